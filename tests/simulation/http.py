"""HTTP/1.1 as a backend speaks it: one request at a time on a connection that is kept."""

import asyncio
import json
from typing import Any

__all__ = ["Caller"]


class Caller:
    """Asks nodes, from one host. Raises `OSError` or `TimeoutError` when there is no whole answer."""

    def __init__(self, token: str, patience: float = 8.0) -> None:
        self._token = token
        self._patience = patience
        self._open: dict[str, tuple[asyncio.StreamReader, asyncio.StreamWriter]] = {}

    async def ask(
        self, host: str, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        """Status and JSON of the answer."""
        try:
            async with asyncio.timeout(self._patience):
                kept = self._open.pop(host, None)
                if kept is None or kept[1].is_closing():
                    kept = await asyncio.open_connection(host, 80)
                answer = await self._exchange(*kept, host, method, path, body, headers or {})
        except (asyncio.IncompleteReadError, ValueError) as error:
            raise ConnectionResetError(str(error)) from None
        self._open[host] = kept
        return answer

    async def _exchange(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        host: str,
        method: str,
        path: str,
        body: Any,
        headers: dict[str, str],
    ) -> tuple[int, Any]:
        try:
            data = b"" if body is None else json.dumps(body, ensure_ascii=False).encode()
            lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", f"Authorization: Bearer {self._token}"]
            lines += [f"{name}: {value}" for name, value in headers.items()]
            lines += [f"Content-Length: {len(data)}", "Content-Type: application/json", "", ""]
            writer.write("\r\n".join(lines).encode() + data)
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            status, length = int(head[0].split()[1]), 0
            for line in head[1:]:
                if line.lower().startswith("content-length:"):
                    length = int(line.partition(":")[2])
            text = await reader.readexactly(length)
        except BaseException:
            writer.transport.abort()
            raise
        try:
            return status, json.loads(text) if text else None
        except ValueError:
            return status, None
