"""What benchmarks/serving.py measures beside throughput: evenness, swaps, a long run, agreement, start and memory."""

import asyncio
import itertools
import json
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import held_load
import load
import numpy as np
import served
import uvloop
from held_load import Held
from served import Server
from sqlalchemy.engine import Engine

SECONDS_AT_A_RATE = 1.5
TURNS_AT_A_RATE = 5
SWAPS = 50
SWAP_EVERY_SECONDS = 0.3
ROUNDS_OF_AGREEMENT = 300


def shuffled(requests: list[bytes]) -> Iterator[bytes]:
    """The same requests over and over, in an order of chance."""
    chance = np.random.default_rng(3)
    while True:
        for index in chance.permutation(len(requests)).tolist():
            yield requests[index]


@dataclass
class Evenness:
    """What all turns at a held rate met, and the 99th percentile of the worst; in milliseconds."""

    taken: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)  # the tool itself
    worst: float = 0.0

    def add(self, held: Held) -> None:
        assert not held.failed
        self.taken += (held.taken * 1000).tolist()
        self.late += (held.late * 1000).tolist()
        self.worst = max(self.worst, float(np.quantile(held.taken, 0.99)) * 1000)

    @property
    def ratio(self) -> float:
        """Of the 99th percentile to the median, over all requests."""
        return float(np.quantile(self.taken, 0.99) / np.median(self.taken))

    def told(self) -> str:
        median, last = np.median(self.taken), np.quantile(self.taken, 0.99)
        told = f"median {median:.2f} ms, 99th percentile {last:.2f} (worst turn {self.worst:.2f})"
        return f"{told}, ratio {self.ratio:.1f}; the tool was late by {np.quantile(self.late, 0.99):.2f}"


def evenness(world: Any, yardstick: Server) -> Iterator[tuple[str, float]]:
    """How much longer late answers take than usual ones at half of the rate that is measured first, cold and warm.

    The empty endpoint takes turns at the same rate.
    """
    everyone = world.gets(np.arange(world.num_users))
    for kind in ("cold", "warm"):
        # The next request of each is no first one, nor one after an event where it shall be warm.
        uvloop.run(load.closed(world.server.port, everyone, 16))

        def prepare(kind: str = kind) -> list[bytes]:
            if kind == "cold":
                uvloop.run(load.closed(world.server.port, world.lists(world.events(np.arange(world.num_users))), 1))
            order = world.chance.permutation(world.num_users)
            return [everyone[user] for user in order.tolist()]

        rate = uvloop.run(load.closed(world.server.port, prepare(), 16)).rate / 2
        service, empty = Evenness(), Evenness()
        for turn in range(TURNS_AT_A_RATE):
            requests = list(islice(itertools.cycle(prepare()), int(rate * SECONDS_AT_A_RATE)))
            if kind == "cold":
                del requests[world.num_users :]
            dues = held_load.poisson_dues(len(requests), rate, seed=turn)
            empty.add(held_load.hold(yardstick.port, [load.get("/")] * len(requests), dues))
            service.add(held_load.hold(world.server.port, requests, dues))
        print(f"{kind} at {rate:.0f} a second: {service.told()}", file=sys.stderr)
        print(f"the empty endpoint at the same rate: {empty.told()}", file=sys.stderr)
        yield kind, service.ratio


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
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(seconds / 100):
            sizes.append(server.resident_mib())

    sampling = threading.Thread(target=sample)
    sampling.start()
    if rate is None:
        result = uvloop.run(load.closed(server.port, requests(), 16, seconds=seconds))
        assert not result.failed, result.statuses
        rate = result.rate
    else:
        number = int(rate * seconds)
        dues = held_load.poisson_dues(number, rate)
        assert not held_load.hold(server.port, list(islice(requests(), number)), dues).failed
    ended.set()
    sampling.join()
    warm, last = statistics.median(sizes[20:30]), statistics.median(sizes[-10:])
    print(f"mixed load: {rate:.0f} a second, memory {warm:.0f} then {last:.0f} MiB", file=sys.stderr)
    return {"growth": last / warm, "resident_mib": max(sizes)}
