"""`make test-deepspeed`: ZeRO-3 on two gloo processes of this CPU trains as one process without DeepSpeed does.

    python -m tests.zero3.check

Needs DeepSpeed in the Python that runs it. The folder is not called deepspeed: pytest puts `tests` on the path, where
such a folder would pass for the package. Every job runs in processes of its own, which torchrun starts. Prints one
line per check and exits with 1 if any fails.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from gradpruner import processes
from gradpruner.encoding import collate
from gradpruner.finetune.result import load_finetuned
from gradpruner.finetune.run import CHECKPOINTS_FOLDER, finetune
from gradpruner.importance import record_early_gradients
from gradpruner.importance_spec import ImportanceSpec
from gradpruner.models.spec import ModelSpec
from gradpruner.runtime import quiet_libraries
from tests.several_processes import CONFIG, ROWS, SPEC, arguments

ROOT = Path(__file__).resolve().parents[2]
NUM_PROCESSES = 2
MAX_LOSS_DIFFERENCE, MAX_WEIGHT_DIFFERENCE = 1e-5, 1e-4
# The same in bfloat16, whose rounding depends on how rows share a batch.
MAX_BF16_DIFFERENCE = 1e-2
# Name of a fine-tune: changes of the model's config, its dtype, and changes of the spec.
CASES = {
    "lora": ({}, torch.float32, {"mode": "lora", "gradient_checkpointing": True}),
    "full": ({}, torch.float32, {"mode": "full", "group_by_length": False}),
    "full-tied": ({"tie_word_embeddings": True}, torch.float32, {"mode": "full", "max_grad_norm": 0.0}),
    "lora-bf16": ({}, torch.bfloat16, {"mode": "lora"}),
    "full-bf16": ({}, torch.float32, {"mode": "full", "precision": "bf16_mixed"}),
}
INTERRUPTED = ("lora", "full")


class Watch(TrainerCallback):
    """Notes the gradients that a callback sees before an optimizer step, and the dtypes of all weights."""

    def __init__(self):
        self.num_gradients, self.dtypes = 0, []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.num_gradients += sum(parameter.grad is not None for parameter in model.parameters())

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.dtypes.append(sorted({str(parameter.dtype) for parameter in model.parameters()}))


class KillRank1(TrainerCallback):
    """Kills process 1 in the fourth step."""

    def on_step_begin(self, args, state, control, **kwargs):
        if processes.rank() == 1 and state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)


def make(name, folder):
    """Returns a case's model and spec; ZeRO-3 if there are several processes."""
    config, dtype, changes = CASES[name]
    with processes.main_first():
        model = ModelSpec("random:llama", config=CONFIG | config).load(folder.parent / "assets").to(dtype)
    parallel = "deepspeed_zero3" if processes.count() > 1 else "ddp"
    return model, dataclasses.replace(SPEC, parallel=parallel, **changes)


def train(name, folder, callbacks=()):
    """Runs a case's fine-tune and returns its losses and the like, step by step."""
    model, spec = make(name, folder)
    return finetune(model, ROWS, 1, spec, folder / name, callbacks=callbacks)["history"]


# ---- jobs: what the processes do ----


def compare(folder):
    """Trains every case, then measures importance, which DeepSpeed must not have changed."""
    watch = Watch()
    history = {name: train(name, folder, [watch]) for name in CASES}
    found = {"history": history, "num_gradients": watch.num_gradients, "dtypes": watch.dtypes}
    model, _ = make("lora", folder)
    batches = [collate(ROWS[3 * index : 3 * index + 3], 1) for index in range(4)]
    spec = ImportanceSpec(steps=2, accumulation=2, learning_rate=1e-2)
    found["energies"] = record_early_gradients(model, batches, spec, folder / "importance").energies.tolist()
    if processes.is_main():
        (folder / "found.json").write_text(json.dumps(found))


def resume(folder):
    """Resumes the interrupted fine-tunes."""
    for name in INTERRUPTED:
        train(name, folder)


def resume_alone(folder):
    """Asks one process to resume what DeepSpeed trained."""
    train("full", folder)


JOBS = {
    **{"compare": compare, "resume": resume, "resume_alone": resume_alone},
    **{f"interrupt-{name}": lambda folder, name=name: train(name, folder, [KillRank1()]) for name in INTERRUPTED},
}


def work(job, folder):
    """Runs a job in this process, and in the others that torchrun started."""
    quiet_libraries()
    torch.set_num_threads(1)
    processes.start()
    JOBS[job](Path(folder))
    processes.finish()


# ---- checks ----


def launch(num_processes, *command):
    """Runs a module, by torchrun if on several processes; returns exit status and output."""
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={num_processes}"] if num_processes > 1 else []
    own = {
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        # DeepSpeed compiles an operation with ninja on its first start.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "TORCH_EXTENSIONS_DIR": str(Path(sys.prefix) / "extensions"),
    }
    return subprocess.run(
        [sys.executable, *launcher, "-m", *map(str, command)],
        cwd=ROOT,
        env={**os.environ, **own},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_job(job, folder, num_processes=NUM_PROCESSES, fails=False):
    """Runs a job in processes of its own and returns its output; raises RuntimeError if it ends otherwise than told."""
    folder.mkdir(parents=True, exist_ok=True)
    done = launch(num_processes, "tests.zero3.check", "--job", job, folder)
    if bool(done.returncode) != fails:
        raise RuntimeError(f"{job} on {num_processes} processes ended with status {done.returncode}:\n{done.stdout}")
    return done.stdout


def result(name, folder):
    """Returns the weights of the model that a fine-tune's result makes, and the dtypes in its file."""
    model, spec = make(name, folder)
    [file] = (folder / name).rglob("*.safetensors")
    return load_finetuned(model, spec, folder / name).state_dict(), {value.dtype for value in load_file(file).values()}


def difference(name, *folders):
    """Returns the largest difference of a weight between two results; infinity if names, shapes or dtypes differ."""
    (ours, our_dtypes), (theirs, their_dtypes) = (result(name, folder) for folder in folders)
    if ours.keys() != theirs.keys() or our_dtypes != their_dtypes:
        return float("inf")
    return max(float((ours[key].float() - theirs[key].float()).abs().max()) for key in ours)


def history_difference(ours, theirs, key):
    """Returns the largest difference of a number in two histories."""
    return max(abs(own[key] - other[key]) for own, other in zip(ours, theirs, strict=True))


def check_training(folder):
    """Yields the checks of losses, weights and importance against one process."""
    for count in (1, NUM_PROCESSES):
        run_job("compare", folder / str(count), count)
    one, two = (json.loads((folder / str(count) / "found.json").read_text()) for count in (1, NUM_PROCESSES))
    for name in CASES:
        ours, theirs = two["history"][name], one["history"][name]
        loss, norm, rate = (history_difference(ours, theirs, key) for key in ("loss", "grad_norm", "learning_rate"))
        weight = difference(name, folder / str(NUM_PROCESSES), folder / "1")
        limits = (MAX_BF16_DIFFERENCE,) * 2 if "bf16" in name else (MAX_LOSS_DIFFERENCE, MAX_WEIGHT_DIFFERENCE)
        text = f"{len(ours)} steps, largest difference: loss {loss:.1e}, gradient norm {norm:.1e}, weight {weight:.1e}"
        yield name, loss <= limits[0] and weight <= limits[1] and rate == 0, text
    energies = [torch.tensor(found["energies"]) for found in (two, one)]
    ratio = float(((energies[0] - energies[1]).abs() / energies[1].clamp(min=1e-30)).max())
    yield "importance", ratio < 1e-3, f"by DDP after ZeRO-3, largest relative difference of an energy {ratio:.1e}"
    yield "dtypes", two["dtypes"] == one["dtypes"], f"of weights in training: {two['dtypes']}"
    num_gradients = two["num_gradients"]
    yield "callbacks", num_gradients == 0 < one["num_gradients"], f"see {num_gradients} gradients before a step"


def check_resume(folder):
    """Yields the checks of runs that were killed."""
    killed, whole = folder / "killed", folder / str(NUM_PROCESSES)
    for name in INTERRUPTED:
        run_job(f"interrupt-{name}", killed, fails=True)
        found = sorted(file.parent.name for file in (killed / name / CHECKPOINTS_FOLDER).glob("*/complete.json"))
        yield f"killed {name}", found == ["checkpoint-2"], f"kept {', '.join(found)}"
    output = run_job("resume_alone", killed, 1, fails=True)
    is_refused = "got ddp and a checkpoint of deepspeed_zero3 on 2 processes" in output
    yield "resume on one process", is_refused, "is refused" if is_refused else output
    run_job("resume", killed)
    for name in INTERRUPTED:
        weight = difference(name, killed, whole)
        histories = [json.loads((where / name / "training.json").read_text())["history"] for where in (killed, whole)]
        loss = history_difference(*histories, "loss")
        yield f"resumed {name}", weight == loss == 0, f"largest difference: loss {loss:.1e}, weight {weight:.1e}"


def check_command(folder):
    """Yields the check of a whole run: importance, pruning, fine-tune, predictions."""
    records = []
    for count, parallel in ((1, "ddp"), (NUM_PROCESSES, "deepspeed_zero3")):
        run = folder / f"command-{parallel}"
        run.mkdir()
        rows = [{"question": f"{n} + {n}?", "options": [str(2 * n), "none"], "answer": 0} for n in range(14)]
        (run / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        chosen = [each.replace("method=last", "method=gradpruner") for each in arguments(run)]
        done = launch(count, "experiments.run", *chosen, f"finetune.parallel={parallel}")
        if done.returncode:
            raise RuntimeError(f"experiments.run ended with status {done.returncode}:\n{done.stdout}")
        records.append(json.loads((run / "run" / "record.json").read_text()))
    one, two = records
    plans = [record["pruning"]["pruned_layers"] for record in records]
    loss = abs(two["finetune"]["loss"] - one["finetune"]["loss"])
    likelihood = abs(two["metrics"]["answer_nll"] - one["metrics"]["answer_nll"])
    is_equal = plans[0] == plans[1] and loss <= MAX_LOSS_DIFFERENCE and likelihood <= MAX_WEIGHT_DIFFERENCE
    text = f"prunes layers {plans[1]} and {plans[0]}, difference: loss {loss:.1e}, answer_nll {likelihood:.1e}"
    yield "experiments.run", is_equal, text


def main():
    """Returns the exit status."""
    quiet_libraries()
    passed = []
    with tempfile.TemporaryDirectory() as text:
        for check in (check_training, check_resume, check_command):
            for name, is_right, found in check(Path(text)):
                print(f"{'ok' if is_right else 'FAILED':8}{name:24}{found}", flush=True)
                passed.append(is_right)
    return int(not all(passed))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        work(*sys.argv[2:])
    else:
        sys.exit(main())
