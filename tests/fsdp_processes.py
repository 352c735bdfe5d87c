"""What `test_fsdp.py` runs: fine-tunes that accelerate divides by FSDP2, on processes that share the CPU.

accelerate runs FSDP on accelerators only, and makes it DDP elsewhere. Here it is told that the CPU is one, so that its
own code, the Trainer's and ours run as on GPUs, with gloo in place of NCCL.
"""

import dataclasses
import json
import os
from contextlib import contextmanager

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from gradpruner import processes
from gradpruner.finetune import parallel
from gradpruner.finetune import run as finetuning
from gradpruner.finetune.distill import Distillation, DistillationLoss
from gradpruner.finetune.losses import SignalLoss
from gradpruner.finetune.run import finetune
from gradpruner.models.architectures import decoder_layers
from gradpruner.models.spec import ModelSpec
from gradpruner.plan import PruningPlan
from tests.several_processes import CONFIG, ROWS, SPEC, base, pipeline

FULL = dataclasses.replace(SPEC, mode="full")
LORA = dataclasses.replace(SPEC, mode="lora", epochs=1)
CHECKPOINTED = dataclasses.replace(SPEC, mode="lora", gradient_checkpointing=True)


def take_the_cpu_for_gpus():
    """Makes accelerate run FSDP, in fine-tunes that ask for it, on the CPU."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    parallel._check_sharded = lambda *args: None
    finetuning.engine_state = on_accelerators


@contextmanager
def on_accelerators(spec):
    found = PartialState._prepare_backend
    if spec.parallel == "fsdp":
        PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    try:
        with parallel.engine_state(spec):
            yield
    finally:
        PartialState._prepare_backend = found


def load(folder, dtype="float32", **config):
    name = "-".join(["assets", dtype, *config])
    return ModelSpec("random:llama", config={**CONFIG, **config}, dtype=dtype).load(folder.parent / name)


def distillation(folder):
    teacher = load(folder)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(0.9)
    return DistillationLoss(teacher, Distillation(), PruningPlan(num_hidden_layers=4, pruned_layers=(), method="last"))


# Name -> settings of the fine-tune, of the model, and of the loss.
TRAININGS = {
    "full": (dataclasses.replace(FULL, epochs=1), {}, None),
    "full, checkpointing": (dataclasses.replace(FULL, epochs=1, gradient_checkpointing=True), {}, None),
    "full, tied": (dataclasses.replace(FULL, epochs=1), {"tie_word_embeddings": True}, None),
    "full, bf16_mixed": (dataclasses.replace(FULL, epochs=1, precision="bf16_mixed"), {}, None),
    "full, distilled": (dataclasses.replace(FULL, epochs=1), {}, distillation),
    "lora": (LORA, {}, None),
    "lora, checkpointing": (dataclasses.replace(LORA, gradient_checkpointing=True), {}, None),
    "lora on bfloat16": (LORA, {"dtype": "bfloat16"}, None),
    "lora, all tokens": (LORA, {}, lambda folder: SignalLoss()),
}


class IsDivided(TrainerCallback):
    """Fails where a process holds a whole model, or does not do what the settings say."""

    def __init__(self, spec):
        self._spec = spec

    def on_step_end(self, args, state, control, model=None, **kwargs):
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        for layer in decoder_layers(base(model)):
            assert layer.gradient_checkpointing == self._spec.gradient_checkpointing
            policy = layer._get_fsdp_state()._fsdp_param_group.mp_policy
            assert policy.param_dtype == (torch.bfloat16 if self._spec.precision == "bf16_mixed" else None)
            assert policy.reduce_dtype in (None, torch.float32)  # gradients are averaged in float32


def divided(spec):
    """Returns a fine-tune's settings with FSDP, and the callback that sees it; unchanged on one process."""
    if processes.count() == 1:
        return spec, []
    take_the_cpu_for_gpus()
    return dataclasses.replace(spec, parallel="fsdp"), [IsDivided(spec)]


def train(folder, spec, settings, make_loss):
    spec, callbacks = divided(spec)
    loss = None if make_loss is None else make_loss(folder)
    account = finetune(load(folder, **settings), ROWS, 1, spec, folder / "result", callbacks=callbacks, loss=loss)
    assert parallel.USE_FSDP not in os.environ  # else every later Trainer of this process, on GPUs, divides its model
    return [entry["loss"] for entry in account["history"]]


def trainings(folder):
    """Runs every fine-tune, then a whole run, with a fine-tune before its importance run."""
    losses = {}
    for name, (spec, settings, make_loss) in TRAININGS.items():
        losses[name] = train(folder / name, spec, settings, make_loss)
    spec, _ = divided(FULL)
    found = {"losses": losses, "run": pipeline(folder, parallel=spec.parallel, epochs=1, tune_dense_first=True)}
    if processes.is_main():
        (folder / "results.json").write_text(json.dumps(found))
    processes.finish()


class Stop(TrainerCallback):
    """Ends the process in the fourth step, behind the checkpoint of the second."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os._exit(9)


def stopped_full(folder, spec=FULL):
    spec, callbacks = divided(spec)
    finetune(load(folder), ROWS, 1, spec, folder / "result", callbacks=[*callbacks, Stop()])


def resumed_full(folder, spec=FULL):
    train(folder, spec, {}, None)
    processes.finish()


def stopped_lora(folder):
    stopped_full(folder, CHECKPOINTED)


def resumed_lora(folder):
    resumed_full(folder, CHECKPOINTED)


def weights(folder):
    """Returns what a fine-tune has trained; weights that share memory have one of their names in the file."""
    [file] = [*(folder / "result").glob("*.safetensors"), *(folder / "result").glob("adapter/*.safetensors")]
    found = load_file(file)
    return {
        "lm_head.weight" if name == "model.embed_tokens.weight" and "lm_head.weight" not in found else name: value
        for name, value in found.items()
    }
