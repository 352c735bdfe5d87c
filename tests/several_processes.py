"""What `test_processes.py` runs on 1, 2 and 3 processes, which a fork server starts in milliseconds.

Every job is a function of the run's folder; rank 0's result is written as JSON or tensors.
"""

import dataclasses
import gc
import json
import multiprocessing
import os
import signal
import sys
import traceback
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch.distributed import TCPStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from experiments import run as command
from gradpruner import processes
from gradpruner.encoding import TrainingRow, collate
from gradpruner.evaluate.likelihood import Likelihood
from gradpruner.finetune import run as finetuning
from gradpruner.finetune.distill import Distillation, DistillationLoss
from gradpruner.finetune.parallel import gathered_weights, whole
from gradpruner.finetune.run import finetune
from gradpruner.finetune.spec import TrainingSpec
from gradpruner.grad_pruner import GradPruner
from gradpruner.importance import _GradientRecorder, record_early_gradients
from gradpruner.importance_spec import ImportanceSpec
from gradpruner.models.architectures import decoder_layers, lora_targets
from gradpruner.models.spec import ModelSpec
from gradpruner.pipeline.run import Pipeline
from gradpruner.plan import PruningPlan
from gradpruner.tasks import JsonLines
from tests.commands import call

CONFIG = {
    **{"num_hidden_layers": 4, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2},
    "initializer_range": 0.1,
}
# Rows and answers of very different lengths: a mean of the processes' means would be wrong.
ROWS = [
    TrainingRow((*range(2, 9 + 5 * (index % 4)), *(60 + index,) * (1 + 3 * (index % 3)), 1), 2 + 3 * (index % 3))
    for index in range(26)
]
SPEC = TrainingSpec(learning_rate=1e-2, batch_size=12, micro_batch_size=2, epochs=2, save_steps=2)


class KeepGradients(TrainerCallback):
    """Keeps the gradients of the first optimizer step."""

    def __init__(self):
        self.gradients = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def load(folder):
    return ModelSpec("random:llama", config=CONFIG).load(folder / "assets")


def gradients(folder):
    for mode in ("lora", "full"):
        keep = KeepGradients()
        spec = dataclasses.replace(SPEC, mode=mode, max_steps=1, max_grad_norm=0)
        finetune(load(folder), ROWS, 1, spec, folder / f"gradients-{mode}", callbacks=[keep])
        if processes.is_main():
            names = {name.removeprefix("module."): value for name, value in keep.gradients.items()}
            save_file(names, folder / f"gradients-{mode}.safetensors")


def training(folder):
    found = {}
    for mode, grouped in (("lora", True), ("full", False)):
        spec = dataclasses.replace(SPEC, mode=mode, group_by_length=grouped)
        account = finetune(load(folder), ROWS, 1, spec, folder / f"training-{mode}")
        losses = [entry["loss"] for entry in account["history"]]
        found[mode] = {"losses": losses, "steps": account["steps"], "tokens": account["tokens"]}
    return found


def distillation(folder):
    plan = PruningPlan(num_hidden_layers=4, pruned_layers=(), method="last")
    loss = DistillationLoss(load(folder), Distillation(states=True), plan)
    student = load(folder)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(0.9)
    spec = dataclasses.replace(SPEC, mode="full", epochs=1)
    account = finetune(student, ROWS, 1, spec, folder / "distillation", loss=loss)
    return [entry["loss"] for entry in account["history"]]


def importance(folder):
    batches = [collate(ROWS[3 * index : 3 * index + 1 + index % 3], 1) for index in range(8)]  # 1 to 3 rows
    spec = ImportanceSpec(steps=4, accumulation=2, learning_rate=1e-2)
    early = record_early_gradients(load(folder), batches, spec, folder / "importance")
    return {"energies": early.energies.tolist(), "losses": list(early.losses)}


def pipeline(folder, **changes):
    data = folder / "rows.jsonl"
    task = JsonLines(
        train_file=str(data), test_file=str(data), prompt="{question}", choice=" {choice}", answer_field="answer",
        choices_field="options", max_length=128,
    )  # fmt: skip
    made = Pipeline(
        model=ModelSpec("random:llama", config=CONFIG),
        task=task,
        method=GradPruner(sparsity=0.5, merge_count=1, steps=3, batch_size=4, learning_rate=1e-2),
        training=dataclasses.replace(SPEC, mode="full", **changes),
        evaluation=Likelihood(batch_size=3),
        seed=0,
        cache_dir=folder / "cache",
    )
    outcome = made.run()
    return {
        "plan": [list(outcome.plan.pruned_layers), list(outcome.plan.layer_importance)],
        "losses": [entry["loss"] for entry in outcome.training["history"]],
        "predictions": [json.loads(line) for line in outcome.predictions.read_text().splitlines()],
        "stage_ids": made.stage_ids(),
    }


def made_by_another(folder):
    """Loads a random model that the last process has made, though it is not the one that saves checkpoints."""
    processes.start()
    assets = folder / "made by another"
    if processes.rank() == processes.count() - 1:
        ModelSpec("random:llama", config=CONFIG).load(assets)
    processes.wait_for_all()
    model = ModelSpec("random:llama", config=CONFIG).load(assets)
    return float(model.lm_head.weight.double().sum())


def tuned_first(folder):
    return pipeline(folder, epochs=1, tune_dense_first=True)


def sharded(folder):
    """Divides models with FSDP2 and returns by how much gradients and weights differ from those of whole models."""
    if processes.count() == 1:
        return {}
    return {mode: _sharded(folder, mode) for mode in ("lora", "full", "distil")}


def _sharded(folder, mode):
    divided, complete = (_trained_model(folder, mode) for _ in range(2))
    batch, num_processes = collate(ROWS[:6], 1), processes.count()
    own = {name: values[processes.rank() :: num_processes] for name, values in batch.items()}
    mesh = init_device_mesh("cpu", (num_processes,))
    for layer in decoder_layers(base(divided)):
        fully_shard(layer, mesh=mesh)
    fully_shard(divided, mesh=mesh)
    # FSDP averages gradients over processes.
    (_summed_loss(folder, divided, own, mode) * num_processes).backward()
    _summed_loss(folder, complete, batch, mode).backward()
    expected = {name: parameter.grad for name, parameter in complete.named_parameters() if parameter.grad is not None}
    found = {name: whole(parameter.grad) for name, parameter in divided.named_parameters() if name in expected}
    differences = {"gradients": max(float((found[name] - expected[name]).abs().max()) for name in expected)}
    assert all(isinstance(parameter, DTensor) for parameter in divided.parameters())
    if mode == "lora":
        energies = [_energies(model, folder) for model in (divided, complete)]
        differences["energies"] = float((energies[0] / energies[1] - 1).abs().max())
    weights = gathered_weights(divided, trained_only=mode == "lora")
    trained = {name: value for name, value in complete.named_parameters() if value.requires_grad}
    if processes.is_main():
        assert weights.keys() == trained.keys()
        differences["weights"] = max(float((weights[name] - trained[name]).abs().max()) for name in trained)
    else:
        assert not weights
    return differences


def _trained_model(folder, mode):
    model = load(folder).train()
    if mode == "lora":
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=lora_targets(model), task_type="CAUSAL_LM", init_lora_weights=False)
        return get_peft_model(model, config)
    return model


def base(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _summed_loss(folder, model, batch, mode):
    if mode != "distil":
        return model(**batch, num_items_in_batch=torch.tensor(1)).loss
    plan = PruningPlan(num_hidden_layers=4, pruned_layers=(), method="last")
    teacher = load(folder)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(0.9)
    loss = DistillationLoss(teacher, Distillation(), plan)
    model.forward = lambda **batch: loss(model, batch)  # as CompletionTrainer does
    return model(**batch)[0]


def _energies(model, folder):
    recorder = _GradientRecorder(base(model), ImportanceSpec(steps=2), folder, None)
    recorder.on_pre_optimizer_step(None, None, None)
    return recorder.energies[0]


JOBS = (made_by_another, gradients, training, distillation, importance, pipeline, tuned_first, sharded)


def all_jobs(folder):
    """Runs every job and writes rank 0's results."""
    found = {job.__name__: job(folder) for job in JOBS}
    if processes.is_main():
        (folder / "results.json").write_text(json.dumps(found))
    processes.finish()


def arguments(folder):
    return [
        *("debug=smoke", "reference=null", "finetune=full", "method=last", "evaluate_before=false", "dataset=jsonl"),
        *(f"dataset.train_file={folder}/rows.jsonl", f"dataset.test_file={folder}/rows.jsonl"),
        *("dataset.answer_field=answer", "dataset.choices_field=options", "dataset.max_length=128"),
        *("dataset.prompt='{question}'", "dataset.choice=' {choice}'", "finetune.batch_size=12"),
        *("finetune.max_steps=6", "finetune.save_steps=2", f"output_dir={folder}/run", f"cache_dir={folder}/cache"),
    ]


def run_command(folder):
    """Runs the command, and writes what this process printed."""
    rank = processes.rank()
    done = call(command.main, *arguments(folder))
    (folder / f"output{rank}.json").write_text(json.dumps([done.returncode, done.stdout, done.stderr]))
    sys.exit(done.returncode)


def killed(folder):
    """Runs the command; process 1 is killed in the fourth step of the fine-tune."""
    _on_rank_1(3, lambda: os.kill(os.getpid(), signal.SIGKILL))
    run_command(folder)


def diverging(folder):
    """Runs the command; the loss of process 1 is NaN in the second step of the fine-tune."""

    def poison():
        torch.isfinite = lambda value: torch.tensor(False)

    _on_rank_1(1, poison)
    run_command(folder)


def _on_rank_1(step, act):
    def on_step_begin(self, args, state, control, **kwargs):
        if processes.rank() == 1 and state.global_step == step:
            act()

    finetuning._Clock.on_step_begin = on_step_begin


def start(job, folder, count):
    """Starts `count` processes that run a job together; returns them and what they need until they end."""
    # As torchrun does, the parent keeps the store, so that it outlives every process.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.several_processes"])
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"question": f"{n} + {n}?", "options": [str(2 * n), "none", "x" * (n + 1)], "answer": 0} for n in range(14)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    started = [context.Process(target=_work, args=(job, folder, rank, count, store.port)) for rank in range(count)]
    for process in started:
        process.start()
    return started, store


def _work(job, folder, rank, count, port):
    if count > 1:
        os.environ |= {
            **{"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"},
        }
    gc.freeze()  # see conftest.py
    torch.set_num_threads(1)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    os.chdir(Path(__file__).parents[1])
    try:
        job(folder)
    except Exception:
        traceback.print_exc()
        os._exit(1)
