"""Computes RecBole's NeuMF, Caser, BPR and SASRec on the splits of quality.py, one seed each, and keeps their figures.

    python benchmarks/quality_peers.py --data ROOT --python PEER_PYTHON [--only ml-100k/NeuMF] [--hours 2]

PEER_PYTHON is the interpreter of the environment that recbole_peer.py names. Figures go to quality_peers.jsonl beside
this script, a line a model, from where quality.py takes them; what has its line is not run again unless with --again.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from peers import peer_python, run_recbole, write_files
from quality import PEERS, PROTOCOLS

from ml.importers import load, open_source
from ml.split import split_by_name

# RecBole's own settings but for windows. Caser's are what our horizontal filters see: with RecBole's 50, an epoch takes
# hours. With 20, an epoch of SASRec on MovieLens 1M takes 14 minutes of processor time and not 36: eight in two hours,
# not three.
SETTINGS: dict[str, dict[str, Any]] = {
    "BPR": {},
    "NeuMF": {},
    "Caser": {"MAX_ITEM_LIST_LENGTH": 5},
    "SASRec": {"MAX_ITEM_LIST_LENGTH": 20},
}
# RecBole ranks one user at a time with NeuMF: four minutes for Beauty's 270 million pairs, an epoch takes seconds.
SELDOM = {("beauty-sequences", "NeuMF"): {"eval_step": 5}}
EPOCHS = 300
SEQUENTIAL = ("Caser", "SASRec")


def run(folder: Path, model: str, python: str, hours: float) -> dict[str, Any]:
    """Train one model on one data set; returns the line to keep."""
    loaded = load(open_source(folder))
    split = split_by_name(None, loaded.interactions, loaded.labels, 0, has_times=loaded.source.has_times)
    with tempfile.TemporaryDirectory() as name:
        files = write_files(split, Path(name) / folder.name)
        settings = SETTINGS[model] | SELDOM.get((folder.name, model), {})
        found = run_recbole(python, files, split, model, settings, EPOCHS, hours=hours)
    kept = ("model", "settings", "seed", "epochs", "out_of_time", "validation", "test")
    seconds = sum(found["train_seconds"]) + sum(found["validation_seconds"]) + found["test_seconds"]
    return {"data": folder.name, **{name: found[name] for name in kept}, "hours": hours, "seconds": round(seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("SHORTLIST_DATA"), help="the data sets' folder")
    parser.add_argument("--python", help="the interpreter that has RecBole; PEER_PYTHON where left out")
    parser.add_argument("--only", action="append", help="run those that begin so, such as ml-100k or ml-100k/NeuMF")
    parser.add_argument("--hours", type=float, default=2.0, help="of processor time, at most so many a model")
    parser.add_argument("--again", action="store_true", help="also run what has its line already")
    options = parser.parse_args()
    python = peer_python(options.python)
    if python is None or options.data is None:
        parser.error("say where the data sets are (--data) and which interpreter has RecBole (--python)")
    lines = PEERS.read_text(encoding="utf-8").splitlines() if PEERS.exists() else []
    done = {(line["data"], line["model"]) for line in map(json.loads, lines)}
    for data in PROTOCOLS:
        for model in SETTINGS:
            # Where the order of a user's items says nothing, nothing is a sequence.
            is_asked = not options.only or f"{data}/{model}".startswith(tuple(options.only))
            if not is_asked or (data == "ml-1m-predefined" and model in SEQUENTIAL):
                continue
            if options.again or (data, model) not in done:
                line = json.dumps(run(Path(options.data) / data, model, python, options.hours))
                print(line, flush=True)
                with PEERS.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main()
