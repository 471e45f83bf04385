# From a fresh clone, `make demo` and `make test` do all their set-up themselves. `make help` lists the targets.
PYTHON ?= python3
# torch goes in first and by exact version: left to the other packages, pip may choose a build with gigabytes of CUDA.
TORCH ?= torch==2.13.0
# Two processes of one thread each beat one process of two threads: 241 tiny-model tests took 20-35 s against 68-70 s.
WORKERS ?= 2
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
OLD_TRANSFORMERS := 5.16.1 5.19.0
# kvpress runs on transformers up to 5.3, vestige on newer ones only: it has an environment of its own.
PEERS := kvpress==0.5.5 "transformers==5.2.*"
RUN_PYTEST := env OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
SUITE := -n $(WORKERS) $(PYTEST_ARGS)
MATRIX_SUITE := -m "not slow and not peers and not gpu" $(SUITE)

# One experiment of `python -m experiments`, with its options: make results NAME=retention ARGS="--essays DIR".
NAME ?=
ARGS ?=
NEED_PEERS := bench speed retention

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup test check demo docs results matrix matrix-newest peers test-peers clean $(OLD_TRANSFORMERS:%=matrix-%)

help:
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

setup: $(VENV)/.stamp-setup ## make .venv with the vestige command in it
	@echo "Ready: $(BIN)/vestige --help"

check: $(VENV)/.stamp-test ## lint, types, import layers and documents
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src/vestige experiments examples
	$(BIN)/lint-imports
	$(BIN)/python tools/check_docs.py

test: check ## all of check, and the offline tests (PYTEST_ARGS="-k name" to choose)
	$(RUN_PYTEST) $(BIN)/python -m pytest $(SUITE)

demo: $(VENV)/.stamp-setup ## the main job on the default model and a shipped document
	$(BIN)/vestige demo

docs: $(VENV)/.stamp-docs ## the documentation as a site in site/, the import graph drawn again
	$(BIN)/python tools/import_graph.py
	$(BIN)/mkdocs build --quiet

results: $(VENV)/.stamp-test $(if $(filter $(NEED_PEERS),$(NAME)),peers) ## run an experiment: NAME=retention ARGS="--essays DIR"
	$(BIN)/python -m experiments $(NAME) $(ARGS)

matrix: $(OLD_TRANSFORMERS:%=matrix-%) matrix-newest ## the offline tests on transformers 5.16.1, 5.19.0 and the newest

$(OLD_TRANSFORMERS:%=matrix-%): matrix-%: .venv-%/.stamp-matrix
	$(RUN_PYTEST) .venv-$*/bin/python -m pytest $(MATRIX_SUITE)

matrix-newest: $(VENV)/.stamp-test
	$(BIN)/python -m pip install -q --upgrade "transformers<6"
	$(RUN_PYTEST) $(BIN)/python -m pytest $(MATRIX_SUITE)

peers: .venv-peers/.stamp-peers ## make .venv-peers with kvpress in it, for `vestige bench --peer kvpress:...`
	@echo "Ready: vestige bench ... --peer kvpress:SnapKVPress"

test-peers: $(VENV)/.stamp-test peers ## compare with kvpress on the default model (minutes; `make demo` downloads it)
	$(RUN_PYTEST) $(BIN)/python -m pytest -m peers $(PYTEST_ARGS)

clean: ## remove all that make made: environments, caches, builds
	rm -rf .venv .venv-peers $(OLD_TRANSFORMERS:%=.venv-%) build dist site .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .grimp_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# A stamp is touched last, so an interrupted set-up is done again and a finished one costs nothing.
$(VENV)/.stamp-setup: pyproject.toml
	$(call make_venv,$(VENV))
	$(BIN)/python -m pip install -q -e ".[gguf]"
	@touch $@

$(VENV)/.stamp-test: $(VENV)/.stamp-setup
	$(BIN)/python -m pip install -q -e ".[gguf,bench,train,test]"
	@touch $@

$(VENV)/.stamp-docs: $(VENV)/.stamp-test
	$(BIN)/python -m pip install -q -e ".[docs]"
	@touch $@

.venv-%/.stamp-matrix: pyproject.toml
	$(call make_venv,.venv-$*)
	.venv-$*/bin/python -m pip install -q "transformers==$*" -e ".[gguf,bench,train,test]"
	@touch $@

.venv-peers/.stamp-peers: Makefile
	$(call make_venv,.venv-peers)
	.venv-peers/bin/python -m pip install -q $(PEERS)
	@touch $@

# $(call make_venv,DIR): an environment with pip and torch in it, or one clear line about what is missing.
define make_venv
	@command -v "$(PYTHON)" >/dev/null || { echo "vestige needs Python 3.11 or newer, and there is no '$(PYTHON)' here; name one with: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "vestige needs Python 3.11 or newer; '$(PYTHON)' is $$("$(PYTHON)" -V 2>&1); name another with: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo "'$(PYTHON)' has no venv module; install it (on Debian and Ubuntu the package python3-venv)" >&2; exit 1; }
	@test -x $(1)/bin/pip || "$(PYTHON)" -m venv $(1)
	@echo "Setting up $(1) with $(TORCH): one to three minutes the first time."
	$(1)/bin/python -m pip install -q $(TORCH)
endef
