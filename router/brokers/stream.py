"""The inbox on Redis: a stream for each kind of message, consumer groups, a stream of dead letters beside it."""

import logging
import math
from collections.abc import Sequence
from typing import Any

import msgspec
from redis.exceptions import ResponseError

from router.brokers.base import NEVER_DONE, Bounds, Dead, Inbox, Origin, Taken
from router.brokers.layout import PREFIX
from router.brokers.script import AWAY, Scripts, away

__all__ = ["RedisInbox"]

log = logging.getLogger("router")

BLOCK = 2.0
"""Seconds that the server may wait for a message: less than what its answer may take (link.SOCKET_TIMEOUT)."""
FORGET = 3600.0
"""Seconds after which a consumer is forgotten that has nothing in hand and asks for nothing."""


class RedisInbox(Inbox):
    """Keeps what people send in streams, one for each kind; all of them in one hash slot, so that one command reads many.

    Whatever two consumers could do at the same moment is one script. An entry is removed when all groups have done
    it, which is looked at when the stream has grown, not with each message.
    """

    def __init__(self, redis: Any, scripts: Scripts, bounds: Bounds = Bounds()) -> None:
        self._redis = redis
        self._scripts = scripts
        self._bounds = bounds
        self._full: set[str] = set()

    async def put(self, kind: str, origin: Origin, payload: bytes) -> None:
        text = b"%b\n%b" % (_encoder.encode(origin), payload)
        bounds = self._bounds
        arguments = (origin.id, text, bounds.backlog, bounds.unread, int(bounds.unread_for * 1000))
        behind = await self._scripts.call("forward", (_messages(kind),), arguments)
        if not behind:
            self._full.discard(kind)
            return
        if kind not in self._full:
            self._full.add(kind)
            log.error(
                "no more `%s` is taken in: %s wait for the group `%s`; start its consumers, or end it with XGROUP DESTROY",
                kind,
                f"{bounds.backlog:,}",
                behind.decode(),
                extra={"event": "inbox_full"},
            )
        raise bounds.full(kind)

    async def take(self, kinds: Sequence[str], group: str, consumer: str, count: int, wait: float) -> list[Taken]:
        answer = await self._read(kinds, group, consumer, count, wait)
        if answer is None:  # a first time, or a server that has forgotten everything
            await self._scripts.call("group", tuple(map(_messages, kinds)), (group,))
            answer = await self._read(kinds, group, consumer, count, wait) or {}
        names = {_messages(kind).encode(): kind for kind in kinds}
        taken: list[Taken] = []
        others: list[Taken] = []
        for name, parts in answer.items():
            for id_, fields in (entry for part in parts for entry in part):
                found = _taken(names[name], id_, fields, group, consumer, 1)
                (taken if fields.get(b"g", group.encode()) == group.encode() else others).append(found)
        if others:  # put back for another group
            await self.done(*others)
        return taken

    async def _read(
        self, kinds: Sequence[str], group: str, consumer: str, count: int, wait: float
    ) -> dict[bytes, Any] | None:
        """What XREADGROUP answers; None when there is no such group."""
        streams: dict[Any, Any] = dict.fromkeys(map(_messages, kinds), ">")
        block = max(1, int(min(wait, BLOCK) * 1000)) if wait > 0 else None
        try:
            return await self._redis.xreadgroup(group, consumer, streams, count, block) or {}
        except AWAY as error:
            # UNBLOCKED: the stream was deleted while the server waited for something to come into it.
            if isinstance(error, ResponseError) and str(error).startswith(("NOGROUP", "UNBLOCKED")):
                return None
            await self._scripts.look_again()
            raise away(error) from None

    async def done(self, *taken: Taken) -> None:
        if taken:
            keys, places = _places(taken)
            await self._scripts.call("done", keys, (taken[0].group, *places))

    async def hold(self, *taken: Taken) -> list[Taken]:
        return await self._left_alone(taken, 0.0)

    async def give_back(self, *taken: Taken, idle: float) -> None:
        await self._left_alone(taken, idle)

    async def _left_alone(self, taken: tuple[Taken, ...], idle: float) -> list[Taken]:
        if not taken:
            return []
        keys, places = _places(taken)
        arguments = (taken[0].group, taken[0].consumer, math.ceil(idle * 1000), *places)
        return [taken[place] for place in await self._scripts.call("hold", keys, arguments)]

    async def reclaim(
        self, kinds: Sequence[str], group: str, consumer: str, *, idle: float, tries: int, count: int
    ) -> list[Taken]:
        keys = tuple(key for kind in kinds for key in (_messages(kind), _dead(kind)))
        bounds = self._bounds
        arguments = (
            group,
            consumer,
            int(idle * 1000),
            tries,
            count,
            NEVER_DONE,
            bounds.backlog,
            int(FORGET * 1000),
        )
        found, buried = await self._scripts.run("reclaim", keys, arguments)
        for kind in (kinds[place] for place in buried):
            log.error("a `%s` is a dead letter: %s", kind, NEVER_DONE, extra={"event": "dead_letter"})
        return [
            _taken(kinds[int(place)], id_, dict(zip(flat[::2], flat[1::2], strict=True)), group, consumer, delivered)
            for place, id_, flat, delivered in found
        ]

    async def bury(self, taken: Taken, reason: str) -> None:
        keys = (_messages(taken.kind), _dead(taken.kind))
        arguments = (taken.group, taken.consumer, taken.entry, reason, self._bounds.backlog)
        await self._scripts.call("bury", keys, arguments)

    async def dead(self, kind: str, count: int = 100) -> list[Dead]:
        try:
            found = await self._redis.xrange(_dead(kind), count=count)
        except AWAY as error:
            raise away(error) from None
        return [
            Dead(kind, id_.decode(), *_read(of), of[b"g"].decode(), int(of[b"n"]), of[b"r"].decode())
            for id_, of in found
        ]

    async def revive(self, *dead: Dead) -> None:
        for kind in dict.fromkeys(letter.kind for letter in dead):
            entries = tuple(letter.entry for letter in dead if letter.kind == kind)
            await self._scripts.call("revive", (_messages(kind), _dead(kind)), entries)


def _messages(kind: str) -> str:
    return f"{PREFIX}{{inbox}}:messages:{kind}"


def _dead(kind: str) -> str:
    return f"{PREFIX}{{inbox}}:dead:{kind}"


def _places(taken: Sequence[Taken]) -> tuple[tuple[str, ...], list[int | str]]:
    """The streams of what was taken, and for each message the number of its stream (from 1) and its entry."""
    keys = list(dict.fromkeys(_messages(each.kind) for each in taken))
    return tuple(keys), [part for each in taken for part in (keys.index(_messages(each.kind)) + 1, each.entry)]


def _taken(kind: str, id_: bytes, fields: dict[bytes, bytes], group: str, consumer: str, tries: int) -> Taken:
    return Taken(kind, id_.decode(), *_read(fields), group, consumer, tries)


def _read(fields: dict[bytes, bytes]) -> tuple[Origin, bytes]:
    """Origin and payload of an entry. One that somebody wrote by hand, and not as we do, has no origin."""
    head, _, payload = fields.get(b"e", b"").partition(b"\n")
    try:
        return _decode(head), payload
    except msgspec.MsgspecError:
        return Origin(), payload


_encoder = msgspec.json.Encoder()
_decode = msgspec.json.Decoder(Origin).decode
