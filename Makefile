# Thin: every target is one command that also works without make.
SHELL := /bin/bash
.DEFAULT_GOAL := help
UV_VERSION := 0.13.8
UV := .uv/bin/uv
IN_ENV := $(UV) run --frozen --all-extras

.PHONY: help setup demo test test-soak test-browser check format bench docs retrain images chart clean submit status logs rerun wait cancel doctor e2e

help: ## List the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z0-9-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(UV):
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "python3 is older than 3.11; install a newer one"; exit 1; }
	@python3 -m venv .uv 2>/dev/null && .uv/bin/python -m pip --version >/dev/null 2>&1 \
		|| { rm -rf .uv && python3 -m pip install --quiet --target .uv/site uv==$(UV_VERSION) && mkdir -p .uv/bin && ln -s ../site/bin/uv .uv/bin/uv; } \
		|| { echo "python3 has neither venv nor pip; install one: apt-get install python3-venv"; exit 1; }
	@test -x $(UV) || .uv/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

setup: $(UV) ## Install uv and the locked environment into this folder
	@$(UV) sync --frozen --all-extras --quiet

demo: setup ## Label about 100 toy scenes with the shipped tiny models and show what came out; RECIPE=vlplm for the other recipe
	@$(IN_ENV) mill demo --recipe $(or $(RECIPE),cotpl)

test: setup ## Run the tests
	@$(IN_ENV) pytest -q -n 2

test-soak: setup ## Kill workers at random, fifty times, and verify
	@$(IN_ENV) pytest -q -m soak

test-browser: setup ## Use the report in Chromium (apt-get install chromium)
	@$(IN_ENV) pytest -q -m browser

check: setup ## Formatting, lint, types, layers
	@$(IN_ENV) ruff format --check .
	@$(IN_ENV) ruff check .
	@$(IN_ENV) mypy
	@$(IN_ENV) lint-imports
	@$(UV) lock --check --quiet

format: setup ## Bring the code into its one format
	@$(IN_ENV) ruff format .
	@$(IN_ENV) ruff check --fix .

bench: setup ## Measure: baseline and ours in turn
	@for file in tests/bench/bench_*.py; do echo "== $$file"; $(IN_ENV) python $$file || exit 1; done

docs: setup ## Write the generated parts of the README anew
	@$(IN_ENV) python -m mill_jobs.reference README.md

REGISTRY ?= localhost
TAG ?= $(shell git describe --always --dirty 2>/dev/null || echo latest)
PUSH ?= no
IMAGES ?= control worker
# More of the builder, e.g. BUILD_ARGS="--build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu126"
BUILD_ARGS ?=

images: ## Build the images: REGISTRY= TAG= PUSH=yes IMAGES="control worker" BUILD_ARGS=
	@if docker info >/dev/null 2>&1; then build="docker build"; push="docker push"; \
	elif command -v buildah >/dev/null; then build="buildah bud --isolation chroot --layers"; push="buildah push"; \
	else echo "neither a running Docker nor buildah; apt-get install buildah"; exit 1; fi; \
	for image in $(IMAGES); do \
		name="$(REGISTRY)/labelmill-$$image:$(TAG)"; \
		$$build $(BUILD_ARGS) -f images/$$image/Dockerfile -t "$$name" . || exit 1; \
		if [ "$(PUSH)" = yes ]; then $$push "$$name" || exit 1; fi; \
		echo "built $$name"; \
	done

chart: setup ## Generate the chart's values, schema and table anew, and lint it
	@$(IN_ENV) python -m mill_k8s.chart helm/labelmill
	@for file in helm/labelmill/ci/*-values.yaml; do \
		$(IN_ENV) helm lint --quiet --strict helm/labelmill --kube-version 1.33.0 -f "$$file" || exit 1; done

retrain: setup ## Train the demo's tiny models anew (about three hours on one core)
	@$(IN_ENV) python -m mill_jobs.demo.train_sam jobs/mill_jobs/demo/models/sam.pth
	@$(IN_ENV) python -m mill_jobs.demo.train_chat
	@$(IN_ENV) python -m mill_jobs.demo.train_rpn
	@$(IN_ENV) python -m mill_jobs.demo.train_clip

e2e: setup ## Run the cluster tests: KUBECONFIG= E2E_HOST= (see tests/e2e/conftest.py)
	@$(IN_ENV) pytest -q -m cluster

# On a cluster, by KUBECONFIG. RUN=id names a run, FILE=run.yaml a run file; ARGS takes whatever else millctl knows.
submit: setup ## Start a run on the cluster: SHARDS=12 [FILE=run.yaml] [ARGS=...]
	@$(IN_ENV) millctl submit $(FILE) --shards $(or $(SHARDS),$(error SHARDS is missing: make submit SHARDS=12)) $(ARGS)

status: setup ## Show how far a run is: [RUN=id] [ARGS=--watch]
	@$(IN_ENV) millctl status $(RUN) $(ARGS)

logs: setup ## Show the logs of a run: [RUN=id] [SHARD=7] [ARGS=--follow]
	@$(IN_ENV) millctl logs $(RUN) $(if $(SHARD),--shard $(SHARD)) $(ARGS)

rerun: setup ## Label again what is missing: [RUN=id] [ARGS="--failed --reason decode"]
	@$(IN_ENV) millctl rerun $(RUN) $(ARGS)

wait: setup ## Follow a run to its end, with its exit code: [RUN=id]
	@$(IN_ENV) millctl wait $(RUN) $(ARGS)

cancel: setup ## Stop a run; what is committed stays: [RUN=id]
	@$(IN_ENV) millctl cancel $(RUN) $(ARGS)

doctor: setup ## Look for what would stop a run: [FILE=run.yaml]
	@$(IN_ENV) millctl doctor $(FILE) $(ARGS)

clean: ## Remove what the targets made, the environment included
	rm -rf .venv .uv demo-run build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
