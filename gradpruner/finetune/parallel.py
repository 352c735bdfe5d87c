"""A fine-tune on several processes: what is checked before it, the settings of the Trainer, weights as a whole.

`ddp` holds a whole model per process. `fsdp` (FSDP2 through accelerate) and `deepspeed_zero3` divide weights, gradients
and moments among the processes, for models that one card cannot train. Adapters are added and layers are pruned before
that. `docs/several-processes.md` says what has been seen to work.
"""

import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from gradpruner import processes
from gradpruner.finetune.spec import ANSWERS_LOSS, SHARDED, TrainingSpec
from gradpruner.models.architectures import decoder_layers

# Environment variables of accelerate's, which its Accelerator sets for good.
USE_DEEPSPEED, USE_FSDP = "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"


def check_parallel(spec: TrainingSpec, callbacks: Sequence[TrainerCallback] = (), distils: bool = False) -> None:
    """Refuses a fine-tune that cannot run on the processes of this run.

    Args:
        spec: how to train.
        callbacks: those of the method. One that works on a single process only says why in `one_process_because`.
        distils: whether the loss is another one than the likelihood of the answers.

    Raises:
        ValueError: if the batch cannot be divided, a callback works on a single process only, or the weights cannot be
            divided here.
    """
    if spec.parallel in SHARDED:
        _check_sharded(spec, distils)
    if processes.count() == 1:
        return
    spec.check_processes()
    for callback in callbacks:
        if reason := getattr(callback, "one_process_because", None):
            raise ValueError(
                f"This method trains on one process, got {processes.count()}: {reason}. Start it with plain python."
            )


def _check_sharded(spec: TrainingSpec, distils: bool) -> None:
    given = f"finetune.parallel={spec.parallel}"
    if processes.count() == 1:
        raise ValueError(
            f"{given} divides the model among processes, got one process. Start several with torchrun "
            f"--nproc-per-node=N, or set finetune.parallel=ddp."
        )
    runs_on_cpu = spec.parallel == "deepspeed_zero3" and os.environ.get("DS_ACCELERATOR") == "cpu"
    if not torch.cuda.is_available() and not runs_on_cpu:
        raise ValueError(
            f"{given} needs GPUs, got a machine without CUDA. Set finetune.parallel=ddp"
            + (", or DS_ACCELERATOR=cpu in the environment." if spec.parallel == "deepspeed_zero3" else ".")
        )
    if spec.precision == "bf16_stochastic":
        raise ValueError(
            f"{given} keeps float32 weights, got precision=bf16_stochastic, which is for one card. Set "
            "finetune.precision=bf16_mixed."
        )
    if spec.parallel == "deepspeed_zero3":
        if distils or spec.loss != ANSWERS_LOSS:
            refused = "Distillation" if spec.loss == ANSWERS_LOSS else f"finetune.loss={spec.loss}"
            raise ValueError(
                f"{refused} is not offered with DeepSpeed, got {given}: its loss needs the output layer again in "
                f"the backward pass. Set finetune.parallel=fsdp."
            )
        if importlib.util.find_spec("deepspeed") is None:
            raise ValueError(
                f"{given} needs DeepSpeed, got an environment without it. Run `pip install deepspeed`, or set "
                "finetune.parallel=fsdp."
            )


def check_folder(directory: Path) -> None:
    """Raises ValueError if the processes do not write to the same folder, which only rank 0 fills."""
    folders = sorted(set(processes.gather(str(directory.absolute()))))
    if len(folders) > 1:
        raise ValueError(
            f"All processes must be given the same folder, got {', '.join(folders)}. Choose it on rank 0 and hand it "
            "to the others."
        )


def checkpoint_layout(spec: TrainingSpec) -> str:
    """Returns how checkpoints are divided among files. Only a run with the same layout can resume from them."""
    if spec.parallel == "deepspeed_zero3":
        return f"{spec.parallel} on {processes.count()} processes"
    return spec.parallel


def check_layout(spec: TrainingSpec, checkpoint: str | None, layout: str | None) -> None:
    """Raises ValueError if this run cannot resume from a checkpoint with this layout; None is unknown."""
    own = checkpoint_layout(spec)
    if checkpoint is not None and layout is not None and layout != own:
        raise ValueError(
            "A fine-tune resumes only with the finetune.parallel of its checkpoint, and DeepSpeed's only on as many "
            f"processes, got {own} and a checkpoint of {layout}: {checkpoint}. Start it as before, or delete the "
            "checkpoint."
        )


def parallel_arguments(
    model: PreTrainedModel | None = None, spec: TrainingSpec | None = None, precision: str = "float32"
) -> dict[str, Any]:
    """Returns the arguments of `TrainingArguments` for several processes; none with one.

    Args:
        model: the model to train, with its adapters.
        spec: how to train; None is `ddp`.
        precision: one of `spec.PRECISIONS`, never `auto`.
    """
    if processes.count() == 1:
        return {}
    limit = {"ddp_timeout": int(processes.COLLECTIVE_LIMIT.total_seconds())}
    if model is not None and spec is not None and spec.parallel == "fsdp":
        return {**limit, "fsdp": True, "fsdp_config": fsdp_config(model)}
    if spec is not None and spec.parallel == "deepspeed_zero3":
        own_state = {} if torch.cuda.is_available() else {"accelerator_config": {"use_configured_state": True}}
        return {**limit, **own_state, "deepspeed": deepspeed_config(spec, precision)}
    return {**limit, "ddp_find_unused_parameters": False}  # every trained weight takes part in every step


def fsdp_config(model: PreTrainedModel) -> dict[str, Any]:
    """Returns the settings of FSDP2: every decoder layer is a unit, and checkpoints are written in shards.

    FSDP's own recomputation of activations stays off. It renames weights, and then peft finds no adapter to save.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": sorted({type(layer).__name__ for layer in decoder_layers(base)}),
        "reshard_after_forward": True,
        "state_dict_type": "SHARDED_STATE_DICT",
        "cpu_ram_efficient_loading": False,  # every process has loaded the pruned model
    }


@contextmanager
def engine_state(spec: TrainingSpec) -> Iterator[None]:
    """Lets accelerate divide the model in the block, and only there: DeepSpeed on any device, FSDP on accelerators."""
    try:
        if spec.parallel == "deepspeed_zero3" and not torch.cuda.is_available():
            # The Trainer's own state would be one of DDP (use_cpu=True), or of one process (False).
            AcceleratorState._reset_state(reset_partial_state=True)
            os.environ[USE_DEEPSPEED] = "true"
            PartialState(backend="gloo")
        yield
    finally:
        # Else later Trainers of this process divide their models, too (with other settings), and so does
        # `from_pretrained`.
        if spec.parallel == "fsdp":
            os.environ.pop(USE_FSDP, None)
        if spec.parallel == "deepspeed_zero3":
            os.environ.pop(USE_DEEPSPEED, None)
            unset_hf_deepspeed_config()


def keep_precision(trainer: Trainer, precision: str) -> None:
    """Lets FSDP average gradients in float32 where accelerate would do it in bfloat16, and leave outputs as they are.

    Args:
        trainer: before it trains.
        precision: one of `spec.PRECISIONS`, never `auto`.
    """
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None and precision == "bf16_mixed":
        plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def deepspeed_config(spec: TrainingSpec, precision: str) -> dict[str, Any]:
    """Returns the settings of DeepSpeed ZeRO-3. The Trainer fills in what is `auto`; weights keep their dtype."""
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto" if spec.max_grad_norm else 0.0,
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "bf16": {"enabled": False},  # else accelerate makes the weights bfloat16 for `bf16_mixed`
        "torch_autocast": {"enabled": precision == "bf16_mixed", "dtype": "bfloat16"},
    }


def whole(tensor: Tensor) -> Tensor:
    """Returns a tensor whose pieces lie on several processes as a whole; all of them call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered_weights(model: nn.Module, trained_only: bool) -> dict[str, Tensor]:
    """Returns the whole weights of a model that `fsdp` divided, on the CPU of rank 0; other ranks get nothing.

    Args:
        model: the model; all processes call this together.
        trained_only: leave frozen weights out.

    Returns:
        Weights by name, those that share memory once.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only)
    return without_shared(model, get_model_state_dict(model, options=options))


def without_shared(model: nn.Module, state: dict[str, Any]) -> dict[str, Tensor]:
    """Returns the tensors of a state dict, those of weights that share memory under their first name only."""
    shared = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    shared -= {name for name, _ in model.named_parameters()}
    return {name: value for name, value in state.items() if name not in shared and isinstance(value, Tensor)}
