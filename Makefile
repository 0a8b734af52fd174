# Everything here works on a fresh machine with make and Python 3.11 or newer (on Debian: python3 and python3-venv). Where cargo
# is there too (Rust 1.88 or newer), the native core is built, checked and tested; KVATLAS_NATIVE=0 leaves it out.
# CI runs the same targets (.ci/run).

PYTHON ?= python3
DEMO_ARGS ?=
TEST_ARGS ?=
BENCH_ARGS ?= reference --quick

VENV := .venv
DEMO_VENV := .demo-venv
BIN := $(VENV)/bin
PIP_INSTALL := -m pip install --disable-pip-version-check --no-input

NATIVE_SOURCES := hatch_build.py $(shell find native -name target -prune -o -type f -print)
# A cargo that is too old cannot read the workspace; it counts as none.
CARGO_WORKS := [ "$$KVATLAS_NATIVE" != 0 ] && cargo metadata --no-deps --format-version 1 --manifest-path native/Cargo.toml >/dev/null 2>&1
INSTALLED := .installed-$(if $(and $(filter-out 0,$(or $(KVATLAS_NATIVE),1)),$(shell command -v cargo)),with,without)-cargo
SAY_CORE := -c 'from kvatlas.index.choice import describe_core; print("core:", describe_core())'

.DEFAULT_GOAL := help
.PHONY: help demo test lint check bench docs proto clean

help: ## Show this list.
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(DEMO_VENV)/$(INSTALLED) ## Install kvatlas and show it at work: a fleet of engines without a GPU. DEMO_ARGS="--stay" keeps it running.
	@$(DEMO_VENV)/bin/kvatlas demo $(DEMO_ARGS)

test: $(VENV)/$(INSTALLED) ## Run the tests. TEST_ARGS="tests/unit -k keys" runs some of them.
	@if $(CARGO_WORKS); then (set -x; cd native && cargo test --quiet --locked); \
	else echo "WITHOUT the native core's own tests: they need cargo (Rust 1.88 or newer, https://rustup.rs)."; fi
	@$(BIN)/python $(SAY_CORE)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile $(TEST_ARGS)

lint: $(VENV)/$(INSTALLED) ## Formatting, lint, types, and that generated code and pages are current.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python proto/generate.py --check
	$(BIN)/python docs/generate.py --check
	@if $(CARGO_WORKS) && cargo fmt --version >/dev/null 2>&1 && cargo clippy --version >/dev/null 2>&1; then \
		(set -x; cd native && cargo fmt --all --check && cargo clippy --quiet --locked --workspace --all-targets -- -D warnings); \
	else echo "WITHOUT a look at native/: that needs cargo (Rust 1.88 or newer) with rustfmt and clippy."; fi
	@if $(BIN)/python -c 'import kvatlas._native' 2>/dev/null; then (set -x; $(BIN)/stubtest kvatlas._native); \
	else echo "WITHOUT a look at _native.pyi: the native core is not built."; fi

check: lint test ## All that CI checks but the demo: lint, then the tests.

bench: $(VENV)/$(INSTALLED) ## Run a benchmark; BENCH_ARGS="NAME [--quick] [--json]".
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

docs: $(VENV)/$(INSTALLED) ## Write the generated pages of docs/ again.
	$(BIN)/python docs/generate.py

proto: $(VENV)/$(INSTALLED) ## Generate the gRPC code from proto/ again.
	$(BIN)/python proto/generate.py

clean: ## Remove both virtual environments, the built native core and all caches.
	rm -rf $(VENV) $(DEMO_VENV) .fallback-venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist native/target
	rm -f src/kvatlas/_native.abi3.so src/kvatlas/_native_missing.txt
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# For development: editable, with the tools. Made again when the dependencies or the native core change, or cargo comes or goes.
$(VENV)/$(INSTALLED): pyproject.toml $(NATIVE_SOURCES)
	@$(call check_python)
	@echo "Installing kvatlas and its development tools into $(VENV) (once)."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python $(PIP_INSTALL) --editable '.[dev]'
	@rm -f $(VENV)/.installed*
	@touch $@

# For the demo: installed as a user would have it. Made again when the code changes.
$(DEMO_VENV)/$(INSTALLED): pyproject.toml $(NATIVE_SOURCES) \
		$(shell find src -type f -not -name '*.pyc' -not -name '_native.abi3.so' -not -name '_native_missing.txt')
	@$(call check_python)
	@echo "Installing kvatlas into $(DEMO_VENV) (once; minutes where cargo builds the native core: KVATLAS_NATIVE=0 leaves it out)."
	@$(PYTHON) -m venv $(DEMO_VENV)
	@$(DEMO_VENV)/bin/python $(PIP_INSTALL) '.[tokens]'
	@rm -f $(DEMO_VENV)/.installed*
	@touch $@

define check_python
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "kvatlas needs Python 3.11 or newer; name one: make $(firstword $(MAKECMDGOALS)) PYTHON=python3.12" >&2; exit 1; }
endef
