"""Sizes of the checks on a GPU and in the rehearsal on a CPU, and what a check finds."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel

from gradpruner.encoding import TrainingRow
from gradpruner.finetune.precision import convert_weights
from gradpruner.models.offline_configs import shipped_config
from gradpruner.models.shape import config_shape
from gradpruner.pipeline.speed_process import Workload, random_model

OK, FAILED, NOT_CHECKED = "ok", "FAILED", "not checked"
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True)
class Finding:
    """One line of the result.

    Attributes:
        status: `OK`, `FAILED` or `NOT_CHECKED`.
        text: what was compared, and the numbers; for `NOT_CHECKED`, what is missing.
    """

    status: str
    text: str


@dataclass(frozen=True)
class Scale:
    """Sizes of all checks.

    Attributes:
        learner: config values of the model on which precisions are compared.
        num_steps: training steps of that comparison.
        learning_rate: its learning rate.
        precisions: what is compared with float32.
        pruned: config values of the model that is measured, merged, repaired and spread over devices.
        evaluated: config values of the model that is evaluated.
        trained: config values of the model whose training memory is measured.
        train_rows: rows per micro batch of that measurement.
        train_tokens: tokens of the longest row.
        memory_cases: names of `training.MEMORY_CASES` to measure.
        timed: returns the config of the model that is timed.
        num_pruned_layers: layers that its pruned shape lacks.
        workload: what is timed, with LoRA.
        full_precision: precision with which full fine-tuning is timed.
        max_ratio: largest time and memory of the pruned model as fractions of the dense one's; none for tiny models.
    """

    learner: Mapping[str, Any]
    num_steps: int
    learning_rate: float
    precisions: tuple[str, ...]
    pruned: Mapping[str, Any]
    evaluated: Mapping[str, Any]
    trained: Mapping[str, Any]
    train_rows: int
    train_tokens: int
    memory_cases: tuple[str, ...]
    timed: Callable[[], PreTrainedConfig]
    num_pruned_layers: int
    workload: Workload
    full_precision: str
    max_ratio: float


Check = Callable[[Scale, Path], Iterator[Finding]]  # the folder is empty and for this check alone

_SMALL = {
    "vocab_size": 258,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "tie_word_embeddings": False,
}
_LEARNER = _SMALL | {"num_hidden_layers": 3, "intermediate_size": 48}
# A `random:` model has the vocabulary of its byte tokenizer.
_EVALUATED = {key: value for key, value in _SMALL.items() if not key.endswith(("vocab_size", "_token_id"))}

ON_GPU = Scale(
    learner=_LEARNER,
    num_steps=100,
    learning_rate=1e-5,
    precisions=("bf16_mixed", "bf16_stochastic"),
    pruned=_SMALL | {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8},
    evaluated=_EVALUATED | {"hidden_size": 256, "initializer_range": 0.05},
    # Large enough that workspaces of libraries (32 MiB a handle) do not count.
    trained=_SMALL
    | {
        "vocab_size": 32_000,
        "hidden_size": 1536,
        "intermediate_size": 6144,
        "num_hidden_layers": 8,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
    },
    train_rows=8,
    train_tokens=512,
    memory_cases=(
        *("LoRA", "LoRA, recomputed", "full float32", "full float32, recomputed"),
        *("full bf16_mixed", "full bf16_mixed, recomputed", "full bf16_mixed, recomputed, accumulated"),
        "full bf16_stochastic",
    ),
    timed=lambda: shipped_config("meta-llama/Llama-3.1-8B"),
    num_pruned_layers=13,
    workload=Workload(
        train_rows=8,
        train_tokens=256,
        answer_tokens=16,
        batch_size=8,
        prompt_tokens=512,
        new_tokens=16,
        dtype="bfloat16",
        rounds=1,
    ),
    full_precision="bf16_stochastic",
    max_ratio=0.75,
)
REHEARSAL = replace(
    ON_GPU,
    num_steps=15,
    learning_rate=1e-4,
    precisions=("bf16_mixed",),  # compiling the optimizer of the other takes longer than all else together
    pruned=_SMALL | {"hidden_size": 32, "intermediate_size": 48},
    evaluated=_EVALUATED | {"hidden_size": 32, "initializer_range": 0.1},
    trained=_SMALL | {"vocab_size": 1000, "hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 4},
    train_rows=4,
    train_tokens=64,
    memory_cases=("LoRA", "full bf16_mixed, recomputed"),
    timed=lambda: LlamaConfig(**_SMALL),
    num_pruned_layers=2,
    workload=Workload(
        train_rows=2, train_tokens=8, answer_tokens=2, prompt_tokens=6, new_tokens=2, repeats=1, rounds=1, lora_rank=2
    ),
    full_precision="float32",
    max_ratio=math.inf,
)


def judged(passed: bool, text: str) -> Finding:
    """Returns a finding that is `OK` or `FAILED`."""
    return Finding(OK if passed else FAILED, text)


def make_model(config: Mapping[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    """Returns a Llama with random weights on the default device; equal calls give equal weights.

    Weights are drawn in bfloat16, so that models of different dtypes have the same.
    """
    own = LlamaConfig(**config)
    torch.manual_seed(0)
    model = random_model(own, config_shape(own), Workload(dtype="bfloat16"))
    convert_weights(model, dtype)
    return model


def random_rows(config: Mapping[str, Any], num_rows: int, num_tokens: int, num_answer_tokens: int) -> list[TrainingRow]:
    """Returns rows of random tokens, all of the same length but every third, which lacks up to three tokens."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(2, config["vocab_size"], (num_rows, num_tokens), generator=generator).tolist()
    return [
        TrainingRow(tuple(row[: num_tokens - index % 4] if index % 3 == 0 else row), num_answer_tokens)
        for index, row in enumerate(tokens)
    ]
