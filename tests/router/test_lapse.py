"""What has begun and is not heard of any more is closed after a deadline."""

from msgspec.structs import replace

from plugins.chat import ChatResponseChunk, chat_response_chunk
from plugins.step import (
    StepCompleted,
    StepError,
    StepProgress,
    StepStarted,
    step_completed,
    step_progress,
    step_started,
)
from router import Lapse, Now, Plugin, Policy
from router.lapse import Lapses
from router.testing import Clock, envelope


class Stage:
    def __init__(self):
        self.clock = Clock()
        self.lapses = Lapses(self.clock)
        self.seq = 0

    def tell(self, plugin, event):
        self.seq += 1
        self.lapses.note(replace(envelope(plugin, event, seq=self.seq), published_at=self.clock.now))

    def after(self, seconds):
        self.clock.move(seconds)
        return [closing.event for closing in self.lapses.due()]


def test_a_step_whose_worker_dies_fails_after_the_deadline():
    stage = Stage()
    stage.tell(step_started, StepStarted(step_id="a"))
    assert stage.after(899) == []
    (closed,) = stage.after(1)
    assert isinstance(closed, StepError)
    assert closed.step_id == "a"
    assert stage.after(10_000) == []


def test_progress_is_a_sign_of_life():
    stage = Stage()
    stage.tell(step_started, StepStarted(step_id="a"))
    for done in range(5):
        assert stage.after(800) == []
        stage.tell(step_progress, StepProgress(step_id="a", progress=done / 10))
    assert len(stage.after(900)) == 1


def test_a_step_that_ends_is_not_closed_again():
    stage = Stage()
    stage.tell(step_started, StepStarted(step_id="a"))
    stage.tell(step_started, StepStarted(step_id="b"))
    stage.tell(step_completed, StepCompleted(step_id="a", result={}))
    assert [event.step_id for event in stage.after(1000)] == ["b"]
    assert len(stage.lapses) == 0


def test_an_answer_whose_author_dies_is_completed_with_a_reason():
    stage = Stage()
    stage.tell(chat_response_chunk, ChatResponseChunk(content="Here ", is_complete=False, stream_id="x"))
    stage.tell(chat_response_chunk, ChatResponseChunk(content="done", is_complete=True, stream_id="y"))
    assert stage.after(60) == [ChatResponseChunk(content="", is_complete=True, stream_id="x", reason="lost")]


def test_every_node_that_notices_names_the_closing_event_the_same():
    ids = set()
    for _ in range(2):
        stage = Stage()
        stage.tell(step_started, StepStarted(step_id="a"))
        stage.clock.move(900)
        ids |= {closing.message_id for closing in stage.lapses.due()}
    assert ids == {"lapse:step_started:1"}


def test_what_is_told_again_to_one_who_catches_up_opens_nothing():
    stage = Stage()
    started = replace(envelope(step_started, StepStarted(step_id="a"), seq=1), published_at=stage.clock.now)
    stage.lapses.note(replace(started, replay=True))
    assert stage.after(1000) == []


def test_a_topic_that_nobody_listens_to_is_not_judged_from_here():
    stage = Stage()
    stage.tell(step_started, StepStarted(step_id="a"))
    stage.lapses.forget("project:p1")
    assert stage.after(1000) == []


def test_a_closing_that_fails_keeps_no_other_stream_open(caplog):
    stage = Stage()
    broken = Plugin(StepStarted, Policy(deliver=Now(by=("step_id",)), lapse=Lapse(900.0, lambda _: 1 / 0)))
    stage.tell(broken, StepStarted(step_id="a"))
    stage.tell(step_started, StepStarted(step_id="b"))
    assert [event.step_id for event in stage.after(900)] == ["b"]
    assert "ZeroDivisionError" in caplog.text
