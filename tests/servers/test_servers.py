"""The servers that tests have: each kind starts, answers, fails as it is told to, and leaves nothing behind."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
from importlib.resources import files

import pytest
import redis
import redis.asyncio
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.servers import COMMANDS, black_hole, find_servers, has_tls, run_cluster, run_sentinel, run_server
from tests.servers.process import wait_until

every_program = pytest.mark.parametrize(
    "binary", [pytest.param(path, id=name) for name, path in find_servers().items()]
)


def client(url, **options):
    return redis.Redis.from_url(url, retry=Retry(NoBackoff(), 0), decode_responses=True, **options)


def patient(url, **options):
    """A client in the event loop that waits a tenth of a second for an answer."""
    return redis.asyncio.Redis.from_url(url, retry=Retry(NoBackoff(), 0), socket_timeout=0.1, **options)


def refuses(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


@every_program
def test_a_server_that_was_killed_begins_again_with_nothing_at_the_same_place(binary):
    with run_server(binary) as server, client(server.url) as someone:
        someone.set("a", 1)
        server.kill()
        assert refuses(server.port)
        server.start()
        assert someone.get("a") is None
    assert refuses(server.port)


def test_a_frozen_server_keeps_its_connections_and_does_not_answer(program):
    with run_server(program) as server, client(server.url, socket_timeout=0.05) as someone:
        someone.set("a", 1)
        number = someone.client_id()
        server.freeze()
        with pytest.raises(redis.TimeoutError):
            client(server.url, socket_timeout=0.05).ping()
        server.thaw()
        assert (someone.get("a"), someone.client_id()) == ("1", number)
        server.freeze()
    assert refuses(server.port)


def test_what_does_not_start_says_why(program):
    with pytest.raises(AssertionError, match="no-such-option"), run_server(program, "--no-such-option", "1"):
        pass


def test_whoever_has_no_password_may_do_nothing(program):
    with run_server(program, access="password") as server:
        assert client(server.url).ping()
        with pytest.raises(redis.AuthenticationError):
            client(f"redis://127.0.0.1:{server.port}").ping()


@every_program
def test_the_router_s_user_may_do_what_it_must_and_no_more(binary):
    with run_server(binary, access="user") as server, client(server.url) as router, client(server.admin_url) as admin:
        assert router.hset("router:{a}:meta", "seq", "1")
        assert router.publish("project:p", "x") == router.publish("router:node:x", "x") == 0
        for command in ("SET a 1", "PUBLISH elsewhere x", "SUBSCRIBE elsewhere", "KEYS *", "FLUSHALL", "CONFIG GET *"):
            with pytest.raises(redis.exceptions.NoPermissionError):
                router.execute_command(*command.split())
        assert admin.flushall()


def test_the_router_s_user_may_run_all_that_is_in_the_scripts():
    scripts = [path.read_text() for path in files("router.brokers").joinpath("lua").iterdir()]
    run = {command.lower() for text in scripts for command in re.findall(r"redis\.p?call\('(\w+)'", text)}
    assert run
    assert not run - set(COMMANDS)


def test_a_server_with_tls_is_known_by_its_authority():
    binary = next((binary for binary in find_servers().values() if has_tls(binary)), None)
    if binary is None:
        missing = "no server program here was built with TLS: rediss:// is NOT tested"
        if os.environ.get("ROUTER_TEST_NO_SKIP"):
            pytest.fail(missing)
        pytest.skip(missing)
    with run_server(binary, tls=True) as server:
        assert client(server.url).ping()
        with pytest.raises(redis.ConnectionError, match="CERTIFICATE_VERIFY_FAILED"):
            client(f"rediss://127.0.0.1:{server.port}").ping()
        with pytest.raises(redis.ConnectionError):
            client(f"redis://127.0.0.1:{server.port}").ping()


@every_program
def test_a_slot_of_a_cluster_moves_with_its_keys(binary):
    with run_cluster(binary) as cluster:
        port = cluster.nodes[0].port
        with redis.RedisCluster(host="127.0.0.1", port=port, decode_responses=True) as someone:
            for number in range(30):
                someone.set(f"key:{number}", number)
            source = cluster.owner("key:1")
            to = (source + 1) % 3
            with client(cluster.nodes[source].admin_url) as old, client(cluster.nodes[to].admin_url) as new:
                assert {cluster.owner(f"key:{number}") for number in range(30)} == {0, 1, 2}
                with cluster.moving("key:1", to):
                    assert old.get("key:1") == "1"
                    with pytest.raises(redis.exceptions.AskError):
                        old.get("{key:1}:that is not there")
                assert new.get("key:1") == "1"
                with pytest.raises(redis.exceptions.MovedError):
                    old.get("key:1")
                if "spublish" in new.command():  # not in 6.2
                    assert new.execute_command("SPUBLISH", "key:1", "x") == 0
            assert cluster.owner("key:1") == to
            assert [someone.get(f"key:{number}") for number in range(30)] == [str(number) for number in range(30)]
            cluster.flush()
            assert not any(someone.get(f"key:{number}") for number in range(30))
    assert all(refuses(node.port) for node in cluster.nodes)


async def test_masters_that_die_are_replaced_in_a_cluster_and_under_sentinel(program):
    with run_cluster(program, replicas=True) as cluster, run_sentinel(program) as sentinel:
        first = cluster.owner("a")
        before = sentinel.master()
        cluster.kill(first)
        sentinel.freeze_master()
        await asyncio.gather(cluster.wait_for_failover(first), sentinel.wait_for_failover())
        assert cluster.owner("a") == first + 3
        with client(cluster.nodes[first + 3].url) as someone:
            assert someone.set("a", 1)
        after = sentinel.master()
        assert after is not before
        with client(after.url) as someone:
            assert someone.set("a", 1)
        sentinel.thaw_master()
        sentinel.kill_master()
        assert refuses(after.port)
        assert not refuses(before.port)
    assert all(refuses(server.port) for server in (*cluster.nodes, *sentinel.servers))


async def test_a_black_hole_swallows_both_ways_and_ends_no_connection(program):
    with run_server(program) as server, client(server.url) as beside:
        async with black_hole(server) as hole, patient(hole.url) as someone:
            reader, writer = await asyncio.open_connection("127.0.0.1", hole.port)
            for said, answer in ((b"PING", b"+PONG\r\n"), (b"SUBSCRIBE a", b"*3\r\n")):
                writer.write(said + b"\r\n")
                assert await reader.readline() == answer
            for _ in range(5):
                await reader.readline()
            hole.swallow()
            writer.write(b"PING swallowed\r\n")
            assert beside.publish("a", "swallowed") == 1
            with pytest.raises(redis.TimeoutError):
                await someone.ping()
            hole.restore()
            assert beside.publish("a", "b") == 1
            assert [await reader.readline() for _ in range(7)][-1] == b"b\r\n"
            assert await someone.ping()
            hole.swallow()
            server.kill()
            with pytest.raises(redis.TimeoutError):  # and not a ConnectionError
                await someone.ping()
            assert not reader.at_eof()
            hole.restore()
            assert await reader.read() == b""
            writer.close()


async def test_a_black_hole_resets_what_it_cuts(program):
    with run_server(program) as server:
        async with black_hole(server) as hole:
            reader, writer = await asyncio.open_connection("127.0.0.1", hole.port)
            writer.write(b"PING\r\n")
            assert await reader.readline() == b"+PONG\r\n"
            hole.cut()
            with pytest.raises(ConnectionResetError):
                await reader.readline()
            writer.close()
            async with patient(hole.url) as someone:
                assert await someone.ping()
                server.kill()
                with pytest.raises(redis.ConnectionError):
                    await someone.ping()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
def test_servers_end_when_the_tests_are_killed(program, tmp_path):
    code = """
import sys
from tests.servers import find_server, run_server
with run_server(find_server()) as server:
    server.freeze()
    print(server.port, flush=True)
    sys.stdin.read()
"""
    pipe, environment = subprocess.PIPE, {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as tests:
        assert tests.stdout is not None
        port = int(tests.stdout.readline())
        assert not refuses(port)
        tests.send_signal(signal.SIGKILL)
    wait_until(lambda: refuses(port), "the server is gone")
