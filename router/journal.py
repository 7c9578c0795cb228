"""Log lines as JSON objects, with every token taken out, uvicorn's own lines included."""

import json
import logging
import re
import sys
from datetime import UTC, datetime
from typing import Any

import msgspec

__all__ = ["JsonLines", "Redact", "configure"]

_TOKEN = re.compile(r"([?&]token=)[^&\s\"'\\]+|\beyJ[\w-]*\.[\w-]*\.[\w-]*|\b[\w-]{16,}\.[\w-]{16,}\.[\w-]{20,}")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message", "taskName"}


def redact(text: str) -> str:
    """`text` without tokens: whatever follows `token=`, and whatever looks like a JWT."""
    return _TOKEN.sub(lambda found: f"{found[1] or ''}[hidden]", text)


class Redact(logging.Filter):
    """Takes tokens out of every record. uvicorn logs whole WebSocket URLs, `access_log=False` or not."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        clean = redact(text)
        if clean != text:
            record.msg, record.args = clean, None
        return True


class JsonLines(logging.Formatter):
    """One JSON object a line: the specification's `event` and `timestamp`, level, logger, and what a record brings."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {name: value for name, value in vars(record).items() if name not in _STANDARD}
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {
            "event": fields.pop("event", "log"),
            "timestamp": moment.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **fields,
        }
        if record.exc_info:
            line["exception"] = redact(self.formatException(record.exc_info))
        try:
            text = msgspec.json.encode(line, enc_hook=str).decode()
        except UnicodeEncodeError:  # half a surrogate pair, as in the name of a file that is not UTF-8
            text = json.dumps(line, default=str)
        return redact(text)


def configure(level: str) -> None:
    """Send everything through one handler to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(Redact())
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers = []
        logger.propagate = True
    # Its lines for each connection say less than ours, and cost a tenth of a handshake.
    logging.getLogger("uvicorn.error").setLevel(max(logging.WARNING, logging.getLevelName(level)))
    logging.getLogger("uvicorn.access").setLevel(logging.WARNING)
    logging.getLogger("httpx").setLevel(logging.WARNING)
