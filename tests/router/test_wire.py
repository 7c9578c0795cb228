"""What frames look like as bytes."""

import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from router import Audience, BadMessage, Event, Plugin, wire
from router.testing import envelope


class Said(Event, frozen=True, tag="said"):
    text: str


plugin = Plugin(Said)


@given(st.text(), st.integers(1, 10**9))
def test_the_publishers_bytes_stay_and_the_number_is_added(text, seq):
    payload = json.dumps({"type": "said", "text": text, "more": [1]}).encode()
    made = replace(envelope(plugin, Said(text=text), seq=seq), payload=payload)
    assert wire.numbered(made) == payload[:-1] + b',"seq":%d}' % seq
    assert json.loads(wire.numbered(made))["text"] == text


def test_a_position_is_told_where_it_differs_from_the_number():
    made = envelope(plugin, Said(text=""), seq=7)
    assert "pos" not in json.loads(wire.numbered(made))
    assert json.loads(wire.numbered(replace(made, pos=3)))["pos"] == 3
    assert json.loads(wire.numbered(replace(made, pos=6), floor=2))["pos"] == 2


def test_frames_name_the_topics_of_the_user_and_of_everybody():
    made = envelope(plugin, Said(text=""), seq=1)
    labels = [
        json.loads(wire.numbered(replace(made, audience=Audience(t)))).get("topic")
        for t in ("project:p", "user:u", "all")
    ]
    assert labels == [None, "user", "all"]


def test_a_batch_has_the_position_of_its_last_numbered_event():
    made = [envelope(plugin, Said(text=str(i)), seq=seq) for i, seq in enumerate((4, 5, 0))]
    batch = json.loads(wire.batch(made))
    assert (batch["type"], batch["pos"], [e.get("seq") for e in batch["events"]]) == ("batch", 5, [4, 5, None])


@given(st.binary(max_size=70_000))
def test_a_text_frame_has_its_length_in_the_shortest_form(payload):
    frame = wire.text_frame(payload)
    assert frame[0] == 0x81
    short = frame[1]
    if len(payload) < 126:
        assert (short, frame[2:]) == (len(payload), payload)
    elif len(payload) < 65536:
        assert (short, struct.unpack("!H", frame[2:4])[0], frame[4:]) == (126, len(payload), payload)
    else:
        assert (short, struct.unpack("!Q", frame[2:10])[0], frame[10:]) == (127, len(payload), payload)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"7", b'{"type":5}', b"{}", b"\xff", "[" * 100_000])
def test_whatever_comes_in_is_read_or_refused(data):
    with pytest.raises(BadMessage):
        wire.read_head(data)


@pytest.mark.parametrize("ref", [5, {}, "x" * 65])
def test_a_mark_that_is_no_short_text_is_refused(ref):
    with pytest.raises(BadMessage, match="ref"):
        wire.mark_of(wire.read_head(json.dumps({"type": "said", "ref": ref})))


def test_a_field_that_the_router_adds_cannot_be_published():
    for name in ("seq", "pos", "topic", "redelivered"):
        with pytest.raises(BadMessage, match=f"`{name}` is set by the router"):
            wire.refuse_reserved(wire.read_head(json.dumps({"type": "said", name: None})))
