.DEFAULT_GOAL := help
.PHONY: help venv test lint format demo demo-short clean

# The first of these that is Python 3.11 or newer; `make PYTHON=...` takes another.
PYTHON ?= $(firstword $(foreach python,python3.11 python3,$(shell \
	$(python) -c 'import sys; print("$(python)" if sys.version_info >= (3, 11) else "")' 2>/dev/null)))

help: ## Print this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

venv: .venv/.installed ## Create .venv with hwnas, its dependencies and the tools

.venv/.installed: pyproject.toml constraints.txt
	$(if $(PYTHON),,$(error hwnas needs Python 3.11 or newer, and neither python3.11 nor python3 is one))
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -e '.[dev]' -c constraints.txt
	touch $@

test: lint ## Lint, check the types and run the tests
	.venv/bin/pytest -q

lint: venv ## Check style and types
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	cd benchmarks && ../.venv/bin/mypy --config-file= --cache-dir=../.mypy_cache --ignore-missing-imports *.py

format: venv ## Format the code and fix what ruff can fix
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

demo: venv ## The whole story on Fashion-MNIST, from training to a file per device, in demo-run/
	.venv/bin/python examples/demo.py --run demo-run

demo-short: venv ## The same in a short form, in a temporary folder
	folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && \
	.venv/bin/python examples/demo.py --short --run "$$folder/run"

clean: ## Remove .venv, the demo's run folder, caches and build outputs
	rm -rf .venv demo-run build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find hwnas tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
