# The project's commands: `make` lists them. Written for GNU make 3.81 and the tools of both Linux and macOS.

PYTHON = python3
VENV = .venv
UV_VERSION = 0.13.9
ARGS =
CHAOS_SECONDS ?= 600
# A recorded ledger, which two tests replay: UCI Online Retail, summed per invoice.
LISTENER_REPLAY_FILE ?= ../shared/data/online_retail_invoices.csv.gz
HAS_LEDGER := $(shell test -f "$(LISTENER_REPLAY_FILE)" && echo yes)
TESTS = $(if $(HAS_LEDGER),not debian,not debian and not ledger)
# Each has a server of its own; a given server has one alone.
WORKERS = $(if $(LISTENER_TEST_DATABASE_URL),0,2)

PIP = $(VENV)/bin/pip --disable-pip-version-check --quiet
INSTALLED = $(VENV)/.installed
COMPILE = $(VENV)/bin/uv pip compile --quiet --system-certs --universal --python-version 3.11 \
	--generate-hashes --no-emit-index-url --no-header $(ARGS)

ifeq ($(OS),Windows_NT)
$(error listener needs Linux or macOS; on Windows run it inside WSL)
endif

.DELETE_ON_ERROR:
.PHONY: help demo test test-debian check check-sql bench chaos lock wheel install clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

demo: $(INSTALLED) ## the whole way of a change, on a PostgreSQL of its own: make demo ARGS="--seconds 20"
	@$(VENV)/bin/listener demo $(ARGS)

test: $(INSTALLED) ## the tests, on a PostgreSQL of their own: make test ARGS="-k debounce"
	@$(if $(findstring not ledger,$(TESTS)),echo "without the tests of a recorded ledger: \
	$(LISTENER_REPLAY_FILE) (UCI Online Retail, summed per invoice) is not there; LISTENER_REPLAY_FILE names another")
	$(VENV)/bin/pytest --numprocesses $(WORKERS) --dist worksteal -m "$(TESTS)" $(ARGS)

test-debian: $(INSTALLED) ## the tests that need packages from Debian (.ci/run fetches them)
	$(VENV)/bin/pytest -m debian $(ARGS)

check: $(INSTALLED) ## lint, format, types, imports between modules, compose file, SQL
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml
	@$(MAKE) --no-print-directory check-sql

check-sql: $(INSTALLED) ## the checks of the SQL files alone
	$(VENV)/bin/pytest tests/test_sql_checks.py

bench: $(INSTALLED) ## the benchmarks: make bench ARGS="--help"
	@$(VENV)/bin/python -m benchmarks $(ARGS)

chaos: $(INSTALLED) ## faults at random against three replicas for CHAOS_SECONDS=600: make chaos ARGS="--help"
	@CHAOS_SECONDS=$(CHAOS_SECONDS) PYTHONPATH=tests $(VENV)/bin/python -m chaos $(ARGS)

lock: $(VENV)/bin/python ## write requirements/*.lock anew; make lock ARGS=--upgrade takes later versions
	@echo "installing uv $(UV_VERSION)"
	@$(PIP) install uv==$(UV_VERSION)
	@echo "locking requirements/runtime.lock"
	@$(COMPILE) pyproject.toml --output-file requirements/runtime.lock
	@echo "locking requirements/dev.lock"
	@$(COMPILE) pyproject.toml --extra embedded --extra dev \
		--constraints requirements/runtime.lock --output-file requirements/dev.lock

wheel: $(INSTALLED) ## dist/*.tar.gz, and the wheel built from it
	@rm -rf dist
	@mkdir dist
	@echo "building dist/"
	@$(VENV)/bin/python -m build --no-isolation > dist/build.log 2>&1 || { cat dist/build.log; exit 1; }
	@rm dist/build.log
	@ls dist/*

install: ## the wheel and its locked dependencies into an environment: make install DIR=/srv/listener
	@test -n "$(DIR)" || { echo "say where: make install DIR=/srv/listener" >&2; exit 1; }
	@$(MAKE) --no-print-directory wheel
	@echo "installing into $(DIR)"
	@$(PYTHON) -m venv "$(DIR)"
	@"$(DIR)/bin/pip" --disable-pip-version-check --quiet install --require-hashes --no-deps -r requirements/runtime.lock
	@"$(DIR)/bin/pip" --disable-pip-version-check --quiet install --no-deps dist/listener-*.whl

clean: ## remove what the other targets made
	rm -rf $(VENV) dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@command -v $(PYTHON) > /dev/null || { echo "no $(PYTHON) found: install Python 3.11 or later" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later is needed, $(PYTHON) is older: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || \
		{ echo "$(PYTHON) lacks the venv module: on Debian and Ubuntu, apt-get install python3-venv" >&2; exit 1; }
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(INSTALLED): $(VENV)/bin/python requirements/dev.lock pyproject.toml
	@echo "installing locked dependencies"
	@$(PIP) install --require-hashes --no-deps -r requirements/dev.lock
	@echo "installing listener"
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@
