"""Fixtures that all tests share: seeds, tiny random models made on the spot, and token batches for them."""

import contextlib
import gc
import io
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from gradpruner.evaluate.likelihood import Likelihood
from gradpruner.finetune.spec import TrainingSpec
from gradpruner.method import Method
from gradpruner.models.spec import ModelSpec
from gradpruner.pipeline import speed, speed_process
from gradpruner.pipeline.run import Pipeline
from gradpruner.tasks import JsonLines

# Grouped-query attention (4 heads, 2 key-value heads). 258 is the vocabulary of the byte tokenizer of `random:` models;
# weights are larger than the default 0.02 so that every layer affects the logits.
TINY_CONFIG: dict[str, Any] = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "tie_word_embeddings": False,
}

Batches = list[dict[str, Tensor]]


def pytest_sessionstart() -> None:
    """Collects no garbage while test modules are imported and tests are collected: there is none."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Exempts all objects imported so far from garbage collection.

    Every training run collects twice, and scanning torch's and transformers' objects takes 3/4 of a tiny run's time.
    """
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def spare_survivors() -> Iterator[None]:
    """Exempts what is alive after a test that collected garbage: libraries import much more on first use."""
    before = gc.get_stats()[-1]["collections"]
    yield
    if gc.get_stats()[-1]["collections"] > before:
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seeds Python, NumPy and torch before every test."""
    set_seed(0)
    return 0


@pytest.fixture(scope="session")
def assets_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder in which `ModelSpec` creates models; one per session."""
    return tmp_path_factory.mktemp("assets")


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a `cache_dir` for runs that tests start from: equal stages run once, for all workers of pytest-xdist.

    Not for tests of what a run computes or finds in its cache.
    """
    folder = tmp_path_factory.getbasetemp()
    return (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "shared-cache"


@pytest.fixture(scope="session")
def tiny_spec() -> ModelSpec:
    """Returns a `random:llama` model with tokenizer, for tests that go through `ModelSpec`."""
    config = {key: value for key, value in TINY_CONFIG.items() if not key.endswith(("vocab_size", "_token_id"))}
    return ModelSpec("random:llama", config=config)


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_spec: ModelSpec, assets_dir: Path) -> PreTrainedTokenizerBase:
    """Returns a tokenizer with one token per byte, plus `<s>` (0) and `</s>` (1, also the padding)."""
    return tiny_spec.load_tokenizer(assets_dir)


@pytest.fixture
def tiny_llama() -> Callable[..., PreTrainedModel]:
    """Returns `tiny_llama(num_hidden_layers=4, dtype=torch.bfloat16, seed=1, ...)`; equal calls give equal weights."""
    return _factory(LlamaConfig, LlamaForCausalLM)


@pytest.fixture
def tiny_mistral() -> Callable[..., PreTrainedModel]:
    """Returns the Mistral version of `tiny_llama`; its sliding window is shorter than the rows of `make_batches`."""
    return _factory(MistralConfig, MistralForCausalLM, sliding_window=8)


@pytest.fixture
def make_sums_task(tmp_path: Path) -> Callable[[int], JsonLines]:
    """Returns `make_sums_task(num_rows)`, a multiple-choice task with the same rows for training and test."""

    def make(num_rows: int) -> JsonLines:
        rows = [{"question": f"{n} + 1?", "options": [str(n + 1), "x"], "answer": 0} for n in range(num_rows)]
        files = {split: tmp_path / f"{split}.jsonl" for split in ("train", "test")}
        for file in files.values():
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return JsonLines(
            train_file=str(files["train"]), test_file=str(files["test"]), prompt="{question}", choice=" {choice}",
            answer_field="answer", choices_field="options", max_length=128,
        )  # fmt: skip

    return make


@pytest.fixture
def make_pipeline(tmp_path: Path, make_sums_task: Callable[[int], JsonLines]) -> Callable[..., Pipeline]:
    """Returns `make_pipeline(config, method, training, **fields)`, a run of a random Llama on 8 rows."""
    task = make_sums_task(8)

    def make(config: dict[str, Any], method: Method, training: TrainingSpec, **fields: Any) -> Pipeline:
        values: dict[str, Any] = {
            "model": ModelSpec("random:llama", config=config),
            "task": task,
            "method": method,
            "training": training,
            "evaluation": Likelihood(),
            "seed": 0,
            "cache_dir": tmp_path / "cache",
            "evaluate_before": False,
        }
        return Pipeline(**{**values, **fields})

    return make


@pytest.fixture
def make_batches() -> Callable[..., Batches]:
    """Returns `make_batches(3, batch_size=2, length=12, padding="left", seed=0)`, which makes a list of token batches.

    Rows differ in length. Prompts and padding have the label -100; the last third of every row has loss.
    """

    def make(num_batches: int, batch_size: int = 2, length: int = 12, padding: str = "left", seed: int = 0) -> Batches:
        generator = torch.Generator().manual_seed(seed)
        batches = []
        for _ in range(num_batches):
            input_ids = torch.full((batch_size, length), TINY_CONFIG["pad_token_id"])
            attention_mask = torch.zeros(batch_size, length, dtype=torch.int64)
            labels = torch.full((batch_size, length), -100)
            for row in range(batch_size):
                size = length - row % max(1, length // 3)
                answer = 1 + size // 3
                start = length - size if padding == "left" else 0
                tokens = torch.randint(2, TINY_CONFIG["vocab_size"], (size,), generator=generator)
                input_ids[row, start : start + size] = tokens
                attention_mask[row, start : start + size] = 1
                labels[row, start + size - answer : start + size] = tokens[-answer:]
            batches.append({"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels})
        return batches

    return make


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times models in this process: a fresh one takes seconds to start, and tests/test_speed.py has one."""

    def run(command: list[str], *, input: str, **settings: Any) -> subprocess.CompletedProcess[str]:
        assert command == [sys.executable, "-m", speed_process.__name__]
        output = io.StringIO()
        monkeypatch.setattr(sys, "stdin", io.StringIO(input))
        with contextlib.redirect_stdout(output):
            speed_process._main()
        return subprocess.CompletedProcess(command, 0, output.getvalue(), "")

    monkeypatch.setattr(speed, "subprocess", types.SimpleNamespace(run=run))
    monkeypatch.setattr(speed_process, "process_memory_bytes", lambda: 0)


def _factory(config_class: type, model_class: type, **defaults: Any) -> Callable[..., PreTrainedModel]:
    def make(seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> PreTrainedModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = model_class(config_class(**(TINY_CONFIG | defaults | config)))
            for name, parameter in model.named_parameters():
                if "norm" in name:  # ones by default, which would hide a swapped norm
                    torch.nn.init.uniform_(parameter, 0.5, 1.5)
        for parameter in model.parameters():  # not model.to(dtype), which would round the rotary frequencies too
            parameter.data = parameter.data.to(dtype)
        return model.eval()

    return make
