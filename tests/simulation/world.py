"""One world from its plan: what runs on which host, what befalls it, and what came of it."""

import asyncio
import gc
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from tests.checker import Ledger, Publication, Violation, judge
from tests.checker.client import Opened, Resync, Shown, Told, Welcome
from tests.checker.ledger import marks
from tests.simulation import network, seam
from tests.simulation.client import Viewer
from tests.simulation.http import Caller
from tests.simulation.loop import Loop, Stuck
from tests.simulation.node import Node, Refused, Unavailable, make_backend, make_token, on_host
from tests.simulation.redis import RedisServer
from tests.simulation.schedule import Plan, Step

__all__ = ["Outcome", "run"]

SETTLE = 40.0
"""Seconds after the last fault within which all must be right: the slowest of the router's own checks, and some."""
TRIES = 6


@dataclass(slots=True)
class Outcome:
    """How a world went."""

    violations: list[Violation] = field(default_factory=list)
    reached: Counter[str] = field(default_factory=Counter)
    trace: int = 0
    turns: int = 0
    complaints: list[str] = field(default_factory=list)
    crash: str = ""


def run(plan: Plan, tell: Callable[[str], None] | None = None) -> Outcome:
    """Live through `plan`. `tell` is given a line for whatever happens."""
    gc.disable()
    seam.reseed(plan.seed)
    loop = Loop(plan.seed)
    network.WINDOW = plan.window
    loop.network.pace = plan.pace
    asyncio.set_event_loop(loop)
    outcome = Outcome()
    try:
        world = _World(loop, plan, tell)
        try:
            loop.run_until_complete(world.live())
        except Stuck as stuck:
            world.violations.append(Violation("stuck", "world", "", str(stuck), loop.now))
        outcome.violations = world.violations
        outcome.reached = world.reached()
        outcome.trace, outcome.turns, outcome.complaints = loop.network.trace, loop.turns, loop.complaints
    finally:
        asyncio.set_event_loop(None)
        seam.set_loop(lambda: 0.0)
        loop._ready.clear()
        loop._scheduled.clear()
        loop.close()
    return outcome


class _World:
    def __init__(self, loop: Loop, plan: Plan, tell: Callable[[str], None] | None) -> None:
        self.loop = loop
        self.plan = plan
        self.chance = Random(f"world {plan.seed}")
        self.ledger = Ledger()
        self.violations: list[Violation] = []
        self.nodes: dict[str, Node] = {}
        self.generation = 0
        self.redis: RedisServer | None = None
        self.tasks: set[Any] = set()
        self.failures: list[BaseException] = []
        self.counts: Counter[str] = Counter()
        self.calm = False
        self._tell = tell
        self.begin = 0.0
        self.viewers: dict[str, Viewer] = {}
        for each in plan.viewers:
            viewer = Viewer(
                loop,
                Random(f"{each['host']} {plan.seed}"),
                each["host"],
                user=each["user"],
                project=each["project"],
                plain=each["plain"],
                nodes=self.up,
                tell=self.tell,
            )
            viewer.first_since = each["since"]
            viewer.acknowledges = each["acks"]
            self.viewers[each["host"]] = viewer
        self.backend: Any = None
        self.callers: list[Caller] = []
        self.started: set[str] = set()

    def tell(self, line: str) -> None:
        if self._tell is not None:
            self._tell(f"{self.loop.now - self.begin:9.4f}  {line}")

    def up(self) -> list[str]:
        return [node.host for node in self.nodes.values() if node.up]

    # -- life

    async def live(self) -> None:
        plan, loop = self.plan, self.loop
        url = "memory://"
        if plan.broker == "redis":
            url = "redis://redis:6379/0"
            self.redis = RedisServer(loop, Random(f"redis {plan.seed}"))
            await on_host("redis", self.redis.start)
        self.settings = {**plan.settings, "broker": url}
        for each in plan.nodes:
            await self._start(each["host"], each)
        if plan.broker == "redis":
            self.backend = await on_host("backend", self._open_backend)
        self.begin = loop.now
        for step in plan.steps:
            await asyncio.sleep(max(0.0, self.begin + step.at - loop.now))
            self.tell(f"-- {step}")
            self._spawn(getattr(self, f"do_{step.what}"), step)
        await asyncio.sleep(max(0.0, self.begin + plan.length - loop.now))
        await self._calm_down()
        while self.tasks:
            await asyncio.sleep(0.1)
        if self.failures:
            raise self.failures[0]
        self.tell("-- all that was going on has ended")
        await asyncio.sleep(SETTLE)
        for viewer in self.viewers.values():
            viewer.check()
        settled = loop.now
        await self._probe()
        for host, viewer in self.viewers.items():
            if host in self.loop.network.filled:
                for note in viewer.model.record:
                    if isinstance(note, Opened):
                        note.prompt = False
        clients = [viewer.model for viewer in self.viewers.values()]
        self.violations += judge(self.ledger, clients, ended=loop.now, settled=settled)
        await self._check_people()
        await self._check_seats()

    async def _open_backend(self) -> Any:
        return make_backend(self.settings["broker"], history_events=self.settings["history_events"], patience=3.0)

    def _spawn(self, work: Callable[..., Awaitable[Any]], *args: Any) -> None:
        task = self.loop.create_task(work(*args))  # type: ignore[arg-type]
        self.tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: Any) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self.failures.append(task.exception())

    async def _start(self, name: str, what: dict[str, Any]) -> None:
        """Start a node; one that cannot (the broker is away) is tried again, as a supervisor does."""
        while True:
            self.generation += 1
            host = f"{name}.{self.generation}"
            node = Node(host, newer=what["newer"] or self.calm, ours=what["ours"], **self.settings)
            try:
                await on_host(host, node.start)
            except Exception as error:
                self.tell(f"{host} cannot start: {error!r}")
                self.counts["a node could not start"] += 1
                await asyncio.sleep(0.5)
                continue
            self.nodes[name] = node
            self.tell(f"{host} is up")
            return

    async def _calm_down(self) -> None:
        """Faults stop: everything that was taken away is there again, and of the newest version."""
        self.calm = True
        self.tell("-- faults stop")
        if self.redis is not None:
            self.redis.flaky = {}
            while not self.redis.up:
                await asyncio.sleep(0.05)
            self.redis.memory.refuse("")
        for each in self.plan.nodes:
            if not each["newer"]:
                await self._replace(each["host"], kill=False, pause=0.1)
        for viewer in self.viewers.values():
            viewer.wake()
            viewer.read(True)

    # -- at the end

    async def _probe(self) -> None:
        """Say something in each topic; whoever is there must hear it."""
        topics = {topic for viewer in self.viewers.values() for topic in viewer.model.names.values()}
        for topic in sorted(topics):
            said = self.ledger.ask(
                topic, "notification", "now", key=f"probe.{topic.replace(':', '.')}", at=self.loop.now, probe=True
            )
            event = {"type": "notification", "level": "info", "title": said.mark}
            await self._publish([said], [event], "http")
        await asyncio.sleep(5.0)

    async def _check_people(self) -> None:
        """Who is believed to be here is who is here."""
        projects: dict[str, Counter[str]] = {}
        for host, viewer in self.viewers.items():
            if host in self.started:
                if not viewer.there:
                    self._violate("away", viewer, f"cannot connect; was refused with {viewer.refused[-5:]}")
                projects.setdefault(viewer.project, Counter())[viewer.model.user] += 1
        for viewer in self.viewers.values():
            if viewer.there and not viewer.model.plain:
                people = {user: person["connections"] for user, person in viewer.model.people.items()}
                if people != projects[viewer.project]:
                    slow = any(isinstance(note, Opened) and not note.prompt for note in viewer.model.record)
                    self._violate(
                        "stale" if slow else "presence",
                        viewer,
                        f"believes {people}, and here are {dict(projects[viewer.project])}",
                    )
        for project, truth in projects.items():
            for node in self.nodes.values():
                caller = Caller(make_token("backend", project, ("view",)))
                try:
                    _, answer = await caller.ask(node.host, "GET", f"/projects/{project}/presence")
                    people = {user["user_id"]: user["connections"] for user in answer["users"]}
                except (OSError, TimeoutError, TypeError, KeyError) as error:
                    people = {"?": repr(error)}
                if people != truth:
                    what = f"GET presence says {people}, and here are {dict(truth)}"
                    self.violations.append(Violation("presence", node.host, f"project:{project}", what, self.loop.now))

    async def _check_seats(self) -> None:
        """All leave; after that a person can have all ten places again."""
        for viewer in self.viewers.values():
            viewer.sleep(politely=True)
        await asyncio.sleep(8.0)
        for user in sorted({viewer.model.user for viewer in self.viewers.values()}):
            crowd = []
            for number in range(10):
                viewer = Viewer(
                    self.loop,
                    Random(f"seat {user} {number} {self.plan.seed}"),
                    f"seat-{user}-{number}",
                    user=user,
                    project="p1",
                    plain=False,
                    nodes=self.up,
                    tell=self.tell,
                )
                viewer.start()
                crowd.append(viewer)
            await asyncio.sleep(8.0)
            refused = [code for viewer in crowd for code in viewer.refused]
            there = sum(viewer.there for viewer in crowd)
            if refused or there < 10:
                what = f"{there} of 10 places of {user} are free; refused with {refused[:10]}"
                self.violations.append(Violation("seat", user, "", what, self.loop.now))
            for viewer in crowd:
                viewer.sleep(politely=True)
            await asyncio.sleep(1.0)

    def _violate(self, kind: str, viewer: Viewer, what: str) -> None:
        topic = f"project:{viewer.project}"
        self.violations.append(Violation(kind, viewer.host, topic, what, self.loop.now))

    def reached(self) -> Counter[str]:
        """What happened at least once, so that a green run is not an empty one."""
        found = Counter(self.counts)
        found.update(self.loop.network.counts)
        if self.redis is not None:
            found.update(self.redis.counts)
        for viewer in self.viewers.values():
            found["a redelivery"] += viewer.redelivered
            found["a move within a window"] += viewer.moves_in_a_window
            for note in viewer.model.record:
                if isinstance(note, Welcome):
                    found[f"recovered: {str(note.recovered).lower()}"] += 1
                elif isinstance(note, Resync):
                    found["a resync"] += 1
                elif isinstance(note, Shown):
                    found["a merged event"] += len(marks(note.event)) > 1
                elif isinstance(note, Told):
                    found[f"told {note.frame['type']}"] += 1
        for each in self.ledger.publications:
            found[f"publications {each.outcome}"] += 1
        return +found

    # -- publishing

    async def _publish(self, said: list[Publication], events: list[dict[str, Any]], way: str) -> None:
        """Publish, and try again with the same message id, as the documents advise."""
        topic, id_ = said[0].topic, f"id-{said[0].order}"
        outcome: Any = "unknown"
        for attempt in range(TRIES):
            if attempt:
                for each in said:
                    each.identified = each.way != "passing"
                await asyncio.sleep(self.chance.uniform(0.05, 0.4))
            answered = (
                await self._try_backend(topic, events, id_)
                if way == "backend"
                else await self._try_http(topic, events, id_)
            )
            if answered is not None:
                # Another node, which may lack the type, refuses what an earlier try may have published elsewhere.
                outcome = "unknown" if answered == "refused" and attempt else answered
                break
        for each in said:
            each.told(self.loop.now, outcome)
            if outcome != "published":
                self.tell(f"publisher: {each.mark} is {outcome}")

    async def _try_backend(self, topic: str, events: list[dict[str, Any]], id_: str) -> str | None:
        from json import dumps

        kind, _, name = topic.partition(":")
        raw = [dumps(event, ensure_ascii=False) for event in events]

        async def publish() -> str | None:
            try:
                if kind == "project":
                    await self.backend.publish_json(name, *raw, message_id=id_)
                return "published"
            except Unavailable:
                return None
            except Refused:
                return "refused"

        return await on_host("backend", publish)

    async def _try_http(self, topic: str, events: list[dict[str, Any]], id_: str) -> str | None:
        kind, _, name = topic.partition(":")
        path = {"project": f"/projects/{name}/events", "user": f"/users/{name}/events", "all": "/events"}[kind]
        hosts = [node.host for node in self.nodes.values()]
        host = self.chance.choice(hosts)
        body: Any = events[0] if len(events) == 1 else events

        caller = self.callers.pop() if self.callers else Caller(make_token("backend", "*", ("publish",)), 4.0)

        async def publish() -> str | None:
            try:
                status, answer = await caller.ask(host, "POST", path, body, {"Idempotency-Key": id_})
            except (OSError, TimeoutError):
                return None
            self.callers.append(caller)
            if status == 202:
                return "published"
            self.tell(f"publisher: {status} {answer}")
            return "refused" if status in (400, 401, 403, 404, 413) else None

        return await on_host("backend", publish)

    def _project(self, step: Step) -> str:
        return f"project:{step.more.get('project', 'p1')}"

    async def _say(
        self, step: Step, make: Callable[[str, int], dict[str, Any]], kind: str, way: Any, **more: Any
    ) -> None:
        """`count` events of one key, one after the other."""
        name = step.more["name"]
        for number in range(step.more["count"]):
            said = self.ledger.ask(
                self._project(step), kind, way, key=f"{kind}.{name}", at=self.loop.now, line=name, **more
            )
            await self._publish([said], [make(said.mark, number)], step.more.get("way", "http"))
            await asyncio.sleep(step.more.get("gap", 0.0))

    async def do_stream(self, step: Step) -> None:
        more = step.more
        each, made = more.get("each", 1), 0
        while made < more["pieces"]:
            said = [
                self.ledger.ask(
                    self._project(step), "chat_response_chunk", "append", key=f"text.{more['name']}", at=self.loop.now
                )
                for _ in range(min(each, more["pieces"] - made))
            ]
            made += len(said)
            ends = more.get("ends", True) and made >= more["pieces"]
            events = [
                {
                    "type": "chat_response_chunk",
                    "content": one.mark,
                    "is_complete": ends and one is said[-1],
                    "stream_id": more["name"],
                    "index": one.number,
                }
                for one in said
            ]
            await self._publish(said, events, more["way"])
            if made == more.get("pause_after"):
                await asyncio.sleep(more["pause"])
            await asyncio.sleep(more["gap"])

    async def do_progress(self, step: Step) -> None:
        name, way, topic = step.more["name"], step.more["way"], self._project(step)
        for start in range(step.more.get("starts", 1)):
            if start:
                await asyncio.sleep(step.more["pause"])
            said = self.ledger.ask(topic, "step_started", "now", key=f"started.{name}", at=self.loop.now, about=name)
            await self._publish([said], [{"type": "step_started", "step_id": name, "timestamp": said.mark}], way)
            for number in range(step.more["count"]):
                said = self.ledger.ask(
                    topic, "step_progress", "latest", key=f"progress.{name}", at=self.loop.now, about=name
                )
                event = {
                    "type": "step_progress",
                    "step_id": name,
                    "progress": number / 100,
                    "message": said.mark,
                }
                await self._publish([said], [event], way)
                await asyncio.sleep(step.more["gap"])
        if step.more.get("ends", True):
            said = self.ledger.ask(
                topic,
                "step_completed",
                "now",
                key=f"completed.{name}",
                at=self.loop.now,
                about=name,
                settles=f"progress.{name}",
            )
            event = {"type": "step_completed", "step_id": name, "result": {"mark": said.mark}, "timestamp": "t"}
            await self._publish([said], [event], way)

    async def do_changes(self, step: Step) -> None:
        name = step.more["name"]
        await self._say(
            step,
            lambda mark, _: {
                "type": "project_modified",
                "user_id": name,
                "changes": {"steps_added": [mark]},
                "timestamp": "t",
            },
            "project_modified",
            "merge",
        )

    async def do_tally(self, step: Step) -> None:
        name = step.more["name"]
        await self._say(
            step, lambda mark, _: {"type": "sim_tally", "what": name, "entries": [mark]}, "sim_tally", "merge"
        )

    async def do_burst(self, step: Step) -> None:
        """Many keys twice, each time in one go and in another order: all that waits was joined from two."""
        names = [f"{step.more['name']}.{number}" for number in range(step.more["keys"])]
        await self._tallies(step, names[:1])  # it opens the window, in which the others wait
        for _ in range(2):
            for start in range(0, len(names), 50):
                await self._tallies(step, names[start : start + 50])
            await asyncio.sleep(step.more["gap"])
            self.chance.shuffle(names)

    async def _tallies(self, step: Step, names: list[str]) -> None:
        topic = self._project(step)
        said = [self.ledger.ask(topic, "sim_tally", "merge", key=f"tally.{n}", at=self.loop.now) for n in names]
        events = [
            {"type": "sim_tally", "what": name, "entries": [each.mark + "x" * step.more["size"]]}
            for name, each in zip(names, said, strict=True)
        ]
        await self._publish(said, events, step.more["way"])

    async def do_chat(self, step: Step) -> None:
        pad = "x" * step.more.get("size", 0)
        await self._say(
            step,
            lambda mark, _: {"type": "chat_message", "role": "assistant", "content": mark + pad, "timestamp": "t"},
            "chat_message",
            "now",
        )

    async def do_novel(self, step: Step) -> None:
        self.counts["an event that a node cannot read"] += 1
        await self._say(step, lambda mark, _: {"type": "sim_novel", "text": mark}, "sim_novel", "now")

    async def do_cursor(self, step: Step) -> None:
        name = step.more["name"]
        await self._say(
            step, lambda mark, _: {"type": "sim_cursor", "who": name, "text": mark}, "sim_cursor", "passing"
        )

    async def do_critical(self, step: Step) -> None:
        await self._say(
            step,
            lambda mark, number: {
                "type": "notification",
                "level": "alert",
                "title": mark,
                "requires_ack": True,
                "message_id": f"{step.more['name']}-{number}",
            },
            "notification",
            "now",
        )

    async def do_notice(self, step: Step) -> None:
        name, topic = step.more["name"], step.more["to"]
        for _ in range(step.more["count"]):
            said = self.ledger.ask(topic, "notification", "now", key=f"notice.{name}", at=self.loop.now, line=name)
            await self._publish([said], [{"type": "notification", "level": "info", "title": said.mark}], "http")
            await asyncio.sleep(0.02)

    # -- people

    def _viewer(self, step: Step) -> Viewer | None:
        viewer = self.viewers.get(step.more["viewer"])
        return viewer if viewer is not None and step.more["viewer"] in self.started else None

    def _node_host(self, name: str) -> str:
        node = self.nodes.get(name)
        return "" if node is None else node.host

    async def do_open(self, step: Step) -> None:
        self.started.add(step.more["viewer"])
        self.viewers[step.more["viewer"]].start()

    async def do_move(self, step: Step) -> None:
        if (viewer := self._viewer(step)) is not None:
            viewer.move(self._node_host(step.more["to"]), politely=step.more["politely"])

    async def do_drop(self, step: Step) -> None:
        viewer = self._viewer(step)
        if viewer is not None and viewer.socket is not None and viewer.socket.transport is not None:
            viewer.socket.transport.reset()

    async def do_sleep(self, step: Step) -> None:
        if (viewer := self._viewer(step)) is not None:
            viewer.sleep(politely=step.more["politely"])
            await asyncio.sleep(step.more["seconds"])
            viewer.wake()

    async def do_reload(self, step: Step) -> None:
        if (viewer := self._viewer(step)) is not None:
            if "to" in step.more:
                viewer.wanted = self._node_host(step.more["to"])
            viewer.reload(step.more["since"])

    async def do_slow(self, step: Step) -> None:
        if (viewer := self._viewer(step)) is not None:
            viewer.read(False)
            await asyncio.sleep(step.more["seconds"])
            viewer.read(True)

    async def do_say(self, step: Step) -> None:
        if (viewer := self._viewer(step)) is not None and viewer.there:
            topic = f"project:{viewer.project}"
            said = self.ledger.ask(topic, "chat_message", "now", key=f"said.{step.more['name']}", at=self.loop.now)
            viewer.say({"type": "chat_message", "role": "user", "content": said.mark})

    async def do_status(self, step: Step) -> None:
        if (viewer := self._viewer(step)) is not None:
            viewer.say({"type": "presence_update", "status": step.more["name"]})

    # -- faults

    async def do_flaky(self, step: Step) -> None:
        if self.redis is not None and not self.calm:
            self.redis.flaky = dict(step.more["kinds"])
            await asyncio.sleep(step.more["seconds"])
            self.redis.flaky = {}

    async def do_snapshot(self, step: Step) -> None:
        if self.redis is not None:
            self.redis.remember()

    async def do_outage(self, step: Step) -> None:
        if self.redis is None or self.calm or not self.redis.up:
            return
        self.redis.stop()
        await asyncio.sleep(step.more["seconds"])
        back = step.more["back"]
        if back != "everything":
            self.ledger.forgotten.append(self.loop.now)
        await on_host("redis", lambda: self.redis.restart(back))  # type: ignore[union-attr]
        self.tell(f"redis is back with {back}")

    async def do_flush(self, step: Step) -> None:
        if self.redis is not None and not self.calm:
            self.ledger.forgotten.append(self.loop.now)
            self.counts["a flush"] += 1
            self.redis.flush()

    async def do_pubsub(self, step: Step) -> None:
        if self.redis is not None and not self.calm:
            self.redis.kill_pubsub()

    async def do_cut(self, step: Step) -> None:
        if self.redis is not None and not self.calm:
            self.redis.kill_some(step.more["share"])

    async def do_refuse(self, step: Step) -> None:
        if self.redis is not None and not self.calm:
            self.redis.memory.refuse(step.more["how"])
            self.counts[f"redis said {step.more['how']}"] += 1
            await asyncio.sleep(step.more["seconds"])
            self.redis.memory.refuse("")

    async def do_kill(self, step: Step) -> None:
        if not self.calm:
            await self._replace(step.more["node"], kill=True, pause=step.more["seconds"])

    async def do_drain(self, step: Step) -> None:
        if not self.calm:
            await self._replace(step.more["node"], kill=False, pause=step.more["seconds"])

    async def do_renew(self, step: Step) -> None:
        """All nodes are started anew, one after the other."""
        for name in list(self.nodes):
            await self._replace(name, kill=False, pause=0.0)

    async def _replace(self, name: str, *, kill: bool, pause: float) -> None:
        node = self.nodes.get(name)
        if node is None or not node.up:
            return
        what = {"newer": node.newer, "ours": node.ours}
        if kill:
            node.up = False
            self.loop.kill(node.host)
            self.counts["a node was killed"] += 1
        else:
            self.counts["a node was stopped"] += 1
            await on_host(node.host, node.stop)
            self.loop.kill(node.host)
        await asyncio.sleep(pause)
        await self._start(name, what)

    async def do_hole(self, step: Step) -> None:
        if not self.calm:
            host = self._node_host(step.more["one"]) or step.more["one"]
            self.loop.network.hole(host, step.more["other"], self.loop.now + step.more["seconds"])
            self.counts["a black hole"] += 1

    async def do_clock(self, step: Step) -> None:
        host = step.more["host"]
        seam.offsets[self._node_host(host) or host] = step.more["seconds"]
        self.counts["a wrong clock"] += 1
