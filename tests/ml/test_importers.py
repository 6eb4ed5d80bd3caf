import json
import os
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ml.importers import EVENT_SCHEMA, EventBatch, RejectLog, load, load_interactions, open_source
from ml.importers.text import read_blocks
from ml.interactions import Interactions


def read(path: Path, *args, **options) -> tuple[list[dict], list[tuple]]:
    batches: list[EventBatch] = list(open_source(path, *args, **options).events())
    for batch in batches:
        assert batch.table.schema == EVENT_SCHEMA
        assert len(batch.table) == len(batch.rows)
    rows = [row for batch in batches for row in batch.table.to_pylist()]
    numbers = np.concatenate([batch.rows for batch in batches])
    assert (np.diff(numbers) > 0).all()
    return rows, [reject for batch in batches for reject in batch.rejects]


def triples(rows: list[dict]) -> list[tuple]:
    return [(row["user_id"], row["item_id"], row["value"]) for row in rows]


NOON = datetime(2024, 5, 6, 12, tzinfo=UTC)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def write(folder: Path, name: str, text: str, encoding: str = "utf-8") -> Path:
    (folder / name).write_bytes(text.encode(encoding))
    return folder / name


def test_movielens_100k(folder: Path) -> None:
    write(folder, "u.data", "196\t242\t3\t881250949\n186\t302\t4\t891717742\n")
    write(folder, "u.genre", "unknown|0\nAction|1\nDrama|2\n\n")
    write(folder, "u.item", "242|Café Noir (1996)|01-Jan-1996|||0|1|1\n302|L.A.|||0\n", "latin-1")
    write(folder, "u.user", "196|49|M|writer|55105\n")
    source = open_source(folder)
    assert (source.format, source.has_times, source.name) == ("movielens", True, "data")
    rows, rejects = read(folder)
    assert not rejects
    assert rows[0] == {
        "user_id": "196",
        "item_id": "242",
        "type": "rating",
        "value": 3.0,
        "time": datetime.fromtimestamp(881250949, UTC),
    }
    [film] = source.catalogue()
    assert (film.item_id, film.title, film.categories, film.metadata) == (
        "242",
        "Café Noir (1996)",
        ["Action", "Drama"],
        {"year": 1996},
    )
    assert [reject.line for reject in source.catalogue_rejects] == [2]
    assert next(source.users()).metadata == {"age": 49, "gender": "M", "occupation": "writer"}


def test_movielens_1m(folder: Path) -> None:
    write(folder, "ratings.dat", "1::1193::5::978300760\n1::661\n2::661::3::978302109\n")
    write(folder, "movies.dat", "661::Les Misérables (1995)::Drama|Musical\n", "latin-1")
    write(folder, "users.dat", "1::F::1::10::48067\n")
    rows, rejects = read(folder)
    assert triples(rows) == [("1", "1193", 5.0), ("2", "661", 3.0)]
    assert rejects == [(2, "the row has 2 columns instead of 4", "1::661")]
    [film] = open_source(folder).catalogue()
    assert (film.title, film.categories) == ("Les Misérables (1995)", ["Drama", "Musical"])
    assert next(open_source(folder).users()).metadata["gender"] == "F"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_movielens_csv(folder: Path, end: str) -> None:
    lines = ["userId,movieId,rating,timestamp", "1,296,5.0,1147880044", "1,306,3.5,1147868817", ""]
    write(folder, "ratings.csv", end.join(lines))
    films = ["movieId,title,genres", '296,"Fiction, Pulp (1994)",Comedy|Crime', "306,Untitled,(no genres listed)", ""]
    write(folder, "movies.csv", end.join(films))
    rows, rejects = read(folder)
    assert triples(rows) == [("1", "296", 5.0), ("1", "306", 3.5)]
    assert not rejects
    pulp, untitled = open_source(folder).catalogue()
    assert (pulp.title, pulp.categories, pulp.metadata) == ("Fiction, Pulp (1994)", ["Comedy", "Crime"], {"year": 1994})
    assert (untitled.categories, untitled.metadata) == ([], {})
    with pytest.raises(ValueError, match="--format csv"):
        open_source(write(folder, "ratings.csv", "a,b,c,d\n1,2,3,4\n"), "movielens")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1715000400", datetime(2024, 5, 6, 13, tzinfo=UTC)),
        ("1714996800.5", NOON.replace(microsecond=500_000)),
        ("1714996800123", NOON.replace(microsecond=123_000)),
        ("1714996800123456", NOON.replace(microsecond=123_456)),
        ("2024-05-06T12:00:00.123456Z", NOON.replace(microsecond=123_456)),
        ("2024-05-06T14:00:00+02:00", NOON),
        ("2024-05-06 12:00:00", NOON),
        ("2024-05-06", NOON.replace(hour=0)),
        ("0", datetime(1970, 1, 1, tzinfo=UTC)),
    ],
)
@pytest.mark.parametrize("beside", ["", "u,x,yesterday\n"])
def test_times(folder: Path, text: str, expected: datetime, beside: str) -> None:
    path = write(folder, "events.csv", f"user_id,item_id,time\nu,i,{text}\n{beside}")
    rows, rejects = read(path)
    assert [row["time"] for row in rows] == [expected]
    assert len(rejects) == len(beside.splitlines())


def test_each_bad_row_says_why_and_the_others_are_read(folder: Path) -> None:
    bad = {
        3: ("a,x,view,1", "the row has 4 columns instead of 5"),
        4: (",x,view,1,1", "user id is missing"),
        5: ("a/b,x,view,1,1", "user id holds a slash"),
        6: ("a,x\x07y,view,1,1", "item id holds an unprintable character"),
        7: (f"{'a' * 256},x,view,1,1", "user id is longer than 255 characters"),
        8: ("a,x,view,nan,1", "value is not finite"),
        9: ("a,x,view,much,1", "value is not a number"),
        10: ("a,x,view,1,soon", "time is neither RFC 3339 nor a number of seconds or milliseconds since 1970"),
        11: ("a,x,view,1,", "time is missing"),
        12: ("a,x,retract,1,1", "type is `retract`, and no column `retracts` names the event that it takes back"),
        13: ("a,\udcff,view,1,1", "item id is not UTF-8"),
        14: (f"a,x,{'t' * 65},1,1", "type is longer than 64 characters"),
        15: ("a,x,view,1,9e99", "time is neither RFC 3339 nor a number of seconds or milliseconds since 1970"),
        16: ("a,x,view,1,4102444800", "time lies in the future"),
    }
    lines = [
        "user_id,item_id,type,value,time",
        "good,first,,,1",
        *(row for row, _ in bad.values()),
        "good,last,buy,2,3",
    ]
    path = folder / "events.csv"
    path.write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    rows, rejects = read(path, latest=datetime(2030, 1, 1, tzinfo=UTC))
    assert triples(rows) == [("good", "first", None), ("good", "last", 2.0)]
    assert [row["type"] for row in rows] == ["view", "buy"]
    assert [(line, reason) for line, reason, _ in rejects] == [(line, reason) for line, (_, reason) in bad.items()]
    assert rejects[0].raw == "a,x,view,1"
    assert len(rejects[4].raw) == 200


def test_blank_lines_count_as_lines_and_a_byte_order_mark_as_nothing(folder: Path) -> None:
    path = write(folder, "events.csv", "\ufeffuser_id,item_id\r\n\r\na,x\r\n\r\nbad\r\nb,y")
    source = open_source(path)
    [batch] = source.events()
    assert batch.rows.tolist() == [3, 6]
    assert [reject.line for reject in batch.rejects] == [5]
    assert not source.has_times
    assert batch.table["time"].to_pylist() == sorted(batch.table["time"].to_pylist())


def test_quotes_may_hold_line_ends_and_stray_ones_swallow_nothing(folder: Path) -> None:
    header = "user_id,note,item_id\n"
    quoted = write(folder, "events.csv", f'{header}a,"two\nlines, ""said""",x\nb,,"y"\n')
    source = open_source(quoted)
    [batch] = source.events()
    assert triples(batch.table.to_pylist()) == [("a", "x", None), ("b", "y", None)]
    assert batch.rows.tolist() == [2, 4]
    stray = write(folder, "events.csv", f'{header}a,,x\nb,"open,y\nc,in"side,z\nd,,"v\ne,,u\n')
    rows, rejects = read(stray)
    assert [row["user_id"] for row in rows] == ["a", "c", "e"]
    assert [(reject.line, reject.reason) for reject in rejects] == [
        (3, "the quotes do not match"),
        (5, "the quotes do not match"),
    ]
    twice = write(folder, "events.csv", 'user_id,item_id\na,"x\nb,y"\nc,z\n')
    rows, rejects = read(twice)
    assert [row["user_id"] for row in rows] == ["b", "c"]
    assert [reject.line for reject in rejects] == [2]


def test_named_columns_and_other_delimiters(folder: Path) -> None:
    path = write(folder, "log.csv", "when;who;what;stars\n5;a;x;1,5\n6;b;y;2\n")
    columns = {"user": "who", "item": "what", "time": "when", "value": "stars"}
    rows, rejects = read(path, columns=columns)
    assert triples(rows) == [("b", "y", 2.0)]
    assert [reject.reason for reject in rejects] == ["value is not a number"]
    with pytest.raises(ValueError, match="no column 'user_id'; it has when, who, what, stars"):
        open_source(path)
    with pytest.raises(ValueError, match="no column 'wer' for the user"):
        open_source(path, columns={"user": "wer"})
    with pytest.raises(ValueError, match="no column can be named for 'users'"):
        open_source(path, columns={"users": "who"})


def test_json_lines_of_one_kind_and_of_many(folder: Path) -> None:
    same = [{"user_id": number, "item_id": f"i{number}", "value": 1, "timestamp": 10} for number in range(3)]
    path = write(folder, "events.jsonl", "".join(json.dumps(row) + "\n" for row in same))
    rows, rejects = read(path)
    assert triples(rows) == [("0", "i0", 1.0), ("1", "i1", 1.0), ("2", "i2", 1.0)]
    assert not rejects
    mixed = [
        '{"user_id": "a", "item_id": 7, "occurred_at": "2024-05-06T12:00:00Z", "type": "like"}',
        '{"user_id": 8, "item_id": "2024-05-06", "time": 1714996800, "value": 2.5, "extra": {"deep": [1]}}',
        '{"user_id": 1.5, "item_id": "x", "time": 1}',
        '{"user_id": null, "item_id": "x", "time": 1}',
        '{"user_id": ["a"], "item_id": "x", "time": 1}',
        '["a", "x"]',
        '{"user_id": "cut',
        '{"user_id": "\\ud800", "item_id": "x", "time": 1}',
    ]
    rows, rejects = read(write(folder, "events.jsonl", "\n".join(mixed)))
    assert triples(rows)[:2] == [("a", "7", None), ("8", "2024-05-06", 2.5)]
    assert [row["time"] for row in rows[:2]] == [NOON, NOON]
    assert [reject.line for reject in rejects] == [3, 4, 5, 6, 7]
    with pytest.raises(ValueError, match="no field 'user_id'"):
        open_source(write(folder, "other.jsonl", '{"who": "a", "item_id": "x"}\n'))


@pytest.mark.parametrize(
    "time",
    [
        pa.array([NOON, NOON], pa.timestamp("ns", "Europe/Berlin")),
        pa.array([NOON.replace(tzinfo=None)] * 2, pa.timestamp("ms")),
        pa.array([int(NOON.timestamp())] * 2),
        pa.array(["2024-05-06T12:00:00Z"] * 2),
    ],
)
def test_parquet_in_any_types(folder: Path, time: pa.Array) -> None:
    table = pa.table(
        {
            "user_id": pa.array([1, 2], pa.int32()),
            "item_id": pa.array(["x", "a/b"]).dictionary_encode(),
            "rating": pa.array([3, 4], pa.int8()),
            "timestamp": time,
        }
    )
    pq.write_table(table, folder / "part-1.parquet")
    pq.write_table(table, folder / "part-2.parquet")
    rows, rejects = read(folder)
    assert triples(rows) == [("1", "x", 3.0)] * 2
    assert {row["time"] for row in rows} == {NOON}
    assert [(reject.line, reject.reason) for reject in rejects] == [
        (2, "item id holds a slash"),
        (4, "item id holds a slash"),
    ]
    with pytest.raises(ValueError, match="not a Parquet file"):
        open_source(write(folder, "no.parquet", "text"))


def test_sequences_find_out_what_names_the_user(folder: Path) -> None:
    path = write(folder, "sequences.txt", "a x y\nb y\n\nc z x\n")
    source = open_source(folder)
    assert not source.has_times
    assert "the user is the first word of a line" in source.describe()
    interactions, labels = load_interactions(path)
    assert labels is None
    assert interactions.users.ids(range(3)) == ["a", "b", "c"]
    assert interactions.items.ids(interactions.history(2)) == ["z", "x"]
    path = write(folder, "sequences.txt", "x y\nx z w\n")
    assert "the user is the number of the line" in open_source(path).describe()
    interactions, _ = load_interactions(path)
    assert interactions.users.ids(range(2)) == ["1", "2"]
    assert interactions.items.ids(interactions.history(1)) == ["x", "z", "w"]
    interactions, _ = load_interactions(path, users="first")
    assert interactions.items.ids(interactions.item_index) == ["y", "z", "w"]
    rows, _ = read(path)
    assert [row["time"] for row in rows] == sorted(row["time"] for row in rows)


def test_sequences_refuse_single_words_and_lines(folder: Path) -> None:
    path = folder / "sequences.txt"
    path.write_bytes(b"a x y/y z\nb\n\xff\xfe\nc x\n")
    rows, rejects = read(path)
    assert [(row["user_id"], row["item_id"]) for row in rows] == [("a", "x"), ("a", "z"), ("c", "x")]
    assert sorted(reject.reason for reject in rejects) == [
        "item id holds a slash",
        "the row has a user and no item",
        "the row is not UTF-8",
    ]


def test_pairs(folder: Path) -> None:
    path = write(folder, "pairs.txt", "a x\nb\ty\na,z\na b c\n")
    rows, rejects = read(path)
    assert [(row["user_id"], row["item_id"], row["type"]) for row in rows] == [
        ("a", "x", "view"),
        ("b", "y", "view"),
        ("a", "z", "view"),
    ]
    assert [(reject.line, reject.raw) for reject in rejects] == [(4, "a b c")]
    assert triples(read(path, default_type="click")[0]) == triples(rows)


def test_predefined_labels_follow_their_rows(folder: Path) -> None:
    write(folder, "train.txt", "b x y\na y z w\n")
    write(folder, "valid.txt", "a x\n")
    write(folder, "test.txt", "a v\nb v w\n")
    interactions, labels = load_interactions(folder)
    assert labels is not None
    items = interactions.items.ids(interactions.item_index)
    assert interactions.users.ids(interactions.user_index) == ["a"] * 5 + ["b"] * 4
    assert list(zip(items, labels.tolist(), strict=True)) == [
        ("y", 0),
        ("z", 0),
        ("w", 0),
        ("x", 1),
        ("v", 2),
        ("x", 0),
        ("y", 0),
        ("v", 2),
        ("w", 2),
    ]
    (folder / "valid.txt").unlink()
    _, labels = load_interactions(folder)
    assert labels is not None
    assert labels.tolist() == [0, 0, 0, 2, 0, 0, 2, 2]
    (folder / "test.txt").unlink()
    with pytest.raises(ValueError, match=r"train.txt and test.txt"):
        open_source(folder, "predefined")


def test_large_files_come_in_batches_that_join_to_the_whole(folder: Path) -> None:
    count = 150_000
    text = "".join(f"user-{number % 997},item-{number % 1_009},{number}\n" for number in range(count))
    path = write(folder, "events.csv", "user_id,item_id,time\n" + text + text)
    source = open_source(path)
    batches = list(source.events(batch_rows=10_000))
    assert max(map(len, batches)) == 10_000
    assert np.array_equal(np.concatenate([batch.rows for batch in batches]), np.arange(2, 2 * count + 2))
    assert [batch.progress for batch in batches] == sorted(batch.progress for batch in batches)
    assert batches[-1].progress == 1.0
    seen = []
    loaded = load(source, on_progress=seen.append)
    assert len(loaded.interactions) == 2 * count
    assert len(seen) > 1


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_items_and_users_beside_the_events(folder: Path, ending: str) -> None:
    write(folder, "events.csv", "user_id,item_id\na,x\n")
    items = [
        {"item_id": "x", "title": "A title, with a comma", "categories": ["One", "Two"], "year": 1999},
        {"item_id": "a/b", "title": None, "categories": [], "year": None},
        {"item_id": "y", "title": "", "categories": [], "year": None},
    ]
    if ending == "csv":
        write(
            folder, "items.csv", 'item_id,title,categories,year\nx,"A title, with a comma",One|Two,1999\na/b,,,\ny,,,\n'
        )
    elif ending == "jsonl":
        write(folder, "items.jsonl", "".join(json.dumps(item) + "\n" for item in items))
    else:
        pq.write_table(pa.Table.from_pylist(items), folder / "items.parquet")
    write(folder, "users.csv", "user_id,country\na,PT\n")
    source = open_source(folder)
    first, second = source.catalogue()
    assert (first.title, first.categories) == ("A title, with a comma", ["One", "Two"])
    assert str(first.metadata["year"]) == "1999"
    assert (second.item_id, second.title, second.categories, second.metadata) == ("y", None, [], {})
    assert [reject.reason.split(": ")[1] for reject in source.catalogue_rejects] == ["item id holds a slash"]
    assert [(user.user_id, user.metadata) for user in source.users()] == [("a", {"country": "PT"})]


def test_rows_nested_without_end_are_refused_alone(folder: Path) -> None:
    nested = "[" * 100_000
    good = '{"user_id": "u", "item_id": "i"}'
    for first in (nested, good, '{"user_id": "u", "item_id": "i", "more": ' + nested + "]" * 100_000 + "}"):
        rows, rejects = read(write(folder, "events.jsonl", f"{first}\n{nested}\n{good}\n"))
        assert triples(rows)[-1] == ("u", "i", None)
        assert rejects[-1][:2] == (2, "the row is not JSON")
    items = write(folder, "items.jsonl", f'{nested}\n{{"item_id": "i"}}\n')
    assert items.exists()
    source = open_source(folder / "events.jsonl")
    assert [item.item_id for item in source.catalogue()] == ["i"]
    assert len(source.catalogue_rejects) == 1


def test_a_row_far_longer_than_a_block_is_read_in_few_steps(folder: Path) -> None:
    path = write(folder, "events.txt", "u " + "i " * 50_000 + "\nv j\n")
    blocks = list(read_blocks(path, block_bytes=16))
    lengths = [len(block.row(index).split()) for block in blocks for index in range(len(block))]
    assert (lengths, len(blocks)) == ([50_001, 2], 1)  # in steps of 16 bytes the second row comes by itself


def test_what_is_taken_back_does_not_train(folder: Path) -> None:
    text = (
        "event_id,user_id,item_id,type,time,retracts\n3,u,a,retract,9,1\n1,u,a,view,1,\n2,u,b,view,2,\n1,v,a,view,3,\n"
    )
    path = write(folder, "events.csv", text + "4,v,a,retract,9,2\n")
    log = RejectLog(max_bad_share=0.5)
    found = load(open_source(path), rejects=log).interactions
    taken = [(found.users.id(int(u)), found.items.id(int(i))) for u, i in zip(*_indices(found), strict=True)]
    assert taken == [("u", "b"), ("v", "a")]
    assert (log.accepted, log.rejected) == (4, 1)
    assert log.examples[0] == (6, "it takes back an event that this user does not have", "v, 2")


def _indices(interactions: Interactions) -> tuple[list[int], list[int]]:
    return interactions.user_index.tolist(), interactions.item_index.tolist()


def test_what_cannot_be_read_says_what_was_found(folder: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        open_source(folder / "absent")
    with pytest.raises(ValueError, match="found nothing"):
        open_source(folder)
    write(folder, "notes.md", "hello")
    with pytest.raises(ValueError, match=r"found notes\.md"):
        open_source(folder)
    with pytest.raises(ValueError, match="is empty"):
        open_source(write(folder, "events.csv", ""))
    with pytest.raises(ValueError, match="there is no format 'excel'"):
        open_source(folder, "excel")
    with pytest.raises(ValueError, match="`pairs` or `sequences`"):
        open_source(write(folder, "log.txt", "a b\nc d\n"))
    with pytest.raises(ValueError, match="unpack it"):
        open_source(write(folder, "ml.zip", "PK"))
    with pytest.raises(ValueError, match="none of MovieLens' files"):
        open_source(folder / "log.txt", "movielens")
    with pytest.raises(ValueError, match="no interaction"):
        load_interactions(write(folder, "events.csv", "user_id,item_id,type\na,x,impression\n"))


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "shape", "parts"),
    [
        ("ml-100k", (100_000, 943, 1_682), None),
        ("ml-1m-sequences", (987_019, 6_040, 3_416), None),
        ("beauty-sequences", (198_502, 22_363, 12_101), None),
        ("ml-1m-predefined", (836_478, 6_039, 3_628), [590_733, 80_897, 164_848]),
    ],
)
def test_real_data_is_read_whole(name: str, shape: tuple[int, int, int], parts: list[int] | None) -> None:
    interactions, labels = load_interactions(Path(os.environ["SHORTLIST_DATA"]) / name, max_bad_share=0)
    assert (len(interactions), interactions.num_users, interactions.num_items) == shape
    assert (None if labels is None else np.bincount(labels).tolist()) == parts
