"""Who is speaking (Identity) and who shall hear it (Audience)."""

from typing import Final

from msgspec import Struct
from msgspec.structs import replace

__all__ = ["EVERYONE", "Audience", "Identity", "project_topic", "user_topic"]

EVERYONE: Final = "all"
"""The topic that every session listens to."""


def project_topic(project: str) -> str:
    """The topic of a project: everybody who has it open."""
    return f"project:{project}"


def user_topic(user: str) -> str:
    """The topic of one person: all connections of that user, whatever project they have open."""
    return f"user:{user}"


class Identity(Struct, frozen=True):
    """Who somebody proved to be, and what they may do in the project they opened."""

    user: str
    grants: frozenset[str] = frozenset()
    expires_at: float = float("inf")
    """Seconds since the epoch, as in the token's `exp`."""
    issuer: str | None = None
    token_id: str | None = None


class Audience(Struct, frozen=True):
    """Everybody in `topic` who holds all of one set of grants, none of another, and is not one of some sessions.

    It can only be narrowed, so no middleware can let in whom another kept out, and their order does not matter.
    It is a description: only the hub knows who is here, and grants bite at delivery, not at publish.
    """

    topic: str
    holding: frozenset[str] = frozenset()
    lacking: frozenset[str] = frozenset()
    without: frozenset[str] = frozenset()
    """Session ids that do not get it."""
    only: frozenset[str] | None = None
    """When given, nobody but these session ids gets it: replies."""

    def narrowed(
        self,
        *,
        holding: str | None = None,
        lacking: str | None = None,
        without: frozenset[str] = frozenset(),
        only: frozenset[str] | None = None,
    ) -> "Audience":
        """The part of this audience that also passes these tests."""
        return replace(
            self,
            holding=self.holding if holding is None else self.holding | {holding},
            lacking=self.lacking if lacking is None else self.lacking | {lacking},
            without=self.without | without,
            only=self.only if only is None else (only if self.only is None else self.only & only),
        )

    def admits(self, grants: frozenset[str]) -> bool:
        """Whether people with these grants belong to it (sessions left out are looked up one by one)."""
        return self.holding <= grants and not (self.lacking & grants)

    def includes(self, session: str, grants: frozenset[str]) -> bool:
        """Whether this one session belongs to it."""
        return self.admits(grants) and session not in self.without and (self.only is None or session in self.only)
