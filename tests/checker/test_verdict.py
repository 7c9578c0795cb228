"""Each promise, broken once by a history that was written by hand."""

from typing import Any

import pytest

from tests.checker import Client, Ledger, Publication, judge, marks

TOPIC = "project:p1"


class Story:
    """A publisher and one client, in the order in which the test tells it; every step takes a second."""

    def __init__(self, since: str | None = None, *, plain: bool = False) -> None:
        self.now = 0.0
        self.seq = 0
        self.ledger = Ledger()
        self.client = Client("viewer", plain=plain)
        self._since = since

    def open(self, **welcome: Any) -> None:
        self.now += 1
        self.client.opened(self.now, self.client.since() or self._since)
        if not self.client.plain:
            self.frame(
                {"type": "welcome", "epoch": "e", "pos": self.seq, "recovered": False}
                | {"user": {"epoch": "u", "pos": 0}, "all": {"epoch": "a", "pos": 0}}
                | welcome
            )

    def close(self) -> None:
        self.now += 1
        self.client.closed(self.now)

    def publish(self, key: str = "k", way: Any = "now", outcome: Any = "published", **more: Any) -> Publication:
        self.now += 1
        self.seq += 1
        made = self.ledger.ask(TOPIC, "said", way, key=key, at=self.now, **more)
        made.told(self.now + 0.5, outcome)
        return made

    def show(self, *said: Publication, seq: int | None = None, **more: Any) -> None:
        text = "".join(each.mark for each in said)
        self.frame({"type": "said", "text": text, **({} if seq == 0 else {"seq": seq or self.seq}), **more})

    def frame(self, frame: dict[str, Any]) -> list[dict[str, Any]]:
        self.now += 1
        return self.client.take(frame, self.now)

    def kinds(self) -> list[str]:
        return [violation.kind for violation in judge(self.ledger, [self.client], ended=self.now + 10)]


def test_what_is_shown_once_and_in_order_breaks_nothing() -> None:
    story = Story()
    story.open()
    for _ in range(3):
        story.show(story.publish(line="ada"))
    assert story.kinds() == []


def test_what_never_comes_is_lost() -> None:
    story = Story()
    story.open()
    story.publish()
    assert story.kinds() == ["lost"]


def test_what_was_published_before_the_page_was_open_is_asked_of_nobody() -> None:
    story = Story()
    story.publish()
    story.open()
    assert story.kinds() == []


def test_whoever_asks_for_all_is_owed_what_was_before() -> None:
    story = Story(since="0")
    story.publish()
    story.open(pos=0, recovered=True)
    assert story.kinds() == ["cut"]


def test_nobody_is_owed_what_the_broker_forgot() -> None:
    story = Story(since="0")
    story.publish()
    story.ledger.forgotten.append(story.now + 0.9)
    story.open(pos=0, recovered=True)
    assert story.kinds() == []


def test_a_resync_covers_what_was_published_before_it_and_nothing_after() -> None:
    story = Story()
    story.open()
    story.publish()
    story.frame({"type": "resync", "epoch": "f", "pos": 0, "reason": "new"})
    assert story.kinds() == []
    story.publish()
    assert story.kinds() == ["lost"]


def test_a_resync_of_another_topic_covers_nothing() -> None:
    story = Story()
    story.open()
    story.publish()
    story.frame({"type": "resync", "epoch": "f", "pos": 0, "reason": "new", "topic": "user"})
    assert story.kinds() == ["lost"]


@pytest.mark.parametrize("outcome", ["unknown", "refused"])
def test_what_may_not_stand_is_owed_to_nobody(outcome: str) -> None:
    story = Story()
    story.open()
    story.publish(outcome=outcome)
    assert story.kinds() == []


def test_what_was_refused_is_not_shown() -> None:
    story = Story()
    story.open()
    story.show(story.publish(outcome="refused"))
    assert story.kinds() == ["phantom"]


def test_a_newer_value_stands_for_the_older_ones_and_not_the_other_way() -> None:
    story = Story()
    story.open()
    first, second = story.publish(way="latest"), story.publish(way="latest")
    story.show(second)
    assert story.kinds() == []
    other = Story()
    other.open()
    first, second = other.publish(way="latest"), other.publish(way="latest")
    other.show(first, seq=1)
    assert other.kinds() == ["lost"]


def test_what_is_settled_need_not_be_shown() -> None:
    story = Story()
    story.open()
    story.publish("progress", "latest")
    story.show(story.publish("done", settles="progress"))
    assert story.kinds() == []


def test_a_piece_that_comes_again_inside_a_joined_one_is_seen() -> None:
    story = Story()
    story.open()
    first, second, third = (story.publish("text", "append") for _ in range(3))
    story.show(first, second, seq=2)
    story.show(second, third, seq=3)
    assert story.kinds() == ["twice"]


def test_what_comes_again_under_its_number_is_dropped_by_the_client() -> None:
    story = Story()
    story.open()
    said = story.publish()
    story.show(said)
    story.show(said)
    assert story.kinds() == []


def test_after_a_resync_a_piece_may_come_again() -> None:
    story = Story()
    story.open()
    said = story.publish("text", "append")
    story.show(said)
    story.frame({"type": "resync", "epoch": "f", "pos": 0, "reason": "new"})
    story.show(said)
    assert story.kinds() == []


def test_an_older_value_after_a_newer_one_is_out_of_order() -> None:
    story = Story()
    story.open()
    first, second = story.publish(way="latest"), story.publish(way="latest")
    story.show(second, seq=2)
    story.show(first, seq=3)
    assert story.kinds() == ["order"]


def test_what_is_never_held_keeps_its_publishers_order() -> None:
    story = Story()
    story.open()
    first, second = story.publish("a", line="ada"), story.publish("b", line="ada")
    story.show(second, seq=2, pos=0)
    story.show(first, seq=1)
    assert story.kinds() == ["order"]


def test_a_text_without_its_beginning_is_torn_for_one_who_asked_for_all() -> None:
    story = Story(since="0")
    pieces = [story.publish("text", "append") for _ in range(3)]
    story.open(pos=1, recovered=True)
    story.show(*pieces[1:])
    assert "cut" in story.kinds()  # its first piece


def test_a_page_that_joins_in_mid_stream_begins_there_and_has_no_holes() -> None:
    story = Story()
    pieces = [story.publish("text", "append") for _ in range(4)]
    story.open(pos=1)
    story.show(pieces[1], seq=2)
    story.show(pieces[3], seq=4)
    assert story.kinds() == ["torn"]


def test_a_probe_that_does_not_come_makes_its_client_deaf_also_a_plain_one() -> None:
    for plain in (False, True):
        story = Story(plain=plain)
        story.open()
        story.publish(probe=True)
        assert story.kinds() == ["deaf"]


def test_an_event_that_is_not_kept_is_owed_to_those_who_are_there() -> None:
    story = Story()
    story.open()
    story.publish(way="passing")
    assert story.kinds() == ["passing"]
    later = Story()
    later.publish(way="passing")
    later.open()
    assert later.kinds() == []


def test_what_counts_as_seen_and_never_was_is_told_as_the_cause() -> None:
    story = Story()
    story.open(pos=100)
    said = story.publish()
    story.show(said)
    (violation,) = judge(story.ledger, [story.client], ended=story.now)
    assert violation.kind == "lost"
    assert "dropped: number 1 counts as seen at e:100" in violation.what


def test_whoever_is_away_at_the_end_is_owed_nothing_yet() -> None:
    story = Story()
    story.open()
    story.publish()
    story.close()
    assert story.kinds() == []


def test_what_was_missed_between_two_connections_is_owed() -> None:
    story = Story()
    story.open()
    story.close()
    story.publish()
    story.open(pos=0, recovered=True)
    assert story.kinds() == ["lost"]


def test_marks_are_found_wherever_they_stand() -> None:
    assert marks({"type": "x", "a": {"b": ["<k:1>", "c"]}, "d": "<l.m:22><k:3>"}) == [("k", 1), ("l.m", 22), ("k", 3)]


def test_what_is_held_must_not_come_after_what_was_said_later_about_the_same_thing() -> None:
    story = Story()
    story.open()
    progress = story.publish("progress", "latest", about="step")
    completed = story.publish("completed", "now", about="step")
    story.show(completed, pos=0)
    story.show(progress, seq=1)
    assert story.kinds() == ["order"]


def test_what_comes_only_with_the_probe_is_late() -> None:
    story = Story()
    story.open()
    said, settled = story.publish(), story.now + 0.7
    probe = story.publish("probe", probe=True)
    story.show(said, seq=1)
    story.show(probe)
    found = judge(story.ledger, [story.client], ended=story.now + 10, settled=settled)
    assert [violation.kind for violation in found] == ["late"]
