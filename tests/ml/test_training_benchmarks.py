"""The benchmark that needs a GPU runs here in small, so that it runs where there is one."""

import importlib.util
import json
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "training_gpu.py"


def test_the_gpu_benchmark_runs_in_small_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    found = importlib.util.spec_from_file_location("training_gpu", PATH)
    assert found is not None
    assert found.loader is not None
    benchmark = importlib.util.module_from_spec(found)
    found.loader.exec_module(benchmark)
    benchmark.main(["--small", "--device", "cpu"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["model"] for row in rows] == ["NeuMF", "Caser"]
    assert all(row["million_samples_per_second"] > 0 for row in rows)
