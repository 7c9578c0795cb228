"""Runs Lua scripts on the server, several in one round trip."""

from collections.abc import Sequence
from importlib.resources import files
from typing import Any, TypeAlias

from redis.asyncio import Redis
from redis.exceptions import NoScriptError

from router.errors import Unavailable

__all__ = ["Call", "Scripts"]

Call: TypeAlias = tuple[tuple[str, ...], tuple[Any, ...]]
"""Keys and arguments."""


class Scripts:
    """The scripts in `lua/`, by name. One that the server does not know (any more) is loaded."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._digests: dict[str, str] = {}

    async def run(self, name: str, calls: Sequence[Call]) -> list[Any]:
        """Run a script once for each call, in one round trip. What went wrong for one call is in its place."""
        for _ in range(2):
            digest = self._digests.get(name)
            if digest is None:
                source = files("router.brokers").joinpath("lua", f"{name}.lua").read_text(encoding="utf-8")
                digest = self._digests[name] = await self._redis.script_load(source)
            async with self._redis.pipeline(transaction=False) as pipeline:
                for keys, arguments in calls:
                    # `evalsha` of a pipeline asks first whether the script exists: one round trip more.
                    pipeline.execute_command("EVALSHA", digest, len(keys), *keys, *arguments)
                answers: list[Any] = await pipeline.execute(raise_on_error=False)
            if not any(isinstance(answer, NoScriptError) for answer in answers):
                return answers
            # A restarted server has forgotten its scripts; then it has run none of these.
            self._digests.pop(name, None)
        raise Unavailable("the broker does not keep its scripts")
