# `make` alone prints help. Everything that is installed goes into .venv, pinned by version and hash.
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PROJECT := {{cookiecutter.project_slug}}
DEMO := .demo/my_service

# python3 if it is new enough, else the newest that is. `make PYTHON=/path/to/python` takes another one.
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$python" -c '$(NEW_ENOUGH)' 2>/dev/null && echo "$$python" && break; done)
TOO_OLD = { echo "Python 3.11 or newer is needed, and $(or $(PYTHON),python3) is older or missing: make PYTHON=/path/to/python" >&2; exit 1; }
# uv where it is installed: it is faster, and can bring a Python. `make UV=` uses venv and pip.
UV ?= $(shell command -v uv 2>/dev/null)
ifneq ($(UV),)
CHECK_PYTHON = $(if $(PYTHON),"$(PYTHON)" -c '$(NEW_ENOUGH)' 2>/dev/null || $(TOO_OLD),:)
MAKE_VENV = "$(UV)" venv --quiet --python "$(or $(PYTHON),>=3.11)" .venv
INSTALLER = true
INSTALL = "$(UV)" pip install --python .venv/bin/python --compile-bytecode --require-hashes -r
else
CHECK_PYTHON = "$(PYTHON)" -c '$(NEW_ENOUGH)' 2>/dev/null || $(TOO_OLD)
MAKE_VENV = "$(PYTHON)" -m venv .venv
INSTALLER = .venv/bin/python -c 'import pip' 2>/dev/null || .venv/bin/python -m ensurepip
INSTALL = .venv/bin/python -m pip install --disable-pip-version-check --require-hashes -r
endif
LOCK = UV="$$PWD/.venv/bin/uv" sh "$(PROJECT)/requirements/lock"

# pytest closes its usual folder to other users, also in a project that is tested. As root, the tests' Postgres runs as
# nobody and could not enter it. So the tests have a folder of their own.
PYTEST = folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT INT TERM && MYPY_CACHE_DIR="$$folder/mypy" .venv/bin/python -m pytest --basetemp "$$folder/pytest"

.PHONY: help demo .tools test bench chaos lint lock record clean

help: ## Print this
	@echo "make TARGET, where TARGET is one of:"
	@sed -n 's/^\([a-z]*\):.*## /  \1|/p' Makefile | awk -F'|' '{ printf "%-8s %s\n", $$1, $$2 }'

demo: .demo/baked ## Make a project with the defaults and serve it on http://127.0.0.1:8000 (PORT=8001 moves it)
	@test -z "$$(find cookiecutter.json hooks "$(PROJECT)" -newer .demo/baked | head -n 1)" || \
		echo "The template has changed since $(DEMO) was made. 'rm -r .demo' lets make bake it again, without its data."
	@trap 'exit 0' INT; $(MAKE) -C $(DEMO) run $(if $(PYTHON),PYTHON="$(PYTHON)")

test: .venv/.test .tools ## Test the template and the projects that it makes (ARGS="-k slug" for some of it)
	@$(PYTEST) -n 2 --dist loadfile $(ARGS)

chaos: .venv/.test .tools ## Run the full load and failure tests, and print their table (about 40 minutes)
	@$(PYTEST) tests/chaos --long $(ARGS)

bench: .venv/.bench ## Compare its speed with other apps: an hour on a quiet machine (ARGS="--rounds 1 --seconds 1")
	@command -v wrk >/dev/null || apt-get install -y wrk || { \
		echo "wrk makes the load and cannot be installed from here: apt-get install wrk, as root" >&2; exit 1; }
	@.venv/bin/python -m tests.bench run $(ARGS)
	@.venv/bin/python -m tests.bench chart

lint: .venv/.test ## Check the style of hooks, tests and workflows
	@.venv/bin/python -m ruff check
	@.venv/bin/python -m ruff format --check
	@.venv/bin/actionlint .github/workflows/*.yml
	@.venv/bin/zizmor --offline --quiet .github/workflows

lock: .venv/.test ## Pin the newest versions that requirements/*.in allow, here and in the project
	$(LOCK)
	$(LOCK) requirements/bake.in -o requirements/bake.txt
	$(LOCK) -c "$(PROJECT)/requirements/prod.txt" requirements/deploy.in -o requirements/deploy.txt
	$(LOCK) -c "$(PROJECT)/requirements/prod.txt" requirements/blocks.in -o requirements/blocks.txt
	$(LOCK) -c requirements/bake.txt -c "$(PROJECT)/requirements/dev.txt" requirements/test.in -o requirements/test.txt
	$(LOCK) -c requirements/test.txt -c "$(PROJECT)/requirements/dev.txt" tests/bench/requirements.in -o tests/bench/requirements.txt

record: ## Write the library's RECORD again, after a change of its files
	@$(ANY_PYTHON) tests/record.py

clean: ## Remove .demo with its data, .venv and the caches
	rm -rf .demo .venv .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# A $(DEMO) without this stamp is an interrupted bake.
.demo/baked: | .venv/.bake
	@rm -rf $(DEMO)
	@echo "Making a project with the template's defaults in $(DEMO)"
	@.venv/bin/python -m cookiecutter . --no-input --default-config --output-dir .demo >/dev/null
	@touch $@

.venv/.bake: requirements/bake.txt
.venv/.test: requirements/test.txt
.venv/.bench: tests/bench/requirements.txt
# A .venv that is broken is made again.
.venv/.bake .venv/.test .venv/.bench:
	@.venv/bin/python -c '$(NEW_ENOUGH)' 2>/dev/null || { rm -rf .venv; $(CHECK_PYTHON); }
	@test -e .venv || $(MAKE_VENV)
	@$(INSTALLER)
	$(INSTALL) $<
	@touch $@

# The programs that some tests need: a pooler, the proxy, a browser. tests/needs.py has the table.
.tools: .venv/.test
	@.venv/bin/python tests/needs.py
