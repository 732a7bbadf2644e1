# make train and make test need nothing but Python 3.10, 3.11 or 3.12 with pip and venv; they set up .venv by themselves.
SUPPORTED = import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.10; do $$p -c '$(SUPPORTED)' 2>/dev/null && echo $$p && break; done)
ARGS ?=

.PHONY: help train test lint tensorboard clean

help:
	@echo "make train        train the quick start and print a sample (some minutes; ARGS='train.max_minutes=1' for overrides)"
	@echo "make test         run every test (ARGS='-k rotary' for some)"
	@echo "make lint         check the style"
	@echo "make tensorboard  look at the curves of runs/"
	@echo "make clean        delete .venv and caches; runs and data stay"

train: .venv/installed
	.venv/bin/python train.py experiment=quickstart $(ARGS)

test: .venv/installed
	.venv/bin/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

tensorboard: .venv/installed
	.venv/bin/tensorboard --logdir runs

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis *.egg-info build rank_0 kernel_meta local_attention/_kernels.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Made again from nothing when pyproject.toml changes, so that a removed or replaced dependency leaves nothing behind, and
# when kernels.cpp does, which pip compiles.
.venv/installed: pyproject.toml local_attention/kernels.cpp
	@test -n "$(PYTHON)" || { echo "error: expected Python 3.10, 3.11 or 3.12 as python3, got $$(python3 --version 2>&1); or name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c '$(SUPPORTED)' || { echo "error: expected Python 3.10, 3.11 or 3.12, but PYTHON=$(PYTHON) is $$($(PYTHON) --version 2>&1)" >&2; exit 1; }
	rm -rf .venv local_attention/_kernels.*
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[train,dev]'
	@touch $@
