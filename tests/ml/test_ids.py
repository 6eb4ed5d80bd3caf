import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ml.ids import IdMap

ids = st.text(st.characters(codec="utf-8"), max_size=12)


@settings(deadline=None)
@given(st.lists(ids), st.lists(ids))
def test_index_is_the_rank_among_the_sorted_ids(known: list[str], others: list[str]) -> None:
    expected = sorted(set(known), key=str.encode)
    mapped = IdMap.from_ids(known)
    assert mapped.ids(range(len(mapped))) == expected
    for wanted in known + others:
        rank = expected.index(wanted) if wanted in expected else -1
        assert mapped.index(wanted) == rank
        assert mapped.indices([wanted]).tolist() == [rank]
        assert mapped.indices(pa.array([wanted])).tolist() == [rank]


def test_a_saved_map_opens_as_it_was(tmp_path) -> None:
    mapped = IdMap.from_ids(pa.array(["ö", "b", "a", "a", "日本", "b c"]))
    mapped.save(tmp_path / "ids.arrow")
    opened = IdMap.open(tmp_path / "ids.arrow")
    assert opened.equals(mapped)
    assert not opened.equals(IdMap.from_ids(["a"]))
    assert opened.ids(range(5)) == ["a", "b", "b c", "ö", "日本"]
    assert opened.index("日本") == 4
    assert opened.index("\ud800") == -1


def test_an_empty_map_knows_nothing(tmp_path) -> None:
    IdMap.from_ids([]).save(tmp_path / "ids.arrow")
    opened = IdMap.open(tmp_path / "ids.arrow")
    assert len(opened) == 0
    assert opened.index("a") == -1
    assert opened.indices(["a", "b"]).tolist() == [-1, -1]
    with pytest.raises(IndexError, match="outside"):
        opened.id(0)


def test_many_ids_and_few_ids_find_the_same(tmp_path) -> None:
    mapped = IdMap.from_ids([f"item-{number}" for number in range(5000)])
    wanted = ["item-17", "nobody", "item-4999"]
    few = mapped.indices(wanted)
    many = mapped.indices(wanted * 1000)
    assert few.dtype == many.dtype == np.int64
    assert np.array_equal(np.tile(few, 1000), many)
    assert mapped.id(int(few[0])) == "item-17"
    assert mapped.members(wanted).tolist() == sorted(few[few >= 0].tolist())
    assert mapped.members([]).tolist() == []


def test_chunks_and_slices_are_read_from_where_they_start() -> None:
    chunked = pa.chunked_array([["c", "a"], ["b"], []], pa.string())
    assert IdMap.from_ids(chunked).ids([0, 1, 2]) == ["a", "b", "c"]
    sliced = IdMap(pa.array(["a", "bb", "ccc", "dddd"], pa.large_string()).slice(1, 2))
    assert (sliced.id(0), sliced.index("ccc"), sliced.index("dddd")) == ("bb", 1, -1)


def test_what_is_no_id_map_is_refused(tmp_path) -> None:
    (tmp_path / "text").write_text("not arrow")
    with pytest.raises(ValueError, match="not an id map"):
        IdMap.open(tmp_path / "text")
    other = pa.table({"other": ["a"]})
    with pa.OSFile(str(tmp_path / "other"), "wb") as sink, pa.ipc.new_file(sink, other.schema) as writer:
        writer.write_table(other)
    with pytest.raises(ValueError, match="column `id`"):
        IdMap.open(tmp_path / "other")
    with pytest.raises(ValueError, match="missing"):
        IdMap.from_ids(pa.array(["a", None]))
