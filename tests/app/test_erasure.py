"""Erasing reaches every place that knows a user or an item, and waits for events under way."""

import threading
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient
from sqlalchemy.engine import Engine

from app import erasure
from app.database import create_engine, reading, writing
from app.erasure import Erased, erase, subject_sha256
from app.imported_events import EVENT_COLUMNS, open_writer
from app.serving import popularity
from app.serving.catalog import Catalog
from app.serving.recommendation_log import SHOWN, RecommendationLog, Shown
from app.settings import Settings
from app.tables import audit_log, erasures, events, item_counts, items, recommendation_log, snapshots, users
from app.training.snapshots import take_snapshot
from ml.snapshots import DEFAULT_MEANINGS, read_parts
from ml.store import open_store

NOW = datetime(2026, 11, 21, 9, 30, tzinfo=UTC)


def event(user: str, number: int, item: str = "i") -> dict[str, object]:
    ids = {"user_id": user, "event_id": str(number), "item_id": item}
    return {**ids, "type": "click", "occurred_at": NOW, "received_at": NOW}


def log_row(user: str, number: int) -> dict[str, object]:
    texts = {"recommendation_id": str(number), "user_id": user, "surface": "home", "policy": "p", "source": "model"}
    lists: dict[str, object] = {name: [] for name in ("item_ids", "scores", "propensities", "explorations")}
    return {**texts, **lists, "filters": {}, "candidate_count": 0, "created_at": NOW}


def test_a_user_is_erased_once(engine: Engine) -> None:
    with writing(engine) as connection:
        connection.execute(sa.insert(events), [event(user, n) for n, user in enumerate(["a", "b", "a", "c"])])
        connection.execute(sa.insert(recommendation_log), [log_row("a", 1), log_row("b", 2)])
        connection.execute(sa.insert(users), {"user_id": "a", "metadata": {}, "created_at": NOW, "updated_at": NOW})
        newest = connection.execute(sa.select(sa.func.max(events.c.position))).scalar()
    assert erase(engine, "user", "a", actor="cli") == Erased(catalog=1, events=2, log_rows=1)
    assert erase(engine, "user", "a", actor="cli") == Erased(0, 0, 0, is_new=False)
    with engine.connect() as connection:
        assert connection.execute(sa.select(events.c.user_id).order_by(events.c.position)).scalars().all() == ["b", "c"]
        assert connection.execute(sa.select(recommendation_log.c.user_id)).scalars().all() == ["b"]
        (erased,) = connection.execute(sa.select(erasures)).mappings().all()
        (audited,) = connection.execute(sa.select(audit_log)).mappings().all()
    assert (erased["kind"], erased["subject_sha256"], erased["through_position"]) == (
        "user",
        subject_sha256("a"),
        newest,
    )
    assert audited["subject"] == f"sha256:{subject_sha256('a')}"
    assert audited["details"] == {"catalog": 1, "events": 2, "log_rows": 1}


@pytest.mark.parametrize("kind", ["user", "item"])
def test_what_left_no_row_is_erased_for_those_that_may_hold_it(engine: Engine, kind: Literal["user", "item"]) -> None:
    assert erase(engine, kind, "a", actor="cli") == Erased(0, 0, 0, is_new=True)
    assert erase(engine, kind, "a", actor="cli") == Erased(0, 0, 0, is_new=False)
    with writing(engine) as connection:  # it may have come back, gone into this snapshot, and lost its rows
        later = datetime.now(UTC) + timedelta(seconds=1)
        connection.execute(sa.insert(snapshots), {"hash": "h", "cluster": "", "created_at": later})
    assert erase(engine, kind, "a", actor="cli") == Erased(0, 0, 0, is_new=True)
    with engine.connect() as connection:
        assert (
            connection.execute(sa.select(erasures.c.kind, erasures.c.subject_sha256)).all()
            == [(kind, subject_sha256("a"))] * 2
        )


def test_an_item_is_erased_with_everyones_events(engine: Engine) -> None:
    with writing(engine) as connection:
        connection.execute(sa.insert(events), [event("a", 1, "i"), event("b", 2, "i"), event("a", 3, "j")])
    assert erase(engine, "item", "i", actor="cli") == Erased(catalog=0, events=2, log_rows=0)
    with engine.connect() as connection:
        assert connection.execute(sa.select(events.c.item_id)).scalars().all() == ["j"]


def test_an_items_events_are_found_without_an_index(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """All are read before the lock is taken: what comes after that is met under it."""
    monkeypatch.setattr(erasure, "ROWS_AT_A_TIME", 2)
    with writing(engine) as connection:
        connection.execute(sa.insert(events), [event("a", n, "i" if n % 2 else "j") for n in range(11)])
    read = erasure._events_of_item

    def meanwhile(*arguments: Any) -> Any:
        found = read(*arguments)
        with writing(engine) as connection:
            connection.execute(sa.insert(events), [event("b", n, "i" if n % 2 else "j") for n in range(5)])
        return found

    monkeypatch.setattr(erasure, "_events_of_item", meanwhile)
    assert erase(engine, "item", "i", actor="cli") == Erased(catalog=0, events=7, log_rows=0)
    with engine.connect() as connection:
        assert set(connection.execute(sa.select(events.c.item_id)).scalars()) == {"j"}
        assert connection.execute(sa.select(erasures.c.through_position)).scalar_one() == 16


@pytest.mark.parametrize("user", ["a", "b"])
def test_events_under_way_are_waited_for(engine: Engine, user: str) -> None:
    """An event that took a lower position and commits later would be dropped with the erased ones, or outlive them."""
    with writing(engine) as connection:
        connection.execute(sa.insert(events), event("a", 0))
    outcome: list[Erased] = []
    eraser = threading.Thread(target=lambda: outcome.append(erase(engine, "user", "a", actor="cli")))
    with writing(engine) as connection:
        connection.execute(sa.insert(events), event(user, 1))
        eraser.start()
        eraser.join(0.2)
        assert eraser.is_alive(), "it must wait for the open transaction"
    eraser.join(30)
    assert outcome == [Erased(catalog=0, events=2 if user == "a" else 1, log_rows=0)]
    with writing(engine) as connection:
        connection.execute(sa.insert(events), event("a", 2))
    with engine.connect() as connection:
        through = connection.execute(sa.select(erasures.c.through_position)).scalar_one()
        left = connection.execute(sa.select(events.c.user_id, events.c.position)).all()
    assert all(name != "a" or position > through for name, position in left)
    assert len(left) == (1 if user == "a" else 2)


def test_an_answer_that_enters_the_log_meanwhile_does_not_outlive_its_user(engine: Engine) -> None:
    with writing(engine) as connection:
        connection.execute(sa.insert(events), event("a", 0))
    log = RecommendationLog(engine, on_lost=lambda _: None)
    shown = {name: value for name, value in log_row("a", 1).items() if name in SHOWN} | {"filters": "{}"}
    eraser = threading.Thread(target=erase, args=(engine, "user", "a"), kwargs={"actor": "cli"})

    def erase_in_between(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if (
            "FROM erasures" in statement and eraser.ident is None
        ):  # what was erased before is known; the answer is written next
            eraser.start()
            eraser.join(0.5)  # it ends, or waits for this transaction

    sa.event.listen(engine, "after_cursor_execute", erase_in_between)
    log.start()
    log.add("1", Shown(**shown, model_version=None, feedback_through=None).as_row())  # type: ignore[arg-type]
    log.stop()
    eraser.join(30)
    with engine.connect() as connection:
        assert connection.execute(sa.select(recommendation_log.c.user_id)).scalars().all() == []
        assert connection.execute(sa.select(erasures.c.kind)).scalars().all() == ["user"]


def test_what_an_import_brings_back_is_in_the_catalogue_again(engine: Engine) -> None:
    rows = 45_000  # several chunks on both databases
    texts = {"user_id": "u", "item_id": "i", "type": "click", "retracts": None}
    columns = {name: pa.repeat(pa.scalar(value, pa.string()), rows) for name, value in texts.items()}
    columns |= {"event_id": pa.array(map(str, range(rows))), "value": pa.nulls(rows, pa.float64())}
    columns["occurred_at"] = pa.repeat(pa.scalar(NOW.replace(tzinfo=None), pa.timestamp("us")), rows)
    with closing(open_writer(engine)) as writer:
        chunks = writer.write(pa.table({name: columns[name] for name in EVENT_COLUMNS}))
        first, _ = next(chunks)
        assert erase(engine, "user", "u", actor="cli").events == first
        assert erase(engine, "item", "i", actor="cli").catalog == 1
        assert sum(stored for _, stored in chunks) == rows - first
    with engine.connect() as connection:
        assert connection.execute(sa.select(users.c.user_id)).scalars().all() == ["u"]
        assert connection.execute(sa.select(items.c.item_id)).scalars().all() == ["i"]


def test_what_is_erased_is_gone_from_the_file(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(popularity, "SAVE_EVERY", 1)
    path = Path(sqlite_url.removeprefix("sqlite:///"))
    engine = create_engine(sqlite_url)
    with writing(engine) as connection:
        connection.execute(sa.insert(events), [event(f"user-{n}", n, f"item-{n}") for n in range(200)])
        connection.execute(sa.insert(events), event("somebody-unmistakable", 1))
        connection.execute(sa.insert(events), event("user-0", 200, "something-unmistakable"))
    counts = popularity.Popularity(DEFAULT_MEANINGS, Catalog())
    with reading(engine) as connection:
        counts.poll(connection)
    counts.save(engine)
    with engine.connect() as connection:
        assert "something-unmistakable" in connection.execute(sa.select(item_counts.c.counts)).scalar_one()
    erase(engine, "user", "somebody-unmistakable", actor="cli")
    erase(engine, "item", "something-unmistakable", actor="cli")
    with engine.connect() as connection:
        connection.commit()
        connection.connection.driver_connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    engine.dispose()
    assert b"unmistakable" not in path.read_bytes()
    assert b"user-199" in path.read_bytes()


def test_erasing_reaches_snapshots_and_loaded_versions(
    client: TestClient, settings: Settings, engine: Engine, publish: Any
) -> None:
    names = [f"item-{number}" for number in range(12)]
    store = open_store(settings.resolved_store_url)
    feedback = [{"user_id": user, "item_id": item, "type": "click"} for user in ("anna", "ben") for item in names[:4]]
    assert client.post("/feedback", json=feedback).status_code == 201
    before = take_snapshot(engine, store, settings)
    publish("v1", names, snapshot=before.hash)
    client.app.state.service.poll()  # type: ignore[attr-defined]

    def shown(user: str) -> tuple[str, set[str]]:
        answer = client.get(f"/users/{user}/recommendations?k=12").json()
        return answer["source"], {item["item_id"] for item in answer["items"]}

    assert shown("anna") == ("model", set(names[4:]))
    assert client.delete("/users/anna").status_code == 204
    assert client.delete("/items/item-5").status_code == 204
    left = set(names) - {"item-5"}
    assert shown("anna") == ("popular", left), "neither the model's row of the user nor the history may be used"
    assert shown("ben") == ("model", left - set(names[:4]))

    after = take_snapshot(engine, store, settings)
    assert after.hash != before.hash
    users = pa.concat_tables(read_parts(store, after))["user_id"].to_pylist()
    assert users == ["ben"] * 4
    assert not {part.sha256 for part in after.parts} & {part.sha256 for part in before.parts}

    # Whoever comes back is new: known by the events since, and to no version from before.
    client.post("/feedback", json={"user_id": "anna", "item_id": "item-0", "type": "click"})
    assert shown("anna") == ("folded_in", left - {"item-0"})
    users = pa.concat_tables(read_parts(store, take_snapshot(engine, store, settings)))["user_id"].to_pylist()
    assert sorted(users) == ["anna"] + ["ben"] * 4
