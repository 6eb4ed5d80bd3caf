"""What benchmarks/serving.py measures beside throughput: evenness, swaps, a long run, agreement, start and memory."""

import asyncio
import itertools
import json
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import load
import numpy as np
import served
import uvloop
from served import Server
from sqlalchemy.engine import Engine

SECONDS_AT_A_RATE = 10.0
SWAPS = 50
SWAP_EVERY_SECONDS = 0.3
ROUNDS_OF_AGREEMENT = 300


def shuffled(requests: list[bytes]) -> Iterator[bytes]:
    """The same requests over and over, in an order of chance."""
    chance = np.random.default_rng(3)
    while True:
        for index in chance.permutation(len(requests)).tolist():
            yield requests[index]


def evenness(port: int, gets: list[bytes], rate: float) -> tuple[float, float]:
    """The median and the 99th percentile, in milliseconds, of answers at a held rate."""
    result = uvloop.run(load.held(port, shuffled(gets), rate, SECONDS_AT_A_RATE))
    assert not result.failed, result.statuses
    print(f"at {rate:.0f} a second: median {result.milliseconds(0.5):.2f} ms", file=sys.stderr)
    return result.milliseconds(0.5), result.milliseconds(0.99)


class Versions:
    """Counts answers of a version that differ from its other answers to the same user, where nothing else changes."""

    def __init__(self) -> None:
        self.answers: dict[str, int] = {}
        self.expected: dict[tuple[str, str], list[str]] = {}
        self.mixed = 0

    def __call__(self, _request: bytes, body: bytes) -> None:
        answer = json.loads(body)
        version = answer["model_version"]
        self.answers[version] = self.answers.get(version, 0) + 1
        ids = [item["item_id"] for item in answer["items"]]
        expected = self.expected.setdefault((answer["user_id"], version), ids)
        if answer["source"] != "model" or expected != ids:
            self.mixed += 1


def swaps(engine: Engine, port: int, gets: list[bytes], versions: tuple[str, str]) -> dict[str, float]:
    """Load at full rate while another version is made active 50 times."""
    requests = shuffled(gets)
    calm = uvloop.run(load.closed(port, requests, 16, seconds=SWAPS * SWAP_EVERY_SECONDS / 3))
    seen = Versions()
    ended = threading.Event()

    def swap() -> None:
        for turn in range(SWAPS):
            served.make_active(engine, versions[turn % 2])
            time.sleep(SWAP_EVERY_SECONDS)
        ended.set()

    swapping = threading.Thread(target=swap)
    swapping.start()

    def until_ended() -> Iterator[bytes]:
        while not ended.is_set():
            yield next(requests)

    result = uvloop.run(load.closed(port, until_ended(), 16, seen=seen))
    swapping.join()
    print(f"answers by version: {seen.answers}", file=sys.stderr)
    return {
        "failed": float(result.failed),
        "mixed": float(seen.mixed),
        "p99_ratio": result.milliseconds(0.99) / calm.milliseconds(0.99),
    }


async def _one(port: int, request: bytes) -> Any:
    bodies: list[bytes] = []
    await load.closed(port, [request], 1, seen=lambda _request, body: bodies.append(body))
    return json.loads(bodies[0])


def disagreements(ports: tuple[int, int], world: Any) -> int:
    """How often two servers on one database did not give the same, each asked right after the other heard an event."""

    async def version(port: int) -> Any:
        return (await _one(port, world.gets(np.array([0]))[0]))["model_version"]

    async def ask() -> int:
        while await version(ports[0]) != await version(ports[1]):
            await asyncio.sleep(0.01)  # a process follows another version within its poll
        wrong = 0
        for turn in range(ROUNDS_OF_AGREEMENT):
            user = int(world.chance.integers(0, world.num_users))
            event = world.events(np.array([user]))
            await _one(ports[turn % 2], load.post("/feedback", json.dumps(event).encode(), world.key))
            request = world.gets(np.array([user]))[0]
            one, other = await _one(ports[(turn + 1) % 2], request), await _one(ports[turn % 2], request)
            same = [(answer["items"], answer["feedback_through"]) for answer in (one, other)]
            ids = {item["item_id"] for item in one["items"]}
            wrong += same[0] != same[1] or event[0]["item_id"] in ids
        return wrong

    return uvloop.run(ask())


def mixed_load(world: Any, server: Server, minutes: float, rate: float | None) -> dict[str, float]:
    """Reads and writes side by side; resident memory after a fifth of the time, and at the end."""
    seconds = minutes * 60
    users = world.chance.permutation(world.num_users)
    gets = shuffled(world.gets(users))

    def requests() -> Iterator[bytes]:
        for number in itertools.count():
            if number % 5 == 0:
                event = world.events(world.chance.integers(0, world.num_users, 1))
                yield load.post("/feedback", json.dumps(event).encode(), world.key)
            else:
                yield next(gets)

    sizes: list[float] = []

    async def run() -> load.Result:
        if rate is None:
            answers = load.closed(server.port, requests(), 16, seconds=seconds)
        else:
            answers = load.held(server.port, requests(), rate, seconds)
        going = asyncio.ensure_future(answers)
        while not going.done():
            await asyncio.sleep(seconds / 100)
            sizes.append(server.resident_mib())
        return await going

    result = uvloop.run(run())
    assert not result.failed, result.statuses
    warm, last = statistics.median(sizes[20:30]), statistics.median(sizes[-10:])
    print(f"mixed load: {result.rate:.0f} a second, memory {warm:.0f} then {last:.0f} MiB", file=sys.stderr)
    return {"growth": last / warm, "resident_mib": max(sizes), "p99_ms": result.milliseconds(0.99)}
