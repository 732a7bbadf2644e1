# Every target but clean and help sets up .venv by itself, parity .venv-parity; all that they need is Python 3.10, 3.11 or
# 3.12 with pip and venv.
SUPPORTED = import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.10; do $$p -c '$(SUPPORTED)' 2>/dev/null && echo $$p && break; done)
ARGS ?=
OPERATORS = $(shell find local_attention -name '*.cpp' -o -name '*.h' -o -name '*.hpp')
PYTEST = .venv/bin/python -m pytest -n 2 --dist loadfile

.PHONY: help train test test-all lint sanitize docs parity tensorboard clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

train: .venv/installed ## train the quick start and print a sample, in minutes (ARGS='train.max_minutes=1' for overrides)
	.venv/bin/python train.py experiment=quickstart $(ARGS)

test: .venv/installed ## run the tests but for the slow ones (ARGS='-k rotary' for some)
	$(PYTEST) -m "not slow" $(ARGS)

test-all: .venv/installed ## run every test
	$(PYTEST) $(ARGS)

lint: .venv/installed ## check style and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

sanitize: ## run the operators in C++ under ThreadSanitizer, AddressSanitizer and UndefinedBehaviorSanitizer (needs g++)
	@set -e; folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	for sanitizers in thread address,undefined; do \
	  build="$(CXX) -std=c++17 -O1 -g -pthread -fsanitize=$$sanitizers -fno-sanitize-recover=all"; \
	  $$build -shared -fPIC -Wl,-soname,libdnnl.so.3 -o $$folder/libdnnl.so.3 tests/kernels/dnnl.cpp; \
	  $$build -o $$folder/driver tests/kernels/driver.cpp local_attention/kernels/*.cpp \
	    -Wl,--no-as-needed $$folder/libdnnl.so.3 -Wl,-rpath,$$folder -ldl; \
	  printf '%s: ' $$sanitizers; TSAN_OPTIONS=halt_on_error=1 $$folder/driver; \
	done

docs: .venv/installed ## write docs/api.md from the docstrings
	.venv/bin/python scripts/make_api_reference.py

parity: .venv-parity/installed ## set up .venv-parity, with PyTorch and its package local-attention, for comparisons

tensorboard: .venv/installed ## show the curves of runs/
	.venv/bin/tensorboard --logdir runs

clean: ## delete .venv, .venv-parity, caches and what was built; runs and data stay
	rm -rf .venv .venv-parity .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info build dist rank_0 kernel_meta local_attention/_kernels.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

define CHECK_PYTHON
@test -n "$(PYTHON)" || { echo "error: expected Python 3.10, 3.11 or 3.12 as python3, got $$(python3 --version 2>&1); or name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
@$(PYTHON) -c '$(SUPPORTED)' || { echo "error: expected Python 3.10, 3.11 or 3.12, but PYTHON=$(PYTHON) is $$($(PYTHON) --version 2>&1)" >&2; exit 1; }
endef

# Rebuilt from nothing when pyproject.toml changes, so that a removed or replaced dependency leaves nothing behind, and
# when the operators in C++ do, which pip compiles.
.venv/installed: pyproject.toml $(OPERATORS)
	$(CHECK_PYTHON)
	@echo "Setting up .venv: about 940 MB to download (MindSpore alone is 800 MB), 3 GB on disk; takes a minute or more."
	rm -rf .venv local_attention/_kernels.*
	$(PYTHON) -m venv .venv
	@bar=off; if [ -t 1 ]; then bar=on; fi; set -x; \
	.venv/bin/python -m pip install --disable-pip-version-check --progress-bar $$bar --editable '.[train,dev]'
	@touch $@

# Another environment, as PyTorch's package has the same import name. PyTorch without CUDA is a tenth of the size; where
# its index cannot be reached, pip takes PyTorch from the usual one.
.venv-parity/installed: pyproject.toml $(OPERATORS)
	$(CHECK_PYTHON)
	@echo "Setting up .venv-parity: about 1.2 GB to download, 4 GB on disk; takes some minutes."
	rm -rf .venv-parity
	$(PYTHON) -m venv .venv-parity
	-.venv-parity/bin/python -m pip install --retries 1 --index-url https://download.pytorch.org/whl/cpu 'torch>=2.2,<3'
	.venv-parity/bin/python -m pip install --editable '.[train,dev,parity]'
	@touch $@
