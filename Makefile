.DEFAULT_GOAL := help
.PHONY: help install demo up down test check fmt protos bench fuzz storm clean install-dev

# Any Python 3 can run the installer, which then finds one that fits.
ANY_PYTHON := $(shell command -v python3 || command -v python3.12 || command -v python3.11)
INSTALL := $(or $(ANY_PYTHON),echo "headrace needs python3 on the PATH";false) deploy/local/install.py
BIN := .venv/bin
BUILD := build

help: ## Print this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 16

demo: ## Install, start the mesh, and stream the answer of a real model
	@$(INSTALL) --edge-port services triton models
	@$(BIN)/headrace up
	@$(BIN)/headrace demo

install: ## Install the dependencies of the mesh
	@$(INSTALL) services triton models

up: ## Install and start the mesh
	@$(INSTALL) --edge-port services triton models
	@$(BIN)/headrace up

down: ## Stop the mesh and all its processes
	@if [ -x $(BIN)/headrace ]; then $(BIN)/headrace down; else echo "nothing is installed"; fi

test: install-dev ## Install and run the tests, but for `storm` (ARGS="-k name" selects some)
	@$(BIN)/pytest $(ARGS)

check: install-dev ## Check format, lint, types, layers and protos without writing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code --exclude-path protos/google
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash protos/check_breaking.sh
	@scratch=$$(mktemp -d) && trap 'rm -rf "$$scratch"' EXIT \
	  && PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python protos/generate.py "$$scratch/gen" \
	  && diff -r -x __pycache__ libs/gen "$$scratch/gen" && echo "libs/gen is up to date"

fmt: install-dev ## Format the code and the protos
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/buf format --write --exclude-path protos/google

protos: install-dev ## Generate libs/gen from the protos
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python protos/generate.py libs/gen

bench: install-dev ## Measure into build/bench.json (ONLY=area measures one area)
	@$(BIN)/python -m tests.bench $(ONLY)

fuzz: install-dev ## Fuzz our own parsers, guided by coverage (SECONDS=60 each, ONLY="tar names")
	@$(INSTALL) fuzz
	@$(BIN)/python -m tests.fuzz --seconds $(or $(SECONDS),60) $(ONLY)

storm: install-dev ## Attack a mesh for minutes: tenants that flood it, 10,000 mutated messages of each kind
	@$(BIN)/pytest -m storm $(ARGS)

clean: down ## Stop the mesh and remove its state, caches and build output, but not the environments
	rm -rf .headrace $(BUILD) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

install-dev:
	@$(INSTALL) services triton models dev
