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

LAPROX_ARGS = $(if $(ESSAYS),--essays "$(ESSAYS)") $(if $(LONGBENCH),--longbench "$(LONGBENCH)") $(if $(PART),--part $(PART))
INDEXMEM_ARGS = $(RETENTION_ARGS) $(if $(DTYPE),--dtype $(DTYPE))
RETENTION_ARGS = $(if $(ESSAYS),--essays "$(ESSAYS)") $(if $(PART),--part $(PART))
ERASE_ARGS = $(if $(ESSAYS),--essays "$(ESSAYS)") $(if $(QA),--qa "$(QA)") $(if $(PART),--part $(PART))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup test check demo matrix matrix-newest results-bench results-bench-dev results-erase results-erase-dev results-erase-speed results-laprox results-laprox-dev results-dilution results-gates results-indexmem results-indexmem-dev results-indexmem-speed results-memory results-retention results-restored results-retention-dev results-speed peers test-peers clean $(OLD_TRANSFORMERS:%=matrix-%)

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 10

setup: $(VENV)/.stamp-setup ## make .venv with the vestige command in it
	@echo "Ready: $(BIN)/vestige --help"

check: $(VENV)/.stamp-test ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src/vestige
	$(BIN)/python tools/readme.py --check

test: check ## lint, types and the offline tests (PYTEST_ARGS="-k name" to choose)
	$(RUN_PYTEST) $(BIN)/python -m pytest $(SUITE)

demo: $(VENV)/.stamp-setup ## the main job on the default model and a shipped document
	$(BIN)/vestige demo

matrix: $(OLD_TRANSFORMERS:%=matrix-%) matrix-newest ## the offline tests on transformers 5.16.1, 5.19.0 and the newest

$(OLD_TRANSFORMERS:%=matrix-%): matrix-%: .venv-%/.stamp-matrix
	$(RUN_PYTEST) .venv-$*/bin/python -m pytest $(MATRIX_SUITE)

matrix-newest: $(VENV)/.stamp-test
	$(BIN)/python -m pip install -q --upgrade "transformers<6"
	$(RUN_PYTEST) $(BIN)/python -m pytest $(MATRIX_SUITE)

# The essays are Paul Graham's, in text files; without ESSAYS they are fetched.
results-bench: $(VENV)/.stamp-test peers ## the comparison in the README (hours; goes on after an interrupt): ESSAYS=DIR
	$(BIN)/python -m experiments.bench --out results/bench $(if $(ESSAYS),--essays "$(ESSAYS)")
	$(BIN)/vestige report results/bench results/speed --out results/bench
	$(BIN)/python tools/readme.py

results-speed: $(VENV)/.stamp-test peers ## the speed table in the README, on an idle machine (a quarter of an hour)
	rm -rf results/speed
	$(BIN)/vestige bench speed --length 2000 --batch 1,4 --budget 0.25,0.05 --peer kvpress:SnapKVPress --out results/speed/2000
	$(BIN)/vestige bench speed --length 8000 --budget 0.05 --peer kvpress:SnapKVPress --prefills 2 --out results/speed/8000

results-bench-dev: $(VENV)/.stamp-test ## what the tasks of results-bench are chosen by, on the dev split
	$(BIN)/python -m experiments.bench --dev --out out/bench-dev $(if $(ESSAYS),--essays "$(ESSAYS)")

results-laprox: $(VENV)/.stamp-test ## LaProx beside the field (hours; goes on after an interrupt): ESSAYS=DIR LONGBENCH=DIR PART=name
	$(BIN)/python -m experiments.laprox --out results/laprox $(LAPROX_ARGS)
	$(BIN)/vestige report results/laprox --out results/laprox

results-laprox-dev: $(VENV)/.stamp-test ## the same on the dev split, to choose by
	$(BIN)/python -m experiments.laprox --dev --out out/laprox-dev $(LAPROX_ARGS)

results-memory: $(VENV)/.stamp-test ## what a memory of the evicted is worth at 4K and 8K (hours; goes on after an interrupt): ESSAYS=DIR
	$(BIN)/python -m experiments.memory --out results/memory $(if $(ESSAYS),--essays "$(ESSAYS)")
	$(BIN)/vestige report results/memory results/memory/*/* --out results/memory

results-retention: $(VENV)/.stamp-test peers ## retention gates beside the field (3 hours on two cores; goes on after an interrupt): ESSAYS=DIR PART=name
	$(BIN)/python -m experiments.retention --out results/retention $(RETENTION_ARGS)

results-retention-dev: $(VENV)/.stamp-test peers ## what their rivals are chosen by, on the dev split: ESSAYS=DIR PART=name
	$(BIN)/python -m experiments.retention --dev --out out/retention-dev $(RETENTION_ARGS)

results-dilution: $(VENV)/.stamp-test ## whether eviction can beat the full cache among distractors (half an hour; goes on after an interrupt): ESSAYS=DIR
	$(BIN)/python -m experiments.distractor_attention --out results/retention $(if $(ESSAYS),--essays "$(ESSAYS)")

results-gates: $(VENV)/.stamp-test ## gates trained in other ways (two hours; goes on after an interrupt): DATA="DIR FILE.jsonl" FIELD=name ESSAYS=DIR PART=name
	$(BIN)/python -m experiments.ablations --gates out/gates --out results/retention/gates $(addprefix --data ,$(DATA)) $(if $(FIELD),--field $(FIELD)) $(RETENTION_ARGS)

results-indexmem: $(VENV)/.stamp-test ## IndexMem beside the field, memories on and off (3 hours; goes on after an interrupt): ESSAYS=DIR PART=name DTYPE=float32
	$(BIN)/python -m experiments.indexmem --out results/indexmem $(INDEXMEM_ARGS)

results-indexmem-dev: $(VENV)/.stamp-test ## the same on the dev split, to choose by
	$(BIN)/python -m experiments.indexmem --dev --out out/indexmem-dev $(INDEXMEM_ARGS)

results-indexmem-speed: $(VENV)/.stamp-test ## what a memory costs while decoding, at equal bytes, on an idle machine (minutes): DTYPE=float32
	rm -rf results/indexmem/speed
	$(BIN)/vestige bench speed --length 4000 --budget $(if $(filter float32,$(DTYPE)),18MB,9MB) --policy "indexmem(share=model)" --memory none,linear,slots,moments,centroids --blocks 5 --prefills 1 $(if $(DTYPE),--dtype $(DTYPE)) --out results/indexmem/speed

results-restored: $(VENV)/.stamp-test ## what memories give back of what evictors take from attention (half an hour; goes on after an interrupt): ESSAYS=DIR
	$(BIN)/python -m experiments.memory_restoration --out results/indexmem $(if $(ESSAYS),--essays "$(ESSAYS)") $(if $(DTYPE),--dtype $(DTYPE))

results-erase: $(VENV)/.stamp-test ## erasers side by side (hours; goes on after an interrupt): ESSAYS=DIR QA=FILE PART=name
	$(BIN)/python -m experiments.erase --out results/erase $(ERASE_ARGS)

results-erase-dev: $(VENV)/.stamp-test ## the same on the dev split, to choose by
	$(BIN)/python -m experiments.erase --dev --out out/erase-dev $(ERASE_ARGS)

results-erase-speed: $(VENV)/.stamp-test ## what an edit takes by length, on an idle machine (minutes)
	rm -f results/erase/speed.json
	$(BIN)/vestige bench erase-speed --method learned,shift,drop,repair,blend,erratum --rounds 11 --out results/erase
	$(BIN)/python -m experiments.erase --report --out results/erase

peers: .venv-peers/.stamp-peers ## make .venv-peers with kvpress in it, for `vestige bench --peer kvpress:...`
	@echo "Ready: vestige bench ... --peer kvpress:SnapKVPress"

test-peers: $(VENV)/.stamp-test peers ## compare with kvpress on the default model (minutes; `make demo` downloads it)
	$(RUN_PYTEST) $(BIN)/python -m pytest -m peers $(PYTEST_ARGS)

clean: ## remove all that make made: environments, caches, builds
	rm -rf .venv .venv-peers $(OLD_TRANSFORMERS:%=.venv-%) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# A stamp is touched last, so an interrupted set-up is done again and a finished one costs nothing.
$(VENV)/.stamp-setup: pyproject.toml
	$(call make_venv,$(VENV))
	$(BIN)/python -m pip install -q -e ".[gguf]"
	@touch $@

$(VENV)/.stamp-test: $(VENV)/.stamp-setup
	$(BIN)/python -m pip install -q -e ".[gguf,bench,train,test]"
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
