"""The error tree and the close codes.

RouterError
├── Refused        one message is declined; the connection stays; an `error` frame answers it
│   ├── BadMessage     not JSON, unknown type, bad field (with the path from msgspec), reserved name
│   ├── TooLarge       over a size limit
│   ├── Denied         the sender lacks a grant
│   ├── RateLimited    too fast; tells when to try again
│   ├── Unavailable    the broker or another service is away
│   └── PluginFailed   a plugin's handler raised or took too long
├── Disconnect     the connection ends with a close code that tells the client whether to come back
└── SetupError     raised before serving: broken plugin, bad setting, missing key
"""

from enum import IntEnum

__all__ = [
    "BadMessage",
    "CloseCode",
    "Denied",
    "Disconnect",
    "PluginFailed",
    "RateLimited",
    "Refused",
    "RouterError",
    "SetupError",
    "TooLarge",
    "Unavailable",
]

MAX_REASON = 123
"""Bytes of a close reason: a control frame carries 125, two are the code (RFC 6455 section 5.5)."""


class CloseCode(IntEnum):
    """Why a connection ended. 4000-4999 is the private range of RFC 6455 section 7.4.2."""

    NORMAL = 1000
    GOING_AWAY = 1001
    TOO_BIG = 1009
    INTERNAL_ERROR = 1011
    RESTART = 1012
    OVERLOAD = 1013
    BAD_MESSAGES = 4400
    UNAUTHENTICATED = 4401
    FORBIDDEN = 4403
    NO_SUCH_PROJECT = 4404
    TOO_SLOW = 4408
    ENDED_ELSEWHERE = 4409
    LIMIT = 4429


class RouterError(Exception):
    """Everything this project raises on purpose."""


class Refused(RouterError):
    """One message is declined. The connection stays open and the sender gets an `error` frame.

    `code` is stable and for programs; the text is for people. `temporary` says that the same message may pass
    later, `retry_after` (seconds) when.
    """

    code = "refused"
    temporary = False

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        temporary: bool | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        if code is not None:
            self.code = code
        if temporary is not None:
            self.temporary = temporary
        self.retry_after = retry_after


class BadMessage(Refused):
    code = "bad_message"


class TooLarge(Refused):
    code = "too_large"


class Denied(Refused):
    code = "denied"

    def __init__(self, grant: str, where: str = "this project") -> None:
        super().__init__(f"this needs the grant `{grant}` on {where}")
        self.grant = grant


class RateLimited(Refused):
    code = "rate_limited"
    temporary = True


class Unavailable(Refused):
    code = "unavailable"
    temporary = True


class PluginFailed(Refused):
    code = "plugin_failed"


class Disconnect(RouterError):
    """The connection ends with `code`. `retry_after` (seconds) goes into refusals that happen before it opens."""

    def __init__(self, code: CloseCode, reason: str, *, retry_after: float | None = None) -> None:
        super().__init__(f"{int(code)} {reason}")
        self.code = code
        self.reason = reason
        self.retry_after = retry_after


class SetupError(RouterError):
    """The router cannot start as configured. The text says what is wrong, where, and what to do."""


def clip_reason(reason: str) -> str:
    """`reason` cut to what a close frame can carry, never in the middle of a character."""
    return reason.encode()[:MAX_REASON].decode(errors="ignore")


def place(error: Exception) -> str | None:
    """Where an exception was raised: file and line, nothing of what was in its variables."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return None if trace is None else f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
