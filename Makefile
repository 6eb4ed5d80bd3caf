PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DATA ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-real-data check openapi format clean bench-diversity bench-import bench-loading bench-ranking bench-serving bench-quality bench-cold-users bench-warm-start bench-training bench-training-gpu

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# The stamp makes a second call free; it is older than its inputs whenever a dependency changes.
$(VENV)/.stamp: pyproject.toml clients/python/pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]' --editable clients/python
	@touch $@

setup: $(VENV)/.stamp ## Make .venv with everything the other commands need

demo: setup ## Import, train, promote and serve on http://127.0.0.1:8000 (DATA=DIR for MovieLens)
	$(BIN)/shortlist demo $(if $(DATA),--data $(DATA))

test: setup ## Run every test, on SQLite and on a private PostgreSQL
	$(BIN)/pytest -n auto -m 'not real_data'

test-real-data: setup ## Run the tests that use the data sets under SHORTLIST_DATA
	$(BIN)/pytest -n auto -m real_data

check: setup ## Lint, types, import rules, dependencies
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry .
	cd clients/python && $(abspath $(BIN))/deptry src

bench-serving: setup ## Measure one worker on one core beside an empty endpoint (MINUTES=30 of mixed load)
	PYTHONPATH=. $(BIN)/python benchmarks/serving.py $(if $(MINUTES),--minutes $(MINUTES))

bench-diversity: setup ## Measure what diversity costs on MovieLens 100K in DATA
	$(if $(DATA),,$(error name the data: make $@ DATA=DIR))$(BIN)/python benchmarks/diversity.py --data $(DATA) --write docs/diversity.md

bench-import: setup ## Measure importing 1,000,000 events into SQLite, and how long feedback waits meanwhile
	$(BIN)/python benchmarks/import_speed.py

bench-quality: setup ## Compute docs/quality.md's tables on the data sets in DATA; goes on from where it ended
	$(BIN)/python benchmarks/quality.py $(if $(DATA),--data $(DATA))

openapi: setup ## Export docs/openapi.json, after a change of the HTTP interface
	$(BIN)/shortlist openapi --out docs/openapi.json

bench-loading: setup ## Measure the way from a snapshot of 20,000,000 events to the first step: time and memory
	$(BIN)/python benchmarks/loading.py

bench-warm-start: setup ## Measure a warm start on sequences in DATA beside a full training, five seeds; goes on from where it ended
	$(if $(DATA),,$(error name the data: make $@ DATA=DIR))mkdir -p build && $(BIN)/python benchmarks/warm_start.py --data $(DATA) --results build/warm-start.jsonl

bench-ranking: setup ## Measure how fast the best of 1,000,000 items are found, beside plain ways to find them
	OMP_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python benchmarks/ranking.py

bench-cold-users: setup ## Measure ranking for users unseen in training, beside popularity, on MovieLens 1M in DATA
	PYTHONPATH=. $(BIN)/python benchmarks/cold_users.py $(if $(DATA),--data $(DATA))

bench-training: setup ## Measure training beside RecBole (PEER_PYTHON=…, DATA=DIR, RANKING_DATA=DIR), by size of catalogue, and loading 20,000,000 events
	$(BIN)/python benchmarks/training.py; trained=$$?; $(BIN)/python benchmarks/loading.py && exit $$trained

bench-training-gpu: setup ## Measure NeuMF and Caser on a GPU, at the sizes of published references
	$(BIN)/python benchmarks/training_gpu.py

format: setup ## Format the code and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove the environment and caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
