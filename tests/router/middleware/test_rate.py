"""How fast one user may send: by the node's own budget, then by the one that nodes share."""

import pytest

from plugins.chat import ChatMessage, chat_message
from router import Identity
from router.errors import RateLimited
from router.middleware.rate import RateLimit
from router.testing import Clock, envelope

ADA = Identity("ada", frozenset({"chat"}))


def said(leg="inbound", sender=ADA):
    return envelope(chat_message, ChatMessage(role="user", content="hello"), leg=leg, sender=sender)


class Shared:
    """The budget that nodes share; it answers what it is told to."""

    def __init__(self):
        self.asked = []
        self.wait = 0.0

    async def spend(self, user, cost, rate, burst):
        self.asked.append((user, cost, rate, burst))
        return self.wait


@pytest.fixture
def shared():
    return Shared()


@pytest.fixture
def send(shared):
    limit = RateLimit(Clock(), rate=10.0, burst=2.0, spend=shared.spend)
    passed = []

    async def forward(one):
        passed.append(one)

    async def send(**options):
        await limit(said(**options), forward)
        return len(passed)

    return send


async def test_what_passes_here_is_taken_from_the_shared_budget_too(send, shared):
    assert await send() == 1
    assert shared.asked == [("ada", 1.0, 10.0, 2.0)]


async def test_what_does_not_pass_here_is_not_asked_for(send, shared):
    for _ in range(2):
        await send()
    with pytest.raises(RateLimited) as refused:
        await send()
    assert refused.value.retry_after == pytest.approx(0.1)
    assert len(shared.asked) == 2


async def test_the_shared_budget_may_decline_and_tells_when_to_try_again(send, shared):
    shared.wait = 0.7
    with pytest.raises(RateLimited) as refused:
        await send()
    assert refused.value.retry_after == 0.7


async def test_nobody_can_have_the_shared_budget_asked_more_often_than_they_may_send(send, shared):
    shared.wait = 0.7
    for _ in range(20):
        with pytest.raises(RateLimited):
            await send()
    assert len(shared.asked) == 2


async def test_what_goes_out_and_what_backends_say_is_free(send, shared):
    for _ in range(5):
        await send(leg="outbound")
        await send(sender=None)
    assert shared.asked == []
