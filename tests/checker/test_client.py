"""The client of the protocol page."""

from typing import Any

from tests.checker import Client
from tests.checker.client import Dropped, Shown

WELCOME = {
    "type": "welcome",
    "session_id": "s",
    "epoch": "5a",
    "pos": 41,
    "user": {"epoch": "27", "pos": 0},
    "all": {"epoch": "bf", "pos": 3},
}


def opened(**more: Any) -> Client:
    client = Client("viewer")
    client.opened(0.0, None)
    client.take(WELCOME | more, 0.0)
    return client


def shown(client: Client) -> list[Any]:
    return [note.event.get("seq") for note in client.record if isinstance(note, Shown)]


def test_a_client_asks_from_the_positions_that_it_was_told() -> None:
    assert opened(known=[43, 44]).since() == "5a:41:43.44,user:27:0,all:bf:3"
    assert Client("new").since() is None


def test_numbers_beyond_the_position_are_remembered_until_it_passes_them() -> None:
    client = opened()
    client.take({"type": "said", "seq": 43, "pos": 41}, 1.0)
    assert client.since() == "5a:41:43,user:27:0,all:bf:3"
    client.take({"type": "said", "seq": 42, "pos": 43}, 2.0)
    assert client.since() == "5a:43,user:27:0,all:bf:3"
    assert shown(client) == [43, 42]


def test_a_position_never_goes_back() -> None:
    client = opened()
    client.take({"type": "said", "seq": 50, "pos": 40}, 1.0)
    assert client.since() == "5a:41:50,user:27:0,all:bf:3"


def test_a_batch_has_one_position_and_one_topic() -> None:
    client = opened()
    events = [{"type": "said", "seq": 5, "pos": 3}, {"type": "said", "seq": 6}]
    client.take({"type": "batch", "events": events, "pos": 6, "topic": "all"}, 1.0)
    assert client.since() == "5a:41,user:27:0,all:bf:6"


def test_what_was_seen_is_dropped_unless_it_says_redelivered() -> None:
    client = opened()
    client.take({"type": "said", "seq": 41}, 1.0)
    client.take({"type": "said", "seq": 41, "redelivered": True}, 1.0)
    assert shown(client) == [41]
    assert [type(note) for note in client.record[-2:]] == [Dropped, Shown]


def test_a_critical_event_is_acknowledged_each_time_and_shown_once() -> None:
    client = opened()
    event = {"type": "said", "seq": 42, "pos": 41, "requires_ack": True, "message_id": "m"}
    assert client.take(event, 1.0) == [{"type": "ack", "message_id": "m"}]
    assert client.take(event | {"redelivered": True}, 2.0) == [{"type": "ack", "message_id": "m"}]
    assert shown(client) == [42]


def test_a_resync_sets_the_position_of_its_topic_also_back() -> None:
    client = opened()
    client.take({"type": "resync", "epoch": "99", "pos": 2, "reason": "new", "topic": "user"}, 1.0)
    client.take({"type": "resync", "epoch": "5b", "pos": 1, "known": [3], "reason": "new"}, 1.0)
    assert client.since() == "5b:1:3,user:99:2,all:bf:3"


def test_an_epoch_frame_changes_the_name_and_nothing_else() -> None:
    client = opened(known=[43])
    client.take({"type": "epoch", "epoch": "5c"}, 1.0)
    assert client.since() == "5c:41:43,user:27:0,all:bf:3"


def test_a_plain_client_is_shown_events_and_knows_no_position() -> None:
    client = Client("plain", plain=True)
    client.opened(0.0, None)
    client.take({"type": "ping"}, 1.0)
    client.take({"type": "said", "text": "hello"}, 1.0)
    assert client.since() is None
    assert shown(client) == [None]


def test_presence_that_came_while_the_answer_was_under_way_counts() -> None:
    client = opened()
    client.ask_people()
    client.take({"type": "presence_updated", "user_id": "bob", "connections": 2}, 1.0)
    client.know_people([{"user_id": "ada", "connections": 1}, {"user_id": "bob", "connections": 1}])
    assert {user: person["connections"] for user, person in client.people.items()} == {"ada": 1, "bob": 2}
    client.take({"type": "presence_left", "user_id": "bob"}, 2.0)
    assert list(client.people) == ["ada"]
