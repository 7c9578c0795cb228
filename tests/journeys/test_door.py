"""Who gets in, who is turned away and how, and how long they may stay."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import HMACAlgorithm
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from router.journal import JsonLines, Redact
from router.testing import Clock
from router.tracing import Tracing
from router.upkeep import Upkeep
from tests.node import KEY, Client, Node, make_token, run_node

CHAT = {"type": "chat_message", "role": "user", "content": "hello"}
OTHER_KEY = "another-secret-that-is-long-enough-too"


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def claims(**changes: Any) -> dict[str, Any]:
    now = int(time.time())
    return {"sub": "ada", "iat": now, "exp": now + 600, "projects": {"p1": ["view"]}, **changes}


@asynccontextmanager
async def knock(
    node: Node,
    query: str = "",
    *,
    path: str = "/ws/project/p1",
    protocols: tuple[str, ...] = ("router.v1",),
    **headers: str,
) -> AsyncIterator[Client]:
    """An attempt to connect, with nothing but what is given. Raises `InvalidStatus` when it is refused over HTTP."""
    url = f"ws://127.0.0.1:{node.port}{path}{query}"
    offered: Any = protocols or None
    async with connect(url, additional_headers=headers, subprotocols=offered, compression=None) as connection:
        yield Client(connection)


async def refusal(node: Node, query: str = "", **options: Any) -> httpx.Response:
    """The HTTP answer to an attempt that is refused without Origin."""
    with pytest.raises(InvalidStatus) as refused:
        async with knock(node, query, **options):
            pass
    response = refused.value.response
    return httpx.Response(
        response.status_code, headers=list(response.headers.raw_items()), content=bytes(response.body or b"")
    )


async def turned_away(node: Node, query: str = "", **options: Any) -> tuple[int, str]:
    """The close code and reason that a browser on a page of our own host gets."""
    async with knock(node, query, **{"Origin": node.url, **options}) as client:
        return await client.closed()


async def left(node: Node) -> None:
    """Wait until nobody is connected any more and all seats are free."""
    async with asyncio.timeout(10):
        while node.router.broker._connections:
            await asyncio.sleep(0)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def standing() -> AsyncIterator[Node]:
    """A node that many tests use one after the other, as they leave nothing behind in it."""
    async with run_node() as running:
        yield running


# -- where the token may be


@pytest.mark.asyncio(loop_scope="module")
async def test_a_token_comes_by_subprotocol_header_or_query(standing):
    token = make_token()
    for query, protocols, headers in (
        ("", ("router.v1", f"bearer.{token}"), {}),
        ("", ("router.v1",), bearer(token)),
        ("", ("router.v1",), {"authorization": f"bearer  {token} "}),
        (f"?token={token}", ("router.v1",), {}),
    ):
        async with knock(standing, query, protocols=protocols, **headers) as client:
            assert (await client.frame())["type"] == "welcome"


@pytest.mark.asyncio(loop_scope="module")
async def test_the_subprotocol_is_preferred_to_the_header_and_the_header_to_the_query(standing):
    good, bad = make_token(), "not-a-token"
    for query, protocols, headers in (
        (f"?token={bad}", ("router.v1", f"bearer.{good}"), bearer(bad)),
        (f"?token={bad}", ("router.v1",), bearer(good)),
    ):
        async with knock(standing, query, protocols=protocols, **headers) as client:
            assert (await client.frame())["type"] == "welcome"
    for query, protocols, headers in (
        (f"?token={good}", ("router.v1", f"bearer.{bad}"), bearer(good)),
        (f"?token={good}", ("router.v1",), bearer(bad)),
    ):
        assert (await refusal(standing, query, protocols=protocols, **headers)).status_code == 401


async def test_the_query_can_be_turned_off():
    async with run_node(query_token=False) as node:
        response = await refusal(node, f"?token={make_token()}")
        assert (response.status_code, response.json()["detail"]) == (401, "token missing")
        async with knock(node, **bearer(make_token())) as client:
            assert (await client.frame())["type"] == "welcome"


@pytest.mark.asyncio(loop_scope="module")
async def test_router_v1_is_selected_and_nothing_that_was_offered_with_the_token_in_it(standing):
    token = make_token()
    for offered, selected in (
        (("router.v1", f"bearer.{token}"), "router.v1"),
        ((f"bearer.{token}", "router.v1"), "router.v1"),
        ((f"bearer.{token}",), None),
        ((f"bearer.{token}", "graphql-ws"), None),
    ):
        async with knock(standing, protocols=offered) as client:
            assert client.connection.subprotocol == selected
            assert token not in str(client.connection.response.headers)


@pytest.mark.asyncio(loop_scope="module")
async def test_a_browser_that_is_turned_away_gets_the_subprotocol_too_or_it_would_see_no_code(standing):
    async with knock(standing, protocols=("router.v1", "bearer.bad"), Origin=standing.url) as client:
        assert client.connection.subprotocol == "router.v1"
        assert (await client.closed())[0] == 4401


# -- tokens that are no good


def forged(algorithm: str, **changes: Any) -> str:
    return jwt.encode(claims(**changes), OTHER_KEY if algorithm != "none" else None, algorithm=algorithm)


BAD_TOKENS: dict[str, tuple[Callable[[], str | None], str]] = {
    "missing": (lambda: None, "token missing"),
    "not a token": (lambda: "garbage", "token invalid: it is no JWT"),
    "three empty parts": (lambda: "..", "token invalid: it is no JWT"),
    "expired": (lambda: make_token(exp=int(time.time()) - 60), "token expired"),
    "not valid yet": (
        lambda: make_token(nbf=int(time.time()) + 600),
        "token invalid: it was issued in the future, so some clock is wrong",
    ),
    "wrong key": (lambda: forged("HS256"), "token invalid: it was signed with another key than the router's"),
    "algorithm none": (lambda: forged("none"), "token invalid: its algorithm is not among `jwt_algorithms`"),
    "algorithm not on the list": (
        lambda: jwt.encode(claims(), KEY * 2, algorithm="HS512"),
        "token invalid: its algorithm is not among `jwt_algorithms`",
    ),
    "no subject": (lambda: make_token(sub=None), "token has no claim sub"),
    "no expiry": (lambda: make_token(exp=None), "token has no claim exp"),
    "no time of issue": (lambda: make_token(iat=None), "token has no claim iat"),
    "empty subject": (lambda: make_token(sub=""), "token claim sub is no text of 1 to 128 characters"),
    "endless subject": (lambda: make_token(sub="x" * 129), "token claim sub is no text of 1 to 128 characters"),
    "expiry as text": (lambda: make_token(exp=str(int(time.time()) + 600)), "token claim exp is no number of seconds"),
    "expiry as true": (lambda: make_token(exp=True), "token expired"),
    "endless expiry": (lambda: make_token(exp=float("inf")), "token invalid: it is no JWT"),
    "grants as text": (
        lambda: make_token(projects={"p1": "view"}),
        'token claim projects is not {"<project>": ["view", ...]}',
    ),
    "projects as list": (
        lambda: make_token(projects=["p1"]),
        'token claim projects is not {"<project>": ["view", ...]}',
    ),
}


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(("make", "reason"), BAD_TOKENS.values(), ids=BAD_TOKENS.keys())
async def test_a_bad_token_is_http_401_and_for_browsers_close_4401(standing, make, reason):
    token = make()
    headers = {} if token is None else bearer(token)
    response = await refusal(standing, **headers)
    assert (response.status_code, response.headers["content-type"]) == (401, "application/problem+json")
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json() == {
        "title": "Unauthorized",
        "status": 401,
        "detail": reason,
        "code": "unauthorized",
        "close_code": 4401,
    }
    assert await turned_away(standing, **headers) == (4401, reason)


async def test_a_subject_that_cannot_be_written_as_utf_8_is_http_401(node):
    assert (await refusal(node, **bearer(make_token("\ud800")))).status_code == 401


async def test_a_token_that_says_it_lives_for_ever_lives_as_long_as_the_settings_say():
    async with run_node(jwt_max_lifetime=3600.0) as node:
        for expires in (1e300, 2**62):
            async with node.client(token=make_token(exp=expires)) as client:
                assert 3590 < client.welcome["expires_in"] <= 3600


async def test_so_does_one_whose_expiry_has_400_digits(node):
    async with node.client(token=make_token(exp=10**400)) as client:
        assert 86_390 < client.welcome["expires_in"] <= 86_400


async def test_issuer_and_audience_must_be_those_of_the_settings():
    async with run_node(jwt_issuer="https://id", jwt_audience="router") as node:
        async with node.client(token=make_token(iss="https://id", aud=["other", "router"])) as client:
            assert client.welcome["type"] == "welcome"
        for wrong, reason in (
            ({"iss": "https://id"}, "token has no claim aud"),
            ({"aud": "router"}, "token has no claim iss"),
            ({"iss": "https://evil", "aud": "router"}, "token invalid: it is from another issuer"),
            ({"iss": "https://id", "aud": "other"}, "token invalid: it is for another audience"),
        ):
            assert (await refusal(node, **bearer(make_token(**wrong)))).json()["detail"] == reason


# -- other keys

KEYS: dict[str, Callable[[], Any]] = {
    "RS256": lambda: rsa.generate_private_key(public_exponent=65537, key_size=2048),
    "ES256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate,
}


def public_pem(private: Any) -> str:
    return private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


@pytest.mark.parametrize("algorithm", KEYS)
async def test_tokens_signed_with_a_private_key_are_let_in_and_forgeries_are_not(tmp_path, algorithm):
    private, other = KEYS[algorithm](), KEYS[algorithm]()
    file = tmp_path / "public.pem"
    file.write_text(public_pem(private))
    async with run_node(jwt_key=f"@{file}", jwt_algorithms=(algorithm,)) as node:
        async with knock(node, **bearer(jwt.encode(claims(), private, algorithm=algorithm))) as client:
            assert (await client.frame())["type"] == "welcome"
        for forgery in (
            jwt.encode(claims(), other, algorithm=algorithm),
            signed_with_what_is_public(file.read_text().strip()),
            signed_with_what_is_public(file.read_text()),
            forged("none"),
        ):
            response = await refusal(node, **bearer(forgery))
            assert (response.status_code, response.json()["close_code"]) == (401, 4401)


def signed_with_what_is_public(pem: str) -> str:
    """The classic confusion: HS256 with the public key as secret. PyJWT does not make one, so this does."""
    head, body, _ = jwt.encode(claims(), KEY).split(".")
    signature = HMACAlgorithm(HMACAlgorithm.SHA256).sign(f"{head}.{body}".encode(), pem.encode())
    return f"{head}.{body}.{jwt.utils.base64url_encode(signature).decode()}"


# -- whether they may


@pytest.mark.asyncio(loop_scope="module")
async def test_a_project_that_one_may_not_see_is_403_and_for_browsers_4403(standing):
    for token in (make_token(project="p2"), make_token(grants=("chat", "edit"))):
        response = await refusal(standing, **bearer(token))
        assert (response.status_code, response.headers["content-type"]) == (403, "application/problem+json")
        assert (response.json()["detail"], response.json()["close_code"]) == ("not allowed to see this project", 4403)
        assert await turned_away(standing, **bearer(token)) == (4403, "not allowed to see this project")


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("project", ["a%20b", "%C3%A9", "%ff", "p" * 129, "a:b", "a%0A", "%00"])
async def test_an_impossible_project_is_404_and_for_browsers_4404(standing, project):
    headers = bearer(make_token(project="*"))
    response = await refusal(standing, path=f"/ws/project/{project}", **headers)
    assert (response.status_code, response.json()["close_code"]) == (404, 4404)
    assert (await turned_away(standing, path=f"/ws/project/{project}", **headers))[0] == 4404


@pytest.mark.asyncio(loop_scope="module")
async def test_grants_for_all_projects_count_in_each(standing):
    async with standing.client("p7", token=make_token(project="*", grants=("view",))) as client:
        assert client.welcome["type"] == "welcome"


PERMISSIONS = """
asked = []

def by_name(user, project):
    asked.append((user.user, project, sorted(user.grants)))
    return {"yes": True, "no": False, "gone": None, "chat": {"view", "chat"}, "list": ["view"], "nothing": []}[project]

async def later(user, project):
    return by_name(user, project)

def broken(user, project):
    raise LookupError(f"no database for {user}")

def odd(user, project):
    return "view"
"""


@pytest.fixture
def permissions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module with permission functions."""
    name = f"permissions_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(PERMISSIONS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


@pytest.mark.parametrize("function", ["by_name", "later"])
async def test_permissions_are_the_applications_own_when_it_has_a_function_for_them(permissions, function):
    token = make_token(project="*", grants=("edit",))
    async with run_node(permissions=f"{permissions}:{function}") as node:
        for project in ("yes", "chat", "list"):
            async with node.client(project, token=token) as client:
                await client.send(CHAT)
                answer = (await client.events(lambda e: e["type"] in ("error", "chat_message")))[-1]
                assert answer["type"] == ("chat_message" if project == "chat" else "error")
        for project, status in (("no", 403), ("nothing", 403), ("gone", 404)):
            path = f"/ws/project/{project}"
            assert (await refusal(node, path=path, **bearer(token))).status_code == status
            assert (await turned_away(node, path=path, **bearer(token)))[0] == 4000 + status
        [asked] = {str(call) for call in __import__(permissions).asked if call[1] == "yes"}
        assert asked == str(("ada", "yes", ["edit"]))


async def test_yes_adds_view_to_the_grants_of_the_token(permissions):
    token = make_token(project="yes", grants=("chat",))
    async with run_node(permissions=f"{permissions}:by_name") as node, node.client("yes", token=token) as client:
        await client.send(CHAT)
        assert (await client.event("chat_message"))["content"] == "hello"


@pytest.mark.parametrize("function", ["broken", "odd"])
async def test_a_permissions_function_that_fails_is_our_fault_not_the_clients(permissions, caplog, function):
    async with run_node(permissions=f"{permissions}:{function}") as node:
        response = await refusal(node, **bearer(make_token()))
        assert (response.status_code, response.headers["retry-after"]) == (503, "5")
        assert (response.json()["detail"], response.json()["close_code"]) == ("internal error", 1011)
        assert await turned_away(node, **bearer(make_token())) == (1011, "internal error; retry after 5 s")
        assert 'router_errors_total{code="1011"} 2.0' in node.router.metrics.render().decode()
    [logged, _] = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert logged.startswith(
        "handshake failed: LookupError at " if function == "broken" else "handshake failed: SetupError"
    )
    assert "no database" not in caplog.text
    assert "ada" not in caplog.text


# -- where the page is from


async def test_a_page_of_our_own_host_or_of_the_list_may_connect_another_gets_http_403():
    async with run_node(allowed_origins=("https://app.example",)) as node:
        for origin in (node.url, "https://app.example"):
            async with knock(node, Origin=origin, **bearer(make_token())) as client:
                assert (await client.frame())["type"] == "welcome"
        for origin in ("https://evil.example", "null", f"{node.url}.evil.example", "https://app.example:8443", ""):
            response = await refusal(node, Origin=origin, **bearer(make_token()))
            assert (response.status_code, response.json()["close_code"]) == (403, 4403)
            assert response.json()["detail"] == "this origin is not on the list `allowed_origins`"


async def test_a_star_lets_pages_from_everywhere_connect():
    headers = {"Origin": "https://anywhere.example", **bearer(make_token())}
    async with run_node(allowed_origins=("*",)) as node, knock(node, **headers) as client:
        assert (await client.frame())["type"] == "welcome"


async def test_an_origin_that_is_no_url_is_refused_with_a_problem(node):
    response = await refusal(node, Origin="http://[evil", **bearer(make_token()))
    assert (response.status_code, response.headers["content-type"]) == (403, "application/problem+json")


# -- whether there is room


@pytest.mark.parametrize(
    ("limit", "first", "second", "status", "reason"),
    [
        ("limit_user", ("ada", "p1"), ("ada", "p2"), 429, "too many connections of this user"),
        ("limit_project", ("ada", "p1"), ("grace", "p1"), 429, "too many viewers of this project"),
        ("limit_system", ("ada", "p1"), ("grace", "p2"), 503, "too many connections"),
    ],
)
async def test_over_a_limit_one_is_told_when_to_come_back_and_the_seat_is_free_again_after_somebody_leaves(
    limit, first, second, status, reason
):
    path = f"/ws/project/{second[1]}"
    headers = bearer(make_token(*second))
    async with run_node(**{limit: 1}) as node:
        async with node.client(first[1], token=make_token(*first)):
            response = await refusal(node, path=path, **headers)
            assert (response.status_code, response.headers["retry-after"]) == (status, "5")
            assert (response.json()["detail"], response.json()["close_code"]) == (reason, 4429)
            assert await turned_away(node, path=path, **headers) == (4429, f"{reason}; retry after 5 s")
        await left(node)
        async with node.client(second[1], token=make_token(*second)) as client:
            assert client.welcome["type"] == "welcome"


async def test_who_is_turned_away_takes_no_seat():
    async with run_node(limit_system=1) as node:
        await refusal(node)
        await turned_away(node)
        await refusal(node, **bearer(make_token(project="p2")))
        await refusal(node, Origin="https://evil.example", **bearer(make_token()))
        async with node.client() as client:
            assert client.welcome["type"] == "welcome"


async def test_one_who_vanishes_leaves_the_seat_too():
    async with run_node(limit_user=1) as node, node.client() as client:
        client.connection.transport.abort()
        await left(node)
        async with node.client() as again:
            assert again.welcome["type"] == "welcome"


# -- how long they may stay


@pytest.fixture
def upkeeps(monkeypatch: pytest.MonkeyPatch) -> list[Upkeep]:
    """Every `Upkeep` that is made, so that a test can set its clock and tick."""
    made: list[Upkeep] = []

    def make(*args: Any, **options: Any) -> Upkeep:
        made.append(Upkeep(*args, **options))
        return made[-1]

    monkeypatch.setattr("router.app.Upkeep", make)
    return made


def secret_plugin(folder: Path) -> str:
    (folder / "secret.py").write_text(
        "from router import Event, Plugin, Policy\n"
        'class Secret(Event, frozen=True, tag="secret"):\n    text: str = ""\n'
        'secret = Plugin(Secret, Policy(receive="staff"))\n'
    )
    return str(folder)


async def test_a_refreshed_token_brings_its_own_grants(tmp_path):
    token = make_token(grants=("view", "chat", "staff"))
    async with run_node(plugins=(secret_plugin(tmp_path),)) as node, node.client(token=token) as client:
        await node.publish({"type": "secret", "text": "1"})
        assert (await client.event("secret"))["text"] == "1"
        await client.send({"type": "auth_refresh", "token": make_token(grants=("view",)), "ref": "r1"})
        refreshed = await client.event("token_refreshed")
        assert 590 < refreshed["expires_in"] <= 600
        await client.send(CHAT)
        assert (await client.event("error"))["message"] == "this needs the grant `chat` on this project"
        await node.publish({"type": "secret", "text": "2"})
        await node.publish({"type": "step_started", "step_id": "end"})
        seen = await client.events(lambda event: event.get("step_id") == "end")
        assert "secret" not in [event["type"] for event in seen]


async def test_a_refreshed_token_may_bring_more_grants(tmp_path):
    token = make_token(grants=("view",))
    async with run_node(plugins=(secret_plugin(tmp_path),)) as node, node.client(token=token) as client:
        await client.send({"type": "auth_refresh", "token": make_token(grants=("view", "chat", "staff"))})
        await client.event("token_refreshed")
        await node.publish({"type": "secret", "text": "for staff"})
        assert (await client.event("secret"))["text"] == "for staff"
        await client.send(CHAT)
        assert (await client.event("chat_message"))["content"] == "hello"


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("make", "code", "reason"),
    [
        pytest.param(lambda: "garbage", 4401, "token invalid: it is no JWT", id="no token"),
        pytest.param(lambda: "", 4401, "token missing", id="empty"),
        pytest.param(lambda: make_token(exp=1), 4401, "token expired", id="expired"),
        pytest.param(lambda: make_token("grace"), 4401, "the new token is for another user", id="another user"),
        pytest.param(lambda: make_token(iss="x"), 4401, "the new token is for another user", id="another issuer"),
        pytest.param(lambda: make_token(grants=("chat",)), 4403, "not allowed to see this project", id="view lost"),
        pytest.param(lambda: make_token(project="p2"), 4403, "not allowed to see this project", id="another project"),
    ],
)
async def test_a_refresh_that_is_no_good_ends_the_connection(standing, make, code, reason):
    async with standing.client() as client:
        await client.send({"type": "auth_refresh", "token": make()})
        assert await client.closed() == (code, reason)


async def test_permissions_are_asked_again_at_a_refresh(permissions):
    async with run_node(permissions=f"{permissions}:by_name") as node:
        module = __import__(permissions)
        async with node.client("chat", token=make_token(project="chat")) as client:
            before = len(module.asked)
            await client.send({"type": "auth_refresh", "token": make_token(project="chat")})
            await client.event("token_refreshed")
            assert len(module.asked) == before + 1


async def test_a_second_refresh_within_a_second_is_declined_and_a_later_one_is_not(node):
    node.router.auth._clock = clock = Clock(time.time())
    async with node.client() as client:
        await client.send({"type": "auth_refresh", "token": make_token()})
        await client.event("token_refreshed")
        clock.move(0.25)
        await client.send({"type": "auth_refresh", "token": make_token(), "ref": "soon"})
        assert await client.event("error") == {
            "type": "error",
            "code": "rate_limited",
            "message": "one token refresh a second is enough",
            "temporary": True,
            "retry_after": 0.75,
            "ref": "soon",
        }
        clock.move(0.75)
        await client.send({"type": "auth_refresh", "token": make_token()})
        await client.event("token_refreshed")


async def test_an_expiring_token_is_asked_for_anew_and_at_the_end_of_its_grace_the_connection_is_closed(upkeeps):
    expires = int(time.time()) + 3000
    async with run_node(token_grace=25.0) as node:
        [upkeep] = upkeeps
        upkeep._wall = node.router.auth._clock = wall = Clock(float(expires - 100))
        async with (
            node.client(token=make_token(exp=expires)) as client,
            node.client(plain=True, token=make_token("grace", exp=expires)) as plain,
            node.client(token=make_token("bob", exp=expires + 3000)) as later,
        ):
            await upkeep.tick()
            await node.publish({"type": "step_started", "step_id": "before"})
            seen = await client.events(lambda event: event["type"] == "step_started")
            assert "token_expiring" not in [event["type"] for event in seen]
            wall.now = float(expires - 30)
            await upkeep.tick()
            assert (await client.event("token_expiring"))["expires_in"] == 30
            wall.now = expires + 24.9
            await upkeep.tick()
            await node.publish({"type": "step_started", "step_id": "in the grace"})
            assert client.connection.close_code is None
            wall.now = expires + 25.0
            await upkeep.tick()
            assert await client.closed() == (4401, "token expired")
            assert await plain.closed() == (4401, "token expired")
            await node.publish({"type": "step_started", "step_id": "after"})
            await later.events(lambda event: event.get("step_id") == "after")
            assert (await plain.frame())["step_id"] == "before"
            with pytest.raises(ConnectionClosed):  # nothing of the grace, nothing of the expiry
                await plain.frame()


async def test_between_expiry_and_the_end_of_the_grace_nothing_is_delivered_and_a_message_ends_the_connection(node):
    expires = int(time.time()) + 3000
    node.router.auth._clock = wall = Clock(float(expires - 1))
    async with node.client(token=make_token(exp=expires)) as client, node.client(token=make_token("grace")) as other:
        await client.events(lambda event: event.get("user_id") == "grace")
        wall.now = float(expires)
        await node.publish({"type": "step_started", "step_id": "unseen"})
        await client.send(CHAT)
        with pytest.raises(ConnectionClosed) as closed:
            await client.event("step_started")
        assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (4401, "token expired")
        assert other.connection.close_code is None


async def test_in_the_grace_a_refresh_brings_back_everything_that_was_missed_too(upkeeps):
    expires = int(time.time()) + 300
    async with run_node() as node:
        [upkeep] = upkeeps
        upkeep._wall = node.router.auth._clock = wall = Clock(float(expires - 1))
        async with node.client(token=make_token(exp=expires)) as client:
            wall.now = float(expires)
            await node.publish({"type": "step_started", "step_id": "meanwhile"})
            await client.send({"type": "auth_refresh", "token": make_token(exp=expires + 300)})
            seen = await client.events(lambda event: event.get("step_id") == "meanwhile")
            assert "token_refreshed" in [event["type"] for event in seen]
            wall.now = expires + 26.0
            await upkeep.tick()
            await node.publish({"type": "step_started", "step_id": "live"})
            assert (await client.event("step_started"))["step_id"] == "live"
            await client.send(CHAT)
            await client.event("chat_message")


async def test_one_who_comes_with_a_token_that_just_expired_gets_nothing_before_a_fresh_one(node):
    await node.publish({"type": "step_started", "step_id": "before"})
    async with node.client(token=make_token(exp=int(time.time()) - 5), since="0") as client:
        await node.publish({"type": "step_started", "step_id": "secret"})
        await client.send({"type": "auth_refresh", "token": make_token()})
        seen = await client.events(lambda event: event["type"] == "token_refreshed")
        assert "secret" not in [event.get("step_id") for event in seen]


async def test_the_refreshed_token_expires_too(upkeeps):
    expires = int(time.time()) + 300
    async with run_node(token_grace=25.0) as node:
        [upkeep] = upkeeps
        upkeep._wall = node.router.auth._clock = wall = Clock(float(expires - 20))
        async with node.client(token=make_token(exp=expires)) as client:
            await client.send({"type": "auth_refresh", "token": make_token(exp=expires + 300)})
            await client.event("token_refreshed")
            wall.now = expires + 270.0
            await upkeep.tick()
            await upkeep.tick()
            await node.publish({"type": "step_started", "step_id": "s"})
            seen = await client.events(lambda event: event["type"] == "step_started")
            assert ("token_expiring", 30) in [(event["type"], event.get("expires_in")) for event in seen]
            wall.now = expires + 325.0
            await upkeep.tick()
            await upkeep.tick()
            assert await client.closed() == (4401, "token expired")


# -- where the token must not be


@pytest.fixture
def server_log() -> Iterator[Callable[[], list[str]]]:
    """Begins to collect the server's log at DEBUG, as `router serve` writes it; what our own clients log is left out."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.setFormatter(JsonLines())
    handler.addFilter(lambda record: not record.name.startswith(("websockets", "httpx", "httpcore")))
    handler.addFilter(Redact())
    handler.emit = lambda record: lines.append(handler.format(record))  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("", "uvicorn.error")]
    levels = [logger.level for logger in loggers]

    def begin() -> list[str]:
        loggers[0].addHandler(handler)
        for logger in loggers:
            logger.setLevel(logging.DEBUG)
        return lines

    yield begin
    loggers[0].removeHandler(handler)
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


async def test_no_token_is_in_log_audit_metrics_or_spans(tmp_path, monkeypatch, server_log):
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr("router.app._tracing", lambda _: Tracing(provider))
    audit = tmp_path / "audit.jsonl"
    tokens = [make_token(jti=str(number)) for number in range(4)]
    expired = make_token(exp=1, jti="expired")
    async with run_node(audit=str(audit)) as node:
        lines = server_log()
        for query, protocols, headers in (
            (f"?token={tokens[0]}", ("router.v1",), {}),
            ("", ("router.v1", f"bearer.{tokens[1]}"), {}),
            ("", ("router.v1",), bearer(tokens[2])),
        ):
            async with knock(node, query, protocols=protocols, **headers) as client:
                await client.send({"type": "auth_refresh", "token": tokens[3]})
                await client.event("token_refreshed")
                await client.send(CHAT)
                await client.event("chat_message")
                await client.send({"type": "auth_refresh", "token": [tokens[3]]})
                await client.event("error")
        await refusal(node, f"?token={expired}")
        await turned_away(node, f"?token={expired}")
        async with httpx.AsyncClient(base_url=node.url, headers=bearer(tokens[0])) as http:
            assert (await http.post("/projects/p1/events", json=CHAT)).status_code == 403
            metrics = (await http.get("/metrics")).text
    log = "".join(lines)
    records = audit.read_text()
    spans = "".join(span.to_json() for span in exporter.get_finished_spans())
    assert "[hidden]" in log, "uvicorn logs the query, and at DEBUG the headers and frames"
    assert "websocket_connected" in log
    assert '"type":"chat_message"' in records
    assert 'router_errors_total{code="4401"} 2.0' in metrics
    assert "handshake" in spans
    assert "process chat_message" in spans
    for token in (*tokens, expired):
        _, body, signature = token.split(".")
        for text in (log, records, metrics, spans):
            for part in (token, body, signature):
                assert part not in text


async def test_a_token_with_a_space_in_its_header_is_hidden_too(node, server_log):
    lines = server_log()
    head = jwt.utils.base64url_encode(b'{ "alg": "HS256", "typ": "JWT" }').decode()
    body = make_token().split(".")[1]
    signature = HMACAlgorithm(HMACAlgorithm.SHA256).sign(f"{head}.{body}".encode(), KEY.encode())
    token = f"{head}.{body}.{jwt.utils.base64url_encode(signature).decode()}"
    for protocols, headers in ((("router.v1", f"bearer.{token}"), {}), (("router.v1",), bearer(token))):
        async with knock(node, protocols=protocols, **headers) as client:
            assert (await client.frame())["type"] == "welcome"
    assert lines
    assert body not in "".join(lines)


# -- the rest of the house


@pytest.mark.asyncio(loop_scope="module")
async def test_other_paths_are_refused(standing):
    for path in ("/", "/ws", "/ws/project/", "/ws/project/a/b", "/ws/project/a%2Fb"):
        assert (await refusal(standing, path=path, **bearer(make_token(project="*")))).status_code == 403
