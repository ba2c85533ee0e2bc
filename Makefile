# make demo | tour | test | test-sites | test-outages | test-verbs | test-verbs-all | test-pythons | compat | chaos | fuzz | coverage | lint | format | docs | clean
# (Debian 12 / Ubuntu 24.04, Python >= 3.11)
PYTHON ?= python3
VENV   ?= .venv
# Extra pip options, for example a private index or a CPU-only PyTorch index.
PIP_ARGS ?=
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PYTEST_ARGS ?= -n 3 --dist worksteal

.PHONY: demo tour test test-sites test-outages test-verbs test-verbs-all test-pythons compat chaos fuzz coverage lint format docs clean setup
.DELETE_ON_ERROR:

setup: $(STAMP)

# Re-made only when what is installed would change; the package itself is installed in editable mode.
$(STAMP): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "nvflare-rdma needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) has no venv module. Debian and Ubuntu: apt install python3-venv"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip setuptools wheel
	@echo "Installing what is missing into $(VENV); the first time that takes some minutes."
	$(BIN)/pip install $(PIP_ARGS) -c constraints.txt -e '.[test,lint]'
	touch $@

demo: $(STAMP)
	$(BIN)/python jobs/stdlib_lm/demo.py

# From start-up kits to reports, with FLARE's own commands: a server and three sites on this machine, and three jobs.
# TOUR_ARGS="--folder FOLDER" keeps what they leave.
tour: $(STAMP)
	$(BIN)/python jobs/tour.py $(TOUR_ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# A provisioned federation with a network for each host. Where namespaces or TUN devices are not allowed, it fails.
test-sites: $(STAMP)
	$(BIN)/python tests/wan/wire.py $(BIN)/python -m pytest tests/wan/sites.py tests/wan/upgraded.py tests/wan/provisioned.py \
	  tests/wan/balanced.py

# Jobs whose site is out of reach for up to a quarter of an hour. OUTAGES="cut-down move-up" chooses.
OUTAGES_FOLDER ?= /tmp/outages
test-outages: $(STAMP)
	rm -rf $(OUTAGES_FOLDER)
	$(BIN)/python -m tests.wan.outages $(OUTAGES_FOLDER) $(OUTAGES)

# The tests that need RDMA devices: on this machine's own, or else in a QEMU guest with software devices. Of those that
# show the same, test-verbs runs one (tests/guest/selection.py).
test-verbs: $(STAMP)
	$(BIN)/python tests/guest/run_tests.py

test-verbs-all: $(STAMP)
	$(BIN)/python tests/guest/run_tests.py --all

# A wheel in a clean environment, without and with torch, on each supported Python that is here. PYTHONS="3.12 /path/of/python"
# chooses others, PYTHONS_STEPS=plain leaves out torch and the job.
PYTHONS_STEPS ?= all
test-pythons: $(STAMP)
	$(BIN)/python tests/pythons/smoke.py --steps $(PYTHONS_STEPS) -- $(PIP_ARGS)

# Tests with the newest release of FLARE 2.9 that the index has, in an environment of its own. What they pass with can be
# added to TRIED in nvflare_rdma/flare_compat.py.
COMPAT := build/compat
COMPAT_TESTS ?= tests/test_flare_compat.py tests/test_provision.py tests/cli tests/driver tests/filters tests/flare tests/kits \
  tests/persistors tests/streaming
compat:
	rm -rf $(COMPAT)
	$(PYTHON) -m venv $(COMPAT)
	grep -v '^nvflare' constraints.txt > $(COMPAT)/constraints.txt
	$(COMPAT)/bin/pip install -q $(PIP_ARGS) -c $(COMPAT)/constraints.txt --upgrade -e '.[test]'
	@$(COMPAT)/bin/python -c 'from importlib.metadata import version; from nvflare_rdma.flare_compat import TRIED; \
	  found = version("nvflare"); print("NVIDIA FLARE", found, "was tried" if found in TRIED else "is new here")'
	$(COMPAT)/bin/python -m pytest $(PYTEST_ARGS) $(COMPAT_TESTS)

# Processes that pull from each other while they are killed and stopped, and their connections cut, stalled and flipped.
# CHAOS_ARGS="--seed 7" plays a run again.
CHAOS_SECONDS ?= 300
chaos: $(STAMP)
	$(BIN)/python -m tests.chaos.run --seconds $(CHAOS_SECONDS) $(CHAOS_ARGS)

# Random input for everything that takes what a peer says, each target for so long. FUZZ_ARGS="parser --seed 7" chooses.
FUZZ_SECONDS ?= 60
fuzz: $(STAMP)
	$(BIN)/python -m tests.fuzz.run --seconds $(FUZZ_SECONDS) $(FUZZ_ARGS)

# How much of transfer/ and streaming/ their own tests reach, in all processes that they start.
coverage: $(STAMP)
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest $(PYTEST_ARGS) tests/transfer tests/streaming
	$(BIN)/coverage combine -q
	$(BIN)/coverage report

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(STAMP)
	$(BIN)/pip install -q $(PIP_ARGS) -c constraints.txt -e '.[docs]'
	$(BIN)/sphinx-build -q -W -b html docs docs/_build

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache demo_workspace
