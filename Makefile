# Everything here works on a fresh machine with make and Python 3.11 or newer (on Debian: python3 and python3-venv).
# CI runs the same targets (.ci/run).

PYTHON ?= python3
DEMO_ARGS ?=
TEST_ARGS ?=
BENCH_ARGS ?= reference --quick

VENV := .venv
DEMO_VENV := .demo-venv
BIN := $(VENV)/bin
PIP_INSTALL := -m pip install --disable-pip-version-check --no-input

.DEFAULT_GOAL := help
.PHONY: help demo test lint check bench docs proto clean

help: ## Show this list.
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(DEMO_VENV)/.installed ## Install kvatlas and show it at work on two recorded vLLM engines. DEMO_ARGS="--stay" keeps it running.
	@$(DEMO_VENV)/bin/python -m kvatlas.demo $(DEMO_ARGS)

test: $(VENV)/.installed ## Run the tests. TEST_ARGS="tests/unit -k keys" runs some of them.
	$(BIN)/python -m pytest $(TEST_ARGS)

lint: $(VENV)/.installed ## Formatting, lint, types, and that generated code and pages are current.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python proto/generate.py --check
	$(BIN)/python docs/generate.py --check

check: lint test ## All that CI checks but the demo: lint, then the tests.

bench: $(VENV)/.installed ## Run a benchmark; BENCH_ARGS="NAME [--quick] [--json]".
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

docs: $(VENV)/.installed ## Write the generated pages of docs/ again.
	$(BIN)/python docs/generate.py

proto: $(VENV)/.installed ## Generate the gRPC code from proto/ again.
	$(BIN)/python proto/generate.py

clean: ## Remove both virtual environments and all caches.
	rm -rf $(VENV) $(DEMO_VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# For development: editable, with the tools. Made again when the dependencies change.
$(VENV)/.installed: pyproject.toml
	@$(call check_python)
	@echo "Installing kvatlas and its development tools into $(VENV) (once)."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python $(PIP_INSTALL) --editable '.[dev]'
	@touch $@

# For the demo: installed as a user would have it. Made again when the code changes.
$(DEMO_VENV)/.installed: pyproject.toml $(shell find src -type f -not -name '*.pyc')
	@$(call check_python)
	@echo "Installing kvatlas into $(DEMO_VENV) (once)."
	@$(PYTHON) -m venv $(DEMO_VENV)
	@$(DEMO_VENV)/bin/python $(PIP_INSTALL) .
	@touch $@

define check_python
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "kvatlas needs Python 3.11 or newer; name one: make $(firstword $(MAKECMDGOALS)) PYTHON=python3.12" >&2; exit 1; }
endef
