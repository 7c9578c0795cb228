"""Backends that publish through Redis: typed, in batches, patient while it is away, from code that awaits or not."""

import asyncio
import json
import subprocess
import sys
import threading
import time

import pytest
from opentelemetry.sdk.trace import TracerProvider

from plugins.chat import ChatMessage
from plugins.notification import Notification
from plugins.step import StepProgress, StepStarted
from router.backend import Backend
from router.blocking import SyncBackend, SyncPublisher
from router.errors import BadMessage, SetupError, TooLarge, Unavailable
from router.presence import PresenceLeft
from tests.node import make_token, run_node
from tests.servers import has_tls, run_server


def steps(*names):
    return [StepStarted(step_id=name) for name in names]


async def seen(client, until):
    found = []
    while not found or found[-1] != until:
        found.append((await client.event("step_started"))["step_id"])
    return found


async def test_what_a_backend_publishes_is_numbered_and_reaches_everybody(redis_url):
    async with run_node(broker=redis_url) as node, node.client() as client, Backend(redis_url) as backend:
        assert await backend.publish("p1", *steps("a", "b")) == [1, 2]
        assert await backend.publish_json("p1", '{"type": "step_started", "step_id": "c", "extra": [1]}') == [3]
        assert await seen(client, "b") == ["a", "b"]
        assert await client.event("step_started") == {
            "type": "step_started",
            "step_id": "c",
            "extra": [1],
            "seq": 3,
        }
        note = Notification(level="info", title="hello")
        await backend.publish_to_user("ada", note)
        assert (await client.event("notification"))["topic"] == "user"
        await backend.publish_to_all(note)
        assert (await client.event("notification"))["topic"] == "all"


async def test_a_page_goes_on_from_the_position_that_its_state_was_loaded_after(redis_url):
    async with run_node(broker=redis_url) as node, Backend(redis_url) as backend:
        since = await backend.position("p1")  # of a project that nobody looks at
        await backend.publish("p1", *steps("a"))
        async with node.client(since=since) as client:
            assert client.welcome["recovered"] is True
            assert await seen(client, "a") == ["a"]
        since = await backend.position("p1")
        with SyncBackend(redis_url) as waiting:
            assert await asyncio.to_thread(waiting.position, "p1") == since
        await backend.publish("p1", *steps("b"))
        async with node.client(since=since) as client:
            assert await seen(client, "b") == ["b"]
        with pytest.raises(BadMessage):
            await backend.position("no project")


async def test_a_batch_keeps_its_order_however_large(redis_url):
    async with run_node(broker=redis_url) as node, node.client() as client, Backend(redis_url) as backend:
        names = [str(number) for number in range(700)]
        assert await backend.publish("p1", *steps(*names)) == list(range(1, 701))
        assert await seen(client, "699") == names


async def test_the_same_message_id_is_published_once(redis_url):
    async with run_node(broker=redis_url) as node, node.client() as client, Backend(redis_url) as backend:
        first = await backend.publish("p1", *steps("a", "b"), message_id="job-1")
        assert await backend.publish("p1", *steps("a", "b"), message_id="job-1") == first
        await backend.publish("p1", *steps("c"))
        assert await seen(client, "c") == ["a", "b", "c"]


async def test_a_bad_event_is_told_and_none_of_its_batch_is_published(redis_url):
    async with Backend(redis_url) as backend:
        for bad, error in [
            (Notification(level="info", title="x", message="x" * 300_000), TooLarge),
            (PresenceLeft(user_id="ada"), BadMessage),
        ]:
            with pytest.raises(error):
                await backend.publish("p1", *steps("a"), bad)
        for text in ("not json", '{"type": "nobody_knows"}', '{"type": "step_started"}'):
            with pytest.raises(BadMessage):
                await backend.publish_json("p1", '{"type": "step_started", "step_id": "a"}', text)
        assert await backend.publish("p1", *steps("b")) == [1]


async def test_the_trace_that_the_backend_is_in_goes_along(redis_url):
    tracer = TracerProvider().get_tracer("test")
    async with run_node(broker=redis_url) as node, Backend(redis_url) as backend:
        with tracer.start_as_current_span("work") as span:
            await backend.publish("p1", *steps("a"))
        (kept,) = (await node.router.broker.history("project:p1", 0)).envelopes
        assert f"{span.get_span_context().trace_id:032x}" in kept.traceparent


async def test_a_server_behind_tls_is_reached(program):
    if not has_tls(program):
        pytest.skip("the server program here was built without TLS: rediss:// is NOT tested")
    with run_server(program, access="password", tls=True) as server:
        async with run_node(broker=server.url) as node, node.client() as client, Backend(server.url) as backend:
            await backend.publish("p1", *steps("a"))
            assert await seen(client, "a") == ["a"]


async def test_publishes_wait_in_order_while_redis_is_away(own_server):
    async with run_node(broker=own_server.url) as node, Backend(own_server.url) as backend:
        await backend.publish("p1", *steps("a"))
        own_server.kill()
        waiting = [asyncio.create_task(backend.publish("p1", *steps(name))) for name in "bcd"]
        await asyncio.sleep(0.1)
        own_server.start()
        assert await asyncio.gather(*waiting) == [[1], [2], [3]], "a server without a memory begins anew"
        history = await node.router.broker.history("project:p1", 0)
        assert [envelope.event.step_id for envelope in history.envelopes] == ["b", "c", "d"]


async def test_a_publish_whose_answer_was_lost_is_there_once(own_server):
    async with Backend(own_server.url) as backend:
        await backend.publish("p1", *steps("a"))
        own_server.freeze()
        publishing = asyncio.create_task(backend.publish("p1", *steps("b")))
        await asyncio.sleep(0.1)
        for connection in list(backend._link.redis.connection_pool._in_use_connections):
            connection._writer.transport.abort()  # after the request was sent, before it is answered
        own_server.thaw()
        assert await publishing == [2]
        assert await backend.publish("p1", *steps("c")) == [3]


async def test_a_full_waiting_room_is_told_at_once(own_server):
    async with Backend(own_server.url, patience=0.5, room=3) as backend:
        own_server.kill()
        waiting = [asyncio.create_task(backend.publish("p1", *steps("x"))) for _ in range(3)]
        while not backend._scripts._failing:
            await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="3 messages wait"):
            await backend.publish("p1", *steps("y"))
        for outcome in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(outcome, Unavailable)


async def test_code_that_does_not_await_publishes_too_from_many_threads(redis_url):
    async with run_node(broker=redis_url) as node, node.client() as client:

        def work():
            with SyncBackend(redis_url) as backend:
                threads = [threading.Thread(target=backend.publish, args=("p1", *steps(name))) for name in "abcd"]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                backend.publish_json("p1", json.dumps({"type": "step_started", "step_id": "last"}))
                with pytest.raises(TooLarge):
                    backend.publish("p1", StepProgress(step_id="s", progress=0.1, message="x" * 300_000))
            with SyncPublisher(node.url, make_token("backend", "*", ("publish",))) as publisher:
                return publisher.publish("p1", *steps("http"))

        assert await asyncio.to_thread(work) == [6]
        found = await seen(client, "http")
        assert sorted(found[:4]) == list("abcd")
        assert found[4:] == ["last", "http"]


async def test_what_people_send_is_taken_answered_and_acknowledged(redis_url):
    async with run_node(broker=redis_url) as node, node.client() as client, Backend(redis_url) as backend:
        await client.send({"type": "chat_message", "role": "user", "content": "What sells best?"})
        async for message in backend.messages("chat_message", group="answers"):
            async with message:
                assert (message.project, message.user, message.event.content) == ("p1", "ada", "What sells best?")
                await backend.publish(message.project, ChatMessage(role="assistant", content="Engines."))
            break
        said = {(await client.event("chat_message"))["content"] for _ in range(2)}  # the answer may be first
        assert said == {"What sells best?", "Engines."}
        with pytest.raises(BadMessage, match="no message type"):
            backend.messages("nobody_knows")


async def test_what_was_not_acknowledged_is_there_for_others_when_a_backend_closes(redis_url):
    async with run_node(broker=redis_url) as node, node.client() as client:
        await client.send({"type": "chat_message", "role": "user", "content": "hello"})
        for tries in (1, 2, 3):
            async with Backend(redis_url) as backend:
                async for message in backend.messages("chat_message"):
                    assert message.tries == tries
                    break


async def test_code_that_does_not_await_takes_messages_too(redis_url):
    def work():
        with SyncBackend(redis_url) as backend:
            for message in backend.messages("chat_message", tries=1):
                if message.event.content == "bad":
                    with pytest.raises(ZeroDivisionError), message:
                        1 / 0  # noqa: B018
                    continue
                with message:
                    backend.publish(message.project, StepStarted(step_id=message.event.content))
                break
            return backend

    async with run_node(broker=redis_url) as node, node.client() as client:
        for content in ("bad", "good"):
            await client.send({"type": "chat_message", "role": "user", "content": content})
        await asyncio.to_thread(work)
        assert await seen(client, "good") == ["good"]


def test_it_works_after_a_fork(redis_url):
    code = f"""
import os
from plugins.step import StepStarted
from router.blocking import SyncBackend
backend = SyncBackend({redis_url!r})
backend.publish("p1", StepStarted(step_id="parent"))
child = os.fork()
if not child:
    backend.publish("p1", StepStarted(step_id="child"))
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print(backend.publish("p1", StepStarted(step_id="parent again")))
backend.close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert done.stdout.strip() == "[3]", done.stderr


def test_a_backend_needs_no_litestar():
    code = (
        "import sys, router.backend, router.blocking; sys.exit('litestar' in sys.modules or 'uvicorn' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=30, check=False).returncode == 0


def test_what_cannot_be_a_redis_is_told():
    for url in ("memory://", "http://127.0.0.1:8000", "redis+sentinel://127.0.0.1:26379", "redis://x?nonsense=1"):
        with pytest.raises(SetupError):
            Backend(url)


def test_closing_a_sync_backend_frees_the_threads_that_wait_in_it(own_server):
    backend = SyncBackend(own_server.url)
    backend.publish("p1", StepStarted(step_id="s"))
    own_server.kill()
    out = []

    def work():
        try:
            out.append(backend.publish("p1", StepStarted(step_id="s")))
        except BaseException as e:
            out.append(type(e).__name__)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(4)]
    for t in threads:
        t.start()
    time.sleep(0.5)
    backend.close()
    for t in threads:
        t.join(3)
    assert [t.is_alive() for t in threads] == [False] * 4, out
