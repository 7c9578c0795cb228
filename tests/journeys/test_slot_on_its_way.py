"""A slot that moves key by key, as `redis-cli --cluster reshard` moves it: what is there already stays whole."""

from contextlib import suppress

from msgspec.structs import replace

from plugins.step import StepStarted
from router import wire
from router.backend import Backend
from router.brokers.layout import names_of
from router.errors import Unavailable
from router.presence import PLUGINS, PresenceJoined
from router.testing import envelope

PLUGIN = next(plugin for plugin in PLUGINS if plugin.event is PresenceJoined)


async def test_an_event_without_a_number_that_cannot_be_kept_while_its_slot_moves_is_not_counted(
    redis_cluster, cluster_url
):
    """The keys move one after the other; an event is published when only some have."""
    names = names_of("project:p1")
    async with Backend(cluster_url) as backend:
        joined = envelope(PLUGIN, PresenceJoined(user_id="ada"))
        joined = replace(joined, payload=wire.encode(joined.event))
        for _ in range(3):
            await backend._post.publish(joined)
        await backend.publish("p1", StepStarted(step_id="s"))
        here = redis_cluster.owner(names.meta)
        there = next(i for i in range(3) if i != here)
        slot = redis_cluster._slot(names.meta)
        ids = [redis_cluster._ask(i, "CLUSTER", "MYID") for i in (here, there)]
        redis_cluster._ask(there, "CLUSTER", "SETSLOT", slot, "IMPORTING", ids[0])
        redis_cluster._ask(here, "CLUSTER", "SETSLOT", slot, "MIGRATING", ids[1])
        port = redis_cluster.nodes[there].port
        try:
            redis_cluster._ask(here, "MIGRATE", "127.0.0.1", port, names.loose, 0, 5000)
            before = redis_cluster._ask(here, "HGET", names.meta, "loose")
            with suppress(Unavailable):
                await backend._post.publish(joined)
                raise AssertionError("it is neither here nor there, so it cannot be published now")
            # Counted without being kept, it would be a gap, and everybody would be told to reload.
            assert redis_cluster._ask(here, "HGET", names.meta, "loose") == before
        finally:
            for key in redis_cluster._ask(here, "CLUSTER", "GETKEYSINSLOT", slot, 100):
                redis_cluster._ask(here, "MIGRATE", "127.0.0.1", port, key, 0, 5000, "REPLACE")
            for i in (there, here):
                redis_cluster._ask(i, "CLUSTER", "SETSLOT", slot, "NODE", ids[1])
