"""Load at a held rate: one request after another when its time has come, whatever became of those before.

A request's time counts from when it was due, so that a server that stalls is not excused by the requests it kept from
being sent. One thread, blocking on its sockets and on the next due time alone, without garbage collection, and ahead
of what else runs on its core where the system allows it: what the tool itself adds is measured and told (`late`).
"""

import gc
import os
import select
import socket
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_LENGTH = b"content-length:"


@dataclass
class Held:
    """What a run met; times in seconds, in order of the requests."""

    taken: npt.NDArray[np.float64]  # from when it was due to the end of its answer
    late: npt.NDArray[np.float64]  # of them between when it could have been sent and when it was: the tool's own share
    failed: int


def poisson_dues(number: int, rate: float, seed: int = 0) -> npt.NDArray[np.float64]:
    """Gaps as independent callers leave them: exponential ones."""
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate, number))


def hold(port: int, requests: Sequence[bytes], dues: npt.NDArray[np.float64], connections: int = 32) -> Held:
    """Send each request when it is due, in seconds from now; one that finds no free connection waits for one."""
    opened = [socket.create_connection(("127.0.0.1", port)) for _ in range(connections)]
    try:
        with _undisturbed():
            return _run(opened, requests, dues)
    finally:
        for connection in opened:
            connection.close()


def _run(opened: list[socket.socket], requests: Sequence[bytes], dues: npt.NDArray[np.float64]) -> Held:
    clock, total = time.perf_counter, len(requests)
    for connection in opened:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setblocking(False)
    by_number = {connection.fileno(): connection for connection in opened}
    free = deque(by_number)  # in turn: a server closes a connection that is idle for long
    asked: dict[int, int] = {}  # connection -> request under way
    partial: dict[int, bytes] = {}
    since = dict.fromkeys(by_number, 0.0)  # when it became free
    taken, late = np.zeros(total), np.zeros(total)
    sent = answered = failed = 0
    due = (dues + (clock() + 0.01)).tolist()
    while answered < total:
        now = clock()
        while sent < total and free and due[sent] <= now:
            number = free.popleft()
            by_number[number].send(requests[sent])
            asked[number] = sent
            now = clock()
            late[sent] = now - max(due[sent], since[number])
            sent += 1
        wait = due[sent] - now if sent < total and free else None
        for number in select.select(list(asked), (), (), wait)[0]:
            data = by_number[number].recv(65_536)
            now = clock()
            if not data:
                raise ConnectionResetError("the server closed the connection")
            if number in partial:
                data = partial.pop(number) + data
            if not _is_whole(data):
                partial[number] = data
                continue
            request = asked.pop(number)
            taken[request] = now - due[request]
            failed += data[9:10] >= b"4"
            answered += 1
            since[number] = now
            free.append(number)
    return Held(taken, late, failed)


def _is_whole(data: bytes) -> bool:
    end = data.find(b"\r\n\r\n")
    if end < 0:
        return False
    at = data.find(_LENGTH, 0, end)
    assert at >= 0, "the load tool reads answers with a Content-Length alone"
    return len(data) >= end + 4 + int(data[at + len(_LENGTH) : data.find(b"\r", at)])


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Neither garbage collections nor a wait for the core."""
    gc.collect()
    gc.freeze()
    gc.disable()
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    with suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    try:
        yield
    finally:
        os.sched_setscheduler(0, *before)
        gc.enable()
        gc.unfreeze()
