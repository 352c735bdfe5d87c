"""Scores options with lm-evaluation-harness; `benchmarks.option_scoring` runs this file in a venv that has lm_eval.

    .venv-lm-eval/bin/python benchmarks/lm_eval_runner.py JOB.json RESULT.json

JOB.json has `model` (a folder), `rows` (a JSONL file with prompt, choices and label), `delimiter` (between prompt and
choice), `batch_sizes` and `num_threads`. RESULT.json has the attributes of `benchmarks.option_scoring.Result`. This
file imports nothing from gradpruner, which is not installed in the venv.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

NUM_WARMUP_REQUESTS = 8


class TimedModel(HFLM):
    """lm_eval's `hf` backend, with the time of its scoring after a warm-up, tokenization included."""

    seconds = 0.0

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Scores (context, continuation) pairs."""
        super().loglikelihood(requests[:NUM_WARMUP_REQUESTS], disable_tqdm=True)
        start = time.perf_counter()
        answers = super().loglikelihood(requests, disable_tqdm)
        self.seconds = time.perf_counter() - start
        return answers


def task_config(rows: str, delimiter: str) -> dict[str, Any]:
    """Returns the task of a rows file; it names columns, not templates, so that the model sees unchanged texts."""
    return {
        "task": "rows",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": rows}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "prompt",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "target_delimiter": delimiter,
        "num_fewshot": 0,
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }


def main(job_file: str, result_file: str) -> None:
    """Runs one job."""
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    torch.set_num_threads(job["num_threads"])
    model = TimedModel(pretrained=job["model"], dtype="float32", device="cpu", batch_size=1)
    seconds = {}
    for batch_size in job["batch_sizes"]:
        model.batch_size_per_gpu = batch_size
        evaluated = simple_evaluate(
            model,
            tasks=[task_config(job["rows"], job["delimiter"])],
            task_manager=TaskManager(include_defaults=False),
            bootstrap_iters=0,
        )
        seconds[batch_size] = model.seconds
    samples = sorted(evaluated["samples"]["rows"], key=lambda sample: sample["doc_id"])
    result = {
        "seconds": seconds,
        "log_likelihoods": [[float(score) for score, _ in sample["filtered_resps"]] for sample in samples],
        "acc": evaluated["results"]["rows"]["acc,none"],
        "acc_norm": evaluated["results"]["rows"]["acc_norm,none"],
    }
    Path(result_file).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
