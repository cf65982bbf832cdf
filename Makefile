# Thin: every target is one command that also works without make.
SHELL := /bin/bash
.DEFAULT_GOAL := help
UV_VERSION := 0.13.8
UV := .uv/bin/uv
RUN := $(UV) run --frozen --all-extras

.PHONY: help setup demo test test-soak test-browser check format bench docs retrain clean

help: ## List the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(UV):
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "python3 is older than 3.11; install a newer one"; exit 1; }
	@python3 -m venv .uv 2>/dev/null && .uv/bin/python -m pip --version >/dev/null 2>&1 \
		|| { rm -rf .uv && python3 -m pip install --quiet --target .uv/site uv==$(UV_VERSION) && mkdir -p .uv/bin && ln -s ../site/bin/uv .uv/bin/uv; } \
		|| { echo "python3 has neither venv nor pip; install one: apt-get install python3-venv"; exit 1; }
	@test -x $(UV) || .uv/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

setup: $(UV) ## Install uv and the locked environment into this folder
	@$(UV) sync --frozen --all-extras --quiet

demo: setup ## Label about 100 toy scenes with the shipped tiny models and show what came out
	@$(RUN) mill demo

test: setup ## Run the tests
	@$(RUN) pytest -q -n 2

test-soak: setup ## Kill workers at random, fifty times, and verify
	@$(RUN) pytest -q -m soak

test-browser: setup ## Use the report in Chromium (apt-get install chromium)
	@$(RUN) pytest -q -m browser

check: setup ## Formatting, lint, types, layers
	@$(RUN) ruff format --check .
	@$(RUN) ruff check .
	@$(RUN) mypy
	@$(RUN) lint-imports
	@$(UV) lock --check --quiet

format: setup ## Bring the code into its one format
	@$(RUN) ruff format .
	@$(RUN) ruff check --fix .

bench: setup ## Measure: baseline and ours in turn
	@for file in tests/bench/bench_*.py; do echo "== $$file"; $(RUN) python $$file || exit 1; done

docs: setup ## Write the generated parts of the README anew
	@$(RUN) python -m mill_jobs.reference README.md

retrain: setup ## Train the demo's tiny models anew (about two hours on two cores)
	@$(RUN) python -m mill_jobs.demo.train_sam
	@$(RUN) python -m mill_jobs.demo.train_chat

clean: ## Remove what the targets made, the environment included
	rm -rf .venv .uv demo-run build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
