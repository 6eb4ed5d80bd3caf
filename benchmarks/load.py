"""A load tool: requests made beforehand, sent over connections that stay open, with as little work as can be.

`closed` keeps every connection busy; `held_load` sends at a set rate.
"""

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import cast

import numpy as np

Seen = Callable[[bytes, bytes], None]  # request, body of its answer


@dataclass
class Result:
    """What a run of requests met."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)  # seconds, in order of the answers
    statuses: dict[int, int] = field(default_factory=dict)

    @property
    def requests(self) -> int:
        return len(self.latencies)

    @property
    def rate(self) -> float:
        """Answers a second."""
        return self.requests / self.seconds

    @property
    def failed(self) -> int:
        return sum(count for status, count in self.statuses.items() if status >= 400)

    def milliseconds(self, quantile: float) -> float:
        return float(np.quantile(self.latencies, quantile) * 1000)


class _Connection(asyncio.Protocol):
    """One request under way at a time; `answered` hears of its answer."""

    def __init__(self, result: Result, answered: Callable[["_Connection"], None], seen: Seen | None) -> None:
        self.result = result
        self.answered = answered
        self.seen = seen
        self.request = b""
        self.due = 0.0
        self.buffer = bytearray()
        self.length = -1
        self.lost: Exception | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's own is no subclass of it

    def send(self, request: bytes, due: float | None = None) -> None:
        self.request = request
        self.due = time.perf_counter() if due is None else due
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if self.length < 0:
            end = self.buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            head = bytes(self.buffer[:end]).lower()
            at = head.find(b"content-length:")
            assert at >= 0, "the load tool reads answers with a Content-Length alone"
            self.body = end + 4
            self.length = self.body + int(head[at + 15 :].split(b"\r\n", 1)[0])
        if len(self.buffer) < self.length:
            return
        self.result.latencies.append(time.perf_counter() - self.due)
        status = int(self.buffer[9:12])
        self.result.statuses[status] = self.result.statuses.get(status, 0) + 1
        if self.seen is not None:
            self.seen(self.request, bytes(self.buffer[self.body : self.length]))
        self.buffer.clear()
        self.length = -1
        self.answered(self)

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = error or ConnectionResetError("the server closed the connection")
        self.answered(self)


async def _connections(
    port: int, number: int, result: Result, answered: Callable[[_Connection], None], seen: Seen | None
) -> list[_Connection]:
    loop = asyncio.get_running_loop()
    opened = [
        await loop.create_connection(lambda: _Connection(result, answered, seen), "127.0.0.1", port)
        for _ in range(number)
    ]
    return [protocol for _, protocol in opened]


async def closed(
    port: int,
    requests: Iterable[bytes],
    connections: int,
    seconds: float | None = None,
    seen: Seen | None = None,
) -> Result:
    """Send requests, one after another on each connection, until they or the seconds run out."""
    result, waiting = Result(), iter(requests)
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    busy = 0
    until = float("inf")

    def next_one(connection: _Connection) -> None:
        nonlocal busy
        if connection.lost is not None and not done.done():
            done.set_exception(connection.lost)
            return
        request = next(waiting, None) if time.perf_counter() < until else None
        if request is not None:
            connection.send(request)
            return
        busy -= 1
        if not busy and not done.done():
            done.set_result(None)

    opened = await _connections(port, connections, result, next_one, seen)
    busy = len(opened)
    began = time.perf_counter()
    until = began + seconds if seconds is not None else until
    for connection in opened:
        next_one(connection)
    await done
    result.seconds = time.perf_counter() - began
    _close(opened)
    return result


def _close(opened: list[_Connection]) -> None:
    for connection in opened:
        connection.answered = lambda _connection: None
        connection.transport.close()


def get(path: str, key: str | None = None) -> bytes:
    """The bytes of a GET."""
    authorization = f"Authorization: Bearer {key}\r\n" if key else ""
    return f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{authorization}Accept: application/json\r\n\r\n".encode()


def post(path: str, body: bytes, key: str | None = None) -> bytes:
    """The bytes of a POST of JSON."""
    authorization = f"Authorization: Bearer {key}\r\n" if key else ""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{authorization}Accept: application/json\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
