from pathlib import Path

import numpy as np
import pytest

from ml.importers import load_interactions, open_source
from ml.simulate import DAYS, START, Simulation, simulate


@pytest.fixture(scope="module")
def simulation() -> Simulation:
    return simulate(users=400, items=300, events=16_000, seed=7)


def test_the_seed_decides_everything(simulation: Simulation) -> None:
    again = simulate(users=400, items=300, events=16_000, seed=7)
    assert again.titles == simulation.titles
    assert again.events().equals(simulation.events())
    other = simulate(users=400, items=300, events=16_000, seed=8)
    assert not other.events().equals(simulation.events())


def test_every_user_has_a_history_without_repeats(simulation: Simulation) -> None:
    assert len(simulation) == 16_000
    lengths = np.bincount(simulation.user_index, minlength=400)
    assert lengths.min() >= 2
    assert lengths.max() <= 150
    pairs = simulation.user_index.astype(np.int64) * 300 + simulation.item_index
    assert len(np.unique(pairs)) == 16_000


def test_times_rise_through_months_to_the_microsecond(simulation: Simulation) -> None:
    since = simulation.time - int(START.timestamp()) * 1_000_000
    assert (np.diff(since) >= 0).all()
    assert since[0] >= 0
    assert 180 * 86_400 * 1_000_000 < since[-1] <= DAYS * 86_400 * 1_000_000
    assert (since % 1_000 != 0).any()


def test_titles_differ_and_name_categories(simulation: Simulation) -> None:
    assert len(set(simulation.titles)) == 300
    assert all(3 < len(title) < 60 for title in simulation.titles)
    assert all(1 <= len(names) <= 2 for names in simulation.categories)
    assert len({names[0] for names in simulation.categories}) > 10


def test_popularity_has_a_long_tail(simulation: Simulation) -> None:
    counts = np.sort(np.bincount(simulation.item_index, minlength=300))[::-1]
    assert counts[:30].sum() > 0.25 * counts.sum()
    assert counts[150:].sum() < 0.3 * counts.sum()


def test_users_have_tastes_and_habits(tmp_path: Path, simulation: Simulation) -> None:
    simulation.write(tmp_path)
    interactions, _ = load_interactions(tmp_path)
    kinds = sorted({names[0] for names in simulation.categories})
    kind_of = np.array([kinds.index(names[0]) for names in simulation.categories])
    assert interactions.items.ids(range(300)) == simulation.item_ids
    overall = np.bincount(kind_of[interactions.item_index], minlength=len(kinds)) / len(interactions)
    own = np.zeros((400, len(kinds)))
    np.add.at(own, (interactions.user_index, kind_of[interactions.item_index]), 1)
    own /= own.sum(axis=1, keepdims=True)
    assert np.sort(own, axis=1)[:, -3:].sum(axis=1).mean() > 1.5 * np.sort(overall)[-3:].sum()
    # What followed an item most often in the first half of the users follows it in the other half too.
    same_user = interactions.user_index[1:] == interactions.user_index[:-1]
    before, after = interactions.item_index[:-1][same_user], interactions.item_index[1:][same_user]
    first_half = interactions.user_index[1:][same_user] < 200
    follows = np.zeros((300, 300))
    np.add.at(follows, (before[first_half], after[first_half]), 1)
    guess = follows.argmax(axis=1)
    right = (guess[before[~first_half]] == after[~first_half]).mean()
    popular = np.bincount(interactions.item_index).max() / len(interactions)
    assert right > 4 * popular


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_what_was_written_is_imported(tmp_path: Path, simulation: Simulation, ending: str) -> None:
    simulation.write(tmp_path / "data", "csv" if ending == "parquet" else "parquet")
    simulation.write(tmp_path / "data", ending)
    source = open_source(tmp_path / "data")
    assert (source.format, source.has_times) == (ending, True)
    batches = list(source.events())
    assert not any(batch.rejects for batch in batches)
    times = np.concatenate([batch.table.column("time").cast("int64").to_numpy() for batch in batches])
    assert np.array_equal(times, simulation.time)
    first = next(source.catalogue())
    assert (first.item_id, first.title) == (simulation.item_ids[0], simulation.titles[0])
    assert first.categories == simulation.categories[0]


def test_numbers_that_do_not_go_together_are_refused() -> None:
    for users, items, events in ((0, 100, 100), (10, 5, 20), (10, 100, 19), (10, 100, 501)):
        with pytest.raises(ValueError, match="do not go together"):
            simulate(users, items, events)
    assert len(simulate(10, 20, 100)) == 100
    with pytest.raises(ValueError, match="csv or parquet"):
        simulate(10, 20, 100).write(Path("never"), "xml")
