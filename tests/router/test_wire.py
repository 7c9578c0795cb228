"""What frames look like as bytes."""

import json
import math
import struct
from contextlib import suppress

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


def strictly(text):
    """As JSON.parse reads it, which Python's reader is but for three words that are no JSON."""

    def never(word):
        raise ValueError(word)

    return json.loads(text, parse_constant=never)


def is_deep(value, levels):
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return inner is not None and (levels == 0 or any(is_deep(each, levels - 1) for each in inner))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)
PIECES = [
    *(b"\xf6 \xed\xa0\x80 \xc0\xaf \xe2\x82 \xff \xef\xbb\xbf \x00 \x01 \x7f \x85".split()),
    *(rb'" \ \" \u \ud800 \udc00 \x [ ] { } , : 01 1e 1e400 -0 .5 NaN Infinity nul null tru //'.split()),
    *(b"[" * 70, b"]" * 70, b'{"a":' * 70, b"}" * 70, b"9" * 400, b"9" * 5000, b'"message_id":', b"\n"),
]


@given(values, st.lists(st.tuples(st.integers(0, 200), st.sampled_from(PIECES) | st.binary(max_size=3)), max_size=3))
def test_whatever_bytes_are_taken_every_reader_of_json_takes(value, harm):
    data = json.dumps({"type": "said", "text": "x", "more": value, "ending": None}, ensure_ascii=False).encode()
    for where, piece in harm:
        data = data[:where] + piece + data[where:]
    with suppress(BadMessage):
        wire.read_head(data)
        read = strictly(data.decode())
        assert not is_deep(read, wire.MAX_DEPTH)
        assert json.loads(wire.batch([replace(envelope(plugin, Said(text="x"), seq=1), payload=data.strip())]))
        return
    if not harm and not is_deep(value, wire.MAX_DEPTH - 1):
        raise AssertionError("it was right and refused")


@given(st.text('[]{}"\\\\x'), st.sampled_from([0, 1, 27, 28, 29, 30, 60]))
def test_levels_are_counted_of_what_is_there_and_not_of_what_texts_say(text, levels):
    data = json.dumps([text, {text: text}, [text] * 40], ensure_ascii=False)
    for _ in range(levels):
        data = f'[{json.dumps(text)},{{"x":{data}}}]'
    data = f'{{"type":"said","text":{json.dumps("[{" * 40)},"more":{data}}}'
    if levels * 2 + 3 > wire.MAX_DEPTH:
        with pytest.raises(BadMessage, match="nested too deep"):
            wire.check(data)
    else:
        wire.check(data)


@given(st.text())
def test_what_is_made_here_is_written_so_that_everybody_can_read_it(text):
    assert strictly(wire.write(Said(text=text)).decode())["text"] == text


def test_of_a_critical_event_nothing_is_made_anew():
    rest = b'"big":%b,"far":1e400,"\\u00e9":"\\/"' % (b"9" * 400)
    for named in (b'"requires_ack":false', b'"message_id":null', b'"requires_ack":false,"message_id":null'):
        payload = b'{"type":"said","text":"x",%b,%b}' % (named, rest)
        event, written = wire.critical(Said(text="x"), payload, "m1")
        assert (event.message_id, event.requires_ack) == ("m1", True)
        read = strictly(written.decode())
        assert (read["message_id"], read["requires_ack"], read["far"]) == ("m1", True, math.inf)
        assert b"1e400" in written
        assert b"9" * 400 in written
        assert written.count(b'"message_id"') == written.count(b'"requires_ack"') == 1


def test_a_field_that_the_router_adds_cannot_be_published():
    for name in ("seq", "pos", "topic", "redelivered"):
        with pytest.raises(BadMessage, match=f"`{name}` is set by the router"):
            wire.refuse_reserved(wire.read_head(json.dumps({"type": "said", name: None})))
