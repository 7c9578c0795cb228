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


async def count_leaked(site: Site, *, until: float) -> list[str]:
    """Fill all seats; what is wrong with them, once `until` (of the monotonic clock) has come."""
    opened: list[ClientConnection] = []
    places = [(f"u{user}", (user + window) % PROJECTS) for user in range(USERS) for window in range(OF_USER)]
    for project in range(PROJECTS):
        more = OF_PROJECT - sum(each == project for _, each in places)
        places += [(f"v{project}-{number // OF_USER}", project) for number in range(more)]
    try:
        while True:
            refused = []
            for number, (user, project) in enumerate(places):
                status = await _sit(site, number, user, project, opened)
                if status:
                    refused.append((user, project, status))
            if not refused or time.monotonic() > until:
                break
            places = [(user, project) for user, project, _ in refused]
            await asyncio.sleep(0.5)
        wrong = [f"no seat for {user} in p{project}: {status}" for user, project, status in refused]
        if not wrong and not await _sit(site, 0, "w", 0, opened):
            wrong.append("one more than there are seats was let in")
        return wrong
    finally:
        await asyncio.gather(*(connection.close() for connection in opened), return_exceptions=True)


async def _sit(site: Site, number: int, user: str, project: int, opened: list[ClientConnection]) -> int:
    """Open one more; 0, or the status of the refusal."""
    name = project_of(project)
    try:
        with suppress(ConnectionClosed):
            opened.append(
                await connect(
                    f"ws://127.0.0.1:{site.nodes[number % 2].port}/ws/project/{name}",
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
