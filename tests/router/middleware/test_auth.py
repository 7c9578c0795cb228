"""Tokens, identities and their expiry, without sockets. What the door makes of them is in tests/journeys/test_door.py."""

import math
import time
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from plugins.step import StepStarted, step_started
from router.audience import Identity
from router.envelope import Envelope
from router.errors import CloseCode, Disconnect, RateLimited, SetupError
from router.middleware.auth import Auth, Authenticator, Tokens
from router.testing import Clock, envelope
from router.wire import AuthRefresh
from tests.node import KEY, make_token

RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
PRIVATE: dict[str, Any] = {
    "RS256": RSA,
    "PS256": RSA,
    "ES256": ec.generate_private_key(ec.SECP256R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
}


def pem(private: Any) -> str:
    return private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def tokens(key: str = KEY, *algorithms: str, **options: Any) -> Tokens:
    return Tokens(key, algorithms or ("HS256",), **{"clock": time.time, **options})


def refused(reader: Tokens, token: str | None) -> str:
    """The reason why `token` is refused, which is always 4401."""
    with pytest.raises(Disconnect) as found:
        reader.read(token)
    assert found.value.code == CloseCode.UNAUTHENTICATED
    assert found.value.__cause__ is None, "PyJWT's own exceptions quote what they were given"
    return found.value.reason


# -- tokens


def test_a_token_says_who_one_is_and_what_one_may_where():
    expires = int(time.time()) + 600
    claims = tokens().read(
        make_token("ada", projects={"p1": ["view", "chat"], "*": ["operate"]}, exp=expires, iss="id", jti="t1")
    )
    assert (claims.user, claims.expires_at, claims.issuer, claims.token_id) == ("ada", expires, "id", "t1")
    assert claims.grants("p1") == {"view", "chat", "operate"}
    assert claims.grants("p2") == {"operate"}


def test_a_token_without_projects_grants_nothing():
    assert tokens().read(make_token(projects=None)).grants("p1") == frozenset()


def test_odd_issuers_and_ids_are_taken_as_none():
    claims = tokens().read(make_token(jti=None))
    assert (claims.issuer, claims.token_id) == (None, None)


@pytest.mark.parametrize("algorithm", PRIVATE)
def test_a_public_key_verifies_what_its_private_key_signed(algorithm):
    private = PRIVATE[algorithm]
    payload = jwt.decode(make_token(), options={"verify_signature": False})
    reader = tokens(pem(private), algorithm)
    assert reader.read(jwt.encode(payload, private, algorithm=algorithm)).user == "ada"
    assert refused(reader, make_token()) == "token invalid: its algorithm is not among `jwt_algorithms`"


def test_one_key_may_serve_several_algorithms_of_its_kind():
    reader = tokens(pem(RSA), "RS256", "PS256")
    payload = jwt.decode(make_token(), options={"verify_signature": False})
    for algorithm in ("RS256", "PS256"):
        assert reader.read(jwt.encode(payload, RSA, algorithm=algorithm)).user == "ada"
    assert (
        refused(reader, jwt.encode(payload, RSA, algorithm="RS512"))
        == "token invalid: its algorithm is not among `jwt_algorithms`"
    )


def test_a_key_in_a_file_is_that_files_text_without_the_newline(tmp_path):
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    assert tokens(f"@{file}").read(make_token()).user == "ada"


def test_a_clock_that_is_a_little_slow_does_not_lock_people_out():
    reader = tokens(leeway=10.0)
    now = int(time.time())
    assert reader.read(make_token(iat=now + 5, nbf=now + 5)).user == "ada"
    assert reader.read(make_token(exp=now - 5)).expires_at == now - 5
    assert refused(reader, make_token(exp=now - 15)) == "token expired"
    assert (
        refused(reader, make_token(iat=now + 60))
        == "token invalid: it was issued in the future, so some clock is wrong"
    )


def test_no_reason_quotes_the_token():
    reader = tokens(issuer="https://id", audience="router")
    good = make_token()
    for bad in (
        "x",
        "a.b.c",
        good,
        good[:-4],
        good + "x",
        good.replace(".", "..", 1),
        make_token(sub=5),
        "\ud800",
        "é" * 9,
    ):
        reason = refused(reader, bad)
        assert all(part not in reason for part in bad.split(".") if len(part) > 1)


def test_the_longest_life_is_counted_from_when_it_was_issued():
    clock = Clock(time.time())
    reader = tokens(clock=clock, max_lifetime=60.0)
    assert reader.read(make_token(exp=int(clock()) + 86_400)).expires_at == int(clock()) + 60
    assert reader.read(make_token(exp=int(clock()) + 30)).expires_at == int(clock()) + 30


@pytest.mark.parametrize("missing", [None, ""])
def test_no_token_at_all_is_said_so(missing):
    assert refused(tokens(), missing) == "token missing"


# -- keys that cannot work


@pytest.mark.parametrize(
    ("key", "algorithms", "text"),
    [
        pytest.param(KEY, (), "ROUTER_JWT_ALGORITHMS) is empty; name at least one", id="no algorithm"),
        pytest.param(KEY, ("none",), "names `none`, which cannot be used", id="none"),
        pytest.param(KEY, ("HS256", "none"), "names `none`, which cannot be used", id="none beside another"),
        pytest.param(KEY, ("HS257",), "names `HS257`, which cannot be used", id="unknown"),
        pytest.param(KEY, ("RS256",), "`jwt_key` is a secret, but `jwt_algorithms` is RS256", id="secret for RS256"),
        pytest.param(pem(RSA), ("HS256",), "`jwt_key` is a public key, but", id="public key for HS256"),
        pytest.param(pem(RSA), ("RS256", "HS256"), "`jwt_key` is a public key, but", id="both kinds"),
        pytest.param("-----BEGIN NONSENSE", ("RS256",), "is no public key in PEM form", id="no PEM"),
        pytest.param(
            PRIVATE["RS256"].private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode(),
            ("RS256",),
            "is no public key in PEM form",
            id="the private key",
        ),
        pytest.param("x" * 31, ("HS256",), "is shorter than 32 bytes; make one: openssl rand -hex 32", id="short"),
        pytest.param("@/nonexistent", ("HS256",), "names a file that cannot be read: ", id="no such file"),
    ],
)
def test_a_key_that_cannot_work_is_told_before_anybody_connects_and_never_quoted(key, algorithms, text):
    with pytest.raises(SetupError) as found:
        Tokens(key, algorithms, clock=time.time)
    assert text in str(found.value)
    assert key not in str(found.value)


def test_a_key_file_that_is_no_text_is_told_too(tmp_path):
    file = tmp_path / "key"
    file.write_bytes(b"\xff" * 32)
    with pytest.raises(SetupError, match=r"ROUTER_JWT_KEY\) names a file that cannot be read"):
        tokens(f"@{file}")


def test_a_public_key_of_another_kind_than_the_algorithm_is_told():
    with pytest.raises(SetupError):
        tokens(pem(RSA), "ES256")


# -- who may


async def test_without_a_function_the_tokens_word_counts():
    authenticate = Authenticator(tokens())
    expires = int(time.time()) + 600
    identity = await authenticate(make_token("ada", "p1", ("view", "chat"), exp=expires, iss="id", jti="t1"), "p1")
    assert identity == Identity("ada", frozenset({"view", "chat"}), expires, "id", "t1")
    with pytest.raises(Disconnect, match="4403 not allowed to see this project"):
        await authenticate(make_token(project="p1"), "p2")


@pytest.mark.parametrize(
    ("answer", "grants"),
    [
        (True, {"view", "edit"}),
        ({"view"}, {"view"}),
        (["view", "chat"], {"view", "chat"}),
        (frozenset({"view"}), {"view"}),
        ((grant for grant in ("view", "x")), {"view", "x"}),
    ],
)
async def test_the_functions_answer_becomes_the_grants(answer, grants):
    authenticate = Authenticator(tokens(), lambda user, project: answer)
    assert (await authenticate(make_token(grants=("edit",)), "p1")).grants == grants


@pytest.mark.parametrize("answer", [False, [], set(), ["chat"]])
async def test_without_view_nobody_gets_in_whoever_says_so(answer):
    authenticate = Authenticator(tokens(), lambda user, project: answer)
    with pytest.raises(Disconnect) as found:
        await authenticate(make_token(), "p1")
    assert found.value.code == CloseCode.FORBIDDEN


async def test_none_means_no_such_project_and_anything_else_is_the_applications_mistake():
    async def none(user: Identity, project: str) -> None:
        assert (user.user, project) == ("ada", "p1")

    with pytest.raises(Disconnect) as found:
        await Authenticator(tokens(), none)(make_token(), "p1")
    assert found.value.code == CloseCode.NO_SUCH_PROJECT
    for odd in ("view", 5, object()):
        with pytest.raises(SetupError, match=rf"`permissions` answered {type(odd).__name__}; it answers True"):
            await Authenticator(tokens(), lambda user, project, odd=odd: odd)(make_token(), "p1")


async def test_the_function_is_not_asked_about_people_without_a_valid_token():
    def never(user: Identity, project: str) -> bool:
        raise AssertionError

    with pytest.raises(Disconnect, match="4401"):
        await Authenticator(tokens(), never)("garbage", "p1")


# -- the middleware

ADA = Identity("ada", frozenset({"view"}), 1100.0, "id")


def inbound(event: Any = None, sender: Identity = ADA) -> Envelope:
    return envelope(step_started, event or StepStarted(step_id="s"), leg="inbound", sender=sender)


def nothing(_: str) -> None:
    """Where no session is to be suspended."""


class Passed:
    """Stands in for the rest of the pipeline, and for whoever suspends sessions; notes what came in which order."""

    def __init__(self) -> None:
        self.envelopes: list[Envelope] = []
        self.suspended: list[str] = []

    async def __call__(self, passed: Envelope) -> None:
        self.envelopes.append(passed)


async def nobody(token: str | None, project: str) -> Identity:
    raise AssertionError("nobody refreshes here")


async def test_a_message_passes_until_its_senders_token_expires():
    clock, passed = Clock(1099.9), Passed()
    auth = Auth(nobody, clock, passed.suspended.append)
    message = inbound()
    await auth(message, passed)
    assert passed.envelopes == [message]
    clock.now = 1100.0
    with pytest.raises(Disconnect, match="4401 token expired"):
        await auth(message, passed)
    assert len(passed.envelopes) == 1


async def test_expired_sessions_are_suspended_once_before_a_message_goes_out_unless_they_refreshed_or_left():
    clock, passed = Clock(0.0), Passed()
    auth = Auth(nobody, clock, passed.suspended.append)
    for session, expires_at in (("a", 10.0), ("b", 10.0), ("c", 20.0), ("for ever", math.inf), ("gone", 10.0)):
        auth.watch(session, expires_at)
    auth.watch("b", 30.0)
    auth.forget("gone")
    message = envelope(step_started, StepStarted(step_id="s"))
    for now, suspended in ((9.9, []), (10.0, ["a"]), (11.0, []), (20.0, ["c"]), (30.0, ["b"]), (1e12, [])):
        clock.now = now
        passed.suspended.clear()
        await auth(message, passed)
        assert passed.suspended == suspended
        assert passed.envelopes[-1] == message


async def test_a_refresh_goes_on_with_the_new_identity_for_the_same_project():
    asked, passed = [], Passed()
    fresh = Identity("ada", frozenset({"view", "chat"}), 2000.0, "id")

    async def authenticate(token: str | None, project: str) -> Identity:
        asked.append((token, project))
        return fresh

    auth = Auth(authenticate, Clock(1200.0), nothing)
    await auth(inbound(AuthRefresh(token="new")), passed)  # the old one expired at 1100; this is its grace
    assert asked == [("new", "p1")]
    assert passed.envelopes[0].sender == fresh


@pytest.mark.parametrize("fresh", [Identity("eve", issuer="id"), Identity("ada", issuer="other"), Identity("ada")])
async def test_a_refresh_for_somebody_else_ends_the_connection(fresh):
    async def authenticate(token: str | None, project: str) -> Identity:
        return fresh

    passed = Passed()
    with pytest.raises(Disconnect, match="4401 the new token is for another user"):
        await Auth(authenticate, Clock(), nothing)(inbound(AuthRefresh(token="new")), passed)
    assert passed.envelopes == []


async def test_tokens_are_verified_once_a_second_for_each_session_good_or_bad():
    clock = Clock()
    calls = 0

    async def authenticate(token: str | None, project: str) -> Identity:
        nonlocal calls
        calls += 1
        return ADA

    auth = Auth(authenticate, clock, nothing)
    refresh = inbound(AuthRefresh(token="new"))
    await auth(refresh, Passed())
    clock.move(0.4)
    with pytest.raises(RateLimited) as found:
        await auth(refresh, Passed())
    assert found.value.retry_after == pytest.approx(0.6)
    clock.move(0.6)
    await auth(refresh, Passed())
    assert calls == 2
    auth.forget("session-1")
    await auth(refresh, Passed())
    assert calls == 3, "what is known of a session that left is forgotten"
