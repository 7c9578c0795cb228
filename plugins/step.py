"""Steps of a project's execution: started, on their way, done or failed."""

from typing import Annotated, Any

from msgspec import Meta, field

from router import Event, Lapse, Latest, Now, Plugin, Policy, timestamp


class StepStarted(Event, frozen=True, tag="step_started"):
    """A step has begun."""

    step_id: str
    timestamp: str = field(default_factory=timestamp)


class StepProgress(Event, frozen=True, tag="step_progress"):
    """A step moved on. `progress` is a fraction of 1."""

    step_id: str
    progress: Annotated[float, Meta(ge=0, le=1)]
    message: str | None = None


class StepCompleted(Event, frozen=True, tag="step_completed"):
    """A step is done. `result`, where there is one, tells about the data and refers to it; it is not the data."""

    step_id: str
    result: dict[str, Any] | None = None
    timestamp: str = field(default_factory=timestamp)


class StepError(Event, frozen=True, tag="step_error"):
    """A step failed. `error` is for people."""

    step_id: str
    error: str
    timestamp: str = field(default_factory=timestamp)


def lost(last: StepStarted | StepProgress) -> StepError:
    """What is told of a step whose worker is not heard of any more."""
    return StepError(step_id=last.step_id, error="No sign of life from the worker: the step is taken to have failed")


STEP = ("step_id",)
SILENCE = Lapse(after=900.0, close=lost)
"""A worker that computes for long says so by progress, at least every quarter of an hour."""

step_started = Plugin(StepStarted, Policy(deliver=Now(by=STEP), lapse=SILENCE))
step_progress = Plugin(StepProgress, Policy(deliver=Latest(by=STEP), lapse=SILENCE))
step_completed = Plugin(StepCompleted, Policy(deliver=Now(by=STEP), settles=(StepProgress,)))
step_error = Plugin(StepError, Policy(deliver=Now(by=STEP), settles=(StepProgress,)))
