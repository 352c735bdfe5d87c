"""In which floating-point formats a fine-tune holds and updates what it trains.

At a learning rate of 1e-5 an AdamW update is below half a unit in the last place of a bfloat16 weight, so a fine-tune
whose weights are bfloat16 learns a fraction of what it should. A tiny Llama's loss fell by 0.0023 in 100 steps, in
float32 by 0.0247; 15 % of its weights changed. What is offered instead, for full fine-tuning:

- `float32`: 4 + 4 + 8 bytes per parameter for weight, gradient and moments; the loss fell by 0.0247.
- `bf16_mixed`: float32 weights, matrix products in bfloat16 (autocast); the same bytes, faster; 0.0247.
- `bf16_stochastic`: bfloat16 weights whose updates are rounded up or down by chance, and 8-bit moments (torchao's
  AdamW8bit): 2 + 2 + 2 bytes; 0.0247 to 0.0249 over three seeds. Kahan summation (torch-optimi) takes 2 + 2 + 6 bytes
  and gave 0.0245.

LoRA adapters and their moments are float32 whatever the dtype of the frozen weights is (peft's default).
"""

import importlib.util
from typing import Any

import torch
from transformers import PreTrainedModel

from gradpruner.finetune.spec import TrainingSpec
from gradpruner.runtime import default_device

OPTIMIZER_8BIT = {"optim": "adamw_torch_8bit", "optim_args": "bf16_stochastic_round=True"}


def resolve_precision(spec: TrainingSpec) -> str:
    """Returns the precision of a fine-tune on this machine, never `auto`; see `TrainingSpec`.

    Raises:
        ValueError: if `bf16_stochastic` lacks torchao.
    """
    if spec.precision == "bf16_stochastic" and importlib.util.find_spec("torchao") is None:
        raise ValueError(
            "finetune.precision=bf16_stochastic needs torchao for 8-bit moments and stochastic rounding, got an "
            "environment without it. Run `pip install 'gradpruner[bf16]'`, or set finetune.precision=bf16_mixed."
        )
    if spec.precision != "auto":
        return spec.precision
    return "bf16_mixed" if spec.mode == "full" and default_device().type == "cuda" else "float32"


def trained_dtype(precision: str) -> torch.dtype:
    """Returns the dtype of weights that a full fine-tune updates."""
    return torch.bfloat16 if precision == "bf16_stochastic" else torch.float32


def prepare_weights(model: PreTrainedModel, spec: TrainingSpec, precision: str) -> None:
    """Converts the weights of a full fine-tune in place; a LoRA fine-tune's frozen weights are unchanged."""
    if spec.mode == "full":
        convert_weights(model, trained_dtype(precision))


def convert_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Converts all parameters in place. Buffers are unchanged: rotary frequencies must not be rounded."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def training_arguments(precision: str) -> dict[str, Any]:
    """Returns the arguments of `TrainingArguments` for a precision."""
    if precision == "bf16_mixed":
        return {"bf16": True}
    return dict(OPTIMIZER_8BIT) if precision == "bf16_stochastic" else {}
