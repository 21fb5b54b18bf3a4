# Everything happens in .venv, made on first use: `make demo` and `make test` work from a fresh clone.

SHELL := bash
PYTHON ?= python3
NEEDED_GB ?= 15
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: help demo test test-all lint format disk clean

help:  ## show these lines
	@sed -n 's/^\([a-z-]*\):.*##/make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

demo: $(INSTALLED)  ## serve a video question over 2 ranks, dense and sparse, and check the answer; options: ARGS="--cp 3 --json"
	$(BIN)/python -m sglang_mm.demo $(ARGS)

test: lint  ## lint, then all tests but the slow ones; options for pytest: ARGS="-k ring"
	$(BIN)/python -m pytest $(ARGS)

test-all: lint  ## lint, then all tests; written to build/test-all.txt and build/test-all.xml
	@mkdir -p build
	set -o pipefail; $(BIN)/python -m pytest -m "" --junitxml=build/test-all.xml $(ARGS) | tee build/test-all.txt

lint: $(INSTALLED)  ## ruff's checks and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

disk:  ## check that there is room for the first install
	@free=$$(df -Pk . | awk 'NR == 2 { print int($$4 / 1048576) }'); \
	if [ "$$free" -lt $(NEEDED_GB) ]; then \
		echo "$$free GB of disk are free here. Needed: $(NEEDED_GB) GB, for SGLang and the libraries it brings." \
			"Remedy: free some, or clone where there is more." >&2; exit 1; \
	fi; \
	echo "disk: $$free GB free, $(NEEDED_GB) GB needed"

clean:  ## remove the environment and everything generated
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not there. Remedy: install Python 3.11 or newer, or pass PYTHON=/path/to/python." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("$(PYTHON) is Python %d.%d. Needed: 3.11 or newer. Remedy: pass PYTHON=/path/to/python3.11." % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(INSTALLED): pyproject.toml
	@[ -e $@ ] || $(MAKE) --no-print-directory disk $(BIN)/python
	@echo "installing into $(VENV): some minutes and 11 GB the first time"
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[serve,ray,dev]'
	@touch $@
