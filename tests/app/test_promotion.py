"""Which version is active: the guard, the activations and the way back."""

import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from app import tables
from app.database import writing
from app.settings import Settings
from app.training import promotion, runs, versions
from app.training.promotion import NothingToRollBackTo, decide
from ml.ids import IdMap
from ml.models import build_model
from ml.recipes import RECIPES
from ml.recommender import Recommender
from ml.registry import Registry, VersionDamaged
from ml.snapshots import DEFAULT_MEANINGS, make_snapshot, publish
from ml.store import FolderStore


def manifest(
    version: str = "new",
    test: float | None = 0.2,
    popularity: float | None = 0.1,
    snapshot: str = "s",
    lower_end: float | None = None,
    **evaluated_on: Any,
) -> dict[str, Any]:
    metrics = {
        "test": {} if test is None else {"ndcg@10": test},
        "popularity": {} if popularity is None else {"ndcg@10": popularity},
        "intervals": {} if lower_end is None else {"ndcg@10": [lower_end, 1.0]},
        "evaluated_on": {"snapshot": snapshot, "split": "leave-one-out", "interactions": 900} | evaluated_on,
    }
    return {"version": version, "metrics": metrics}


def cold(version: str = "new", lower_end: float | None = None, **evaluated_on: Any) -> dict[str, Any]:
    """The manifest of a version that was fitted from scratch on a snapshot of its own; its nDCG@10 is .2."""
    return manifest(version, snapshot=version, lower_end=lower_end, **{"warm": False} | evaluated_on)


def compared(this: float, that: float, version: str = "old", interactions: int = 50) -> dict[str, Any]:
    return {"version": version, "interactions": interactions, "this": this, "that": that}


FEW = compared(0, 1, interactions=49)


@pytest.mark.parametrize(
    ("promote", "new", "active", "comparison", "promoted", "message"),
    [
        ("never", manifest(), None, None, False, "promote: never"),
        ("always", manifest(test=0.0), manifest("old", 0.9), None, True, "promote: always"),
        ("guarded", manifest(), None, None, True, "nothing was active before"),
        ("guarded", manifest(test=0.1), None, None, True, "0.1000 is not below popularity's 0.1000"),
        ("guarded", manifest(test=0.09), None, None, False, "0.0900 is below popularity's 0.1000"),
        ("guarded", manifest(test=None), None, None, False, "no interaction was held out"),
        ("guarded", manifest(test=float("nan")), None, None, False, "no interaction was held out"),
        # Both measured on one hold-out, before they were refitted on it.
        ("guarded", manifest(test=0.3), manifest("old", 0.3), None, True, "0.3000, on the same hold-out"),
        ("guarded", manifest(test=0.3), manifest("old", 0.31), None, False, "0.3000 is below that of the active old"),
        ("guarded", manifest(test=0.3), manifest("old", 0.31), compared(0.4, 0.1), False, "on the same hold-out"),
        # Another hold-out: what the training measured of both.
        ("guarded", manifest(), manifest("old", 0.9, snapshot="t"), compared(0.2, 0.2), True, "on 50 interactions"),
        ("guarded", manifest(), manifest("old", 0.0, snapshot="t"), compared(0.2, 0.21), False, "on 50 interactions"),
        ("guarded", manifest(), manifest("old", 0.9, snapshot="t"), None, True, "does not load"),
        ("guarded", manifest(), manifest("old", 0.9, snapshot="t"), compared(0, 1, interactions=0), True, "all but 0"),
        (
            "guarded",
            manifest(),
            manifest("old", 0.9, snapshot="t"),
            compared(0, 1, interactions=49),
            True,
            "all but 49",
        ),
        # Next to nothing is new: what was measured of each, less what may be chance.
        ("guarded", cold(), cold("old", 0.2), FEW, True, "nearly the same"),
        ("guarded", cold(), cold("old", 0.21), FEW, False, "nearly the same"),
        ("guarded", cold(), cold("old", 0.21), compared(1, 0), True, "on 50 interactions"),
        ("guarded", cold(), cold("old", 0.21), None, True, "does not load"),
        ("guarded", cold(), cold("old"), FEW, True, "all but 49"),
        # Where as much is new as is not, the hold-outs have little in common.
        ("guarded", cold(interactions=490), cold("old", 0.21, interactions=490), FEW, False, "nearly the same"),
        ("guarded", cold(interactions=489), cold("old", 0.21, interactions=489), FEW, True, "all but 49"),
        *(
            ("guarded", cold(), cold("old", 0.21, **unlike), FEW, True, "all but 49")
            for unlike in ({"interactions": 818}, {"interactions": 991}, {"split": "temporal"}, {"warm": True})
        ),
        ("guarded", manifest(), manifest("other", 0.1, snapshot="t"), compared(0.9, 0.1), False, "became active"),
        ("guarded", manifest(), manifest("other", 0.1), compared(0.9, 0.1), True, "on the same hold-out"),
    ],
)
def test_the_guard(
    promote: Any,
    new: dict[str, Any],
    active: dict[str, Any] | None,
    comparison: dict[str, Any] | None,
    promoted: bool,
    message: str,
) -> None:
    decision = decide(promote, new, active, comparison, "old")
    assert (decision.promote, message in decision.message) == (promoted, True), decision.message


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path, _env_file=None)


@pytest.fixture
def registry(settings: Settings) -> Registry:
    return Registry(FolderStore(settings.resolved_store_url))


def publish_version(registry: Registry, version: str, **details: Any) -> None:
    users, items = (IdMap.from_ids([f"{kind}{number}" for number in range(4)]) for kind in "ui")
    recommender = Recommender(build_model("popularity", 4, 4), users, items)
    registry.publish(recommender, recipe=RECIPES["popularity"].as_dict(), version=version, **details)


def publish_and_enter(engine: Engine, registry: Registry, *names: str) -> None:
    for name in names:
        publish_version(registry, name)
    assert versions.discover(engine, registry) == sorted(names)


def states(engine: Engine) -> dict[str, str]:
    with engine.connect() as connection:
        return {row.version: row.state for row in connection.execute(sa.select(tables.model_versions))}


def activate(engine: Engine, registry: Registry, *names: str) -> None:
    for name in names:
        versions.activate(engine, registry, name, actor="tester", reason="test")


def test_versions_published_elsewhere_become_candidates(engine: Engine, registry: Registry) -> None:
    publish_and_enter(engine, registry, "a", "b")
    assert states(engine) == {"a": "candidate", "b": "candidate"}
    assert versions.discover(engine, registry) == []


def test_a_version_of_a_run_counts_only_through_the_run(engine: Engine, registry: Registry) -> None:
    publish_version(registry, "stale", run_id="some-run", run_epoch=1)
    assert versions.discover(engine, registry) == []
    with pytest.raises(KeyError):
        activate(engine, registry, "stale")


def test_rollback_walks_back_through_the_activations(engine: Engine, registry: Registry) -> None:
    publish_and_enter(engine, registry, "a", "b", "c")
    with pytest.raises(NothingToRollBackTo):
        versions.rollback(engine, registry, actor="tester")
    activate(engine, registry, "a", "b", "b", "c")
    assert states(engine) == {"a": "retired", "b": "retired", "c": "active"}
    assert versions.rollback(engine, registry, actor="tester") == ("b", "c")
    assert versions.rollback(engine, registry, actor="tester") == ("a", "b")
    assert states(engine) == {"a": "active", "b": "retired", "c": "retired"}
    with pytest.raises(NothingToRollBackTo):
        versions.rollback(engine, registry, actor="tester")
    activate(engine, registry, "c")
    assert versions.rollback(engine, registry, actor="tester") == ("a", "c")
    with engine.connect() as connection:
        rows = connection.execute(sa.select(tables.audit_log).order_by(tables.audit_log.c.sequence)).all()
    assert [(row.actor, row.action, row.subject) for row in rows] == [
        ("tester", "model.activate", "a"),
        ("tester", "model.activate", "b"),
        ("tester", "model.activate", "c"),
        ("tester", "model.rollback", "b"),
        ("tester", "model.rollback", "a"),
        ("tester", "model.activate", "c"),
        ("tester", "model.rollback", "a"),
    ]


def test_a_damaged_version_is_not_activated(engine: Engine, registry: Registry, settings: Settings) -> None:
    publish_and_enter(engine, registry, "a", "b")
    activate(engine, registry, "a", "b")
    store = Path(settings.resolved_store_url)
    weights = next((store / "versions" / "a").glob("model-*"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(VersionDamaged):
        activate(engine, registry, "a")
    with pytest.raises(VersionDamaged):
        versions.rollback(engine, registry, actor="tester")
    assert states(engine) == {"a": "retired", "b": "active"}


def test_concurrent_activations_leave_one_active(engine: Engine, registry: Registry) -> None:
    names = ["a", "b", "c", "d"]
    publish_and_enter(engine, registry, *names)
    threads = [threading.Thread(target=activate, args=(engine, registry, name)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(states(engine).values()) == ["active", "retired", "retired", "retired"]
    rolled_back = [versions.rollback(engine, registry, actor="tester")[0] for _ in range(3)]
    assert len({*rolled_back}) == 3


def age(engine: Engine, days: int) -> None:
    """Let everything that happened lie that far back."""
    moved = timedelta(days=days)
    with writing(engine) as connection:
        for table, column in (
            (tables.model_versions, "created_at"),
            (tables.activations, "created_at"),
            (tables.runs, "finished_at"),
        ):
            key = next(iter(table.primary_key))
            for row in connection.execute(sa.select(key, table.c[column])).all():
                if row[1] is not None:
                    connection.execute(sa.update(table).where(key == row[0]).values({column: row[1] - moved}))


def run_with_version(engine: Engine, registry: Registry, version: str, **details: Any) -> None:
    """Enter a version as a run that succeeded does."""
    with writing(engine) as connection:
        run, _ = runs.create(connection, "popularity")
    publish_version(registry, version, run_id=run.run_id, run_epoch=1, **details)
    run_claimed = runs.claim(engine, "w", lease_seconds=30, max_attempts=3)
    assert run_claimed is not None
    with writing(engine) as connection:
        entry = registry.manifest(version).as_json()
        promotion.add_candidate(connection, version, "popularity", entry, run.run_id)
        snapshot = details.get("snapshot")
        runs.finish(connection, run_claimed, "succeeded", "", version=version, promoted=False, snapshot=snapshot)


def test_old_versions_are_removed_but_never_one_in_use(engine: Engine, registry: Registry, settings: Settings) -> None:
    for name in ("unused", "first", "second", "active"):
        run_with_version(engine, registry, name)
    publish_and_enter(engine, registry, "foreign")
    activate(engine, registry, "first", "second", "active")
    tidy = lambda: versions.tidy(engine, registry.store, registry, settings)  # noqa: E731
    assert tidy().versions == []
    age(engine, 31)
    run_with_version(engine, registry, "young")
    assert sorted(tidy().versions) == ["first", "unused"]
    assert states(engine) == {"second": "retired", "active": "active", "foreign": "candidate", "young": "candidate"}
    assert registry.names() == ["active", "foreign", "second", "young"]
    assert versions.rollback(engine, registry, actor="tester") == ("second", "active")
    with pytest.raises(NothingToRollBackTo):
        versions.rollback(engine, registry, actor="tester")


def test_what_a_lost_worker_published_is_removed_in_time(
    engine: Engine, registry: Registry, settings: Settings
) -> None:
    run_with_version(engine, registry, "good")
    with engine.connect() as connection:
        run_id = connection.execute(sa.select(tables.runs.c.run_id)).scalar_one()
    publish_version(registry, "stale", run_id=run_id, run_epoch=1)
    publish_version(registry, "of-another-service", run_id="unknown", run_epoch=1)
    versions.tidy(engine, registry.store, registry, settings)
    assert registry.names() == ["good", "of-another-service", "stale"]
    age(engine, 31)
    eager = settings.model_copy(update={"retention_days": 0})
    assert "stale" in versions.tidy(engine, registry.store, registry, eager).versions
    assert "of-another-service" in registry.names()


def test_old_snapshots_are_removed_but_never_one_in_use(engine: Engine, registry: Registry, settings: Settings) -> None:
    store = registry.store
    hashes = []
    for number in range(4):
        watermark = {"position": number, "transaction_id": None, "time": None, "erasures_through": 0}
        snapshot = make_snapshot([], DEFAULT_MEANINGS, watermark)
        publish(store, snapshot)
        hashes.append(snapshot.hash)
    unused, of_run, of_active, newest = hashes
    with writing(engine) as connection:
        row = {"hash": newest, "cluster": "", "created_at": datetime.now(UTC)}
        connection.execute(sa.insert(tables.snapshots).values(row))
    run_with_version(engine, registry, "v", snapshot=of_active)
    activate(engine, registry, "v")
    age(engine, 1)
    with writing(engine) as connection:
        run, _ = runs.create(connection, "popularity")
        connection.execute(sa.update(tables.runs).where(tables.runs.c.run_id == run.run_id).values(snapshot=of_run))
    eager = settings.model_copy(update={"retention_days": 0})
    assert versions.tidy(engine, store, registry, eager).parts == [f"snapshots/{unused}.json"]
    kept = sorted(f"snapshots/{name}.json" for name in (of_run, of_active, newest))
    assert store.list("snapshots") == kept


def test_files_of_finished_runs_are_removed(engine: Engine, registry: Registry, settings: Settings) -> None:
    run_with_version(engine, registry, "v")
    with writing(engine) as connection:
        waiting, _ = runs.create(connection, "popularity")
    with engine.connect() as connection:
        names = connection.execute(sa.select(tables.runs.c.run_id)).scalars().all()
    for name in names:
        (settings.runs_dir / name / "attempt-1").mkdir(parents=True)
    versions.tidy(engine, registry.store, registry, settings)
    assert [folder.name for folder in settings.runs_dir.iterdir()] == [waiting.run_id]
