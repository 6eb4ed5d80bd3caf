"""How fast one worker on one core answers, beside FastAPI with one empty endpoint on the same core in the same run.

The worker is pinned to one core; the load tool and PostgreSQL share another. Data has MovieLens 1M's size. The key is
checked and the log of recommendations is on. What is compared takes turns of about a second each, several times over; a
figure is the ratio of the medians. Prints a JSON line for each figure, and tables to standard error.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import load
import numpy as np
import served
import serving_limits
import uvloop
from load import Result
from served import NUM_ITEMS, NUM_USERS, Server

from app.database import create_engine
from app.migrations import migrate
from app.settings import Settings

VERSIONS = (("v-caser", "caser"), ("v-caser-2", "caser"), ("v-neumf", "neumf"))
CONNECTIONS = 16
LIST_CLIENTS = 8
LIST_LENGTH = 1_000

# name of the figure -> must, reach; by database where they differ
TARGETS: dict[str, tuple[float | None, float | None]] = {
    "get_cold_sqlite": (0.22, 0.30),
    "get_cold_postgresql": (0.15, 0.22),
    "get_warm_sqlite": (0.40, 0.50),
    "get_warm_postgresql": (0.35, 0.45),
    "post_one_sqlite": (0.20, 0.30),
    "post_one_postgresql": (0.20, 0.30),
    "post_lists_events_per_second_sqlite": (30_000, 50_000),
    "post_lists_events_per_second_postgresql": (30_000, 50_000),
}


@dataclass
class World:
    """One database with its server, and what requests to it are made of."""

    name: str
    settings: Settings
    key: str
    server: Server
    num_users: int
    chance: np.random.Generator = field(default_factory=lambda: np.random.default_rng(1))
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def event(self, user: int, item: int) -> dict[str, object]:
        number = next(self.numbers)
        return {
            "event_id": f"event-{number}",
            "user_id": served.user_name(user),
            "item_id": served.item_name(item),
            "type": "rating",
            "value": 4.5,
            "occurred_at": "2026-10-01T12:00:00.123456Z",
        }

    def events(self, users: np.ndarray) -> list[dict[str, object]]:
        items = served.chosen_items(len(users), self.chance)
        return [self.event(user, item) for user, item in zip(users.tolist(), items.tolist(), strict=True)]

    def lists(self, events: list[dict[str, object]]) -> list[bytes]:
        return [
            load.post("/feedback", json.dumps(events[start : start + LIST_LENGTH]).encode(), self.key)
            for start in range(0, len(events), LIST_LENGTH)
        ]

    def gets(self, users: np.ndarray) -> list[bytes]:
        return [load.get(f"/users/{served.user_name(user)}/recommendations?k=10", self.key) for user in users.tolist()]


def run(coroutine: object) -> Result:
    result: Result = uvloop.run(coroutine)  # type: ignore[arg-type]
    if result.failed:
        raise SystemExit(f"requests failed: {result.statuses}")
    return result


class Rates:
    """Answers a second and the worker's seconds of work, round by round."""

    def __init__(self) -> None:
        self.rates: dict[str, list[float]] = {}
        self.cpu: dict[str, list[float]] = {}
        self.latencies: dict[str, list[float]] = {}

    def measure(self, name: str, server: Server, coroutine: object, units: int = 1) -> None:
        before = server.cpu_seconds()
        result = run(coroutine)
        self.rates.setdefault(name, []).append(result.rate * units)
        self.cpu.setdefault(name, []).append((server.cpu_seconds() - before) / result.requests)
        self.latencies.setdefault(name, []).append(result.milliseconds(0.5))

    def rate(self, name: str) -> float:
        return statistics.median(self.rates[name])

    def table(self) -> str:
        head = f"{'':24}{'a second':>12}{'µs of CPU':>12}{'median ms':>12}"
        lines = [
            f"{name:24}{self.rate(name):12.0f}{statistics.median(self.cpu[name]) * 1e6:12.0f}"
            f"{statistics.median(self.latencies[name]):12.2f}"
            for name in self.rates
        ]
        return "\n".join([head, *lines])


def show(name: str, value: float, *, must: float | None = None, reach: float | None = None, digits: int = 3) -> None:
    """Print a figure; of those without a bound, `met` is null."""
    met = None
    if must is not None and reach is not None:
        more_is_better = must < reach
        within = [value >= bound if more_is_better else value <= bound for bound in (must, reach)]
        met = "reach" if within[1] else "must" if within[0] else "no"
    figure = {"name": name, "value": round(value, digits), "must": must, "reach": reach, "met": met}
    print(json.dumps(figure), flush=True)


def measure_gets(world: World, yardstick: Server, rounds: int, label: str) -> None:
    """Cold and warm answers beside the empty endpoint."""
    rates = Rates()
    empty = load.get("/")
    for turn in range(rounds + 1):
        users = world.chance.permutation(world.num_users)[:1_500]
        bare = load.closed(yardstick.port, itertools.repeat(empty, 6_000), CONNECTIONS)
        if turn == 0:  # the first round warms up
            run(bare)
            run(load.closed(world.server.port, world.gets(users), CONNECTIONS))
            continue
        rates.measure("empty", yardstick, bare)
        run(load.closed(world.server.port, world.lists(world.events(users)), 1))
        rates.measure("cold", world.server, load.closed(world.server.port, world.gets(users), CONNECTIONS))
        rates.measure("warm", world.server, load.closed(world.server.port, world.gets(users) * 2, CONNECTIONS))
    print(f"\nGET, {label} on {world.name}\n{rates.table()}", file=sys.stderr)
    for kind in ("cold", "warm"):
        name = f"get_{kind}_{world.name}" if label == "caser" else f"get_{kind}_{label}_{world.name}"
        must, reach = TARGETS.get(name, (None, None))
        show(name, rates.rate(kind) / rates.rate("empty"), must=must, reach=reach)


def measure_posts(world: World, yardstick: Server, rounds: int) -> None:
    """Single events beside an empty POST of the same body, and lists by themselves."""
    rates = Rates()
    for turn in range(rounds + 1):
        users = world.chance.integers(0, world.num_users, 1_500)
        bodies = [json.dumps(event).encode() for event in world.events(users)]
        bare = load.closed(yardstick.port, [load.post("/", body) for body in bodies] * 4, CONNECTIONS)
        single = load.closed(world.server.port, [load.post("/feedback", b, world.key) for b in bodies], CONNECTIONS)
        many = world.lists(world.events(world.chance.integers(0, world.num_users, 40 * LIST_LENGTH)))
        lists = load.closed(world.server.port, many, LIST_CLIENTS)
        if turn == 0:
            for coroutine in (bare, single, lists):
                run(coroutine)
            continue
        rates.measure("empty POST", yardstick, bare)
        rates.measure("one event", world.server, single)
        rates.measure("events in lists", world.server, lists, units=LIST_LENGTH)
    print(f"\nPOST /feedback on {world.name}\n{rates.table()}", file=sys.stderr)
    name = f"post_one_{world.name}"
    show(name, rates.rate("one event") / rates.rate("empty POST"), must=TARGETS[name][0], reach=TARGETS[name][1])
    name = f"post_lists_events_per_second_{world.name}"
    show(name, rates.rate("events in lists"), must=TARGETS[name][0], reach=TARGETS[name][1], digits=0)


@dataclass
class Cores:
    """Where things run: the worker on one core, everything else on another; None where there is one alone."""

    worker: int | None
    load: int | None

    @classmethod
    def of_this_machine(cls) -> "Cores":
        available = sorted(os.sched_getaffinity(0))
        return cls(available[0], available[1]) if len(available) > 1 else cls(None, None)


def measure_limits(world: World, yardstick: Server, cores: Cores, folder: Path) -> None:
    """Evenness, swaps, agreement and start."""
    for kind, ratio in serving_limits.evenness(world, yardstick):
        show(f"p99_to_median_at_half_{kind}_{world.name}", ratio, must=4, reach=4, digits=2)
    gets = world.gets(world.chance.permutation(world.num_users)[:1_500])
    engine = create_engine(world.settings.resolved_database_url)
    # A process that looks for another version more often than one is made active.
    with served.serving(world.settings, cores.worker, folder / "second.log", model_poll_seconds=0.1) as second:
        show(f"ready_seconds_{world.name}", second.ready_seconds, must=5, reach=5, digits=2)
        found = serving_limits.swaps(engine, second.port, gets, ("v-caser-2", "v-caser"))
        show(f"swaps_failed_{world.name}", found["failed"], must=0, reach=0, digits=0)
        show(f"swaps_mixed_{world.name}", found["mixed"], must=0, reach=0, digits=0)
        show(f"swaps_p99_ratio_{world.name}", found["p99_ratio"], must=2, reach=2, digits=2)
        wrong = serving_limits.disagreements((world.server.port, second.port), world)
        show(f"two_workers_disagree_{world.name}", wrong, must=0, reach=0, digits=0)
    engine.dispose()


def measure_mixed_load(world: World, minutes: float, rate: float | None) -> None:
    """Whether memory stays flat, and what a worker takes."""
    mixed = serving_limits.mixed_load(world, world.server, minutes, rate)
    show(f"mixed_memory_growth_{world.name}", mixed["growth"], must=1.03, reach=1.03)
    show(f"resident_mib_{world.name}", mixed["resident_mib"], must=600, reach=600, digits=0)


PARTS = ("gets", "neumf", "posts", "limits", "mixed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--database", choices=["sqlite", "postgresql"], action="append")
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--users", type=int, default=NUM_USERS)
    parser.add_argument("--minutes", type=float, default=1.0, help="of mixed load")
    parser.add_argument("--rate", type=float, help="requests a second of the mixed load; as many as go where left out")
    options = parser.parse_args()
    cores = Cores.of_this_machine()
    if cores.load is not None:
        os.sched_setaffinity(0, {cores.load})
    for database in options.database or ["sqlite", "postgresql"]:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shortlist-serving-")))
            url = None
            if database == "postgresql":
                url = stack.enter_context(served.postgresql(folder / "postgresql"))
            settings = Settings(_env_file=None, data_dir=folder / "data", database_url=url)
            engine = create_engine(settings.resolved_database_url)
            migrate(engine)
            served.write_history(engine, options.users, NUM_ITEMS)
            served.publish(settings, engine, VERSIONS, options.users, NUM_ITEMS)
            served.make_active(engine, "v-caser")
            key = served.make_key(engine)
            yardstick = stack.enter_context(served.bare(cores.worker, folder / "bare.log"))
            server = stack.enter_context(served.serving(settings, cores.worker, folder / "server.log"))
            server.rest()
            world = World(database, settings, key, server, options.users)
            parts = options.part or PARTS
            if "gets" in parts:
                measure_gets(world, yardstick, options.rounds, "caser")
            if "posts" in parts:
                measure_posts(world, yardstick, options.rounds)
            if "limits" in parts:
                measure_limits(world, yardstick, cores, folder)
            if "mixed" in parts:
                measure_mixed_load(world, options.minutes, options.rate)
            if "neumf" in parts:
                served.make_active(engine, "v-neumf")
                time.sleep(3)  # longer than a process takes to follow
                server.rest()
                measure_gets(world, yardstick, options.rounds, "neumf")
            engine.dispose()


if __name__ == "__main__":
    main()
