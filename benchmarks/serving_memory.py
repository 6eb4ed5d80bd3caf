"""What memory a worker takes with many users and items, beside what its tables need.

    python benchmarks/serving_memory.py [--users 10000000] [--items 1000000]

Publishes a Caser (64 factors) with random weights, writes a catalogue into SQLite and histories of 5,000 of the users,
starts one worker, asks for recommendations of these users and of 5,000 others, 16 at a time, and reads what the kernel
counts. Takes about 10 GB of disk and some minutes. Prints a JSON line for each figure.
"""

import argparse
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import load
import numpy as np
import served
import sqlalchemy as sa
import uvloop
from serving import show
from sqlalchemy.engine import Engine

from app.database import create_engine, writing
from app.migrations import migrate
from app.settings import Settings
from app.tables import items

ASKED = 5_000
ROWS_AT_A_TIME = 50_000


def write_catalogue(engine: Engine, number: int) -> None:
    now = datetime.now(UTC)
    rest = {
        "title": None,
        "categories": ["film"],
        "hidden": False,
        "metadata": {},
        "created_at": now,
        "updated_at": now,
    }
    with engine.connect() as connection:
        known = set(connection.execute(sa.select(items.c.item_id)).scalars())  # of histories
    for start in range(0, number, ROWS_AT_A_TIME):
        names = [served.item_name(item) for item in range(start, min(start + ROWS_AT_A_TIME, number))]
        if rows := [{"item_id": name, **rest} for name in names if name not in known]:
            with writing(engine) as connection:
                connection.execute(sa.insert(items), rows)


def mapped(pid: int) -> dict[str, float]:
    """Resident MiB of the files that are mapped, by suffix."""
    sizes: dict[str, float] = {}
    suffix = ""
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        parts = line.split(maxsplit=5)
        if parts[0] == "Rss:":
            sizes[suffix] = sizes.get(suffix, 0.0) + int(parts[1]) / 1024
        elif not parts[0].endswith(":"):  # the first line of a mapping
            suffix = Path(parts[5]).suffix if len(parts) > 5 else ""
    return sizes


def rolled_up(pid: int) -> dict[str, float]:
    """MiB by the kernel's own sums."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {name: int(value.split()[0]) / 1024 for name, _, value in (line.partition(":") for line in lines)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=10_000_000)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="a folder to keep what was made, and to find it again")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="shortlist-memory-") as temporary:
        folder = options.folder or Path(temporary)
        settings = Settings(_env_file=None, data_dir=folder / "data", database_url=None)
        engine = create_engine(settings.resolved_database_url)
        if not (folder / "made").exists():
            migrate(engine)
            served.write_history(engine, ASKED, served.NUM_ITEMS)
            write_catalogue(engine, options.items)
            served.publish(settings, engine, [("v-caser", "caser")], options.users, options.items)
            served.make_active(engine, "v-caser")
            (folder / "made").touch()
        key = served.make_key(engine)
        with served.serving(settings, None, folder / "server.log") as server:
            pid = server.process.pid
            print(f"ready after {server.ready_seconds:.1f} s", file=sys.stderr)
            print(f"its own: {rolled_up(pid)['Anonymous']:.0f} MiB", file=sys.stderr)
            gets = [load.get(f"/users/{served.user_name(user)}/recommendations?k=10", key) for user in range(ASKED)]
            others = np.random.default_rng(0).integers(ASKED, options.users, ASKED).tolist()
            gets += [load.get(f"/users/{served.user_name(user)}/recommendations?k=10", key) for user in others]
            result = uvloop.run(load.closed(server.port, gets, 16))
            assert not result.failed, result.statuses
            print(f"{result.rate:.0f} a second, median {result.milliseconds(0.5):.1f} ms", file=sys.stderr)
            sums, files = rolled_up(pid), mapped(pid)
            show("memory_resident_mib", sums["Rss"], digits=0)
            show("memory_of_its_own_mib", sums["Anonymous"], digits=0)
            show("memory_weights_mib", files.get(".safetensors", 0.0), digits=0)
            show("memory_ids_mib", files.get(".arrow", 0.0), digits=0)
        engine.dispose()


if __name__ == "__main__":
    main()
