"""Measures how well users unseen in training are ranked for after 1, 3 and 10 events, beside popularity.

    python benchmarks/cold_users.py --data DIR [--work build/cold-users] [--write docs/quality.md]

DIR holds MovieLens 1M as sequences, one user a line. One user in ten is reported on, and another tenth, on which the
settings of folding in were chosen (`--users choosing`), stays out of the training too. Versions are kept in the work
folder, and a training that was broken off goes on after its last epoch. Prints one JSON line for each figure.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from ml.evaluate import Evaluation, evaluate, popularity_of
from ml.fold_in import chosen_strength
from ml.ids import IdMap
from ml.importers import load, open_source
from ml.interactions import Interactions
from ml.recipes import apply_overrides, recipe_named
from ml.recommender import Recommender
from ml.registry import Registry
from ml.store import open_store
from ml.train import Progress, train

EVENTS = (1, 3, 10)
# Default recipes, for as many epochs as validation keeps of NeuMF; Caser's falling learning rate follows fewer.
RECIPES = {"neumf": {"epochs": "12"}, "caser": {"epochs": "6"}}
METRIC = "ndcg@10"
LIMIT_MS = 10.0
TIMED = 200
BEGIN, END = "<!-- cold users: begin -->", "<!-- cold users: end -->"


@dataclass(frozen=True)
class People:
    """Who is trained on, and whose rankings are measured."""

    trained: Interactions
    measured: list[npt.NDArray[np.int64]]  # items of each user, oldest first, as the training numbers them


@dataclass(frozen=True)
class Row:
    """One recipe after so many events: means over users and the standard error of the difference."""

    recipe: str
    events: int
    users: int
    value: float
    popularity: float
    error: float


def people(data: Interactions, *, choosing: bool) -> People:
    """Draw a tenth of the users to report on and a tenth to choose on; train on the others alone."""
    order = np.random.default_rng(0).permutation(data.num_users)
    tenth = data.num_users // 10
    is_trained = np.zeros(data.num_users, np.bool_)
    is_trained[order[2 * tenth :]] = True
    kept = data.select(is_trained[data.user_index])
    trained = Interactions.from_arrays(
        data.users.array.take(kept.user_index), data.items.array.take(kept.item_index), kept.time
    )
    numbers = trained.items.indices(data.items.array)
    measured = order[tenth : 2 * tenth] if choosing else order[:tenth]
    return People(trained, [numbers[data.history(user)] for user in measured])


def trained_version(name: str, trained: Interactions, work: Path) -> Recommender:
    """The recipe's version in the work folder, trained if it is not there yet."""
    registry = Registry(open_store(str(work / "versions")))
    recipe = apply_overrides(recipe_named(name), RECIPES[name])
    if not registry.exists(name):

        def tell(progress: Progress) -> None:
            if progress.epoch_ended:
                print(f"{name}: epoch {progress.epoch} of {progress.epochs}, loss {progress.loss:.4f}", flush=True)

        result = train(recipe, trained, checkpoint=work / f"{name}.checkpoint", on_progress=tell)
        made = Recommender(result.model, trained.users, trained.items)
        registry.publish(made, recipe=recipe.as_dict(), version=name)
    recommender, manifest = registry.load(name)
    if recommender.model.fits_strangers:  # as a production training does
        recommender.prior_strength = chosen_strength(recommender.model, trained, 0)
    if manifest.recipe != recipe.as_dict() or not recommender.users.equals(trained.users):
        raise SystemExit(f"{work} holds a {name} of other settings or data: remove it, or choose another --work")
    return recommender


def measured(recommender: Recommender, histories: list[npt.NDArray[np.int64]], events: int) -> Evaluation:
    """Rank for each user as a stranger after their first events; the next one is the target."""
    users = IdMap.from_ids([f"{number:06}" for number in range(len(histories))])

    def interactions(first: int, last: int) -> Interactions:
        parts = [history[first:last] for history in histories]
        rows = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        times = np.concatenate([np.arange(len(part)) for part in parts])
        items = np.concatenate(parts)
        return Interactions(
            users, recommender.items, rows.astype(np.int32), items.astype(np.int32), times.astype(np.int64)
        )

    nobody = np.zeros(len(histories), np.bool_)
    return evaluate(recommender, interactions(0, events), interactions(events, events + 1), known_users=nobody)


def milliseconds(recommender: Recommender, histories: list[npt.NDArray[np.int64]]) -> float:
    """Processor time to encode one stranger with ten events: the median."""
    recommender.encode([-1], [histories[0]])
    times = []
    for history in histories[:TIMED]:
        started = time.process_time()
        recommender.encode([-1], [history[: EVENTS[-1]]])
        times.append(time.process_time() - started)
    return float(np.median(times)) * 1e3


def table(rows: list[Row]) -> str:
    """Format the rows as Markdown."""
    lines = [
        "| recipe | events | nDCG@10 | popularity | difference |",
        "|---|---|---|---|---|",
        *(
            f"| `{row.recipe}` | {row.events} | {row.value:.4f} | {row.popularity:.4f} "
            f"| {row.value - row.popularity:+.4f} ± {row.error:.4f} |"
            for row in rows
        ),
    ]
    return "\n".join(lines)


def write_section(path: Path, content: str) -> None:
    """Put the content between the markers."""
    page = path.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not rest or not after:
        raise SystemExit(f"{path} has no {BEGIN} … {END}")
    path.write_text(f"{before}{BEGIN}\n{content}\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure ranking for users unseen in training, beside popularity.")
    parser.add_argument("--data", type=Path, help="folder with MovieLens 1M as sequences, or one that holds it")
    parser.add_argument("--work", type=Path, default=Path("build/cold-users"), help="where versions are kept")
    parser.add_argument("--users", choices=("reported", "choosing"), default="reported")
    parser.add_argument("--write", type=Path, help="the page whose section to write: docs/quality.md")
    arguments = parser.parse_args()
    folder = arguments.data or Path(os.environ.get("SHORTLIST_DATA", "."))
    if (folder / "ml-1m-sequences").is_dir():
        folder = folder / "ml-1m-sequences"
    torch.set_num_threads(1)
    arguments.work.mkdir(parents=True, exist_ok=True)
    chosen = people(load(open_source(folder, "sequences")).interactions, choosing=arguments.users == "choosing")
    popular = popularity_of(chosen.trained)
    rows, figures = [], []
    for name in RECIPES:
        recommender = trained_version(name, chosen.trained, arguments.work)
        for events in EVENTS:
            # The next event is the target, unless it is one of those before.
            found, base = (measured(it, chosen.measured, events) for it in (recommender, popular))
            ours, theirs = found.by_user[METRIC], base.by_user[METRIC]
            error = float((ours - theirs).std(ddof=1) / len(ours) ** 0.5)
            row = Row(name, events, len(ours), float(ours.mean()), float(theirs.mean()), error)
            rows.append(row)
            figure = {"name": f"cold-users/{name}/{events}/{METRIC}", "value": round(row.value, 4)}
            must = round(row.popularity, 4)
            figures.append({**figure, "must": must, "reach": must, "met": row.value > row.popularity})
        spent = milliseconds(recommender, chosen.measured)
        figure = {"name": f"cold-users/{name}/encode_ms", "value": round(spent, 2)}
        figures.append({**figure, "must": LIMIT_MS, "reach": LIMIT_MS, "met": spent < LIMIT_MS})
    if arguments.write is not None:
        write_section(arguments.write, table(rows))
    else:
        print(table(rows))
    for figure in figures:
        print(json.dumps(figure), flush=True)
    raise SystemExit(0 if all(figure["met"] for figure in figures) else 1)


if __name__ == "__main__":
    main()
