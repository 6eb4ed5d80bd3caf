"""Computes the ranking quality of the recipes, three seeds a row, and writes the table of docs/quality.md.

    python benchmarks/quality.py --data ROOT [--only ml-100k/neumf] [--seeds 3] [--write docs/quality.md]

ROOT (or SHORTLIST_DATA) holds the data sets' folders, named as in `ROWS`; those that are missing are passed over. Every
figure is what `python -m ml experiment --json` prints. Each training is kept in a results file as soon as it is there,
under its settings, its seed, the data's hash and a fingerprint of the code, so that another call goes on from where
the last one ended. The peers' figures come from what quality_peers.py kept. Prints one JSON line for each figure.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ml.metrics import mean_and_std
from ml.recipes import RECIPES

BEGIN, END = "<!-- quality: begin -->", "<!-- quality: end -->"
ROOT = Path(__file__).parents[1]
PEERS = Path(__file__).with_name("quality_peers.jsonl")
HIT_RATE, RECALL, NDCG = "hit_rate@10", "recall@10", "ndcg@10"


# The share of a goal that a default recipe has to reach untuned, where a recipe of the data's own reaches the whole.
UNTUNED = 0.9


@dataclass(frozen=True)
class Row:
    """One recipe on one data set, and what its two metrics must pass and reach for; a baseline has no goals."""

    data: str
    recipe: str
    must: tuple[float, ...] = ()
    reach: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.data}/{self.recipe}"


# What is ranked, and by which metrics it is judged.
PROTOCOLS = {
    "ml-100k": ("MovieLens 100K, leave-one-out in time", (HIT_RATE, NDCG)),
    "beauty-sequences": ("Amazon Beauty sequences, leave-one-out", (HIT_RATE, NDCG)),
    "ml-1m-sequences": ("MovieLens 1M sequences, leave-one-out", (HIT_RATE, NDCG)),
    "ml-1m-predefined": ("MovieLens 1M, predefined 7:1:2", (RECALL, NDCG)),
}
# In the order in which they are computed.
ROWS = (
    Row("ml-100k", "neumf", (0.150, 0.076), (0.180, 0.090)),
    Row("ml-100k", "caser", (0.215, 0.110), (0.250, 0.130)),
    Row("beauty-sequences", "caser", (0.062, 0.034), (0.100, 0.061)),
    Row("ml-1m-predefined", "neumf", (0.150, 0.295), (0.168, 0.326)),
    Row("ml-1m-sequences", "caser-large", (0.320, 0.178), (0.360, 0.200)),
    Row("ml-1m-sequences", "caser", (UNTUNED * 0.320, UNTUNED * 0.178), (0.360, 0.200)),
    Row("ml-100k", "neumf-fast"),
    Row("beauty-sequences", "neumf"),
    Row("ml-1m-predefined", "neumf-fast"),
    Row("ml-100k", "matrix_factorization"),
    Row("beauty-sequences", "matrix_factorization"),
    Row("ml-1m-predefined", "matrix_factorization"),
    Row("ml-1m-sequences", "matrix_factorization"),
)


class Results:
    """Trainings that are done, one JSON line each, by key."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self._by_key = {line["key"]: line for line in map(json.loads, lines)}

    def get(self, key: str) -> dict[str, Any] | None:
        return self._by_key.get(key)

    def add(self, key: str, found: dict[str, Any]) -> None:
        """Keep a training, at once."""
        self._by_key[key] = {"key": key, **found}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self._by_key[key]) + "\n")


def experiment(
    data: Path, recipe: str, seed: int, settings: Sequence[str] = (), *, is_quiet: bool = False
) -> dict[str, Any]:
    """What `python -m ml experiment --json` prints."""
    command = [sys.executable, "-m", "ml", "experiment", "--data", str(data.resolve()), "--recipe", recipe]
    command += ["--device", "cpu", "--seed", str(seed), "--json"]
    command += [part for setting in settings for part in ("--set", setting)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL if is_quiet else None}
    finished = subprocess.run(command, cwd=ROOT, text=True, check=True, **pipes)
    document: dict[str, Any] = json.loads(finished.stdout)
    return document


@cache
def data_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


@cache
def code_fingerprint(recipe: str) -> str:
    """What two epochs of a recipe give on small generated data: it changes when the arithmetic of a training does.

    Hashing the source instead would throw results away for every edited comment.
    """
    chosen = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        lines = []
        for user in range(120):
            first, length = chosen.integers(1_000), chosen.integers(8, 30)
            items = (first + np.cumsum(chosen.integers(1, 4, length))) % 1_000
            lines.append(" ".join(map(str, [f"u{user}", *(f"i{item}" for item in items)])))
        (Path(name) / "sequences.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        document = experiment(Path(name), recipe, 0, ("epochs=2", "batch_size=64"), is_quiet=True)
    figures = {part: {k: round(v, 6) for k, v in document[part].items()} for part in ("validation", "test")}
    return hashlib.sha256(json.dumps(figures, sort_keys=True).encode()).hexdigest()


def key_of(row: Row, seed: int, folder: Path) -> str:
    parts = [data_hash(folder), RECIPES[row.recipe].as_dict(), code_fingerprint(row.recipe), seed]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def compute(row: Row, seeds: int, folder: Path, results: Results, *, train: bool) -> list[dict[str, Any]]:
    """The row's trainings, one a seed: those that are kept, and with `train` the others too."""
    found = []
    for seed in range(seeds):
        key = key_of(row, seed, folder)
        if (kept := results.get(key)) is None and train:
            print(f"{row.name}, seed {seed}", file=sys.stderr, flush=True)
            document = experiment(folder, row.recipe, seed)
            names = ("seed", "validation", "test", "popularity", "epochs", "epochs_run", "seconds")
            results.add(key, {"row": row.name, **{name: document[name] for name in names}})
            kept = results.get(key)
        if kept is not None:
            found.append(kept)
    return found


def peers_of(data: str) -> list[dict[str, Any]]:
    """What quality_peers.py kept of a data set, the last result of each model."""
    lines = PEERS.read_text(encoding="utf-8").splitlines() if PEERS.exists() else []
    return list({line["model"]: line for line in map(json.loads, lines) if line["data"] == data}.values())


def table(data: str, rows: dict[Row, list[dict[str, Any]]]) -> str:
    """The Markdown table of a data set."""
    title, metrics = PROTOCOLS[data]
    shown = {HIT_RATE: "hit rate@10", RECALL: "recall@10", NDCG: "nDCG@10"}
    lines = [f"### {title}", ""]
    heads = ["model", *(shown[name] for name in metrics), "must pass", "reach for", "validation nDCG@10", "seeds"]
    lines += [f"| {' | '.join([*heads, 'best epochs', 'seconds a training'])} |", "|---" * (len(heads) + 2) + "|"]
    for row, runs in rows.items():
        if not runs:
            continue
        test = mean_and_std([run["test"] for run in runs])
        validation = mean_and_std([run["validation"] for run in runs])[NDCG]["mean"]
        cells = [f"`{row.recipe}`", *(with_spread(test[name], len(runs)) for name in metrics)]
        cells += [goals(row.must), goals(row.reach), f"{validation:.4f}", str(len(runs))]
        cells += [", ".join(str(run["epochs"]) for run in runs), f"{np.mean([run['seconds'] for run in runs]):.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    if first := next((runs[0] for runs in rows.values() if runs), None):
        known = first["popularity"]
        figures = [f"{known['test'][name]:.4f}" for name in metrics]
        lines.append(f"| popularity | {' | '.join(figures)} |  |  | {known['validation'][NDCG]:.4f} | - | - | - |")
    for peer in peers_of(data):
        figures = [f"{peer['test'][name]:.4f}" for name in metrics]
        ended = f"{peer['epochs']} run" + (", out of time" if peer["out_of_time"] else "")
        cells = [f"RecBole {peer['model']}", *figures, "", "", f"{peer['validation'][NDCG]:.4f}", "1", ended]
        lines.append(f"| {' | '.join([*cells, format(peer['seconds'], '.0f')])} |")
    return "\n".join(lines)


def with_spread(value: dict[str, float], runs: int) -> str:
    return f"{value['mean']:.4f}" + (f" ± {value['std']:.4f}" if runs > 1 else "")


def goals(values: Iterable[float]) -> str:
    return " / ".join(f"{value:.3f}" for value in values)


def peers_settings() -> str:
    """Tell with which settings the peers ran, beside RecBole's own."""
    lines = []
    for data in PROTOCOLS:
        for peer in peers_of(data):
            settings = ", ".join(f"`{name}` {value}" for name, value in peer["settings"].items()) or "RecBole's own"
            lines.append(f"- RecBole {peer['model']} on {PROTOCOLS[data][0]}: {settings}; at most {peer['hours']:g} h.")
    return "\n".join(lines)


def write_page(path: Path, found: dict[Row, list[dict[str, Any]]]) -> None:
    """Put the tables between the page's marks; what stands around them is written by hand."""
    parts = [
        table(data, {row: runs for row, runs in found.items() if row.data == data})
        for data in PROTOCOLS
        if any(runs for row, runs in found.items() if row.data == data)
    ]
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    tables = "\n\n".join([*parts, *filter(None, [peers_settings()])])
    path.write_text(f"{before}{BEGIN}\n{tables}\n{END}{after}", encoding="utf-8")


def report(found: dict[Row, list[dict[str, Any]]]) -> bool:
    """Print a JSON line for each goal; returns whether all are met. What is not computed has no value."""
    all_met = True
    for row, runs in found.items():
        test = mean_and_std([run["test"] for run in runs]) if runs else None
        for name, must, reach in zip(PROTOCOLS[row.data][1], row.must, row.reach, strict=False):
            value = None if test is None else round(test[name]["mean"], 4)
            met = value is not None and value >= must
            all_met = all_met and met
            line = {"name": f"quality/{row.name}/{name}", "value": value, "must": round(must, 4), "reach": reach}
            print(json.dumps({**line, "met": met, "seeds": len(runs)}), flush=True)
    return all_met


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder of the data sets; SHORTLIST_DATA where left out")
    parser.add_argument("--only", action="append", help="compute rows that begin so, such as ml-100k or ml-100k/caser")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each row")
    parser.add_argument("--results", type=Path, default=Path("build/quality.jsonl"), help="where trainings are kept")
    parser.add_argument("--write", type=Path, default=Path("docs/quality.md"), help="the page that gets the tables")
    options = parser.parse_args()
    root = options.data or (Path(os.environ["SHORTLIST_DATA"]) if os.environ.get("SHORTLIST_DATA") else None)
    if root is None:
        parser.error("say where the data sets are: --data ROOT, make bench-quality DATA=ROOT, or SHORTLIST_DATA")
    rows = [row for row in ROWS if (root / row.data).is_dir()]
    if not rows:
        parser.error(f"{root} has none of the folders {', '.join(PROTOCOLS)}")
    results = Results(options.results)
    found = {row: compute(row, options.seeds, root / row.data, results, train=False) for row in rows}
    write_page(options.write, found)
    for row in rows:
        if not options.only or row.name.startswith(tuple(options.only)):
            found[row] = compute(row, options.seeds, root / row.data, results, train=True)
            write_page(options.write, found)
    raise SystemExit(0 if report(found) else 1)


if __name__ == "__main__":
    main()
