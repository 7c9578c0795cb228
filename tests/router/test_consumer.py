"""A consumer: what it hands to the program, holds for it, gives back, and does while the broker is away."""

import asyncio
import gc
from contextlib import aclosing, suppress

import msgspec
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from router import BadMessage, Event, Unavailable
from router.brokers.base import Bounds, Origin
from router.brokers.queue import MemoryInbox
from router.consumer import Consumer
from router.testing import Clock
from router.tracing import Tracing

IDLE = 60.0
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Said(Event, frozen=True, tag="said"):
    text: str


def read(payload):
    try:
        return msgspec.json.decode(payload, type=Said)
    except msgspec.ValidationError:
        raise BadMessage("Expected `str` - at `$.text`") from None


class Inbox(MemoryInbox):
    """One whose broker can be away, and that says what it was asked."""

    def __init__(self, clock):
        super().__init__(Bounds(), clock)
        self.away = False
        self.asked = []

    async def _ask(self, what, method, *arguments, **named):
        self.asked.append((what, arguments))
        if self.away:
            await asyncio.sleep(0)
            raise Unavailable("the broker cannot be reached: ConnectionError")
        return await method(*arguments, **named)

    async def take(self, *arguments):
        return await self._ask("take", super().take, *arguments)

    async def done(self, *taken):
        if taken:
            await self._ask("done", super().done, *taken)

    async def hold(self, *taken):
        return await self._ask("hold", super().hold, *taken) if taken else []

    async def give_back(self, *taken, idle):
        if taken:
            await self._ask("give_back", super().give_back, *taken, idle=idle)

    async def reclaim(self, *arguments, **named):
        return await self._ask("reclaim", super().reclaim, *arguments, **named)

    async def heard(self, what, count=1):
        """Wait until it was asked `what` so many times more."""
        count += sum(asked == what for asked, _ in self.asked)
        await until(lambda: sum(asked == what for asked, _ in self.asked) >= count)

    async def left(self, idle=IDLE):
        """What nobody holds, as another would take it over."""
        return [taken.payload for taken in await super().reclaim(("said",), "g", "z", idle=idle, tries=99, count=99)]


async def until(holds):
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.001)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def inbox(clock):
    return Inbox(clock)


def consumer(inbox, clock, **options):
    return Consumer(inbox, read, ["said"], "g", clock=clock, **{"idle": IDLE, **options})


async def put(inbox, *texts):
    for text in texts:
        origin = Origin(project="p", user="ada", session="s", at=7.0, id=f"id-{text}", traceparent=TRACE)
        await inbox.put("said", origin, msgspec.json.encode(Said(text=text)))


async def test_a_message_is_typed_and_says_who_sent_it(inbox, clock):
    await put(inbox, "a")
    async with aclosing(aiter(consumer(inbox, clock))) as messages:
        message = await anext(messages)
    assert message.event == Said(text="a")
    assert (message.project, message.user, message.session, message.at) == ("p", "ada", "s", 7.0)
    assert (message.id, message.tries, message.traceparent) == ("id-a", 1, TRACE)


async def test_the_end_of_its_block_acknowledges_a_message(inbox, clock):
    await put(inbox, "a", "b")
    seen = []
    async for message in consumer(inbox, clock):
        async with message:
            seen.append(message.event.text)
            assert len(await inbox.left(idle=0.0)) == 1
        if len(seen) == 2:
            break
    assert seen == ["a", "b"]
    assert await inbox.left(idle=0.0) == []


async def test_a_block_that_raises_gives_the_message_back_and_lets_the_error_through(inbox, clock):
    await put(inbox, "a")
    async with aclosing(aiter(consumer(inbox, clock, pause=1.0))) as messages:
        for tries, pause in enumerate((1.0, 2.0, 4.0, 8.0), 1):
            message = await anext(messages)
            assert message.tries == tries
            with pytest.raises(ZeroDivisionError):
                async with message:
                    _ = 1 / 0
            clock.move(pause - 0.01)
            assert await inbox.left() == []
            clock.move(0.03)


async def test_a_message_that_fails_each_time_is_a_dead_letter_and_others_go_on(inbox, clock):
    await put(inbox, "bad", "good")
    seen = []
    async for message in consumer(inbox, clock, tries=3, pause=0.0):
        seen.append((message.event.text, message.tries))
        with suppress(ZeroDivisionError):
            async with message:
                _ = 1 / (message.event.text != "bad")
        clock.move(1.0)
        if message.event.text == "good":
            break
    assert seen == [("bad", 1), ("bad", 2), ("bad", 3), ("good", 1)]
    assert [letter.origin.id for letter in await inbox.dead("said")] == ["id-bad"]


async def test_to_acknowledge_or_to_give_back_counts_once(inbox, clock):
    await put(inbox, "a", "b")
    async with aclosing(aiter(consumer(inbox, clock))) as messages:
        a, b = await anext(messages), await anext(messages)
        await a.ack()
        await a.ack()
        await a.give_back()
        await b.give_back()
        await b.ack()
        assert [what for what, _ in inbox.asked if what in ("done", "give_back")] == ["done", "give_back"]
    async with aclosing(aiter(consumer(inbox, clock))) as messages:
        clock.move(2.0)
        async with await anext(messages) as again:
            await again.ack()
        assert again.event.text == "b"
    assert await inbox.left(idle=0.0) == []


async def test_one_beat_holds_all_that_is_in_hand_however_long_it_takes(inbox, clock):
    await put(inbox, "a", "b", "c")
    async with aclosing(aiter(consumer(inbox, clock, idle=0.03))) as messages:
        a, b, c = [await anext(messages) for _ in range(3)]
        await b.ack()
        clock.move(1000.0)
        await inbox.heard("hold")
        assert await inbox.left(idle=0.03) == []
        held = [[taken.origin.id for taken in arguments] for what, arguments in inbox.asked if what == "hold"]
        assert held[-1] == ["id-a", "id-c"]
        assert [a.event.text, c.event.text] == ["a", "c"]


async def test_what_the_program_forgets_comes_again(inbox, clock):
    await put(inbox, "a", "b")
    async with aclosing(aiter(consumer(inbox, clock))) as messages:
        message = await anext(messages)
        message = await anext(messages)
        gc.collect()
        clock.move(IDLE)
        again = await anext(messages)
        assert (message.event.text, again.event.text, again.tries) == ("b", "a", 2)


async def test_one_is_never_handed_what_it_has_in_hand_itself(inbox, clock):
    await put(inbox, "a", "b")
    async with aclosing(aiter(consumer(inbox, clock))) as messages:
        first = await anext(messages)
        clock.move(10 * IDLE)
        second = await anext(messages)
        assert (first.event.text, second.event.text, second.tries) == ("a", "b", 1)
    assert [what for what, _ in inbox.asked].count("reclaim") == 2


async def test_leaving_the_loop_gives_back_what_is_not_acknowledged(inbox, clock):
    await put(inbox, "a", "b", "c")
    async for message in consumer(inbox, clock, ahead=3):
        await message.ack()
        break
    await inbox.heard("give_back", 0 if inbox.asked[-1][0] == "give_back" else 1)
    assert await inbox.left() == [b'{"type":"said","text":"b"}', b'{"type":"said","text":"c"}']


async def test_closing_ends_the_iteration_wherever_it_is(inbox, clock):
    await put(inbox, "a")
    closing, seen = consumer(inbox, clock), []

    async def work():
        async for message in closing:
            seen.append(message)

    working = asyncio.create_task(work())
    await until(lambda: seen)
    await asyncio.gather(closing.aclose(), closing.aclose())
    assert len(await inbox.left()) == 1
    await put(inbox, "b")
    await working
    assert len(seen) == 1
    assert await inbox.left() == [b'{"type":"said","text":"b"}']


async def test_a_cancelled_program_gives_back_what_it_was_at(inbox, clock):
    await put(inbox, "a")
    begun = asyncio.Event()

    async def work():
        async for message in consumer(inbox, clock):
            async with message:
                begun.set()
                await asyncio.Event().wait()

    working = asyncio.create_task(work())
    await begun.wait()
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)
    clock.move(1.0)
    assert len(await inbox.left()) == 1


async def test_what_dead_consumers_left_comes_first_and_all_of_it(inbox, clock):
    await put(inbox, "a", "b", "c")
    await inbox.take(["said"], "g", "dead", 2, 0.0)
    clock.move(IDLE)
    async with aclosing(aiter(consumer(inbox, clock))) as messages:
        found = [await anext(messages) for _ in range(3)]
        assert [(message.event.text, message.tries) for message in found] == [("a", 2), ("b", 2), ("c", 1)]


async def test_what_cannot_be_read_is_a_dead_letter_with_the_reason_and_not_in_a_log(inbox, clock, caplog):
    await inbox.put("said", Origin(id="1"), b'{"type": "said", "text": 17}')
    await inbox.put("said", Origin(id="2"), b"secret")
    await put(inbox, "a")
    async with aclosing(aiter(consumer(inbox, clock))) as messages:
        assert (await anext(messages)).event.text == "a"
    assert [(letter.origin.id, letter.reason) for letter in await inbox.dead("said")] == [
        ("1", "it cannot be read: Expected `str` - at `$.text`"),
        ("2", "it cannot be read: DecodeError while it was read"),
    ]
    assert [record.event for record in caplog.records] == ["dead_letter", "dead_letter"]
    assert "secret" not in caplog.text


async def test_while_the_broker_is_away_it_waits_says_so_once_and_goes_on(inbox, clock, caplog):
    caplog.set_level("INFO", "router")
    inbox.away = True
    async with aclosing(aiter(consumer(inbox, clock))) as messages:
        waiting = asyncio.create_task(anext(messages))
        await inbox.heard("take", 2)
        await put(inbox, "a")
        inbox.away = False
        assert (await waiting).event.text == "a"
    assert [record.event for record in caplog.records] == ["inbox_away", "inbox_found"]


async def test_what_is_acknowledged_while_the_broker_is_away_is_told_when_it_is_back(inbox, clock):
    await put(inbox, "a", "b")
    async with aclosing(aiter(consumer(inbox, clock))) as messages:
        a = await anext(messages)
        inbox.away = True
        await a.ack()
        clock.move(2 * IDLE)
        inbox.away = False
        assert (await anext(messages)).event.text == "b"
        assert await inbox.left(idle=1.0) == []


async def test_after_the_broker_was_away_others_may_tell_first_that_they_are_alive(inbox, clock):
    await put(inbox, "a", "b")
    (theirs,) = await inbox.take(["said"], "g", "other", 1, 0.0)
    async with aclosing(aiter(consumer(inbox, clock, tries=9))) as messages:
        inbox.away = True
        waiting = asyncio.create_task(anext(messages))
        await inbox.heard("reclaim")
        clock.move(2 * IDLE)
        await inbox.heard("take")
        inbox.away = False
        assert (await waiting).event.text == "b"
        await put(inbox, "c")
        assert (await anext(messages)).event.text == "c"
        await inbox.hold(theirs)
        clock.move(IDLE / 2)
        waiting = asyncio.create_task(anext(messages))
        await inbox.heard("reclaim")
        await put(inbox, "d")
        assert (await waiting).event.text == "d"


async def test_one_that_is_acknowledged_while_the_beat_is_under_way_was_not_taken_over(inbox, clock, caplog):
    await put(inbox, "a", "b")
    async with aclosing(aiter(consumer(inbox, clock, idle=0.03))) as messages:
        a, _b = [await anext(messages) for _ in range(2)]
        hold = inbox.hold

        async def slowly(*taken):
            inbox.hold = hold
            await a.ack()
            return await hold(*taken)

        inbox.hold = slowly
        await inbox.heard("hold", 2)
    assert not caplog.records


async def test_a_beat_that_fails_is_told_and_the_next_one_comes(inbox, clock, caplog):
    await put(inbox, "a")
    async with aclosing(aiter(consumer(inbox, clock, idle=0.03))) as messages:
        _a = await anext(messages)
        inbox.hold, hold = (lambda *_: 1 / 0), inbox.hold
        await until(lambda: caplog.records)
        inbox.hold = hold
        await inbox.heard("hold")
    assert {record.event for record in caplog.records} == {"holding_failed"}


async def test_one_that_was_taken_over_is_named_in_the_log_and_its_acknowledgement_counts(inbox, clock, caplog):
    await put(inbox, "a")
    async with aclosing(aiter(consumer(inbox, clock, idle=0.03))) as messages:
        a = await anext(messages)
        assert len(await inbox.left(idle=0.0)) == 1
        await until(lambda: caplog.records)
        (record,) = caplog.records
        assert (record.event, record.message_id) == ("taken_over", "id-a")
        await a.ack()
        assert await inbox.left(idle=0.0) == []


async def test_work_on_a_message_is_a_span_in_the_senders_trace(inbox, clock):
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    await put(inbox, "secret")
    async with (
        aclosing(aiter(consumer(inbox, clock, tracing=Tracing(provider)))) as messages,
        await anext(messages) as a,
    ):
        with provider.get_tracer("mine").start_as_current_span("mine"):
            pass
    mine, ours = exporter.get_finished_spans()
    assert (ours.name, ours.kind.name) == ("consume said", "CONSUMER")
    assert ours.parent.span_id == int(TRACE.split("-")[2], 16)
    assert mine.parent.span_id == ours.context.span_id == int(a.traceparent.split("-")[2], 16)
    assert "secret" not in ours.to_json().replace("id-secret", "")
    assert ours.attributes["messaging.consumer.group.name"] == "g"


async def test_it_is_iterated_once(inbox, clock):
    one = consumer(inbox, clock)
    await one.aclose()
    with pytest.raises(RuntimeError, match="iterated once"):
        await anext(aiter(one))


def test_it_must_be_told_what_to_take(inbox, clock):
    with pytest.raises(ValueError, match="types"):
        Consumer(inbox, read, [], "g")
