"""Token buckets and windows. Time is a number here."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router import Append, Event, Latest, Merge, Now, Plugin, Policy, pacing
from router.pacing import TokenBucket, Window, conflate
from router.testing import envelope


class Progress(Event, frozen=True, tag="progress"):
    step: str
    done: float


class Done(Event, frozen=True, tag="done"):
    step: str


class Restarted(Event, frozen=True, tag="restarted"):
    step: str


class Piece(Event, frozen=True, tag="piece"):
    stream: str
    text: str
    last: bool = False


class Changed(Event, frozen=True, tag="changed"):
    things: tuple[int, ...]


progress = Plugin(Progress, Policy(deliver=Latest(by=("step",))))
done = Plugin(Done, Policy(deliver=Now(by=("step",)), settles=(Progress,)))
restarted = Plugin(Restarted, Policy(deliver=Now(by=("step",))))
piece = Plugin(Piece, Policy(deliver=Append(by=("stream",), field="text", every=0.04, ends="last")))
changed = Plugin(Changed, Policy(deliver=Merge(lambda old, new: Changed(things=old.things + new.things))))


def at(step: str, amount: float, seq: int):
    return envelope(progress, Progress(step=step, done=amount), seq=seq)


def text(stream: str, words: str, seq: int, *, last: bool = False):
    return envelope(piece, Piece(stream=stream, text=words, last=last), seq=seq)


def told(envelopes):
    return [(e.event, e.seq, e.seq if e.pos is None else e.pos) for e in envelopes]


def test_a_lone_event_is_never_late():
    released, merged = Window(1.0).offer(at("a", 0.1, 1), 100.0)
    assert told(released) == [(Progress(step="a", done=0.1), 1, 1)]
    assert not merged


def test_a_burst_ends_with_its_newest_value_for_each_thing():
    window = Window(1.0)
    window.offer(at("a", 0.1, 1), 100.0)
    for seq, (step, amount) in enumerate([("a", 0.2), ("b", 0.1), ("a", 0.3)], 2):
        assert window.offer(at(step, amount, seq), 100.5)[0] == []
    assert window.flush(100.9) == []
    assert window.due() == 101.0
    assert told(window.flush(101.0)) == [(Progress(step="b", done=0.1), 3, 1), (Progress(step="a", done=0.3), 4, 4)]
    assert window.due() is None


def test_what_was_merged_is_told():
    window = Window(1.0)
    for seq in (1, 2):
        window.offer(at("a", seq / 10, seq), 100.0)
    _, merged = window.offer(at("a", 0.3, 3), 100.0)
    assert [e.seq for e in merged] == [2]


def test_the_position_stays_behind_while_something_older_is_held():
    window = Window(1.0)
    window.offer(at("a", 0.1, 1), 100.0)
    window.offer(at("a", 0.2, 2), 100.0)
    released, _ = window.offer(envelope(done, Done(step="other"), seq=3), 100.0)
    assert told(released) == [(Done(step="other"), 3, 1)]


def test_an_event_that_settles_drops_what_is_pending_for_the_same_thing_only():
    window = Window(1.0)
    for seq, step in enumerate(["a", "a", "b"], 1):
        window.offer(at(step, 0.5, seq), 100.0)
    released, settled = window.offer(envelope(done, Done(step="a"), seq=4), 100.1)
    assert told(released) == [(Done(step="a"), 4, 2)]
    assert [e.seq for e in settled] == [2]
    assert told(window.flush(101.0)) == [(Progress(step="b", done=0.5), 3, 4)]


def test_an_event_about_the_same_thing_is_preceded_by_what_is_pending():
    window = Window(1.0)
    window.offer(at("a", 0.1, 1), 100.0)
    window.offer(at("a", 0.9, 2), 100.0)
    released, _ = window.offer(envelope(restarted, Restarted(step="a"), seq=3), 100.1)
    assert told(released) == [(Progress(step="a", done=0.9), 2, 2), (Restarted(step="a"), 3, 3)]


def test_what_is_pending_for_another_audience_is_sent_rather_than_dropped():
    window = Window(1.0)
    window.offer(at("a", 0.1, 1), 100.0)
    window.offer(at("a", 0.9, 2).narrowed(holding="staff"), 100.0)
    released, settled = window.offer(envelope(done, Done(step="a"), seq=3), 100.1)
    assert [type(e.event) for e in released] == [Progress, Done]
    assert not settled


def test_pieces_of_a_stream_are_joined_and_two_streams_never_mix():
    window = Window(1.0)
    assert window.offer(text("x", "X1 ", 1), 100.0)[0]
    for seq, (stream, words) in enumerate([("y", "Y1 "), ("x", "X2 "), ("y", "Y2 "), ("x", "X3 ")], 2):
        assert window.offer(text(stream, words, seq), 100.01)[0] == []
    assert [e.event.text for e in window.flush(100.04)] == ["Y1 Y2 ", "X2 X3 "]


def test_the_last_piece_goes_at_once_with_what_is_pending():
    window = Window(1.0)
    window.offer(text("x", "one ", 1), 100.0)
    window.offer(text("x", "two ", 2), 100.01)
    released, _ = window.offer(text("x", "three", 3, last=True), 100.02)
    assert told(released) == [(Piece(stream="x", text="two three", last=True), 3, 3)]


def test_a_critical_event_is_never_merged():
    window = Window(1.0)
    window.offer(at("a", 0.1, 1), 100.0)
    window.offer(at("a", 0.2, 2), 100.0)
    released, _ = window.offer(envelope(progress, Progress(step="a", done=0.3, requires_ack=True), seq=3), 100.0)
    assert [e.seq for e in released] == [2, 3]


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (lambda _old, _new: 1 / 0, "raised ZeroDivisionError"),
        (lambda _old, _new: "text", "returned str, not Changed"),
    ],
)
def test_a_merge_function_that_fails_is_reported_and_both_events_arrive_unmerged(function, what):
    faults = []
    broken = Plugin(Changed, Policy(deliver=Merge(function)))
    window = Window(1.0, fault=lambda e, text: faults.append((e.type, text)))
    out = []
    for seq in (1, 2, 3):
        out += window.offer(envelope(broken, Changed(things=(seq,)), seq=seq), 100.0)[0]
    out += window.flush(101.0)
    assert [e.event.things for e in out] == [(1,), (2,), (3,)]
    assert faults == [("changed", f"its merge function {what}")]


def test_a_merge_function_that_takes_long_is_reported_and_both_events_arrive_unmerged(monkeypatch):
    times = iter([0.0, pacing.SLOW_MERGE * 2])
    monkeypatch.setattr(pacing, "perf_counter", lambda: next(times))
    faults = []
    window = Window(1.0, fault=lambda e, text: faults.append((e.type, text)))
    out = []
    for seq in (1, 2, 3):
        out += window.offer(envelope(changed, Changed(things=(seq,)), seq=seq), 100.0)[0]
    assert [e.event.things for e in [*out, *window.flush(101.0)]] == [(1,), (2,), (3,)]
    assert faults == [("changed", "its merge function took 0.100 s, and everybody waited")]


def test_merged_events_say_what_both_said():
    window = Window(1.0)
    for seq in (1, 2, 3):
        window.offer(envelope(changed, Changed(things=(seq,)), seq=seq), 100.0)
    (one,) = window.flush(101.0)
    assert (one.event.things, one.first, one.seq) == ((2, 3), 2, 3)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.floats(0, 0.4)), min_size=1, max_size=40))
def test_throttled_events_come_at_most_once_a_window_and_the_newest_always_comes(events):
    window, now, flushes, newest = Window(1.0), 100.0, [], {}
    shown = {}
    for seq, (step, pause) in enumerate(events, 1):
        now += pause
        due = window.due()
        if due is not None and due <= now:
            released = window.flush(due)
            flushes.append(due)
            shown |= {e.event.step: e.event.done for e in released}
        released, _ = window.offer(at(step, seq, seq), now)
        newest[step] = seq
        if released:
            flushes.append(now)
            shown |= {e.event.step: e.event.done for e in released}
    shown |= {e.event.step: e.event.done for e in window.flush(now + 10)}
    assert shown == newest
    assert all(later - earlier >= 1.0 - 1e-9 for earlier, later in pairwise(flushes))


def test_history_is_merged_as_a_window_would_have():
    stretch = [at("a", i / 100, i) for i in range(1, 100)] + [text("x", f"{i} ", 100 + i) for i in range(3)]
    assert [e.event for e in conflate(stretch)] == [Progress(step="a", done=0.99), Piece(stream="x", text="0 1 2 ")]


def test_of_what_a_receiver_has_of_a_stream_nothing_is_told_again():
    stretch = [text("x", f"{i} ", i) for i in range(1, 5)]
    assert [e.event.text for e in conflate(stretch, frozenset({3}))] == ["4 "]


def test_what_a_receiver_has_still_settles_what_came_before_it():
    stretch = [at("a", 0.5, 1), envelope(done, Done(step="a"), seq=2)]
    assert conflate(stretch, frozenset({2})) == []


def test_a_bucket_lets_a_burst_through_and_then_its_rate():
    bucket = TokenBucket(rate=10.0, burst=10)
    assert [bucket.take(100.0) for _ in range(10)] == [0.0] * 10
    assert bucket.take(100.0) == pytest.approx(0.1)
    assert bucket.take(100.1) == 0.0
    assert bucket.full(101.2)


@given(st.lists(st.floats(0, 0.3), max_size=100))
def test_a_bucket_never_lets_more_through_than_burst_and_rate_allow(pauses):
    bucket, now, taken = TokenBucket(rate=10.0, burst=5), 100.0, 0
    for pause in pauses:
        now += pause
        taken += bucket.take(now) == 0.0
    assert taken <= 5 + (now - 100.0) * 10 + 1e-6


def test_a_critical_event_does_not_overtake_what_is_held_of_its_type_when_that_has_no_subject():
    plain = Plugin(Progress, Policy(deliver=Latest()))
    window = Window(1.0)
    for seq in (1, 2):
        window.offer(envelope(plain, Progress(step="a", done=seq), seq=seq), 100.0)
    released, _ = window.offer(envelope(plain, Progress(step="a", done=3, requires_ack=True), seq=3), 100.0)
    assert [e.seq for e in released] == [2, 3]


def test_both_parts_of_a_message_that_was_split_go_at_once():
    window = Window(1.0)
    made = at("a", 0.1, 1)
    parts = [made.narrowed(holding="staff"), made.narrowed(lacking="staff")]
    assert [len(window.offer(part, 100.0)[0]) for part in parts] == [1, 1]


def test_a_stream_is_joined_only_up_to_a_bounded_length():
    half = "x" * (pacing.MAX_JOINED // 2)
    told_ = conflate([text("s", half, 1), text("s", half, 2), text("s", half, 3)])
    assert [len(e.event.text) for e in told_] == [pacing.MAX_JOINED, len(half)]


def test_what_an_event_costs_that_passes_does_not_grow_with_what_a_merge_has_taken_in(monkeypatch):
    """5,000 parts of one sum wait: who passes them is not to count them, or a burst costs its square."""

    class Sum(Event, frozen=True, tag="review_sum"):
        n: int

    class Passing(Event, frozen=True, tag="review_passing"):
        n: int

    class Counted(set):
        looked_at = 0

        def __iter__(self):
            for each in super().__iter__():
                Counted.looked_at += 1
                yield each

    sums = Plugin(Sum, Policy(deliver=Merge(by=(), function=lambda a, b: Sum(n=a.n + b.n))))
    window = Window(1.0)
    for seq in range(1, 102):
        window.offer(envelope(sums, Sum(n=1), seq=seq), 0.0)
    for held in window._held.values():
        held.seqs = Counted(held.seqs)
    window.offer(envelope(Plugin(Passing), Passing(n=1), seq=102), 0.0)
    assert Counted.looked_at <= 1
