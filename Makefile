# Everything a clone needs: `make` lists the targets. Another interpreter: make PYTHON=python3.12 test
PYTHON ?= python3
VENV := .venv
VENV_FLOOR := .venv-floor
VENV_NEWEST := .venv-newest
PIP_INSTALL := bin/python -m pip install --quiet --disable-pip-version-check
# `accelerate launch` lists each of its defaults as a warning, which says nothing about the run.
LAUNCH := ACCELERATE_LOG_LEVEL=error $(VENV)/bin/accelerate launch --quiet
# A file's tests share what they make, and so a process; more processes than these would wait for each other.
IN_PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadfile
# Overrides of the recipe: make pretrain ARGS='--train.max_steps 20'
ARGS ?=
# The quickstart as it is fetches nothing, and no library needs to ask the Hub; what ARGS name may have to be fetched.
OFFLINE = $(if $(strip $(ARGS)),,HF_HUB_OFFLINE=1)

.DEFAULT_GOAL := help
.PHONY: help install pretrain test trials test-floor test-newest lint clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/installed  ## make .venv with the versions of constraints.txt

pretrain: $(VENV)/installed  ## pretrain the quickstart model on this machine (ARGS='--FIELD VALUE' overrides)
	@$(OFFLINE) $(LAUNCH) scripts/pretrain.py $(ARGS)

test: $(VENV)/installed  ## run the tests: minutes, offline
	@$(VENV)/bin/python -m pytest $(IN_PARALLEL)

trials: $(VENV)/installed  ## run the long tests: kills, soaks, real clients
	@$(VENV)/bin/python -m pytest -m trial $(IN_PARALLEL)

test-floor: $(VENV_FLOOR)/installed  ## run the tests on the oldest torch and transformers supported
	@$(VENV_FLOOR)/bin/python -m pytest

test-newest: $(VENV_NEWEST)/installed  ## run the tests of the model on the newest transformers supported
	@$(VENV_NEWEST)/bin/python -m pytest tests/modeling

lint: $(VENV)/installed  ## check style and types: ruff, mypy
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

clean:  ## remove environments and caches, never runs/ or data/
	rm -rf $(VENV) $(VENV_FLOOR) $(VENV_NEWEST) .venv-clients .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is touched last, so an installation that was cut off is taken up again.
$(VENV)/installed: setup.cfg pyproject.toml constraints.txt
	$(call make_environment,$(VENV),constraints.txt)

# Downloads the registry's build of the old torch, also where a CPU build of the new one is at hand.
$(VENV_FLOOR)/installed: setup.cfg pyproject.toml tests/constraints-floor.txt
	$(call make_environment,$(VENV_FLOOR),tests/constraints-floor.txt)

$(VENV_NEWEST)/installed: setup.cfg pyproject.toml tests/constraints-newest.txt
	$(call make_environment,$(VENV_NEWEST),tests/constraints-newest.txt)

define make_environment
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "gpt2x needs Python 3.11 or newer, $(PYTHON) is older: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "installing gpt2x into $(1) (once, some minutes)"
	@test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	@$(1)/$(PIP_INSTALL) -c $(2) -e '.[dev]'
	@touch $@
endef
