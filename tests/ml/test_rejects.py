import csv
from pathlib import Path

import pytest

from ml.importers import RejectLog, TooManyRejects, load_interactions


def events(path: Path, good: int, bad: int) -> Path:
    path.write_text("user_id,item_id\n" + "a,x\n" * good + "a,x,extra\n" * bad)
    return path


def test_bad_rows_are_counted_and_written_with_line_and_reason(tmp_path: Path) -> None:
    path = events(tmp_path / "events.csv", 98, 2)
    interactions, _ = load_interactions(path, rejects_path=tmp_path / "rejects.csv")
    assert len(interactions) == 98
    with (tmp_path / "rejects.csv").open(newline="") as opened:
        assert list(csv.reader(opened)) == [
            ["line", "reason", "raw"],
            ["100", "the row has 3 columns instead of 2", "a,x,extra"],
            ["101", "the row has 3 columns instead of 2", "a,x,extra"],
        ]


def test_too_many_bad_rows_end_the_reading(tmp_path: Path) -> None:
    path = events(tmp_path / "events.csv", 90, 10)
    with pytest.raises(TooManyRejects, match=r"10 of 100 rows are bad, more than 5\.0%[\s\S]*line 92: the row has"):
        load_interactions(path)
    interactions, _ = load_interactions(path, max_bad_share=0.1)
    assert len(interactions) == 90
    with pytest.raises(ValueError, match="between 0 and 1"):
        RejectLog(max_bad_share=2)
