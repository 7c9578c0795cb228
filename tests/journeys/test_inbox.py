"""From a person's socket to a backend: what a plugin forwards is taken, survives whoever took it, and is answered."""

import asyncio
import sys
from contextlib import asynccontextmanager

import httpx

from plugins.chat import ChatMessage
from router.backend import Backend
from router.brokers.base import Bounds
from router.brokers.link import link_to
from router.brokers.queue import MemoryInbox
from router.brokers.script import Scripts
from router.brokers.stream import RedisInbox
from router.consumer import Consumer
from tests.node import run_node

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

DOOMED = """
import asyncio, sys
from plugins.chat import ChatMessage
from router.brokers.link import link_to
from router.brokers.script import Scripts
from router.brokers.stream import RedisInbox
from router.consumer import Consumer
import msgspec

async def main():
    link = link_to(sys.argv[1])
    inbox = RedisInbox(link.redis, Scripts(link.redis))
    read = msgspec.json.Decoder(ChatMessage).decode
    async for message in Consumer(inbox, read, ["chat_message"], "answers", idle=0.3):
        print(message.event.content, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


def said(content, **fields):
    return {"type": "chat_message", "role": "user", "content": content, **fields}


@asynccontextmanager
async def consuming(node, *kinds, url=None, **options):
    """A consumer over a connection of its own, as a backend has it; with no `url` in the node's process."""
    link = None if url is None else link_to(url)
    inbox = node.router.broker.inbox if link is None else RedisInbox(link.redis, Scripts(link.redis))
    consumer = Consumer(inbox, lambda data: node.router.dispatch.read(data)[0], kinds, "answers", **options)
    try:
        yield consumer
    finally:
        await consumer.aclose()
        if link is not None:
            await link.close()


async def test_what_a_person_says_survives_a_killed_consumer_and_is_answered_by_another(redis_url):
    async with run_node(broker=redis_url) as node, node.client() as ada, Backend(redis_url) as backend:
        doomed = await asyncio.create_subprocess_exec(
            sys.executable, "-c", DOOMED, redis_url, stdout=asyncio.subprocess.PIPE
        )
        await ada.send(said("hello", traceparent=TRACE))
        async with asyncio.timeout(20):
            assert await doomed.stdout.readline() == b"hello\n"
        doomed.kill()
        await doomed.wait()
        async with consuming(node, "chat_message", url=redis_url, idle=0.3) as consumer:
            async for message in consumer:
                async with message:
                    assert (message.event.role, message.event.user_id, message.user) == ("user", "ada", "ada")
                    assert (message.project, message.tries) == ("p1", 2)
                    assert message.traceparent == TRACE
                    await backend.publish(message.project, ChatMessage(role="assistant", content="hello yourself"))
                break
        said_and_answered = await ada.events(lambda event: event.get("role") == "assistant")
        assert [event["content"] for event in said_and_answered if event["type"] == "chat_message"] == [
            "hello",
            "hello yourself",
        ]
        assert await backend._link.redis.xpending("router:{inbox}:messages:chat_message", "answers") == {
            "pending": 0,
            "min": None,
            "max": None,
            "consumers": [],
        }


async def test_small_applications_consume_in_the_routers_own_process(node):
    async with node.client() as ada, consuming(node, "cancel", "chat_message") as consumer:
        await ada.send(said("hello", user_id="root", role="system"))
        await ada.send({"type": "cancel", "step_id": "s1", "user_id": "root"})
        found = []
        async for message in consumer:
            async with message:
                found.append((type(message.event).__name__, message.event.user_id, message.session))
            if len(found) == 2:
                break
        session = ada.welcome["session_id"]
        assert sorted(found) == [("Cancel", "ada", session), ("ChatMessage", "ada", session)]
        async with httpx.AsyncClient(base_url=node.url) as http:
            metrics = (await http.get("/metrics")).text
        assert 'router_forwarded_total{type="chat_message"} 1.0' in metrics
        assert 'router_forwarded_total{type="cancel"} 1.0' in metrics


async def test_what_no_backend_will_get_is_shown_to_nobody_and_its_sender_knows(node):
    inbox = node.router.broker.inbox = MemoryInbox(Bounds(backlog=1))
    await inbox.take(["chat_message"], "answers", "slow", 1, 0.0)
    async with node.client() as ada, node.client() as grace:
        await ada.send(said("first"))
        await ada.send(said("second", ref="r2"))
        error = await ada.event("error")
        assert (error["code"], error["temporary"], error["retry_after"], error["ref"]) == (
            "unavailable",
            True,
            5.0,
            "r2",
        )
        await inbox.done(*await inbox.take(["chat_message"], "answers", "slow", 1, 0.0))
        await ada.send(said("third"))
        seen = await grace.events(lambda event: event.get("content") == "third")
        assert [event["content"] for event in seen if event["type"] == "chat_message"] == ["first", "third"]


async def test_a_consumer_goes_on_by_itself_when_redis_was_away(own_server, caplog):
    async with (
        run_node(broker=own_server.url) as node,
        node.client() as ada,
        consuming(node, "chat_message", url=own_server.url) as consumer,
    ):
        messages = aiter(consumer)
        await ada.send(said("before"))
        async with await anext(messages) as message:
            assert message.event.content == "before"
        waiting = asyncio.create_task(anext(messages))
        own_server.kill()
        while "inbox_away" not in [getattr(record, "event", None) for record in caplog.records]:
            await asyncio.sleep(0.001)
        own_server.start()
        await ada.send(said("after"))
        async with await waiting as message:
            assert message.event.content == "after"
