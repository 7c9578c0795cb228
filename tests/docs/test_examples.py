"""What pages show works in a running node as they say, not only when it is called."""

import asyncio
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.docs.blocks import blocks
from tests.docs.generate import ROOT
from tests.node import make_token, run_node

HOW_TO = ROOT / "docs" / "how-to"


def python(path: Path, which: str) -> str:
    """The one block that says `which`."""
    [found] = [block.text for block in blocks(path, "python") if which in block.text]
    return found


async def test_the_plugin_of_the_readme_shows_cursors_with_names_and_never_from_history(tmp_path: Path) -> None:
    (tmp_path / "cursor.py").write_text(python(ROOT / "README.md", "cursor_moved"))
    async with run_node(plugins=(str(tmp_path),)) as node, node.client() as ada, node.client() as grace:
        for step in ("s1", "s2", "s3"):
            await ada.send({"type": "cursor_moved", "step_id": step, "user_id": "somebody else"})
        for client in (ada, grace):
            seen = await client.events(lambda event: event.get("step_id") == "s3")
            moves = [event for event in seen if event["type"] == "cursor_moved"]
            assert [move["step_id"] for move in moves] == ["s1", "s3"]
            assert {move["user_id"] for move in moves} == {"ada"}
        async with node.client(since="0") as late:
            await node.publish({"type": "step_started", "step_id": "end"})
            seen = await late.events(lambda event: event.get("step_id") == "end")
            assert "cursor_moved" not in [event["type"] for event in seen]


@pytest.fixture
def my_middleware(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module that the page on middleware has its reader write."""
    module = ModuleType("my_middleware")
    for block in blocks(HOW_TO / "write-a-middleware.md", "python"):
        exec(block.text, vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


async def test_the_middleware_of_the_how_to_shortens_results_and_keeps_people_quiet(my_middleware: ModuleType) -> None:
    [block] = blocks(HOW_TO / "write-a-middleware.md", "toml")
    names = tuple(part.strip(' "\n') for part in block.text.partition("[")[2].rstrip("]\n").split(","))
    viewer = make_token("eve", grants=("view", "chat"))
    async with run_node(middleware=names) as node, node.client() as editor, node.client(token=viewer) as eve:
        await node.publish({"type": "step_completed", "step_id": "s1", "result": {"row_count": 1500}})
        assert (await editor.event("step_completed"))["result"] == {"row_count": 1500}
        assert (await eve.event("step_completed"))["result"] == {}
        async with node.client(token=viewer, since="0") as late:
            assert (await late.event("step_completed"))["result"] == {}
        my_middleware.quiet.on = True
        await eve.send({"type": "chat_message", "role": "user", "content": "?", "ref": "r1"})
        error = await eve.event("error")
        assert (error["code"], error["temporary"], error["retry_after"], error["ref"]) == ("quiet", True, 60, "r1")


@pytest.mark.parametrize(("user", "project", "code"), [("ada", "p1", None), ("eve", "p1", 403), ("ada", "p9", 404)])
async def test_the_function_of_the_how_to_decides_who_may_do_what(
    user: str, project: str, code: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("my_access")
    exec(python(HOW_TO / "permissions.md", "def permissions"), vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    token = make_token(user, project="*", grants=("view", "edit"))
    async with run_node(permissions="my_access:permissions") as node:
        if code is None:
            async with node.client(project, token=token) as client:
                assert client.welcome["type"] == "welcome"
        else:
            with pytest.raises(Exception, match=f"HTTP {code}"):
                async with node.client(project, token=token):
                    pass


async def test_the_backend_of_the_how_to_answers_what_people_send(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROUTER_BROKER", redis_url)
    [loop] = blocks(HOW_TO / "consume-what-people-send.md", "py")  # it runs for ever, so not with the others
    [many] = [b for b in blocks(HOW_TO / "consume-what-people-send.md", "python") if "Semaphore" in b.text]
    module = ModuleType("my_backend")
    for text in (loop.text.removesuffix("asyncio.run(main())\n"), many.text):
        exec(text, vars(module))
    async with run_node(broker=redis_url, limit_burst=20) as node, node.client() as ada:
        working = asyncio.create_task(module.main())
        await ada.send({"type": "chat_message", "role": "user", "content": "hello"})
        answers = await ada.events(lambda event: event.get("role") == "assistant")
        assert answers[-1]["content"] == "You said: hello"
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        said: list[object] = []
        monkeypatch.setattr(module, "print", lambda *words: said.append(words), raising=False)
        working = asyncio.create_task(module.work())
        for number in range(12):
            await ada.send({"type": "chat_message", "role": "user", "content": f"{number}"})
            await ada.event("chat_message")
        while len(said) < 12:
            await asyncio.sleep(0.001)
        assert [words[2] for words in said] == [str(number) for number in range(12)]
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
