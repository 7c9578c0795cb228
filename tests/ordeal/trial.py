"""Runs one random ordeal: what its schedule says, until all should be well, and then the checker's verdict.

`python -m tests.ordeal.trial <kind> <seed> <file> [<records>]` does it in this process and writes its row to the file.
"""

import asyncio
import ctypes
import logging
import signal
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any, cast

import httpx
import msgspec
import uvloop

from plugins.chat import ChatResponseChunk
from plugins.notification import Notification
from plugins.project import ProjectModified
from plugins.step import StepCompleted, StepProgress, StepStarted
from router.backend import Backend
from router.errors import Refused
from router.publisher import Publisher
from tests.checker import Ledger, Publication, Violation, judge, marks
from tests.checker.client import Dropped, Opened, Resync, Shown, Told
from tests.node import make_token
from tests.ordeal.content import tell
from tests.ordeal.outcome import COLUMNS, INTO, Row
from tests.ordeal.page import Page
from tests.ordeal.process import SlowBackend
from tests.ordeal.schedule import CALM_AT, END_AT, PROJECTS, Fault, Kind, Schedule, draw
from tests.ordeal.seat import count_leaked
from tests.ordeal.site import Site, project_of, run_site
from tests.servers import find_server
from tests.servers.process import PR_SET_PDEATHSIG

__all__ = ["LIFE", "run"]

BOUND = 20.0
"""Seconds after the last fault within which all must be right."""
PATIENCE = 5.0
"""Seconds that a publish waits for Redis."""
LIFE = 120
"""Seconds after which an ordeal ends in any case."""
LOSSES = frozenset({"flush", "forget", "age", "tear", "fail_over", "fail_over_frozen"})
"""Faults after which Redis may know less than before."""

EVENTS = StepStarted | StepProgress | StepCompleted | ChatResponseChunk | ProjectModified | Notification
Send = Callable[[str, dict[str, Any]], Awaitable[Any]]


async def run(program: str, schedule: Schedule, records: Path | None = None) -> Row:
    """The ordeal of a schedule. `records`: a folder that gets all that people saw and nodes said."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(24))  # whoever waits there holds up nobody
    async with run_site(program, schedule) as site:
        trial = _Trial(schedule, site)
        row = await trial.run()
        if records is not None:
            trial.record(records / f"{schedule.on}-{schedule.seed}")
        return row


class _Trial:
    """One ordeal under way. Times are seconds since it began."""

    def __init__(self, schedule: Schedule, site: Site) -> None:
        self._schedule = schedule
        self._site = site
        self._begin = time.monotonic()
        self._ledger = Ledger()
        self._stack = AsyncExitStack()
        self._sends: list[Send] = []
        self._pages = [Page(person, site, self._ledger, self._now, schedule.seed) for person in schedule.people]
        self._calm = self._told = 0.0
        """When the last fault was over, and when the last story was told."""
        self._late = 0.0
        self._right = BOUND
        self._done: list[str] = []

    def _now(self) -> float:
        return time.monotonic() - self._begin

    async def run(self) -> Row:
        async with self._stack:
            for lane, publisher in enumerate(self._schedule.publishers):
                self._sends.append(await self._publisher(lane, publisher))
            self._begin = time.monotonic()
            living = [asyncio.create_task(page.live()) for page in self._pages]
            living.append(asyncio.create_task(self._watch_machine()))
            try:
                faults = [self._befall(fault) for fault in self._schedule.faults]
                acts = [page.act() for page in self._pages] + [page.chat() for page in self._pages]
                stories = [self._tell(number) for number in range(len(self._schedule.stories))]
                others = asyncio.gather(*acts, *stories)
                await asyncio.gather(*faults)
                await self._until(CALM_AT)
                self._calm = self._now()
                await others
                await self._until(END_AT)
                self._told = self._now()
                violations = await self._settle(living)
                ended = self._now()
                self._hear_chats()
                violations += judge(self._ledger, [page.client for page in self._pages], ended=ended)
            finally:
                for task in living:
                    task.cancel()
                await asyncio.gather(*living, return_exceptions=True)
            violations += [
                Violation("seat", "all", "", what, self._now())
                for what in await count_leaked(self._site, until=self._begin + self._deadline() + 5)
            ]
        return self._row(violations)

    def record(self, folder: Path) -> None:
        """Write down what everybody saw, what was published and done, and what the nodes said."""
        folder.mkdir(parents=True, exist_ok=True)
        for page in self._pages:
            lines = [repr(page.person), *map(repr, page.client.record), *(f"refused {each}" for each in page.refusals)]
            (folder / f"page-{page.client.name}").write_text("\n".join(lines))
        (folder / "published").write_text("\n".join(map(repr, self._ledger.publications)))
        (folder / "done").write_text("\n".join(self._done))
        for number, node in enumerate(self._site.nodes):
            said = sorted(node.said.parent.glob("output*"), key=lambda path: path.stat().st_mtime)
            (folder / f"node-{number}").write_text("\n--\n".join(path.read_text() for path in said))

    async def _until(self, at: float) -> None:
        await asyncio.sleep(max(0.0, at - self._now()))

    # -- publishing

    async def _publisher(self, lane: int, kind: str) -> Send:
        url = self._site.url
        events = int(self._schedule.settings["history_events"])
        if kind == "http":
            publisher = await self._stack.enter_async_context(
                Publisher(self._site.nodes[lane % 2].url, make_token("backend", "*", ("publish",)), timeout=3)
            )
            return lambda place, event: _send(publisher, place, event)
        if kind == "redis":
            backend = await self._stack.enter_async_context(
                Backend(url, patience=PATIENCE, room=10_000, history_events=events)
            )
            return lambda place, event: _send(backend, place, event)
        slow = SlowBackend(url, float(kind.removeprefix("slow:")), str(PATIENCE), str(events))
        await slow.start()
        self._stack.push_async_callback(slow.stop)
        return slow.publish_json

    async def _tell(self, number: int) -> None:
        story = self._schedule.stories[number]
        await self._until(story.at)
        topic = story.target or f"project:{project_of(story.project)}"
        publish = self._publish(self._sends[story.lane])
        eager = self._schedule.eager[story.lane]
        await tell(number, story, topic, self._ledger, publish, self._now, eager=eager, until=END_AT)

    def _publish(self, send: Send) -> Callable[[str, Publication, dict[str, Any]], Awaitable[None]]:
        async def publish(topic: str, said: Publication, event: dict[str, Any]) -> None:
            try:
                await send(topic.removeprefix("project:"), event)
            except Refused:  # for whatever reason: it may have been published all the same
                said.told(self._now(), "unknown")
            else:
                said.told(self._now(), "published")

        return publish

    # -- faults

    async def _befall(self, fault: Fault) -> None:
        await self._until(fault.at)
        if fault.kind in LOSSES:
            self._ledger.forgotten.append(self._now())
        begun = self._now()
        await self._site.befall(fault)
        self._done.append(f"{begun:.3f} to {self._now():.3f}: {fault}")
        if fault.kind in LOSSES:
            self._ledger.forgotten.append(self._now())

    # -- the end

    async def _watch_machine(self) -> None:
        """Note what the machine takes from us: where it is busy with others, nothing is right in time."""
        while True:
            before = self._now()
            await asyncio.sleep(0.1)
            late = self._now() - before - 0.1
            if late > 0.05:
                self._late += late

    def _deadline(self) -> float:
        return max(self._calm + BOUND, self._told + BOUND / 2) + min(BOUND, 2 * self._late)

    async def _settle(self, living: list[asyncio.Task[None]]) -> list[Violation]:
        """Wait until all is right, or until it should be; then say the last word. Returns what is wrong with presence."""
        publish = self._publish(await self._publisher(0, "redis"))
        wrong = ["nobody looked"]
        number = 0
        while self._now() < self._deadline():
            for task in living:
                if task.done():
                    task.result()
            number += 1
            last = await self._say_last(publish, number, probe=False)
            await self._arrive(last, 1.5)
            wrong = await self._presence()
            if not wrong and self._has_all(last):
                self._right = self._now() - self._calm
                break
            await asyncio.sleep(0.3)
        else:
            self._right = self._now() - self._calm
        # Who is not here now for whatever reason is not deaf: `judge` asks those who are.
        await self._arrive(await self._say_last(publish, number + 1, probe=True), 5)
        await asyncio.sleep(1.2)  # what comes twice would come now, and what is held is let go
        found = [Violation("presence", "", "", what, self._now()) for what in wrong]
        for page in self._pages:
            if not page.is_open:
                found.append(
                    Violation("deaf", page.client.name, "", f"is not let in: {page.refusals[-3:]}", self._now())
                )
        return found

    def _hear_chats(self) -> None:
        """Nobody tells a person that what they said was published; but what one is shown all must be."""
        shown = {
            mark
            for page in self._pages
            for note in page.client.record
            if isinstance(note, Shown) and note.event["type"] == "chat_message"
            for mark in marks(note.event)
        }
        for said in self._ledger.publications:
            if said.kind == "chat_message" and said.outcome == "unknown" and (said.key, said.number) in shown:
                said.told(self._now(), "published")

    async def _say_last(self, publish: Any, number: int, *, probe: bool) -> dict[str, str]:
        """Publish one event to each topic that all can hear; marks by topic."""
        said_last = {}
        for topic in [*(f"project:{project_of(project)}" for project in range(PROJECTS)), "all"]:
            key = f"last-{number}-{topic.replace(':', '-')}"
            said = self._ledger.ask(topic, "notification", "now", key=key, at=self._now(), probe=probe)
            event = {"type": "notification", "level": "info", "title": said.mark}
            await publish(topic, said, event)
            if said.outcome == "published":
                said_last[topic] = said.mark
        return said_last

    def _has_all(self, last: dict[str, str]) -> bool:
        """Whether everybody is here and was shown these."""
        return len(last) == PROJECTS + 1 and all(
            page.is_open
            and all(_has(page, mark) for topic, mark in last.items() if topic in page.client.names.values())
            for page in self._pages
        )

    async def _arrive(self, last: dict[str, str], within: float) -> None:
        until = self._now() + within
        while self._now() < until and not self._has_all(last):
            await asyncio.sleep(0.05)

    async def _presence(self) -> list[str]:
        """What both nodes, and the pages, have wrong about who is here."""
        wrong = []
        async with httpx.AsyncClient(trust_env=False) as http:
            for project in range(PROJECTS):
                name = project_of(project)
                pages = [page for page in self._pages if page.project == name]
                expected = Counter(page.person.user for page in pages if page.is_open)
                for number, node in enumerate(self._site.nodes):
                    told: Any = None
                    with suppress(httpx.HTTPError):
                        token = make_token("observer", name)
                        answer = await http.get(
                            f"{node.url}/projects/{name}/presence",
                            headers={"Authorization": f"Bearer {token}"},
                            timeout=3,
                        )
                        told = {each["user_id"]: each["connections"] for each in answer.json()["users"]}
                    if told != expected:
                        wrong.append(f"node {number} says of {name} {_difference(told, expected)}")
                for page in pages:
                    if not page.person.plain:
                        seen = {user: who["connections"] for user, who in page.client.people.items()}
                        if seen != expected:
                            wrong.append(f"{page.client.name} sees in {name} {_difference(seen, expected)}")
        return wrong

    def _row(self, violations: list[Violation]) -> Row:
        counts = Counter(INTO.get(violation.kind, violation.kind) for violation in violations)
        records = [note for page in self._pages for note in page.client.record]
        publications = self._ledger.publications
        return Row(
            seed=self._schedule.seed,
            on=self._schedule.on,
            faults=self._schedule.told(),
            published=sum(each.outcome == "published" for each in publications),
            refused=sum(each.outcome != "published" and each.kind != "chat_message" for each in publications),
            delivered=sum(isinstance(note, Shown) for note in records),
            resyncs=sum(isinstance(note, Resync) for note in records),
            reached={
                "refused chats": sum(
                    each.outcome != "published" and each.kind == "chat_message" for each in publications
                ),
                "chats": sum(each.kind == "chat_message" for each in publications),
                "faults": len(self._schedule.faults),
                "turns": sum(len(person.turns) for person in self._schedule.people),
                "goaway": sum(isinstance(note, Told) and note.frame["type"] == "goaway" for note in records),
                "repeats dropped": sum(isinstance(note, Dropped) for note in records),
                "connections": sum(isinstance(note, Opened) for note in records),
                "refused handshakes": sum(len(page.refusals) for page in self._pages),
                "ms late": int(self._late * 1000),
                "starts": sum(node.starts for node in self._site.nodes),
            },
            counts={column: counts[column] for column in COLUMNS},
            caught_up=self._right,
            violations=[str(violation) for violation in violations],
        )


async def _send(to: Backend | Publisher, place: str, event: dict[str, Any]) -> None:
    made = msgspec.convert(event, EVENTS)
    if place == "all":
        await to.publish_to_all(made)
    elif place.startswith("user:"):
        await to.publish_to_user(place.removeprefix("user:"), made)
    else:
        await to.publish(place, made)


def _has(page: Page, mark: str) -> bool:
    return any(isinstance(note, Shown) and note.event.get("title") == mark for note in reversed(page.client.record))


def _difference(told: dict[str, int] | None, expected: dict[str, int]) -> str:
    if told is None:
        return "nothing"
    people = sorted(told.keys() | expected.keys())
    return ", ".join(
        f"{user}: {told.get(user)} for {expected.get(user)}" for user in people if told.get(user) != expected.get(user)
    )


def main(kind: Kind, seed: int, file: Path, records: Path | None = None) -> None:
    """One ordeal, in this process."""
    signal.alarm(LIFE)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    logging.getLogger("router").setLevel(logging.CRITICAL)
    schedule = draw(seed, kind)
    program = find_server()
    assert program is not None
    try:
        row = uvloop.run(run(program, schedule, records))
    except Exception as error:
        logging.getLogger(__name__).exception("ordeal %s %s", kind, seed)
        row = Row(seed=seed, on=kind, faults=schedule.told(), error=f"{type(error).__name__}: {error}"[:300])
    file.write_bytes(msgspec.json.encode(row))


if __name__ == "__main__":
    main(cast(Kind, sys.argv[1]), int(sys.argv[2]), *map(Path, sys.argv[3:]))
