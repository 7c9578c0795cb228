"""Finds the fenced blocks of a page, and tells whether commands in them are ones that there are."""

import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import click
from msgspec import Struct

from router.cli import cli
from tests.docs.generate import ROOT

__all__ = ["DOCUMENTS", "ENVIRONMENT", "Block", "blocks", "check_command", "commands"]

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

BIN = Path(sys.executable).parent
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith("ROUTER_")},
    "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
}
"""What a reader's shell has: `router` on its path, and no settings of whoever runs the tests."""

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[a-z]*)\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)

OTHERS = frozenset({"export", "cd", "mkdir", "openssl", "grep", "kill", "ulimit"})
"""Commands of the reader's machine that pages use, and that tests leave alone."""


class Block(Struct, frozen=True):
    """One fenced block."""

    path: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}"


def blocks(path: Path, language: str | None = None) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    page = path.read_text(encoding="utf-8")
    for found in _FENCE.finditer(page):
        if language is None or found["language"] == language:
            yield Block(path, page.count("\n", 0, found.start()) + 1, found["language"], found["text"])


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each command in a shell block: comments and variables before the command are left out."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(re.sub(r"\$\(.*?\)", "SUBSTITUTED", line), comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):
            words.pop(0)
        if words:
            yield words


def check_command(words: list[str]) -> None:
    """Raise where a reader who typed this would be told that there is no such thing."""
    match words:
        case ["router", *rest]:
            parse(rest)
        case ["make", *targets]:
            makefile = (ROOT / "Makefile").read_text()
            assert targets, "name a target"
            for target in targets:
                assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"the Makefile has no target {target}"
        case ["python", "-m", module, *_]:
            assert (ROOT / f"{module.replace('.', '/')}.py").exists() or (ROOT / module.replace(".", "/")).is_dir()
        case ["curl", *_]:
            assert any("$ROUTER_URL/" in word for word in words), "curl asks the router at $ROUTER_URL"
        case ["redis-cli", "PUBLISH", channel, event]:
            assert channel.startswith("project:")
            assert json.loads(event)["type"]
        case ["pip", "install", wanted]:
            extra = wanted.partition("[")[2].rstrip("]")
            assert not extra or re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        case [other, *_]:
            assert other in OTHERS, f"{other} is no command that tests/docs/blocks.py knows"


def parse(arguments: list[str]) -> None:
    """Read the arguments of `router` as the command line would. Runs nothing."""
    name, *rest = arguments
    if name.startswith("--"):
        assert name in {option for parameter in cli.params for option in parameter.opts} | {"--help"}
        return
    command = cli.commands[name]
    # A token comes from the environment there; here any word will do.
    extra = ["--token", "T"] if any("--token" in parameter.opts for parameter in command.params) else []
    command.make_context(name, [*rest, *extra], parent=click.Context(cli)).close()
