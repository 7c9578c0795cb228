"""Whoever comes back in the middle of deliveries gets each event once."""

import json

from router import Audience, Event, Identity, Plugin
from router.brokers.memory import MemoryBroker
from router.catalog import Catalog, Found
from router.flow import Router
from router.session import Session, topics_of
from router.testing import Clock


class Said(Event, frozen=True, tag="said"):
    number: int


class Sink:
    framed = False

    def __init__(self):
        self.numbers = []

    def write(self, data):
        self.numbers.append(json.loads(data)["number"])

    def backlog(self):
        return 0


async def test_one_who_reads_again_between_two_deliveries_gets_neither_twice():
    clock = Clock()
    catalog = Catalog([Found(Plugin(Said), "tests")])
    router = Router(catalog, MemoryBroker(clock=clock), None, clock=clock, wall=clock)
    await router.start()
    sinks = [Sink(), Sink()]
    for name, sink in zip(("quick", "slow"), sinks, strict=True):
        identity = Identity("ada", frozenset({"view"}))
        session = Session(name, identity, "p", plain=True, topics=topics_of("p", "ada"))
        await router.open(session, sink, None, 30.0)
    router.slow(session)
    # All three wait for the topic's turn: a delivery, the one who comes back, a delivery.
    await router.publish(Audience("project:p"), Said(number=1))
    router.resume(session)
    await router.publish(Audience("project:p"), Said(number=2))
    await router._lanes.idle()
    assert [sink.numbers for sink in sinks] == [[1, 2], [1, 2]]
