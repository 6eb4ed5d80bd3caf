from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ml.interactions import Interactions
from ml.snapshots import DEFAULT_MEANINGS, EventMeaning


def events(*rows: dict) -> pa.Table:
    full = [{"type": "view", "value": None, "time": 0, **row} for row in rows]
    names = list(dict.fromkeys(name for row in full for name in row))
    columns = {name: [row.get(name) for row in full] for name in names}
    table = pa.table(columns)
    time = table.column("time").cast(pa.timestamp("us", "UTC"))
    value = table.column("value").cast(pa.float64())
    table = table.set_column(names.index("time"), "time", time).set_column(names.index("value"), "value", value)
    return table


def pairs(interactions: Interactions) -> list[tuple[str, str]]:
    users = interactions.users.ids(interactions.user_index)
    return list(zip(users, interactions.items.ids(interactions.item_index), strict=True))


def test_rows_are_sorted_by_user_and_time_and_ties_keep_input_order() -> None:
    found = Interactions.from_arrays(["b", "a", "b", "b", "a"], ["z", "y", "x", "w", "v"], [5, 9, 5, 1, 2])
    assert pairs(found) == [("a", "v"), ("a", "y"), ("b", "w"), ("b", "z"), ("b", "x")]
    assert found.offsets.tolist() == [0, 2, 5]
    assert found.items.ids(found.history(1)) == ["w", "z", "x"]
    assert (found.user_index.dtype, found.item_index.dtype, found.time.dtype) == (np.int32, np.int32, np.int64)


def test_without_times_the_order_is_the_time() -> None:
    found = Interactions.from_arrays(["b", "a", "b"], ["z", "y", "x"])
    assert pairs(found) == [("a", "y"), ("b", "z"), ("b", "x")]
    assert found.time.tolist() == [1, 0, 2]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("uvwxyz"), st.integers(0, 3)), max_size=40))
def test_the_order_is_that_of_a_stable_sort(rows: list[tuple[str, str, int]]) -> None:
    expected = [(user, item) for user, item, _ in sorted(rows, key=lambda row: (row[0], row[2]))]
    table = pa.table(
        {
            "user_id": pa.array([row[0] for row in rows], pa.string()),
            "item_id": pa.array([row[1] for row in rows], pa.string()),
            "type": pa.array(["view"] * len(rows), pa.string()),
            "value": pa.array([None] * len(rows), pa.float64()),
            "time": pa.array([row[2] for row in rows], pa.timestamp("us", "UTC")),
        }
    )
    whole = Interactions.from_events(table, DEFAULT_MEANINGS)
    parts = Interactions.from_events((table.slice(start, 7) for start in range(0, 42, 7)), DEFAULT_MEANINGS)
    assert pairs(whole) == pairs(parts) == expected


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from([-9, 0, 10**6, 10**15, 4 * 10**18]), st.integers(0, 9))),
    st.sampled_from([1, 1_000, 1_000_000]),
)
def test_times_of_any_unit_and_range_sort_alike(rows: list[tuple[int, int, int]], unit: int) -> None:
    time = [moment // unit * unit for _, moment, _ in rows]
    position = np.array([place for _, _, place in rows], np.int64)
    numbers = [str(number) for number in range(len(rows))]
    found = Interactions.from_arrays([f"u{row[0]}" for row in rows], numbers, time, position=position)
    expected = sorted(range(len(rows)), key=lambda number: (rows[number][0], time[number], position[number], number))
    assert found.items.ids(found.item_index) == [str(number) for number in expected]


def test_positions_decide_ties_when_parts_come_out_of_order() -> None:
    late = events({"user_id": "a", "item_id": "second", "position": 2})
    early = events({"user_id": "a", "item_id": "first", "position": 1})
    assert pairs(Interactions.from_events([late, early], DEFAULT_MEANINGS)) == [("a", "first"), ("a", "second")]


def test_meanings_decide_what_is_an_interaction() -> None:
    table = events(
        {"user_id": "a", "item_id": "seen", "type": "impression"},
        {"user_id": "a", "item_id": "bad", "type": "dislike"},
        {"user_id": "a", "item_id": "low", "type": "rating", "value": 2.5},
        {"user_id": "a", "item_id": "none", "type": "rating"},
        {"user_id": "a", "item_id": "high", "type": "rating", "value": 3.0},
        {"user_id": "b", "item_id": "bought", "type": "purchase"},
        {"user_id": "c", "item_id": "odd", "type": "retract"},
    )
    meanings = {**DEFAULT_MEANINGS, "rating": EventMeaning(minimum_value=3.0), "purchase": EventMeaning(weight=4.0)}
    found = Interactions.from_events(table, meanings)
    assert pairs(found) == [("a", "high"), ("b", "bought")]
    assert found.weight is not None
    assert found.weight.tolist() == [1.0, 4.0]
    assert (found.num_users, found.num_items) == (2, 2)
    everything = Interactions.from_events(table, DEFAULT_MEANINGS)
    assert everything.weight is None
    assert [item for _, item in pairs(everything)] == ["low", "none", "high", "bought"]


def test_a_retraction_takes_its_event_back_from_any_part() -> None:
    first = events(
        {"user_id": "a", "item_id": "kept", "position": 1, "retracts": None},
        {"user_id": "a", "item_id": "gone", "position": 2, "retracts": None},
        {"user_id": "b", "item_id": "gone too", "position": 3, "retracts": None},
    )
    second = events(
        {"user_id": "a", "item_id": "gone", "type": "retract", "position": 4, "retracts": 2},
        {"user_id": "b", "item_id": "gone too", "type": "retract", "position": 5, "retracts": 3},
    )
    found = Interactions.from_events([first, second], DEFAULT_MEANINGS)
    assert pairs(found) == [("a", "kept")]
    assert found.users.ids([0]) == ["a"]
    assert found.num_items == 1


def test_times_are_microseconds_since_the_epoch() -> None:
    moment = datetime(2024, 5, 6, 7, 8, 9, 123456, UTC)
    table = pa.table({"user_id": ["a"], "item_id": ["x"], "type": ["view"], "value": [1.0], "time": pa.array([moment])})
    assert Interactions.from_events(table, DEFAULT_MEANINGS).time.tolist() == [1714979289123456]


def test_selected_and_merged_rows_keep_the_order() -> None:
    whole = Interactions.from_arrays(["a", "a", "a", "b"], ["w", "x", "y", "z"], [1, 2, 2, 3], weight=[1, 2, 3, 4])
    odd = whole.select(np.array([3, 1]))
    even = whole.select(np.array([True, False, True, False]))
    assert pairs(odd) == [("a", "x"), ("b", "z")]
    merged = odd.merge(even)
    assert pairs(merged) == [("a", "w"), ("a", "x"), ("a", "y"), ("b", "z")]
    assert merged.weight is not None
    assert merged.weight.tolist() == [1, 2, 3, 4]
    assert merged.offsets.tolist() == [0, 3, 4]
    with pytest.raises(ValueError, match="different id maps"):
        whole.merge(Interactions.from_arrays(["a"], ["q"]))


def test_nothing_in_gives_nothing_out() -> None:
    for empty in (Interactions.from_arrays([], []), Interactions.from_events([], DEFAULT_MEANINGS)):
        assert (len(empty), empty.num_users, empty.num_items, empty.offsets.tolist()) == (0, 0, 0, [0])
    with pytest.raises(ValueError, match="same length"):
        Interactions.from_arrays(["a"], ["x"], [1, 2])


def test_a_data_frame_becomes_interactions_by_the_names_of_its_columns() -> None:
    frame = pd.DataFrame(
        {
            "who": [7, 7, 5],
            "what": ["b", "a", "a"],
            "when": pd.to_datetime(
                ["2024-01-02T00:00:00.000000", "2024-01-01T00:00:00.000001", "2024-01-03T00:00:00.000000"]
            ),
        }
    )
    built = Interactions.from_frame(frame, user="who", item="what", time="when")
    second = 1_000_000
    first_of_january = int(datetime(2024, 1, 1, tzinfo=UTC).timestamp()) * second
    assert pairs(built) == [("5", "a"), ("7", "a"), ("7", "b")]
    assert built.time.tolist() == [
        first_of_january + 2 * 86_400 * second,
        first_of_january + 1,
        first_of_january + 86_400 * second,
    ]


def test_a_frame_comes_back_as_it_went_in() -> None:
    frame = pd.DataFrame(
        {"user_id": ["a", "a", "b"], "item_id": ["x", "y", "x"], "time": [1, 2, 1], "weight": [1.0, 0.5, 2.0]}
    )
    back = Interactions.from_frame(frame, weight="weight").to_frame()
    pd.testing.assert_frame_equal(back, frame, check_dtype=False)


def test_without_a_time_column_the_rows_are_in_order() -> None:
    frame = pd.DataFrame({"user_id": ["a", "a"], "item_id": ["y", "x"]})
    assert pairs(Interactions.from_frame(frame, time=None)) == [("a", "y"), ("a", "x")]


def test_a_frame_without_its_columns_or_values_is_refused() -> None:
    with pytest.raises(ValueError, match="no column time; it has user_id, item_id"):
        Interactions.from_frame(pd.DataFrame({"user_id": ["a"], "item_id": ["x"]}))
    with pytest.raises(ValueError, match="missing in the column item_id"):
        Interactions.from_frame(pd.DataFrame({"user_id": ["a"], "item_id": [None], "time": [1]}))


def test_rows_stay_without_an_order_when_they_are_chosen_and_merged() -> None:
    unordered = replace(Interactions.from_arrays(["a", "a"], ["x", "y"]), in_order=False)
    assert not unordered.select([0]).merge(unordered.select([1])).in_order
