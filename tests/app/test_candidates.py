"""Which items a version may show follows the catalogue, change by change, for every filter."""

import random
from typing import Any

import numpy as np
import pytest
from sqlalchemy.engine import Engine

from app import catalog_rows
from app.database import create_engine, reading, writing
from app.erasure import erase
from app.serving.candidates import Candidates
from app.serving.catalog import Catalog
from app.serving.filters import EVERY_CATEGORY, CategoryFilter
from ml.ids import IdMap

KNOWN = [f"item-{number}" for number in range(12)]
OTHERS = [f"new-{number}" for number in range(4)]
CATEGORIES = ["a", "b", "c"]


def in_category(category: str) -> CategoryFilter:
    return CategoryFilter(all=frozenset([category]))


FILTERS = [
    EVERY_CATEGORY,
    in_category("a"),
    in_category("nobody has this"),
    CategoryFilter(any=frozenset(["a", "b"])),
    CategoryFilter(all=frozenset(["a", "b"])),
    CategoryFilter(none=frozenset(["a", "c"])),
    CategoryFilter(any=frozenset(["a", "b"]), all=frozenset(["c"]), none=frozenset(["b"])),
]


@pytest.fixture
def engine(sqlite_url: str) -> Any:
    engine = create_engine(sqlite_url)
    yield engine
    engine.dispose()


def put(engine: Engine, item_id: str, categories: list[str], *, hidden: bool) -> None:
    with writing(engine) as connection:
        given: dict[str, Any] = {"title": None, "categories": categories, "hidden": hidden, "metadata": {}}
        catalog_rows.replace(connection, "item", item_id, given)


def follow(engine: Engine, catalog: Catalog) -> None:
    with reading(engine) as connection:
        catalog.follow(connection)


@pytest.mark.parametrize("seed", range(3))
def test_any_sequence_of_changes(engine: Engine, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.serving.candidates.MANY_CHANGES", 3)
    chance = random.Random(seed)
    items, catalog = IdMap.from_ids(KNOWN), Catalog()
    follow(engine, catalog)
    candidates = Candidates(items, catalog, erasures_through=0)
    dropped: set[str] = set()
    for _ in range(40):
        for _ in range(chance.choice([1, 1, 2, 6])):
            item_id = chance.choice(KNOWN + OTHERS)
            if chance.random() < 0.15:
                if erase(engine, "item", item_id, actor="test").is_new:
                    dropped.add(item_id)
            else:
                categories = chance.sample(CATEGORIES, chance.randrange(4))
                put(engine, item_id, categories, hidden=chance.random() < 0.3)
            if chance.random() < 0.5:
                follow(engine, catalog)  # an item that is erased and put again may be seen in between, or not
        follow(engine, catalog)
        entries = catalog.entries
        for wanted in chance.sample(FILTERS, 4):
            allowed = candidates.allowed(wanted)
            expected = {
                item_id
                for item_id, entry in entries.items()
                if item_id in KNOWN and item_id not in dropped and not entry.hidden and wanted.admits(entry.categories)
            }
            assert set(items.ids(np.flatnonzero(allowed.mask))) == expected
            assert allowed.count == len(expected)
        assert set(candidates.unseen()) == {
            item_id
            for item_id, entry in entries.items()
            if not entry.hidden and (item_id in OTHERS or item_id in dropped)
        }


def test_masks_are_kept(engine: Engine) -> None:
    items, catalog = IdMap.from_ids(KNOWN), Catalog()
    for item_id in KNOWN:
        put(engine, item_id, ["a"], hidden=False)
    follow(engine, catalog)
    candidates = Candidates(items, catalog, erasures_through=0)
    wanted = CategoryFilter(any=frozenset(["a", "b"]))
    kept = candidates.allowed(wanted).mask
    put(engine, "an item that the version does not know", ["a"], hidden=False)
    follow(engine, catalog)
    assert candidates.allowed(wanted).mask is kept
    put(engine, "item-3", ["c"], hidden=False)
    follow(engine, catalog)
    assert candidates.changes_behind == 1
    assert candidates.allowed(wanted).count == len(KNOWN) - 1
    assert candidates.changes_behind == 0
    assert kept.sum() == len(KNOWN)  # whoever ranks with it goes on undisturbed
    for number in range(1_000):  # as many filters as a caller can think of
        candidates.allowed(in_category(f"category {number}"))
    assert len(candidates._of_filter) <= 256
    assert len(candidates._of_category) <= 256


def test_a_filter_says_what_it_asks_for() -> None:
    assert str(CategoryFilter(frozenset(["b", "a"]), frozenset(["c"]), frozenset(["d"]))) == (
        "any of the categories 'a', 'b' and all of the categories 'c' and none of the categories 'd'"
    )
