"""How fast events are imported into SQLite, in how much memory, and how long feedback waits meanwhile.

Prints a JSON line for each figure. Everything is generated and goes to a temporary folder (TMPDIR says where); the
import and the service run as processes of their own, as people run them.
"""

import argparse
import http.client
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv

# Between two posts of feedback: each import transaction is met by some.
POST_EVERY_SECONDS = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=1_000_000)
    events: int = parser.parse_args().events
    with tempfile.TemporaryDirectory(prefix="shortlist-import-") as name:
        folder = Path(name)
        half, whole = write_events(folder / "half.csv", events // 2), write_events(folder / "whole.csv", events)
        # The smaller one first: the highest mark of memory is that of all children so far.
        import_file(half, folder / "data-half")
        memory_of_half = peak_mib()
        seconds = import_file(whole, folder / "data")
        memory = peak_mib()
        show("import_seconds", round(seconds, 2), must=30, reach=15)
        show("import_events_per_second", round(events / seconds), must=round(events / 30), reach=round(events / 15))
        show("import_peak_mib", round(memory), must=1024, reach=512)
        show("import_memory_when_the_file_doubles", round(memory / memory_of_half, 3), must=1.15, reach=1.05)
        waits = feedback_waits(write_events(folder / "more.csv", events // 4, seed=1), folder / "data")
        show("feedback_longest_wait_ms", round(max(waits), 1), must=100, reach=50)
        show("feedback_median_wait_ms", round(statistics.median(waits), 1), must=50, reach=20)


def write_events(path: Path, events: int, seed: int = 0) -> Path:
    """Users with even activity, items with a long tail, ratings with times."""
    chosen = np.random.default_rng(seed)
    users = chosen.integers(0, 25_000, events)
    items = np.minimum((chosen.pareto(1.0, events) * 50).astype(np.int64), 20_000)
    table = pa.table(
        {
            "user_id": pa.array(users).cast(pa.string()),
            "item_id": pa.array(items).cast(pa.string()),
            "type": pa.array(np.full(events, "rating")),
            "value": pa.array(chosen.integers(1, 6, events)),
            "time": pa.array(1_600_000_000 + seed * events + np.arange(events)),
        }
    )
    pyarrow.csv.write_csv(table, path)
    return path


def environment(data_dir: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SHORTLIST_")}
    return {**kept, "SHORTLIST_DATA_DIR": str(data_dir), "SHORTLIST_EMBEDDED_WORKER": "false"}


def import_command(path: Path) -> list[str]:
    return [sys.executable, "-m", "app.cli", "import", str(path), "--json"]


def import_file(path: Path, data_dir: Path) -> float:
    """Import a file; returns the seconds, from the start of the process to its end."""
    begun = time.perf_counter()
    subprocess.run(import_command(path), env=environment(data_dir), check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def peak_mib() -> float:
    # Kilobytes on Linux, bytes on macOS.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


@contextmanager
def service(data_dir: Path) -> Iterator[http.client.HTTPConnection]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "app.cli", "serve", "--port", str(port)]
    process = subprocess.Popen(command, env=environment(data_dir), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                connection.request("GET", "/health/ready")
                answer = connection.getresponse()
                answer.read()
                if answer.status == http.HTTPStatus.OK:
                    break
            except OSError:
                connection.close()
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("the service did not start")
            time.sleep(0.1)
        yield connection
    finally:
        connection.close()
        process.terminate()
        process.wait()


def feedback_waits(path: Path, data_dir: Path) -> list[float]:
    """How long each POST /feedback took while a file was imported into the same database, in milliseconds."""
    waits = []
    with service(data_dir) as connection:
        importing = subprocess.Popen(import_command(path), env=environment(data_dir), stdout=subprocess.DEVNULL)
        number = 0
        while importing.poll() is None:
            number += 1
            body = json.dumps({"event_id": f"e{number}", "user_id": f"live{number}", "item_id": "1", "type": "click"})
            begun = time.perf_counter()
            connection.request("POST", "/feedback", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            waits.append((time.perf_counter() - begun) * 1000)
            assert answer.status == http.HTTPStatus.CREATED, answer.status
            time.sleep(POST_EVERY_SECONDS)
        assert importing.returncode == 0
    return waits


def show(name: str, value: float, *, must: float, reach: float) -> None:
    more_is_better = must < reach
    met = "reach" if (value >= reach if more_is_better else value <= reach) else None
    met = met or ("must" if (value >= must if more_is_better else value <= must) else "no")
    print(json.dumps({"name": name, "value": value, "must": must, "reach": reach, "met": met}), flush=True)


if __name__ == "__main__":
    main()
