# Everything runs in .venv, made on first use with any Python from 3.11 on and installed under constraints.txt.
# `make` alone lists the targets.

.DEFAULT_GOAL := help
.PHONY: help venv dev demo serve test check lint types faults slow gpu compose-check bench-serving bench-queue bench-training bench-compose openapi clean

VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Stamps: a target that finds its stamp newer than what it was made from installs nothing.
RUN_STAMP := $(VENV)/.isthmus-run
DEV_STAMP := $(VENV)/.isthmus-dev
BENCH_STAMP := $(VENV)/.isthmus-bench

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/python:
	@python=""; for candidate in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11 python; do \
		if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then echo "Isthmus needs Python 3.11 or newer; name it with make PYTHON=/path/to/python" >&2; exit 1; fi; \
	echo "making $(VENV) with $$($$python --version)"; $$python -m venv $(VENV)

# pip's own settings choose the build of torch: on Linux the usual index has the CUDA build, which is gigabytes;
# PIP_EXTRA_INDEX_URL can name PyTorch's CPU index, whose build the same constraints accept.
$(RUN_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing Isthmus into $(VENV) (the first time takes a few minutes)"
	@$(INSTALL) -e '.[all]'
	@touch $@

$(DEV_STAMP): $(RUN_STAMP)
	@$(INSTALL) -e '.[dev]'
	@touch $@

# open_clip without what it asks for: of torchvision and timm the benchmark uses nothing, and an extra cannot say so.
$(BENCH_STAMP): $(DEV_STAMP)
	@$(INSTALL) -e '.[bench]'
	@$(INSTALL) --no-deps open_clip_torch
	@touch $@

venv: $(RUN_STAMP) ## Install what serving, training and the demo need

dev: $(DEV_STAMP) ## Install what development needs as well

demo: $(RUN_STAMP) ## Learn digits seen and heard, then answer what nobody taught; DATA=<folder of WebDataset tars> for your own
	@$(BIN)/isthmus demo $(if $(DATA),--data '$(DATA)') $(if $(OUT),--out '$(OUT)')

serve: $(RUN_STAMP) ## Start the API and a worker on ./isthmus-data; Ctrl-C stops both
	@$(BIN)/isthmus serve

test: $(DEV_STAMP) ## Run the tests
	@$(BIN)/python -m pytest

lint: $(DEV_STAMP) ## Check style and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(DEV_STAMP) ## Check the types
	@$(BIN)/basedpyright

check: lint types test ## Style, types and tests: what a change must pass

faults: $(DEV_STAMP) ## Break the queue and training in every way we know, in the longest form too (half an hour)
	@$(BIN)/python -m pytest tests/faults -m 'not gpu and not compose' --timeout 1800

slow: $(DEV_STAMP) ## Run the tests that take minutes
	@$(BIN)/python -m pytest -m slow --timeout 1800

gpu: $(DEV_STAMP) ## Run the tests that need a CUDA device
	@$(BIN)/python -m pytest -m gpu

compose-check: $(DEV_STAMP) ## Run the tests that need a compose engine
	@$(BIN)/python -m pytest -m compose

bench-serving: $(DEV_STAMP) ## Measure what a request costs beside the model
	@$(BIN)/python -P benchmarks/serving.py

bench-queue: $(BENCH_STAMP) ## Measure what a job costs beside its work, next to two other queues
	@$(BIN)/python -m benchmarks.queue

bench-training: $(BENCH_STAMP) ## Measure what training costs, next to a bare loop and open_clip
	@$(BIN)/python -m benchmarks.training

bench-compose: $(DEV_STAMP) ## Measure what composition costs, next to bare matrix products and to embedding
	@$(BIN)/python -m benchmarks.compose

openapi: $(DEV_STAMP) ## Write docs/openapi.json anew from the app
	@$(BIN)/isthmus openapi > docs/openapi.json.new && mv docs/openapi.json.new docs/openapi.json

clean: ## Remove what tests and builds leave behind (not .venv, not your data)
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis *.egg-info
	find service worker tests migrations benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
