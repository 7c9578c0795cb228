"""One thing at a time in each topic, all topics side by side."""

import asyncio

import pytest

from router.lane import Lanes


class Record:
    def __init__(self):
        self.done, self.faults = [], []
        self.lanes = Lanes(self.settle, lambda topic, error: self.faults.append((topic, type(error))))

    async def settle(self, topic):
        self.done.append(f"settle {topic}")

    def job(self, name, gate=None):
        async def work():
            if gate is not None:
                await gate.wait()
            self.done.append(name)

        return work


async def test_jobs_of_a_topic_run_in_order_even_when_the_first_waits():
    record, gate = Record(), asyncio.Event()
    record.lanes.put("t", record.job("first", gate))
    record.lanes.put("t", record.job("second"))
    record.lanes.put("other", record.job("third"))
    await asyncio.sleep(0)
    assert record.done == ["third", "settle other"]
    gate.set()
    await record.lanes.idle()
    assert record.done == ["third", "settle other", "first", "second", "settle t"]


async def test_a_job_that_fails_is_reported_and_those_behind_it_run():
    record = Record()

    async def fail():
        raise KeyError

    record.lanes.put("t", fail)
    record.lanes.put("t", record.job("next"))
    await record.lanes.idle()
    assert record.faults == [("t", KeyError)]
    assert record.done == ["next", "settle t"]


async def test_a_job_that_is_awaited_returns_its_result_in_its_turn():
    record, gate = Record(), asyncio.Event()
    record.lanes.put("t", record.job("first", gate))

    async def answer():
        record.done.append("asked")
        return 42

    waiting = asyncio.create_task(record.lanes.run("t", answer))
    await asyncio.sleep(0)
    gate.set()
    assert await waiting == 42
    assert record.done[:2] == ["first", "asked"]


async def test_in_an_idle_topic_it_runs_here_and_now_and_its_error_is_the_callers():
    record = Record()

    async def fail():
        record.lanes.put("t", record.job("behind"))
        raise KeyError

    with pytest.raises(KeyError):
        await record.lanes.run("t", fail)
    await record.lanes.idle()
    assert record.done == ["behind", "settle t"]
    assert record.faults == []


async def test_a_job_that_cancels_itself_does_not_end_its_topic():
    record = Record()

    async def cancel():
        raise asyncio.CancelledError

    record.lanes.put("t", cancel)
    record.lanes.put("t", record.job("next"))
    await record.lanes.idle()
    assert record.done == ["next", "settle t"]
    assert record.faults == [("t", RuntimeError)]
