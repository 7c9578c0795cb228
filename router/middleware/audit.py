"""One record for each message, whatever became of it."""

import logging
from collections.abc import Callable
from io import FileIO
from typing import BinaryIO

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from router.envelope import Envelope, Leg
from router.pipeline import DELIVERED, Forward

__all__ = ["Audit", "Record"]

log = logging.getLogger("router")

BUFFERED = 500
"""Records kept before they are written; `flush` writes them every second."""
COMPLAIN_EVERY = 60.0
"""Seconds between two log lines about a file that cannot be written."""


class Record(Struct, frozen=True, omit_defaults=True):
    """What is written of a message: who, what kind, where to and how it ended; never what it says."""

    time: float
    leg: Leg
    type: str
    topic: str
    outcome: str
    user: str | None = None
    session: str | None = None
    message_id: str | None = None
    seq: int = 0
    merged_from: int = 0
    """The first of the numbers that were merged into this one."""
    size: int = 0
    replay: bool = False
    traceparent: str | None = None


class Audit:
    """Last in the list: writes `delivered` for what came through; `report` writes the outcome of what did not.

    Records are JSON lines, written many at a time: half a microsecond each instead of six through `logging`.
    `flush` is called every second and at the end.
    """

    def __init__(self, file: "BinaryIO | FileIO | None", clock: Callable[[], float]) -> None:
        self._file = file
        self._clock = clock
        self._encoder = msgspec.json.Encoder()
        self._lines: list[bytes] = []
        self._complain_at = 0.0
        self.lost = 0
        """Records that could not be written."""

    async def __call__(self, envelope: Envelope, forward: Forward) -> None:
        await forward(envelope)
        self.report(envelope, DELIVERED)

    def report(self, envelope: Envelope, outcome: str) -> None:
        """Write the record of one message."""
        if self._file is None:
            return
        record = Record(
            time=self._clock(),
            leg=envelope.leg,
            type=envelope.type,
            topic=envelope.topic,
            outcome=outcome,
            user=None if envelope.sender is None else envelope.sender.user,
            session=envelope.session,
            message_id=envelope.ack_id or envelope.message_id,
            seq=envelope.seq,
            merged_from=envelope.first if envelope.first != envelope.seq else 0,
            size=len(envelope.payload or b""),
            replay=envelope.replay,
            traceparent=envelope.traceparent,
        )
        self._write(record)

    def unread(self, topic: str, user: str, session: str, outcome: str) -> None:
        """Write the record of a message that could not even be read."""
        if self._file is not None:
            self._write(Record(self._clock(), "inbound", "unknown", topic, outcome, user, session))

    def unacknowledged(self, envelope: Envelope, user: str, session: str) -> None:
        """Write that one person never acknowledged a critical message."""
        if self._file is not None:
            record = Record(self._clock(), "outbound", envelope.type, envelope.topic, "unacknowledged", user, session)
            self._write(replace(record, message_id=envelope.ack_id, seq=envelope.seq))

    def _write(self, record: Record) -> None:
        assert self._file is not None
        self._lines.append(self._encoder.encode(record))
        if len(self._lines) >= BUFFERED:
            self.flush()

    def flush(self) -> None:
        """Write what is buffered, whole lines at once: several workers append to one file.

        A full disk must not stop messages: it is logged once a minute, and counted, until there is room again.
        """
        if self._file is None or not self._lines:
            return
        lines, self._lines = self._lines, []
        try:
            self._file.write(b"\n".join([*lines, b""]))
        except OSError as error:
            self.lost += len(lines)
            if self._clock() >= self._complain_at:
                self._complain_at = self._clock() + COMPLAIN_EVERY
                fields = {"event": "audit_failed", "lost": self.lost}
                log.error("the audit log cannot be written: %s", error.strerror, extra=fields)

    def close(self) -> None:
        """Write what is buffered and close the file."""
        self.flush()
        if self._file is not None:
            self._file.close()
            self._file = None
