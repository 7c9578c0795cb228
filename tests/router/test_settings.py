"""Where settings come from and what is said about those that are wrong."""

from pathlib import Path

import msgspec
import pytest

from router.errors import SetupError
from router.settings import Settings, Shown, load


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder without a router.toml."""
    monkeypatch.chdir(tmp_path)


def file(text: str) -> Path:
    path = Path("other.toml")
    path.write_text(text)
    return path


def shown(name: str, *sources: object, **arguments: object) -> Shown:
    return next(row for row in load(*sources, **arguments)[1] if row.name == name)


def wrong(*sources: object, **arguments: object) -> str:
    with pytest.raises(SetupError) as found:
        load(*sources, **arguments)
    return str(found.value)


def test_the_defaults_are_those_of_the_protocol():
    settings, rows = load(None, {})
    assert settings == Settings()
    assert {row.source for row in rows} == {"default"}
    assert [row.name for row in rows] == list(Settings.__struct_fields__)
    figures = {
        "host": "127.0.0.1",
        "port": 8000,
        "broker": "memory://",
        "jwt_key": "",
        "query_token": True,
        "limit_user": 10,
        "limit_project": 100,
        "limit_system": 10_000,
        "limit_rate": 10.0,
        "limit_burst": 10,
        "limit_message": 64 * 1024,
        "limit_event": 256 * 1024,
        "broadcast_every": 1.0,
        "history_events": 1000,
        "history_seconds": 300.0,
        "ping_every": 30.0,
        "silence": 75.0,
        "ack_after": 10.0,
        "ack_tries": 3,
        "token_grace": 25.0,
    }
    assert {name: getattr(settings, name) for name in figures} == figures


def test_a_later_source_wins_file_environment_argument():
    toml = file('host = "file"\nport = 1\nlimit_user = 7\n')
    environment = {"ROUTER_HOST": "environment", "ROUTER_PORT": "2"}
    settings, rows = load(toml, environment, host="argument")
    assert (settings.host, settings.port, settings.limit_user) == ("argument", 2, 7)
    sources = {row.name: row.source for row in rows}
    assert sources["host"] == "argument"
    assert sources["port"] == "ROUTER_PORT"
    assert sources["limit_user"] == "other.toml"
    assert sources["limit_project"] == "default"


def test_router_toml_is_read_where_one_stands_and_another_when_it_is_named():
    Path("router.toml").write_text("port = 1")
    assert load(None, {})[0].port == 1
    assert load(file("limit_user = 2"), {})[0].port == 8000


def test_values_in_the_environment_are_read_as_the_setting_wants_them():
    settings, _ = load(
        None,
        {
            "ROUTER_PORT": "0",
            "ROUTER_BROADCAST_EVERY": "0.25",
            "ROUTER_QUERY_TOKEN": "false",
            "ROUTER_STRICT_PLUGINS": "1",
            "ROUTER_JWT_KEY": "12345",
            "ROUTER_JWT_ISSUER": "true",
            "ROUTER_JWT_ALGORITHMS": "RS256, ES256 ,",
            "ROUTER_ALLOWED_ORIGINS": "https://a.example,https://b.example",
            "ROUTER_PLUGINS": "",
        },
    )
    assert (settings.port, settings.broadcast_every) == (0, 0.25)
    assert (settings.query_token, settings.strict_plugins) == (False, True)
    assert (settings.jwt_key, settings.jwt_issuer) == ("12345", "true")
    assert settings.jwt_algorithms == ("RS256", "ES256")
    assert settings.allowed_origins == ("https://a.example", "https://b.example")
    assert settings.plugins == ()


def test_a_file_gives_lists_as_lists():
    assert load(file('plugins = ["a", "b"]'), {})[0].plugins == ("a", "b")
    assert wrong(file('plugins = "a,b"'), {}) == "setting `plugins` in other.toml: Expected `array`, got `str`"


def test_other_variables_are_left_alone():
    load(None, {"ROUTER_TOKEN": "x", "ROUTER_URL": "x", "ROUTER_SETTINGS": "x", "ROUTER_TEST_X": "x", "ROUTERS": "x"})


@pytest.mark.parametrize(
    ("name", "sources", "where"),
    [
        ("prot", (None, {"ROUTER_PROT": "1"}), "ROUTER_PROT"),
        ("prot", ("prot = 1", {}), "other.toml"),
        ("jwt", ("[jwt]\nkey = 1", {}), "other.toml"),
    ],
)
def test_an_unknown_setting_is_named_with_its_place(name, sources, where):
    toml, environment = sources
    said = wrong(None if toml is None else file(toml), environment)
    assert said.startswith(f"unknown setting `{name}` in {where}; ")


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("PORT", "http", "setting `port` in ROUTER_PORT: Expected `int`, got `str`"),
        ("PORT", "65536", "setting `port` in ROUTER_PORT: Expected `int` <= 65535"),
        ("LIMIT_USER", "0", "setting `limit_user` in ROUTER_LIMIT_USER: Expected `int` >= 1"),
        ("PING_EVERY", "0", "setting `ping_every` in ROUTER_PING_EVERY: Expected `float` > 0.0"),
        ("PING_EVERY", "nan", "setting `ping_every` in ROUTER_PING_EVERY: Expected `float` > 0.0"),
        ("DRAIN", "-1", "setting `drain` in ROUTER_DRAIN: Expected `float` >= 0.0"),
        ("TRACE_RATIO", "1.5", "setting `trace_ratio` in ROUTER_TRACE_RATIO: Expected `float` <= 1.0"),
        ("QUERY_TOKEN", "perhaps", "setting `query_token` in ROUTER_QUERY_TOKEN: Expected `bool`, got `str`"),
    ],
)
def test_an_ill_typed_setting_is_named_with_its_place_and_what_it_should_be(variable, value, said):
    assert wrong(None, {f"ROUTER_{variable}": value}) == said


def test_a_file_is_stricter_than_the_environment_as_it_has_types():
    assert wrong(file('port = "8000"'), {}) == "setting `port` in other.toml: Expected `int`, got `str`"


def test_arguments_are_checked_too():
    assert wrong(None, {}, port=-1) == "setting `port` in argument: Expected `int` >= 0"
    assert wrong(None, {}, prot=1).startswith("unknown setting `prot` in argument")


def test_a_file_that_is_not_there_or_no_toml_is_told():
    assert wrong(Path("nowhere.toml"), {}) == "the settings file nowhere.toml does not exist"
    assert wrong(file("port 8000"), {}).startswith("other.toml is not TOML: ")


@pytest.mark.parametrize("make", [lambda path: path.write_bytes(b'host = "\xff"'), lambda path: path.mkdir()])
def test_a_file_that_cannot_be_read_is_told(make):
    path = Path("other.toml")
    make(path)
    assert "other.toml" in wrong(path, {})


def test_secrets_are_hidden_wherever_they_are_shown():
    secret = "hunter2-hunter2-hunter2-hunter2-"
    environment = {"ROUTER_JWT_KEY": secret, "ROUTER_BROKER": f"redis://user:{secret}@host:6379/0"}
    settings, rows = load(None, environment)
    assert settings.jwt_key == secret
    assert secret not in str(msgspec.to_builtins(rows))
    assert shown("jwt_key", None, environment).value == "(hidden)"
    assert shown("broker", None, environment).value == "redis://(hidden)@host:6379/0"
    assert secret not in wrong(file(f'jwt_key = ["{secret}"]'), {})


def test_what_is_no_secret_is_shown():
    assert shown("jwt_key", None, {"ROUTER_JWT_KEY": "@/run/secrets/key"}).value == "@/run/secrets/key"
    assert shown("jwt_key", None, {}).value == ""
    assert shown("broker", None, {}).value == "memory://"
    assert shown("jwt_algorithms", None, {"ROUTER_JWT_ALGORITHMS": "RS256,ES256"}).value == "RS256, ES256"
    assert shown("query_token", None, {}).value == "True"


def test_a_password_in_the_brokers_query_is_hidden_too():
    assert "hunter2" not in shown("broker", None, {"ROUTER_BROKER": "redis://host:6379/0?password=hunter2"}).value
