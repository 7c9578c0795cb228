"""What a Redis knows and does: fakeredis, with what it lacks, deterministic, and quick enough for thousands of scripts."""

import copy
import hashlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

from fakeredis import FakeServer
from fakeredis._commands import command
from fakeredis._core._database import Item
from fakeredis._helpers import NoResponse, SimpleError, SimpleString
from fakeredis._socket import FakeSocket
from fakeredis.commands_mixins.scripting_mixin import LUA_MODULE
from fakeredis.model import is_write_command

__all__ = ["Memory", "Session", "encode"]

PUSHED = frozenset(
    {b"message", b"smessage", b"pmessage", b"subscribe", b"unsubscribe", b"ssubscribe", b"sunsubscribe", b"psubscribe"}
)
FREES = frozenset({"del", "hdel", "srem", "zrem", "spop", "xdel", "xack", "pexpire", "expire", "unlink", "publish"})
"""Writes that are also done when there is no memory left."""


class _Subscribers(dict[Any, None]):
    """As a set, in the order in which they came."""

    def add(self, each: Any) -> None:
        self[each] = None

    def discard(self, each: Any) -> None:
        self.pop(each, None)

    def remove(self, each: Any) -> None:
        del self[each]


class Memory:
    """What one life of a server knows. A restart makes another one, with another id of the run."""

    _lua: dict[str, Any] | None = None

    def __init__(self, chance: Random, kept: dict[bytes, Any] | None = None, *, whole: bool = False) -> None:
        """`whole`: it has all that the one before it had, as only a server has that writes down each event."""
        self.server: Any = FakeServer(version=(7, 4), server_type="redis")
        self.server.subscribers = defaultdict(_Subscribers)
        self.server.psubscribers = defaultdict(_Subscribers)
        self.server.ssubscribers = defaultdict(_Subscribers)
        self.server.run_id = chance.randbytes(20).hex()
        self.server.replid = chance.randbytes(20).hex()
        self.server.refuses = ""
        self.server.writes_down = whole
        self.server.born = time.time()
        if Memory._lua is not None:
            for name, value in Memory._lua.items():
                setattr(self.server, name, value)
        for key, item in copy.deepcopy(kept or {}).items():
            database = self.server.dbs[0]
            database[key] = item

    def copy(self) -> dict[bytes, Item]:
        return copy.deepcopy(self.server.dbs[0]._dict)

    def flush(self) -> None:
        with self.server.lock:
            self.server.dbs[0].clear()

    def refuse(self, what: str) -> None:
        """`READONLY`, `OOM`, or nothing: which writes are refused from now on."""
        self.server.refuses = what


class Session(FakeSocket):
    """One connection's state on the server; answers are handed on as they are."""

    def __init__(self, server: Any, answer: Callable[[Any], None], push: Callable[[list[Any]], None]) -> None:
        super().__init__(server, 0, client_class=object)
        self._answer = answer
        self._push = push
        self.parked: tuple[float, Callable[[bool], Any], Callable[[Any], Any]] | None = None
        """What a command that blocks waits for: until when, and how to look again."""

    @property
    def protocol(self) -> int:
        return int(self._client_info.protocol_version)

    def leave(self) -> None:
        """The connection is gone."""
        self._discard_subscriptions()
        if self in self._server.sockets:
            self._server.sockets.remove(self)

    def _blocking(self, timeout: float | None, func: Any, shape: Any = None) -> Any:
        shaped = shape or (lambda found: found)
        found = func(True)
        if found is not None:
            return shaped(found)
        self.parked = (time.time() + timeout if timeout else float("inf"), func, shaped)
        return NoResponse()

    def look_again(self) -> None:
        """Answer the command that blocks, if there is something or its time is over."""
        if self.parked is not None:
            until, look, shaped = self.parked
            with self._server.lock:
                self._db.time = time.time()
                found = look(False)
            if found is not None or time.time() >= until:
                self.parked = None
                self.put_response(shaped(found))

    def put_response(self, msg: Any) -> None:
        if isinstance(msg, list) and msg and type(msg[0]) is bytes and msg[0] in PUSHED:
            self._push(msg)
        else:
            self._answer(msg)

    def _decode_result(self, result: Any) -> Any:
        return result

    def _run_command(self, func: Any, sig: Any, args: Any, from_script: bool) -> Any:
        refuses = self._server.refuses
        if refuses and sig.name not in ("eval", "evalsha") and is_write_command(sig.name.encode()):
            if refuses == "READONLY":
                return SimpleError("READONLY You can't write against a read only replica.")
            if sig.name not in FREES:
                return SimpleError("OOM command not allowed when used memory > 'maxmemory'.")
        answer = super()._run_command(func, sig, args, from_script)
        if sig.name == "xreadgroup" and isinstance(answer, SimpleError) and "requires the key" in answer.value:
            return SimpleError("NOGROUP No such key or consumer group in XREADGROUP with GROUP option")
        return answer

    def eval(self, script: bytes, numkeys: int, *keys_and_args: bytes) -> Any:
        """As fakeredis does it, with scripts that are compiled once, and without collecting garbage each time."""
        server = self._server
        runtime = self._get_server_runtime(server)
        if Memory._lua is None:
            Memory._lua = {name: value for name, value in vars(server).items() if name.startswith("_lua_")}
            Memory._lua["_lua_compiled"] = server._lua_compiled = {}
        server._lua_current_socket[0] = self
        self._script_resp = 2
        server._lua_set_keys_argv(
            runtime.table_from(keys_and_args[:numkeys]), runtime.table_from(keys_and_args[numkeys:])
        )
        compiled = server._lua_compiled.get(script)
        if compiled is None:
            compiled = server._lua_compiled[script] = runtime.compile(script)
        try:
            result = compiled()
        except SimpleError as error:
            raise SimpleError(error.value) from None
        except LUA_MODULE.LuaError as error:
            sha = hashlib.sha1(script).hexdigest()
            raise SimpleError(f"ERR Error running script (call to f_{sha}): {error}") from None
        finally:
            self._script_resp = None
        return self._convert_lua_result(result, nested=False)

    @command(name="INFO", fixed=(), repeat=(bytes,))
    def info(self, *sections: bytes) -> bytes:
        server = self._server
        text = {
            b"server": f"# Server\r\nredis_version:7.4.0\r\nrun_id:{server.run_id}\r\n"
            f"uptime_in_seconds:{int(time.time() - server.born)}\r\n",
            b"persistence": f"# Persistence\r\nloading:0\r\naof_enabled:{int(server.writes_down)}\r\n",
            b"replication": f"# Replication\r\nrole:master\r\nconnected_slaves:0\r\nmaster_replid:{server.replid}\r\n"
            f"master_replid2:{'0' * 40}\r\nmaster_repl_offset:0\r\n",
        }
        wanted = [section.lower() for section in sections] or list(text)
        return "\r\n".join(text.get(section, "") for section in wanted).encode()


def encode(value: Any, protocol: int, *, push: bool = False) -> bytes:
    """One reply as RESP."""
    return b"".join(_parts(value, protocol, push=push))


def _parts(value: Any, protocol: int, *, push: bool = False) -> Iterator[bytes]:
    kind = type(value)
    if kind is bytes:
        yield b"$%d\r\n%b\r\n" % (len(value), value)
    elif kind is int:
        yield b":%d\r\n" % value
    elif value is None:
        yield b"_\r\n" if protocol == 3 else b"$-1\r\n"
    elif kind is list or kind is tuple:
        mark = b">" if push and protocol == 3 else b"*"
        yield b"%b%d\r\n" % (mark, len(value))
        for each in value:
            yield from _parts(each, protocol)
    elif isinstance(value, SimpleString):
        yield b"+%b\r\n" % value.value
    elif isinstance(value, SimpleError):
        yield b"-%b\r\n" % value.value.replace("\r", " ").replace("\n", " ").encode()
    elif isinstance(value, NoResponse):
        return
    elif kind is str:
        yield from _parts(value.encode(), protocol)
    elif kind is bool:
        yield (b"#t\r\n" if value else b"#f\r\n") if protocol == 3 else (b":1\r\n" if value else b":0\r\n")
    elif kind is float:
        text = repr(value).encode() if not value.is_integer() else b"%d" % value
        yield b",%b\r\n" % text if protocol == 3 else b"$%d\r\n%b\r\n" % (len(text), text)
    elif kind is dict:
        yield (b"%%%d\r\n" % len(value)) if protocol == 3 else b"*%d\r\n" % (2 * len(value))
        for name, each in value.items():
            yield from _parts(name, protocol)
            yield from _parts(each, protocol)
    elif isinstance(value, set | frozenset):
        yield (b"~%d\r\n" if protocol == 3 else b"*%d\r\n") % len(value)
        for each in value:
            yield from _parts(each, protocol)
    else:
        raise TypeError(f"no RESP for a {kind.__name__}")
