"""What a fine-tune leaves in its folder, and the model that this makes.

Merging an adapter into bfloat16 weights rounds: at small learning rates most of the update is below half a unit in the
last place of a weight and vanishes. So such an adapter is evaluated beside its weights, merged for the checkpoint only,
and `update_survival` says how much of the update the checkpoint keeps.
"""

import json
import logging
from pathlib import Path
from typing import NotRequired, TypedDict

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_model
from torch import Tensor
from transformers import PreTrainedModel

from gradpruner.finetune.precision import convert_weights
from gradpruner.finetune.spec import MERGE_DTYPES, TrainingSpec
from gradpruner.plan import PruningPlan
from gradpruner.surgery import apply_plan

logger = logging.getLogger(__name__)

RESULT_FILE = "training.json"
PLAN_FILE = "plan.json"
REPORT_FILE = "report.json"
WEIGHTS_FILE = "model.safetensors"
ADAPTER_FOLDER = "adapter"
LEAST_SURVIVAL = 0.95  # of an update that is merged, before a warning


class TrainingAccount(TypedDict):
    """What a fine-tune cost and how its loss went; JSON-ready.

    Attributes:
        steps: optimizer steps.
        tokens: trained on, without padding.
        train_seconds: wall time, interrupted runs included.
        peak_memory_bytes: see `cost.PeakMemory`.
        loss: mean over the last tenth of the steps.
        precision: one of `spec.PRECISIONS`, never `auto`.
        micro_batch_size: rows per forward pass, never `auto`.
        num_processes: number of processes, if there were several.
        update_survival: see `update_survival`; only of LoRA adapters that are to be merged.
        history: one dict per step, with step, epoch, loss, learning rate and norm of the gradient.
    """

    steps: int
    tokens: int
    train_seconds: float
    peak_memory_bytes: int
    loss: float
    precision: str
    micro_batch_size: int
    num_processes: NotRequired[int]
    update_survival: NotRequired[float]
    history: list[dict[str, float]]


def load_finetuned(model: PreTrainedModel, spec: TrainingSpec, directory: Path) -> PreTrainedModel:
    """Puts the weights that `finetune` wrote into the model that it started with.

    Args:
        model: as the fine-tune started with it; changed in place.
        spec: how it was trained.
        directory: what `finetune` wrote.

    Returns:
        The model in evaluation mode. A PeftModel around it where the adapter is not merged: with `merge_adapter=false`,
        and where merging would round the update, in dtypes narrower than float32.
    """
    prune_again(model, directory)
    dtype = MERGE_DTYPES.get(spec.merge_dtype, model.dtype)
    if spec.mode == "full":
        convert_weights(model, dtype)
        load_model(model, directory / WEIGHTS_FILE)
        return model.eval()
    tuned = PeftModel.from_pretrained(model, directory / ADAPTER_FOLDER)
    return tuned.eval() if dtype.itemsize < 4 else merge_for_checkpoint(tuned, spec)


def merge_for_checkpoint(model: PreTrainedModel, spec: TrainingSpec) -> PreTrainedModel:
    """Merges what `load_finetuned` returned, if `spec` says that the adapter is to be merged and it is not yet.

    Returns:
        The model in evaluation mode; its weights have `merge_dtype`.
    """
    if not (isinstance(model, PeftModel) and spec.merge_adapter):
        return model.eval()
    dtype = MERGE_DTYPES.get(spec.merge_dtype, model.dtype)
    if dtype != model.dtype:
        convert_weights(model, torch.float32)  # so that the sum is rounded once
    merged = model.merge_and_unload()
    convert_weights(merged, dtype)
    return merged.eval()


@torch.no_grad()
def update_survival(model: PreTrainedModel, spec: TrainingSpec) -> float:
    """Returns the fraction of a LoRA update that is left once it is merged and rounded to the checkpoint's dtype.

    With W a frozen weight, D = s B A the update and R what rounding makes of W + D, this is the sum of (R - W) D over
    the sum of D^2, over all sublayers: 1 if nothing is lost, 0 if no weight changes. A value under 95 % is warned of.

    Args:
        model: with trained adapters.
        spec: how they were trained.
    """
    kept = total = 0.0
    dtype = torch.float32
    for module in model.modules():
        if isinstance(module, LoraLayer):
            weight = module.get_base_layer().weight
            dtype = MERGE_DTYPES.get(spec.merge_dtype, weight.dtype)
            update = module.get_delta_weight("default").float()  # (out, in)
            kept += _overlap(weight, update, dtype)
            total += float(update.square().sum(dtype=torch.float64))
    survival = kept / total if total else 1.0
    if survival < LEAST_SURVIVAL:
        logger.warning(
            "%.0f %% of the LoRA update survive merging into %s weights. Set finetune.merge_dtype=float32 for a "
            "checkpoint that keeps all of it, or finetune.merge_adapter=false to keep the adapter apart",
            *(100 * survival, str(dtype).removeprefix("torch.")),
        )
    return survival


def _overlap(weight: Tensor, update: Tensor, dtype: torch.dtype) -> float:
    """Returns the sum of (R - W) D; see `update_survival`."""
    change = (weight.float() + update).to(dtype).float() - weight.float()
    return float((change * update).sum(dtype=torch.float64))


def read_result(directory: Path) -> TrainingAccount:
    """Returns the account that `finetune` wrote."""
    account: TrainingAccount = json.loads((directory / RESULT_FILE).read_text())
    return account


def prune_again(model: PreTrainedModel, folder: Path) -> None:
    """Applies the plan that a `PruningCallback` saved in the folder, if there is one."""
    if (folder / PLAN_FILE).is_file():
        apply_plan(model, PruningPlan.load(folder / PLAN_FILE))
