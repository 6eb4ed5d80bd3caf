"""Published versions: list them, and rank with them on data that they were not built from."""

import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import typer
from torch import Tensor

from ml.distributed import ALONE, Processes
from ml.evaluate import evaluate, popularity_of
from ml.experiment import TEST, SplitEvaluator, counts_of, metrics_table, split_of
from ml.importers import load, open_source
from ml.interactions import Interactions
from ml.recommender import Indices, Ranker, Recommender
from ml.registry import Registry, VersionDamaged
from ml.snapshots import Snapshot, read_part, read_snapshot
from ml.split import split_by_name
from ml.store import Store, open_store

_NEVER = float("-inf")


class Translated:
    """A recommender seen through the id maps of a data set; items that it does not know are never ranked."""

    def __init__(self, recommender: Recommender, data: Interactions) -> None:
        self._recommender = recommender
        self._users = recommender.users.indices(data.users.array)
        items = recommender.items.indices(data.items.array)
        # Index num_items is the padding on both sides, and an unknown item counts as padding in a window.
        self._items = np.append(np.where(items < 0, recommender.num_items, items), recommender.num_items)
        self._columns = torch.from_numpy(np.maximum(items, 0)).to(recommender.device)
        self._unknown = torch.from_numpy(items < 0).to(recommender.device)
        self.num_items = data.num_items
        self.window_length = recommender.window_length
        self.folds_in = recommender.folds_in
        self.device = recommender.device

    @property
    def knows_an_item(self) -> bool:
        """Whether the recommender can rank any item of the data."""
        return not bool(self._unknown.all())

    @property
    def known_users(self) -> npt.NDArray[np.bool_]:
        """Which users of the data the recommender was trained on, (num_users,)."""
        known: npt.NDArray[np.bool_] = self._users >= 0
        return known

    def encode_windows(self, user_index: npt.NDArray[np.int64], windows: Indices) -> Tensor:
        """Encode users of the data, as Recommender.encode_windows does."""
        theirs = self._items[windows]
        # Unknown items leave gaps; padding belongs in front.
        order = np.argsort(theirs != self._recommender.num_items, axis=1, kind="stable")
        theirs = np.take_along_axis(theirs, order, axis=1)
        return self._recommender.encode_windows(np.where(user_index < 0, -1, self._users[user_index]), theirs)

    def score_all(self, encoded: Tensor) -> Tensor:
        """Score the data's items; minus infinity for unknown ones."""
        return self._recommender.score_all(encoded)[:, self._columns].masked_fill_(self._unknown, _NEVER)

    def score_items(self, encoded: Tensor, items: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Score some of the data's items, as Recommender.score_items does; minus infinity for unknown ones."""
        theirs = self._items[items]
        return self._recommender.score_items(
            encoded, np.where((items < 0) | (theirs == self._recommender.num_items), -1, theirs)
        )


def unseen(interactions: Interactions, trained_through: str | None) -> Interactions:
    """Keep what is later than the newest interaction a version was trained on."""
    if trained_through is None:
        return interactions
    return interactions.select(interactions.time > microseconds(trained_through))


def compared(
    this: Ranker,
    other: Recommender,
    trained_through: str | None,
    history: Interactions,
    test: Interactions,
    processes: Processes = ALONE,
) -> dict[str, float | None]:
    """Rank two models for what the other one has not seen, for users that it can rank for.

    Returns the number of interactions and the nDCG@10 of both; None for these where nothing is left to compare on.
    """
    translated = Translated(other, history)
    targets = unseen(test, trained_through)
    if not translated.folds_in:
        targets = targets.select(translated.known_users[targets.user_index])
    try:
        ours = evaluate(this, history, targets, cutoffs=(10,), lists_only=True, processes=processes)
        theirs = evaluate(
            translated,
            history,
            targets,
            cutoffs=(10,),
            known_users=translated.known_users,
            lists_only=True,
            processes=processes,
        )
    except ValueError:
        return {"interactions": 0, "this": None, "that": None}
    return {"interactions": ours.targets, "this": ours.metrics["ndcg@10"], "that": theirs.metrics["ndcg@10"]}


def evaluate_command(
    *,
    version: str,
    store_url: str,
    data: Path | None,
    snapshot_hash: str | None,
    format: str | None,  # noqa: A002
    split: str | None,
    negatives: int,
    seed: int,
    as_json: bool,
) -> None:
    """The body of `ml evaluate`."""
    if (data is None) == (snapshot_hash is None):
        raise ValueError("say what to evaluate on: either --data or --snapshot")
    store = open_store(store_url)
    recommender, manifest = Registry(store).load(version)
    if data is not None:
        loaded = load(open_source(data, format))
        interactions, parts = loaded.interactions, split_of(loaded, split, seed)
    else:
        interactions = interactions_of(store, str(snapshot_hash))
        parts = split_by_name(split, interactions, seed=seed)
    evaluator = SplitEvaluator(parts, negatives=negatives, seed=seed)
    translated = Translated(recommender, interactions)
    if not translated.knows_an_item:
        raise ValueError(
            f"version {version} knows none of the items of this data: are their ids those of its training?"
        )
    evaluator.known_users = translated.known_users
    found = evaluator.evaluate(translated, TEST)
    baseline = evaluator.evaluate(popularity_of(parts.train), TEST, strangers=translated.folds_in)
    through = manifest.trained_through
    not_seen = len(unseen(parts.test, through))
    document = {
        "version": version,
        "split": parts.name,
        TEST: found.metrics,
        "intervals": {TEST: found.intervals()},
        "popularity": {TEST: baseline.metrics},
        "evaluated": {TEST: counts_of(found)},
        "trained_through": through,
        # Figures on what a version was trained on flatter it.
        "test_not_seen_in_training": not_seen,
    }
    if not_seen < len(parts.test):
        typer.echo(f"note: the version was trained on data up to {through}, which holds test interactions", err=True)
    if as_json:
        typer.echo(json.dumps(document, allow_nan=False))
        return
    from rich.console import Console

    ranges = {name: f"{low:.4f} to {high:.4f}" for name, (low, high) in found.intervals().items()}
    Console().print(metrics_table(f"{version}, {parts.name}", found.metrics, baseline.metrics, ranges))


def list_command(store_url: str, *, as_json: bool) -> None:
    """The body of `ml versions`."""
    registry = Registry(open_store(store_url))
    sound, damaged = [], []
    for name in registry.names():
        try:
            manifest = registry.manifest(name)
            registry.check_files_exist(manifest)
            sound.append(manifest)
        except VersionDamaged as error:
            damaged.append({"version": name, "problem": str(error)})
    sound.sort(key=lambda manifest: (manifest.created_at, manifest.version))
    if as_json:
        typer.echo(json.dumps({"versions": [manifest.as_json() for manifest in sound], "damaged": damaged}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("version", "model", "created", "trained through", "test ndcg@10", "popularity", "parent")
    for manifest in sound:
        test, popularity = (manifest.metrics.get(part, {}).get("ndcg@10") for part in (TEST, "popularity"))
        figures = ("" if value is None else f"{value:.4f}" for value in (test, popularity))
        through = manifest.trained_through or ""
        row = (manifest.version, manifest.model["name"], manifest.created_at, through, *figures)
        table.add_row(*row, manifest.parent_version or "")
    Console().print(table)
    for entry in damaged:
        typer.echo(entry["problem"], err=True)


def interactions_of(store: Store, snapshot_hash: str, processes: Processes = ALONE) -> Interactions:
    """Read the interactions of a snapshot; ValueError if it is missing or damaged.

    Several `processes` each read some of the parts and end with the interactions of their own users.
    """
    try:
        snapshot = read_snapshot(store, snapshot_hash)
    except KeyError:
        raise ValueError(f"the store holds no snapshot {snapshot_hash[:80]!r}") from None
    found = Interactions.from_events(_own_parts(store, snapshot, processes), snapshot.meanings, processes)
    pa.default_memory_pool().release_unused()
    return found


def _own_parts(store: Store, snapshot: Snapshot, processes: Processes) -> Iterator[pa.Table]:
    """The parts that this process reads, their events numbered through where the parts themselves don't."""
    first = 0
    for number, part in enumerate(snapshot.parts):
        if number % processes.size == processes.rank:
            table = read_part(store, part, encoded=True)
            if processes.size > 1 and table["position"].null_count:
                table = table.set_column(0, "position", pa.array(np.arange(first, first + len(table))))
            yield table
            # Arrow keeps what it has used; the next part wants another pattern of sizes.
            del table
            pa.default_memory_pool().release_unused()
        first += part.rows


def microseconds(moment: str) -> int:
    """Read an RFC 3339 time as microseconds since the epoch."""
    try:
        time = datetime.fromisoformat(moment)
        offset = time - datetime.fromisoformat("1970-01-01T00:00:00Z")
    except (ValueError, TypeError):
        raise ValueError(f"{moment!r} is no RFC 3339 time such as 2026-01-31T12:00:00Z") from None
    return (offset.days * 86_400 + offset.seconds) * 1_000_000 + offset.microseconds


def rfc3339(time: int) -> str:
    """Write microseconds since the epoch as RFC 3339 in UTC."""
    return str(np.datetime64(time, "us")) + "Z"
