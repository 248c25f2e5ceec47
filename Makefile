# Two commands need nothing but Python 3.11 and make: "make demo" shows the main job, "make test" checks everything.
# Both set up .venv first, and skip that while pyproject.toml and constraints.txt stay as they are.

PYTHON ?= python3.11
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.gpseq-installed

# No windows; no "new release of pip" among our output.
export MPLBACKEND := Agg
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test setup lint types format tests quick examples docs benchmarks report wheel wheel-test clean help
.DEFAULT_GOAL := help

help:
	@echo "make demo        stream a real series and draw the figure (build/demo)"
	@echo "make test        lint, types, examples, docs, tests and doctests: what CI runs"
	@echo "make quick       the tests that are not slow"
	@echo "make format      format and fix what ruff can"
	@echo "make docs        the documentation (build/docs/html/index.html)"
	@echo "make benchmarks  measure;  make report  write the report from what was measured"
	@echo "make wheel-test  build sdist and wheel, install them into an environment of their own and test that"
	@echo "make clean       remove what was built;  rm -r .venv  starts the set-up afresh"

# --- set-up ---------------------------------------------------------------------------------------------------------

# torch goes first and alone, and the constraint holds it: otherwise pip may choose another build (constraints.txt).
PIN := pip install --quiet torch==$(TORCH)
INSTALL := pip install --quiet -c constraints.txt
# laplace-torch, against which its adapter is tested, and what it imports. It and BackPACK list torchvision, and import
# none of it: all go in without dependencies. numpy, scipy, tqdm and torchmetrics are there already.
LAPLACE := laplace-torch asdfghjkl backpack-for-pytorch curvlinops-for-pytorch einconv einops opt-einsum unfoldNd
CHECK_LAPLACE := -W ignore -c 'import laplace, sys; assert "torchvision" not in sys.modules'
CHECK_PIN := -c 'import torch; v = torch.__version__; assert v.startswith("$(TORCH)"), f"torch {v} is not $(TORCH)"'

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo "setting up $(VENV) (some minutes, once)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m $(PIN)
	@$(BIN)/python -m $(INSTALL) -e '.[dev,cli]'
	@$(BIN)/python -m $(INSTALL) --no-deps $(LAPLACE)
	@$(BIN)/python $(CHECK_PIN)
	@$(BIN)/python $(CHECK_LAPLACE)
	@touch $@

# --- the main job ---------------------------------------------------------------------------------------------------

demo: $(STAMP)
	@mkdir -p build/demo
	$(BIN)/gpseq stream gpseq/datasets/data/solar_lean2004.csv --time year --target tsi_11yr_bkgrnd \
		--chunk 40 --features auto --seed 1
	$(BIN)/python -m examples.stream.run --out build/demo

# --- checks ---------------------------------------------------------------------------------------------------------

# Checks run two at a time. The tests come last, so that pytest's closing line closes the run.
test: $(STAMP)
	@$(MAKE) --no-print-directory -j 2 --output-sync=target lint types examples docs
	@$(MAKE) --no-print-directory tests

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy gpseq

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Doctests of the package, README and documentation snippets and a check of the wheel are part of the same run.
PYTEST := $(BIN)/python -m pytest -n 2 --timeout 900 --doctest-modules tests gpseq

tests: $(STAMP)
	$(PYTEST)

quick: $(STAMP)
	$(PYTEST) -m "not slow"

examples: $(STAMP)
	@set -e; for run in examples/*/run.py; do \
		[ -e "$$run" ] || continue; \
		name=$$(basename "$$(dirname "$$run")"); \
		echo "examples.$$name.run --smoke"; \
		$(BIN)/python -m "examples.$$name.run" --smoke --out "build/smoke/$$name"; \
	done

# -E reads every page anew: an unchanged page would keep its warnings to itself.
docs: $(STAMP)
	$(BIN)/python -m sphinx -E -W --keep-going -q -b html -d build/docs/doctrees docs build/docs/html

benchmarks: $(STAMP)
	$(BIN)/python -m benchmarks.run

report: $(STAMP)
	$(BIN)/python -m benchmarks.report

# --- sdist and wheel ------------------------------------------------------------------------------------------------

# build/lib is removed first: setuptools would pack what an earlier build left there. The wheel is built from the sdist,
# so that both are tested at once.
wheel: $(STAMP)
	@rm -rf build/lib build/wheel
	$(BIN)/python -c 'from setuptools import build_meta; build_meta.build_sdist("build/wheel")' > /dev/null
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheel build/wheel/gpseq-*.tar.gz

# Runs the tests of the sdist outside the checkout, where only the installed wheel can be imported.
wheel-test: wheel
	@set -e; dir=$$(mktemp -d); trap 'rm -rf "$$dir"' EXIT; \
	mkdir "$$dir/sdist"; tar xzf build/wheel/gpseq-*.tar.gz -C "$$dir/sdist" --strip-components 1; \
	mv "$$dir/sdist/tests" "$$dir/sdist/setup.cfg" "$$dir"; rm -r "$$dir/sdist"; \
	$(PYTHON) -m venv "$$dir/venv"; python="$$dir/venv/bin/python"; \
	"$$python" -m $(PIN); \
	"$$python" -m $(INSTALL) "$$(ls build/wheel/gpseq-*.whl)[test,cli]"; \
	"$$python" -m $(INSTALL) --no-deps $(LAPLACE); \
	"$$python" $(CHECK_PIN); \
	cd "$$dir"; \
	"$$python" -c 'import gpseq; assert "site-packages" in gpseq.__file__, gpseq.__file__'; \
	"$$python" -m pytest -n 2 --timeout 900 tests

clean:
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache .coverage htmlcov
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
