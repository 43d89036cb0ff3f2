# make book · make test · make lint · make browser · make clean
# Each sets up .venv by itself, once; GROUNDUP_CACHE says where data files are kept.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
TORCH_THREADS ?= 1
BOOK_FLAGS ?=

.PHONY: book test lint browser lock clean help

help:  ## This list
	@grep -hE '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

$(READY): requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.txt
	@touch $@

book: $(READY)  ## Build the site into _build/html
	$(BIN)/groundup fetch
	$(BIN)/jupyter-book build . $(BOOK_FLAGS)

test: $(READY) lint  ## Lint, unit tests, and every page
	$(BIN)/groundup fetch
	OMP_NUM_THREADS=$(TORCH_THREADS) $(BIN)/python -m pytest -n 2
	$(BIN)/python -m pytest --nbmake book -n 2

lint: $(READY)  ## Format, lint, and layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

browser: $(READY)  ## Check the built site in Chromium
	$(BIN)/python -m pytest -m browser tests/book

lock: $(READY)  ## Write requirements.txt anew from pyproject.toml
	$(BIN)/pip-compile --quiet --strip-extras --upgrade --no-header --no-annotate \
	  --no-emit-find-links --no-emit-index-url --no-emit-trusted-host \
	  --allow-unsafe --extra book --extra oracles --extra dev \
	  --output-file .venv/lock.txt pyproject.toml
	@{ echo '# Written by `make lock` from pyproject.toml; do not edit.'; \
	   sed -E 's/\+cpu$$//' .venv/lock.txt; echo '-e .'; } > requirements.txt

clean:  ## Remove everything that was built, the environment too
	rm -rf .venv _build out .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} + ; rm -rf code/*.egg-info
