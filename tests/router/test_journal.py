"""Log lines: JSON, the specification's fields, and no token anywhere."""

import json
import logging
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from router.journal import JsonLines, Redact, configure, redact
from tests.node import make_token


def record(message: str, *args: object, level: int = logging.INFO, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("router", level, __file__, 1, message, args, None)
    made.__dict__.update(extra)
    return made


def line(made: logging.LogRecord) -> dict[str, object]:
    assert Redact().filter(made)
    text = JsonLines().format(made)
    assert "\n" not in text
    return json.loads(text)


@pytest.mark.parametrize(
    "around",
    [
        '127.0.0.1:1 - "WebSocket /ws/project/p1?token={}" [accepted]',
        "GET /ws/project/p1?since=0&token={}&x=1 HTTP/1.1",
        "< Sec-WebSocket-Protocol: router.v1, bearer.{}",
        "< Authorization: Bearer {}",
        '< TEXT \'{{"type":"auth_refresh","token":"{}"}}\' [300 bytes]',
        "{}",
        "two: {0} {0}",
    ],
)
def test_a_token_is_hidden_wherever_it_stands(around):
    token = make_token()
    clean = redact(around.format(token))
    assert clean == around.format("[hidden]")


def test_whatever_is_given_as_token_in_a_query_is_hidden_though_it_looks_like_none():
    assert redact("/ws/project/p1?token=secret&since=0") == "/ws/project/p1?token=[hidden]&since=0"
    assert redact("/ws/project/p1?a=1&token=secret") == "/ws/project/p1?a=1&token=[hidden]"


@pytest.mark.parametrize("text", ["", "a token=5 here", "keys: eyJ", "connected p1", "?tokens=5"])
def test_everything_else_is_left_as_it_is(text):
    assert redact(text) == text


def test_arguments_of_a_record_are_cleaned_as_well_as_its_message():
    token = make_token()
    cleaned = record('%s - "WebSocket %s" %d', "127.0.0.1", f"/ws/project/p1?token={token}", 401)
    assert line(cleaned)["message"] == '127.0.0.1 - "WebSocket /ws/project/p1?token=[hidden]" 401'
    assert cleaned.args is None
    untouched = record("%d connections", 5)
    assert line(untouched)["message"] == "5 connections"
    assert untouched.args == (5,)


def test_a_line_has_the_specifications_fields_and_what_the_record_brings():
    made = record("websocket_connected", event="websocket_connected", project_uuid="proj_123", user_id="user_456")
    got = line(made)
    moment = got.pop("timestamp")
    assert moment.endswith("Z")
    assert datetime.fromisoformat(moment).timestamp() == pytest.approx(made.created, abs=0.001)
    assert got == {
        "event": "websocket_connected",
        "level": "info",
        "logger": "router",
        "message": "websocket_connected",
        "project_uuid": "proj_123",
        "user_id": "user_456",
    }


def test_a_record_without_an_event_is_a_log_line():
    assert line(record("hello", level=logging.WARNING))["event"] == "log"


def test_what_cannot_be_written_as_json_is_written_as_text_and_line_breaks_stay_inside():
    got = line(record("two\nlines", thing=Path("/a/b"), user_id="a\nb"))
    assert (got["message"], got["thing"], got["user_id"]) == ("two\nlines", "/a/b", "a\nb")


def test_a_token_in_an_exception_is_hidden():
    token = make_token()
    made = record("failed", level=logging.ERROR)
    error = ValueError(f"bad token {token}")
    made.exc_info = (ValueError, error, None)
    got = line(made)
    assert "ValueError: bad token [hidden]" in got["exception"]
    assert token not in json.dumps(got)


def test_a_token_in_an_extra_field_is_hidden():
    assert make_token() not in json.dumps(line(record("refused", project_uuid=make_token())))


def test_a_name_that_is_not_utf_8_loses_no_line():
    assert line(record("plugin_broken", place="/plugins/\udcff.py"))["event"] == "log"


@pytest.fixture
def logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    names = ("uvicorn", "uvicorn.error", "uvicorn.access", "httpx")
    loggers = [root, *map(logging.getLogger, names)]
    before = [(list(logger.handlers), logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers, logger.level, logger.propagate = handlers, level, propagate


@pytest.mark.usefixtures("logging_as_before")
def test_configured_every_logger_writes_clean_json_to_standard_error_once(capsys):
    logging.getLogger("uvicorn.error").addHandler(logging.StreamHandler())
    configure("INFO")
    token = make_token()
    logging.getLogger("uvicorn.error").warning('"WebSocket %s" [accepted]', f"/ws?token={token}")
    logging.getLogger("router").info("connected", extra={"event": "websocket_connected"})
    logging.getLogger("some.library").debug("not asked for")
    written = [json.loads(text) for text in capsys.readouterr().err.splitlines()]
    assert [(entry["logger"], entry["event"]) for entry in written] == [
        ("uvicorn.error", "log"),
        ("router", "websocket_connected"),
    ]
    assert written[0]["message"] == '"WebSocket /ws?token=[hidden]" [accepted]'


@pytest.mark.usefixtures("logging_as_before")
def test_the_level_is_the_least_that_is_written(capsys):
    configure("WARNING")
    logging.getLogger("router").info("no")
    logging.getLogger("router").warning("yes")
    assert [json.loads(text)["message"] for text in capsys.readouterr().err.splitlines()] == ["yes"]
