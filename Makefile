# Everything here works from a fresh clone: the environment in .venv is made when it is first needed, and reused.
#
#   make demo PYTHON=python3.12          another interpreter
#   make demo TORCH_FLAGS="--index-url …"   another build of torch (a CPU build saves gigabytes on Linux)

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTHON ?= $(shell for name in python3 python3.13 python3.12 python3.11 python3.14; do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$name && break; done)
TORCH_FLAGS ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
TORCH := $(shell sed -n '/^torch==/p' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help demo check test test-all format docs dist bench starters clean

help:  ## what there is to make
	@sed -n 's/^\([a-z-]*\):[^#]*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

demo: $(READY)  ## align the bundled model, and show what came of it
	@$(BIN)/raftune demo

check: $(READY)  ## style, types, and the directions of imports
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/lint-imports --no-logo

test: $(READY)  ## the tests that take under four minutes on two cores
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m "not slow"

test-all: $(READY)  ## every test: kill points, damage, browsers, demos too; and the coverage by make test
	@export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1; failed=0; run="$(BIN)/python -m pytest --numprocesses 2 --dist worksteal"; \
	$$run -m "not slow" --cov --cov-report= || failed=1; \
	printf "Coverage of raftune/ in percent, of which pyproject.toml sets the floor: "; \
	$(BIN)/coverage report --format=total || failed=1; \
	$$run -m slow || failed=1; exit $$failed

format: $(READY)  ## bring the code into its form
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: $(READY)  ## build the documentation site into build/site
	@$(PIP) --editable '.[docs]'
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(READY)  ## the measurements of the README (long)
	@for name in sampling rounds memory; do echo "== benchmarks/$$name.py"; $(BIN)/python benchmarks/$$name.py || exit 1; done

starters: $(READY)  ## build the bundled tiny models anew
	@$(BIN)/python -m tools.starters.text.build
	@$(BIN)/python -m tools.starters.image.build

dist: $(READY)  ## build the source distribution and the wheel into dist/
	@rm -rf dist
	@$(PIP) build
	@$(BIN)/python -m build --outdir dist . >/dev/null
	@ls -l dist | awk 'NR > 1 {printf "%s  %.1f MB\n", $$NF, $$5 / 1048576}'

clean:  ## remove the environment and all caches
	rm -rf $(VENV) build dist *.egg-info .coverage .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first and at one version: an open range would download build after build to resolve.
$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "raftune needs Python 3.11 or later; none was found. Install one, or name it: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.version_info < (3, 11) and sys.exit("raftune needs Python 3.11 or later; $(PYTHON) is %d.%d. Name another: make PYTHON=/path/to/python" % sys.version_info[:2])'
	@echo "Installing raftune and what it needs into $(VENV): this takes some minutes, once."
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(PIP) $(TORCH_FLAGS) $(TORCH)
	@$(PIP) --editable '.[dev]'
	@touch $@
