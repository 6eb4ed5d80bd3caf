"""The queue of runs: claimed once, fenced by the epoch, on SQLite and PostgreSQL alike."""

import threading
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from app import tables
from app.database import writing
from app.training import runs
from app.training.runs import KeyReused, LeaseLost, Run, RunIsOver

LEASE = 30.0


def queue(engine: Engine, **request: Any) -> Run:
    with writing(engine) as connection:
        return runs.create(connection, "caser", **request)[0]


def claim(engine: Engine, worker: str = "a", *, max_attempts: int = 3) -> Run | None:
    return runs.claim(engine, worker, lease_seconds=LEASE, max_attempts=max_attempts)


def claimed(engine: Engine, worker: str = "a") -> Run:
    run = claim(engine, worker)
    assert run is not None
    return run


def let_lease_pass(engine: Engine, run: Run) -> None:
    with writing(engine) as connection:
        past = runs.database_now(connection) - timedelta(seconds=1)
        connection.execute(sa.update(tables.runs).where(tables.runs.c.run_id == run.run_id).values(lease_until=past))


def read(engine: Engine, run: Run) -> Run:
    with engine.connect() as connection:
        return runs.read(connection, run.run_id)


def told(engine: Engine, run: Run) -> list[tuple[str, Any]]:
    with engine.connect() as connection:
        rows = runs.events_after(connection, run.run_id, 0)
    return [(row.kind, row.details.get("state")) for row in rows]


def test_the_oldest_run_is_claimed_first_and_once(engine: Engine) -> None:
    first, second = queue(engine), queue(engine)
    assert claimed(engine).run_id == first.run_id
    run = claimed(engine, "b")
    assert (run.run_id, run.state, run.worker, run.epoch, run.attempts) == (second.run_id, "running", "b", 1, 1)
    assert claim(engine) is None
    assert told(engine, run) == [("state", "queued"), ("state", "running")]


def test_many_workers_never_claim_the_same_run(engine: Engine) -> None:
    wanted = sorted(queue(engine).run_id for _ in range(12))
    got: list[str] = []

    def work(name: str) -> None:
        empty = 0
        while empty < 3:
            run = claim(engine, name)
            empty = empty + 1 if run is None else 0
            if run is not None:
                got.append(run.run_id)

    workers = [threading.Thread(target=work, args=(f"w{number}",)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(got) == wanted


def test_an_idempotency_key_answers_the_same_run(engine: Engine) -> None:
    run = queue(engine, idempotency_key="k", overrides={"epochs": "2"})
    assert queue(engine, idempotency_key="k", overrides={"epochs": "2"}) == run
    with pytest.raises(KeyReused):
        queue(engine, idempotency_key="k", overrides={"epochs": "3"})
    assert queue(engine, idempotency_key="l").run_id != run.run_id
    assert queue(engine).run_id != queue(engine).run_id


def test_an_idempotency_key_holds_under_concurrency(engine: Engine) -> None:
    made: list[str] = []
    together = threading.Barrier(6)

    def ask() -> None:
        together.wait()
        made.append(queue(engine, idempotency_key="k").run_id)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 6
    assert len(set(made)) == 1


def test_a_silent_workers_run_is_taken_up_and_its_word_no_longer_counts(engine: Engine) -> None:
    queue(engine)
    stale = claimed(engine, "a")
    assert claim(engine, "b") is None
    let_lease_pass(engine, stale)
    run = claimed(engine, "b")
    assert (run.run_id, run.epoch, run.attempts) == (stale.run_id, 2, 2)
    before = read(engine, run)
    with pytest.raises(LeaseLost):
        runs.renew(engine, stale, LEASE)
    with pytest.raises(LeaseLost):
        runs.cancel_requested(engine, stale)
    with pytest.raises(LeaseLost):
        runs.report(engine, stale, "progress", {"epoch": 9}, progress={"epoch": 9})
    with pytest.raises(LeaseLost):
        runs.release(engine, stale)
    with pytest.raises(LeaseLost), writing(engine) as connection:
        runs.finish(connection, stale, "succeeded", "done", version="stale", promoted=True)
    assert read(engine, run) == before
    runs.report(engine, run, "progress", {"epoch": 3}, progress={"epoch": 3})
    assert read(engine, run).progress == {"epoch": 3}


def test_a_renewed_lease_holds(engine: Engine) -> None:
    queue(engine)
    run = claimed(engine)
    let_lease_pass(engine, run)
    assert runs.renew(engine, run, LEASE) is False
    assert claim(engine, "b") is None


def test_a_run_whose_workers_die_is_given_up(engine: Engine) -> None:
    queue(engine)
    for _ in range(2):
        run = claim(engine, max_attempts=2)
        assert run is not None
        let_lease_pass(engine, run)
    assert claim(engine, max_attempts=2) is None
    run = read(engine, run)
    assert (run.state, run.message) == ("failed", "given up: its worker was lost in each of 2 attempts")
    assert run.finished_at is not None


def test_a_released_run_waits_again_and_the_attempt_does_not_count(engine: Engine) -> None:
    queue(engine)
    runs.release(engine, claimed(engine))
    run = claimed(engine, "b")
    assert (run.epoch, run.attempts) == (2, 1)


def test_a_waiting_run_is_cancelled_at_once(engine: Engine) -> None:
    run = queue(engine)
    with writing(engine) as connection:
        assert runs.request_cancel(connection, run.run_id).state == "cancelled"
        assert runs.request_cancel(connection, run.run_id).state == "cancelled"
    assert claim(engine) is None
    assert told(engine, run) == [("state", "queued"), ("state", "cancelled")]


def test_a_running_run_is_cancelled_by_its_worker(engine: Engine) -> None:
    queue(engine)
    run = claimed(engine)
    with writing(engine) as connection:
        assert runs.request_cancel(connection, run.run_id).state == "running"
    assert runs.cancel_requested(engine, run) is True
    assert runs.renew(engine, run, LEASE) is True
    with writing(engine) as connection:
        runs.finish(connection, run, "cancelled", "as asked")
    assert read(engine, run).state == "cancelled"


def test_a_run_that_succeeded_cannot_be_cancelled(engine: Engine) -> None:
    queue(engine)
    run = claimed(engine)
    with writing(engine) as connection:
        runs.finish(connection, run, "succeeded", "done", version="v", promoted=False)
    with pytest.raises(RunIsOver), writing(engine) as connection:
        runs.request_cancel(connection, run.run_id)
    assert read(engine, run).version == "v"


def test_a_run_whose_worker_is_lost_can_be_cancelled(engine: Engine) -> None:
    queue(engine)
    stale = claimed(engine)
    let_lease_pass(engine, stale)
    with writing(engine) as connection:
        assert runs.request_cancel(connection, stale.run_id).state == "cancelled"
    with pytest.raises(LeaseLost):
        runs.renew(engine, stale, LEASE)


def test_runs_are_paged_newest_first(engine: Engine) -> None:
    made = [queue(engine).run_id for _ in range(5)][::-1]
    with engine.connect() as connection:
        first = [run.run_id for run in runs.page(connection, 2)]
        rest = [run.run_id for run in runs.page(connection, 9, before=first[-1])]
        with pytest.raises(KeyError):
            runs.page(connection, 2, before="unknown")
    assert first + rest == made
