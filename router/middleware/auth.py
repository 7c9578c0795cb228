"""Who somebody is: reads tokens, refreshes identities in place, and ends those that have expired."""

import heapq
import inspect
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from jwt.algorithms import get_default_algorithms
from msgspec import Struct
from msgspec.structs import replace

from router.audience import Identity
from router.envelope import Envelope
from router.errors import CloseCode, Disconnect, RateLimited, SetupError
from router.pipeline import Forward
from router.wire import AuthRefresh

__all__ = ["Auth", "Authenticator", "Claims", "Permissions", "Tokens", "read_key"]

MIN_SECRET = 32
"""Bytes of an HMAC secret: as many as the hash gives (RFC 7518 section 3.2)."""
MAX_USER = 128

Permissions: TypeAlias = Callable[[Identity, str], Any]
"""`(user, project)` -> True, False, a collection of grants, or None for "no such project". May be async."""


@lru_cache(maxsize=4096)
def _shared(grants: frozenset[str]) -> frozenset[str]:
    """One object for equal grants: there are few kinds of people, and many of each."""
    return grants


class Claims(Struct, frozen=True):
    """What a valid token says."""

    user: str
    expires_at: float
    projects: Mapping[str, frozenset[str]]
    issuer: str | None = None
    token_id: str | None = None

    def grants(self, project: str) -> frozenset[str]:
        """Grants in one project, those for `*` included."""
        return _shared(self.projects.get(project, frozenset()) | self.projects.get("*", frozenset()))


_WRONG: dict[type[Exception], str] = {
    jwt.InvalidSignatureError: "token invalid: it was signed with another key than the router's",
    jwt.DecodeError: "token invalid: it is no JWT",
    jwt.ImmatureSignatureError: "token invalid: it was issued in the future, so some clock is wrong",
    jwt.InvalidAlgorithmError: "token invalid: its algorithm is not among `jwt_algorithms`",
    jwt.InvalidAudienceError: "token invalid: it is for another audience",
    jwt.InvalidIssuerError: "token invalid: it is from another issuer",
}


class Tokens:
    """Verifies JWTs with one key and a fixed list of algorithms; the token has no say in either (RFC 8725 3.1)."""

    def __init__(
        self,
        key: str,
        algorithms: tuple[str, ...] = ("HS256",),
        *,
        issuer: str | None = None,
        audience: str | None = None,
        leeway: float = 10.0,
        max_lifetime: float = 24 * 3600.0,
        clock: Callable[[], float],
    ) -> None:
        self._key = _load_key(key, algorithms)
        self._algorithms = list(algorithms)
        self._issuer = issuer
        self._audience = audience
        self._max_lifetime = max_lifetime
        self._clock = clock
        self._leeway = leeway
        self._jwt = jwt.PyJWT(options={"enforce_minimum_key_length": True})

    def read(self, token: str | None) -> Claims:
        """The claims of `token`. Raises `Disconnect` 4401 with a reason that never quotes the token."""
        if not token:
            raise Disconnect(CloseCode.UNAUTHENTICATED, "token missing")
        required = ["sub", "exp", "iat", *(["iss"] if self._issuer else []), *(["aud"] if self._audience else [])]
        try:
            claims = self._jwt.decode(
                token,
                self._key,
                algorithms=self._algorithms,
                issuer=self._issuer,
                audience=self._audience,
                leeway=self._leeway,
                options={"require": required, "verify_aud": self._audience is not None},
            )
        except jwt.ExpiredSignatureError:
            raise Disconnect(CloseCode.UNAUTHENTICATED, "token expired") from None
        except jwt.MissingRequiredClaimError as error:
            raise Disconnect(CloseCode.UNAUTHENTICATED, f"token has no claim {error.claim}") from None
        except Exception as error:  # PyJWT lets TypeError, NotImplementedError and others through for odd tokens
            what = _WRONG.get(type(error), f"token invalid: {type(error).__name__}")
            raise Disconnect(CloseCode.UNAUTHENTICATED, what) from None
        return self._claims(claims)

    def _claims(self, claims: dict[str, Any]) -> Claims:
        user, expires = claims["sub"], claims["exp"]
        if not isinstance(user, str) or not 0 < len(user) <= MAX_USER or not _is_text(user) or user in (".", ".."):
            raise Disconnect(CloseCode.UNAUTHENTICATED, f"token claim sub is no text of 1 to {MAX_USER} characters")
        # A `exp` of 1e300 or "1700000000" passes PyJWT and would break every timer after it.
        if isinstance(expires, bool) or not (
            isinstance(expires, int) or (isinstance(expires, float) and math.isfinite(expires))
        ):
            raise Disconnect(CloseCode.UNAUTHENTICATED, "token claim exp is no number of seconds")
        issued = claims["iat"] if isinstance(claims["iat"], int | float) else self._clock()
        expires_at = float(min(expires, issued + self._max_lifetime, self._clock() + self._max_lifetime))
        if expires_at + self._leeway <= self._clock():
            raise Disconnect(CloseCode.UNAUTHENTICATED, "token expired")
        issuer, token_id = claims.get("iss"), claims.get("jti")
        return Claims(
            user=user,
            expires_at=expires_at,
            projects=_projects(claims.get("projects", {})),
            issuer=issuer if isinstance(issuer, str) else None,
            token_id=token_id if isinstance(token_id, str) else None,
        )


def _is_text(value: str) -> bool:
    """Whether it can be written as UTF-8; JSON can hold half a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _projects(value: object) -> dict[str, frozenset[str]]:
    wrong = Disconnect(CloseCode.UNAUTHENTICATED, 'token claim projects is not {"<project>": ["view", ...]}')
    if not isinstance(value, dict):
        raise wrong
    for grants in value.values():
        if not isinstance(grants, list) or not all(isinstance(grant, str) for grant in grants):
            raise wrong
    return {project: frozenset(grants) for project, grants in value.items()}


_KINDS: dict[str, tuple[type, ...]] = {
    "RS": (rsa.RSAPublicKey,),
    "PS": (rsa.RSAPublicKey,),
    "ES": (ec.EllipticCurvePublicKey,),
    "Ed": (ed25519.Ed25519PublicKey, ed448.Ed448PublicKey),
}


def read_key(key: str) -> str:
    """The key that a setting names: itself, or what is in the file after `@`. Raises `SetupError`."""
    if not key.startswith("@"):
        return key
    try:
        return Path(key[1:]).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeError) as error:
        raise SetupError(f"`jwt_key` (ROUTER_JWT_KEY) names a file that cannot be read: {error}") from None


def _load_key(key: str, algorithms: tuple[str, ...]) -> Any:
    """The key as an object, so that no connect pays for parsing it. `@file` reads it from a file."""
    if not algorithms:
        raise SetupError("`jwt_algorithms` (ROUTER_JWT_ALGORITHMS) is empty; name at least one, for example HS256")
    unknown = sorted(set(algorithms) - {"none"} - set(get_default_algorithms()))
    if "none" in algorithms or unknown:
        bad = "none" if "none" in algorithms else unknown[0]
        raise SetupError(f"`jwt_algorithms` (ROUTER_JWT_ALGORITHMS) names `{bad}`, which cannot be used")
    key = read_key(key)
    hmac = [algorithm for algorithm in algorithms if algorithm.startswith("HS")]
    is_pem = key.startswith("-----BEGIN")
    if is_pem == bool(hmac):
        kind, fit = ("a public key", "RS256, ES256 or EdDSA") if is_pem else ("a secret", "HS256")
        raise SetupError(f"`jwt_key` is {kind}, but `jwt_algorithms` is {', '.join(algorithms)}; with it goes {fit}")
    if is_pem:
        try:
            public = load_pem_public_key(key.encode())
        except (ValueError, UnsupportedAlgorithm):
            raise SetupError("`jwt_key` (ROUTER_JWT_KEY) is no public key in PEM form") from None
        for algorithm in algorithms:
            if not isinstance(public, _KINDS[algorithm[:2]]):
                raise SetupError(f"`jwt_key` is not the kind of public key that `jwt_algorithms` names: {algorithm}")
        return public
    if len(key.encode()) < MIN_SECRET:
        raise SetupError(
            f"`jwt_key` (ROUTER_JWT_KEY) is shorter than {MIN_SECRET} bytes; make one: openssl rand -hex 32"
        )
    return key


class Authenticator:
    """Tells who opens a project and with which grants: the token's word, or that of the application's own callable."""

    def __init__(self, tokens: Tokens, permissions: Permissions | None = None) -> None:
        self.tokens = tokens
        self._permissions = permissions

    async def __call__(self, token: str | None, project: str) -> Identity:
        """The identity of somebody who opens `project`. Raises `Disconnect` 4401, 4403 or 4404."""
        identity = await self.identify(token, project)
        if "view" not in identity.grants:
            raise Disconnect(CloseCode.FORBIDDEN, "not allowed to see this project")
        return identity

    async def identify(self, token: str | None, project: str) -> Identity:
        """Who it is, and what they may do in `project`, be it nothing. Raises `Disconnect` 4401 or 4404."""
        claims = self.tokens.read(token)
        grants = claims.grants(project)
        identity = Identity(claims.user, grants, claims.expires_at, claims.issuer, claims.token_id)
        if self._permissions is not None:
            identity = replace(identity, grants=await self._ask(self._permissions, identity, project))
        return identity

    @staticmethod
    async def _ask(permissions: Permissions, identity: Identity, project: str) -> frozenset[str]:
        answer = permissions(identity, project)
        if inspect.isawaitable(answer):
            answer = await answer
        if answer is None:
            raise Disconnect(CloseCode.NO_SUCH_PROJECT, "no such project")
        if isinstance(answer, bool):
            return identity.grants | {"view"} if answer else frozenset()
        if isinstance(answer, Iterable) and not isinstance(answer, str):
            return frozenset(answer)
        raise SetupError(f"`permissions` answered {type(answer).__name__}; it answers True, False, None or grants")


class Auth:
    """First in the list. Inbound: an expired sender is disconnected, an `auth_refresh` becomes a fresh identity.

    Outbound: sessions that have expired are reported to `suspend`, which takes them out of their rooms before this
    message reaches them. One that refreshes in time catches up on what it was not sent.
    """

    def __init__(
        self,
        authenticate: Callable[[str | None, str], Awaitable[Identity]],
        clock: Callable[[], float],
        suspend: Callable[[str], None],
        *,
        grace: float = 25.0,
        refresh_every: float = 1.0,
    ) -> None:
        self._authenticate = authenticate
        self._clock = clock
        self._suspend = suspend
        self.grace = grace
        self._refresh_every = refresh_every
        self._refreshed: dict[str, float] = {}
        self._expires: dict[str, float] = {}
        self._heap: list[tuple[float, str]] = []

    async def __call__(self, envelope: Envelope, forward: Forward) -> None:
        if envelope.leg == "outbound":
            self._suspend_expired()
            await forward(envelope)
            return
        sender = envelope.sender
        assert sender is not None
        if isinstance(envelope.event, AuthRefresh):
            envelope = replace(envelope, sender=await self._refresh(envelope, envelope.event, sender))
        elif sender.expires_at <= self._clock():
            raise Disconnect(CloseCode.UNAUTHENTICATED, "token expired")
        await forward(envelope)

    async def _refresh(self, envelope: Envelope, refresh: AuthRefresh, sender: Identity) -> Identity:
        session = envelope.session or ""
        now = self._clock()
        wait = self._refreshed.get(session, 0.0) + self._refresh_every - now
        if wait > 0:
            raise RateLimited("one token refresh a second is enough", retry_after=wait)
        self._refreshed[session] = now  # a signature takes up to 80 microseconds to verify: not as fast as one can ask
        fresh = await self._authenticate(refresh.token, envelope.topic.removeprefix("project:"))
        if (fresh.user, fresh.issuer) != (sender.user, sender.issuer):
            raise Disconnect(CloseCode.UNAUTHENTICATED, "the new token is for another user")
        return fresh

    def watch(self, session: str, expires_at: float) -> None:
        """Have `session` suspended when something is delivered after `expires_at` (seconds since the epoch)."""
        self._expires[session] = expires_at
        if len(self._heap) > 2 * len(self._expires) + 64:  # most of it is about sessions that are gone
            self._heap = [(at, name) for name, at in self._expires.items() if at != math.inf]
            heapq.heapify(self._heap)
        elif expires_at != math.inf:
            heapq.heappush(self._heap, (expires_at, session))

    def forget(self, session: str) -> None:
        """`session` is gone."""
        self._expires.pop(session, None)
        self._refreshed.pop(session, None)

    def _suspend_expired(self) -> None:
        """Looks at no session that has not expired."""
        while self._heap and self._heap[0][0] <= self._clock():
            expires_at, session = heapq.heappop(self._heap)
            if self._expires.get(session) == expires_at:
                self._suspend(session)
