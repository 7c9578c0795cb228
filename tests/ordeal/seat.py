"""Whether all seats are free once everybody has left: as many may come in as the limits say, and not one more."""

import asyncio
import time
from contextlib import suppress

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

from tests.node import make_token
from tests.ordeal.schedule import OF_PROJECT, OF_USER, PROJECTS, USERS
from tests.ordeal.site import Site, project_of

__all__ = ["count_leaked"]

LEAST = 8.0
"""Seconds that seats have in any case: some leases of dead nodes."""


async def count_leaked(site: Site, *, until: float) -> list[str]:
    """Fill all seats; what is wrong with them, once `until` (of the monotonic clock) has come."""
    opened: list[ClientConnection] = []
    places = [(f"u{user}", (user + window) % PROJECTS) for user in range(USERS) for window in range(OF_USER)]
    for project in range(PROJECTS):
        more = OF_PROJECT - sum(each == project for _, each in places)
        places += [(f"v{project}-{number // OF_USER}", project) for number in range(more)]
    until = max(until, time.monotonic() + LEAST)
    try:
        while True:
            missing = [place for place in places if await _sit(site, *place, opened)]
            wrong = [f"no seat for {user} in p{project}" for user, project in missing]
            if not missing and not await _sit(site, "w", 0, opened):
                wrong = ["one more than there are seats was let in"]
                await opened.pop().close()
            if not wrong or time.monotonic() > until:
                return wrong
            places = missing
            await asyncio.sleep(0.5)
    finally:
        await asyncio.gather(*(connection.close() for connection in opened), return_exceptions=True)


async def _sit(site: Site, user: str, project: int, opened: list[ClientConnection]) -> int:
    """Open one more; 0, or the status of the refusal."""
    name = project_of(project)
    try:
        with suppress(ConnectionClosed):
            opened.append(
                await connect(
                    f"ws://127.0.0.1:{site.nodes[len(opened) % 2].port}/ws/project/{name}",
                    additional_headers={"Authorization": f"Bearer {make_token(user, name)}"},
                    compression=None,
                    ping_interval=None,
                    close_timeout=1,
                    open_timeout=5,
                    proxy=None,
                )
            )
            return 0
    except InvalidStatus as error:
        return error.response.status_code
    except (OSError, TimeoutError, InvalidHandshake, EOFError):
        pass
    return 1
