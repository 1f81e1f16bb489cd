# Two commands: `make demo` and `make test`. Both set up .venv of this checkout first; a second call does not reinstall.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: demo test test-all test-machines lint format lock docs clean bench-headline bench-service bench-planner bench-decoders bench-proof bench-convergence bench-fleet bench-modules bench-truth bench-small page-pictures example

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py $(ARGS)

# Measures the example that an empty service shows; needed when PROFILE_VERSION moves.
example: $(VENV)/.installed
	$(BIN)/python tests/benchmarks/example_profile.py $(ARGS)

# Two files at a time, the longest first; ARGS='-n 0' for one after the other, as a debugger wants them. `test` leaves out the
# tests that are marked as slow, most of which repeat at other sizes or beside other features what quicker ones show.
unexport PYTHONDONTWRITEBYTECODE # hundreds of processes import tightfit, which is compiled once
PYTEST := $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder
test: $(VENV)/.installed-test
	$(PYTEST) -m 'not slow' $(ARGS)

test-all: $(VENV)/.installed-test
	$(PYTEST) $(ARGS)

# Five published models under the published caps; ARGS='--model qwen2.5-0.5b --no-curve' for one in minutes.
bench-headline: $(VENV)/.installed
	$(BIN)/python tests/benchmarks/headline.py $(ARGS)

# 64 clients, kill -9 twenty times; figures as JSON with ARGS=--json.
bench-service: $(VENV)/.installed-test
	$(BIN)/python tests/benchmarks/service.py $(ARGS)

# How long planning takes, how near the bound it comes, and what fixed rules would give: decoders, then bare graphs of
# published networks and random ones, beside PyTorch's own solvers. ARGS=--ablate instead switches off one part of the
# search after the other, and says what each is worth.
ABLATE := $(filter --ablate,$(ARGS))
bench-planner: $(VENV)/.installed-test
	$(BIN)/python tests/benchmarks/$(if $(ABLATE),ablation.py $(filter-out --ablate,$(ARGS)),planner.py $(ARGS))
	$(if $(ABLATE),,$(BIN)/python tests/benchmarks/graphs.py)

# Published decoders at full size: smallest budgets, steps, gaps, planning times on an estimated device. An hour for all;
# ARGS='--models qwen3.5-0.8b,llama-3.2-1b --seconds 30' for two in minutes.
bench-decoders: $(VENV)/.installed-test
	$(BIN)/python tests/benchmarks/decoders.py $(ARGS)

# Brute force over tens of thousands of small graphs, looking for one that contradicts the planner; ten minutes.
bench-proof: $(VENV)/.installed-test
	$(BIN)/python tests/benchmarks/proof.py $(ARGS)

# SmolLM2-135M, and Gemma-3-270M where it is installed, on news texts at one cap: backpropagation, lcsb, mezo and mobillm; ARGS='--steps 40 --factor 4' for a taste.
bench-convergence: $(VENV)/.installed-test
	$(BIN)/python tests/benchmarks/convergence.py $(ARGS)

# Four devices on this machine, with shares of a core, limited links and memory caps; needs root. ARGS='--rates 100,10'.
bench-fleet: $(VENV)/.installed-test
	$(BIN)/python tests/benchmarks/fleet.py $(ARGS)

# Networks in plain PyTorch and of timm beside eager PyTorch, at all of its memory, half and a quarter; ARGS='--networks vit' for one.
bench-modules: $(VENV)/.installed-test
	$(BIN)/pip install --quiet --disable-pip-version-check timm
	$(BIN)/python tests/benchmarks/modules.py $(ARGS)

# Predicted beside measured, peak and seconds: decoders and ten networks of timm (`pip install timm`) at four budgets, each plan run
# five times in its exact budget; two hours. ARGS='--models qwen2.5-0.5b,convnext_pico --runs 2' for two.
bench-truth: $(VENV)/.installed-test
	$(BIN)/pip install --quiet --disable-pip-version-check timm
	$(BIN)/python tests/benchmarks/truth.py $(ARGS)

# The pictures of the page in README and documentation, with the demo's model.
page-pictures: $(VENV)/.installed-test
	$(BIN)/python tests/benchmarks/page_pictures.py $(ARGS)

# From nothing cached to an adapter inside a cgroup with the budget as its limit, with a bundle from a service and with one in a folder;
# needs root. ARGS='--models qwen2.5-0.5b --bundles folder'.
bench-small: $(VENV)/.installed-test
	$(BIN)/python tests/benchmarks/small_device.py $(ARGS)

# Both commands of README as another user, with other Pythons and packages; makes a user, so needs root.
# ARGS='--pythons python3.13 --users ordinary --packages newest --write' for one row.
test-machines: $(VENV)/.installed-test
	$(BIN)/python tests/benchmarks/machines.py $(ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --explicit-package-bases examples tests/benchmarks/headline.py
	$(BIN)/lint-imports

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Brings .ci/lock.txt up to date: the newest versions of all that pyproject.toml asks for, but for PyTorch, whose version is named here.
LOCKED_TORCH ?= 2.13.0
lock: $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check uv
	echo 'torch==$(LOCKED_TORCH)' | $(BIN)/uv pip compile pyproject.toml --extra test --extra dev --universal --python-version 3.11 \
	    --no-annotate --upgrade --constraint - --custom-compile-command 'make lock' --output-file .ci/lock.txt $(ARGS)

# Tables of what is tested, out of the tests.
docs: $(VENV)/.installed
	$(BIN)/python tests/whole/test_docs.py

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tightfit needs Python 3.11 or newer; name one: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

# Tried once: what is installed later, or otherwise, stays.
$(VENV)/.torch: | $(BIN)/python
	@sh .ci/install-torch.sh $(BIN)/python
	@touch $@

$(VENV)/.installed: pyproject.toml | $(VENV)/.torch
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[planner]'
	@touch $@

# Tests and linting run with the versions in .ci/lock.txt, so that they say the same tomorrow; LOCK= takes the newest of everything.
LOCK ?= --constraint .ci/lock.txt
$(VENV)/.installed-test: pyproject.toml .ci/lock.txt | $(VENV)/.torch
	$(BIN)/pip install --quiet --disable-pip-version-check $(LOCK) -e '.[test,dev]'
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build *.egg-info src/*.egg-info .mypy_cache .ruff_cache .pytest_cache examples/out
