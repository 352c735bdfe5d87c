"""Option scoring by likelihood against lm-evaluation-harness: equal numbers, and time.

    python -m benchmarks.option_scoring

Both sides score the same rows of a file with SmolLM2-135M, float32, the same torch and number of threads, in separate
processes, in turns: lm_eval in `.venv-lm-eval`, which is made on first use, this project in this module with --role.
Each side uses the batch size that is fastest on some of the rows. Exits with 1 if the two disagree, or if HellaSwag
takes over 1 / `MIN_RATIO` of lm_eval's time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.own_venv import make_venv
from experiments.config import load_option
from gradpruner.encoding import Encoder
from gradpruner.evaluate.base import predict_all
from gradpruner.evaluate.likelihood import Likelihood
from gradpruner.files import read_jsonl, write_json, write_jsonl
from gradpruner.models.spec import ModelSpec
from gradpruner.runtime import environment, quiet_libraries
from gradpruner.tasks import Example
from gradpruner.tasks.arc_easy import ArcEasy
from gradpruner.tasks.hellaswag import HellaSwag
from gradpruner.tasks.piqa import Piqa
from gradpruner.tasks.winogrande import Winogrande

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv-lm-eval"
LM_EVAL_VERSION = "0.4.13"
ASSETS_DIR = ROOT / ".cache" / "assets"
MODEL = ModelSpec("packaged:smollm2-135m", dtype="float32")
TASKS = {"arc_easy": ArcEasy, "piqa": Piqa, "hellaswag": HellaSwag, "winogrande": Winogrande}
SIDES = ("ours", "lm_eval")
BATCH_SIZES = {"ours": (4, 8, 16, 32), "lm_eval": (1, 2, 4, 8, 16, 32)}  # in questions, and in options
PROBE_SHARE = 5  # every fifth row is used to choose the batch size
DELIMITER = " "
MAX_LENGTH = 2048  # a row that needs more is an error on our side; lm_eval would shorten it
MAX_DIFFERENCE = 1e-3  # of a log-likelihood
MIN_RATIO = 2.0
BUSY_PERCENT = 10.0  # of all cores, by other processes


@dataclass(frozen=True)
class Result:
    """Result of one process of either side.

    Attributes:
        seconds: batch size -> time to tokenize and score all rows, without loading and warm-up.
        log_likelihoods: one list per row with one value per option, at the last batch size, like `acc` and `acc_norm`.
        acc: accuracy by the summed log-likelihood.
        acc_norm: accuracy by the sum divided by the option's characters.
    """

    seconds: dict[str, float]
    log_likelihoods: list[list[float]]
    acc: float
    acc_norm: float


@dataclass(frozen=True)
class Comparison:
    """Results of both sides on one dataset.

    Attributes:
        batch_sizes: side -> batch size that was fastest on some of the rows.
        results: side -> one result per repeat, at that batch size.
    """

    batch_sizes: dict[str, int]
    results: dict[str, list[Result]]

    @property
    def num_rows(self) -> int:
        """Number of scored rows."""
        return len(self.results["ours"][0].log_likelihoods)

    @property
    def max_difference(self) -> float:
        """Largest difference between two log-likelihoods."""
        pairs = zip(*(self.results[side][0].log_likelihoods for side in SIDES), strict=True)
        return max(abs(a - b) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True))

    @property
    def ratio(self) -> float:
        """lm_eval's time divided by ours."""
        return self.seconds("lm_eval") / self.seconds("ours")

    def seconds(self, side: str) -> float:
        """Returns the time of the fastest repeat, because other work on the machine only adds time."""
        return min(time for result in self.results[side] for time in result.seconds.values())


def load_rows(dataset: str, num_rows: int) -> list[dict[str, object]]:
    """Returns rows of a packaged test split, in its order, rendered with the templates of `conf/dataset/`."""
    config = load_option("dataset", dataset)
    task = TASKS[dataset](prompt=config["prompt"], choice=config["choice"], max_test_samples=num_rows)
    examples = task.load("test", seed=0)
    assert all(example.delimiter == DELIMITER for example in examples)
    return [
        {
            "id": example.id,
            "prompt": example.prompt,
            "choices": [choice.removeprefix(DELIMITER) for choice in example.choices],
            "label": example.label,
        }
        for example in examples
    ]


def score(job: dict[str, object]) -> Result:
    """Runs our side of a job in this process; `benchmarks.lm_eval_runner` describes a job."""
    torch.set_num_threads(job["num_threads"])
    model, tokenizer = MODEL.load(ASSETS_DIR), MODEL.load_tokenizer(ASSETS_DIR)
    encoder = Encoder(tokenizer, MAX_LENGTH)
    examples = []
    for row in read_jsonl(Path(job["rows"])):
        choices = tuple(DELIMITER + choice for choice in row["choices"])
        examples.append(Example(row["id"], row["prompt"], choices[row["label"]], choices, row["label"], DELIMITER))
    seconds = {}
    for batch_size in job["batch_sizes"]:
        evaluation = Likelihood(batch_size=batch_size)
        evaluation.predict(model, encoder, evaluation.questions(examples[:2], encoder))  # warm-up
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            questions = evaluation.questions(examples, encoder)
            file = predict_all(lambda: model, evaluation, encoder, questions, Path(folder))
            seconds[str(batch_size)] = time.perf_counter() - start
            predictions = read_jsonl(file)
    metrics, _ = evaluation.measure(predictions, examples)
    scores = [prediction["log_likelihoods"] for prediction in predictions]
    return Result(seconds, scores, metrics["accuracy"], metrics["accuracy_norm"])


def run(side: str, rows: Path, batch_sizes: Sequence[int]) -> Result:
    """Scores a file of rows in a fresh process.

    Raises:
        RuntimeError: if that process fails, with its stderr.
    """
    folder = rows.parent
    job = {
        "model": MODEL.source(ASSETS_DIR),
        "rows": str(rows),
        "delimiter": DELIMITER,
        "batch_sizes": list(batch_sizes),
        "num_threads": torch.get_num_threads(),
    }
    write_json(folder / "job.json", job)
    files = [str(folder / "job.json"), str(folder / "result.json")]
    if side == "ours":
        command = [sys.executable, "-m", "benchmarks.option_scoring", "--role", *files]
    else:
        command = [str(VENV / "bin" / "python"), str(ROOT / "benchmarks" / "lm_eval_runner.py"), *files]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "datasets")}
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | offline, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise RuntimeError(f"The process of {side} ended with status {done.returncode}:\n{done.stderr}")
    return Result(**json.loads((folder / "result.json").read_text(encoding="utf-8")))


def compare(dataset: str, num_rows: int, num_repeats: int, folder: Path) -> Comparison:
    """Finds the best batch size per side, then scores all rows with both sides in turns."""
    rows = load_rows(dataset, num_rows)
    probe, whole = folder / f"{dataset}-probe.jsonl", folder / f"{dataset}.jsonl"
    write_jsonl(probe, rows[::PROBE_SHARE])
    write_jsonl(whole, rows)
    batch_sizes = {}
    for side in SIDES:
        seconds = run(side, probe, BATCH_SIZES[side]).seconds
        batch_sizes[side] = int(min(seconds, key=seconds.__getitem__))
    results: dict[str, list[Result]] = {side: [] for side in SIDES}
    for _ in range(num_repeats):
        for side in SIDES:
            results[side].append(run(side, whole, [batch_sizes[side]]))
    return Comparison(batch_sizes, results)


def results_table(comparisons: dict[str, Comparison]) -> Table:
    """Returns a table with one row per dataset."""
    table = Table(title=f"Scoring options: this project / lm_eval {LM_EVAL_VERSION}, {MODEL.name}")
    for column in ("dataset", "rows", "max difference", "acc", "acc_norm", "seconds", "batch size", "ratio"):
        table.add_column(column, justify="left" if column == "dataset" else "right", no_wrap=True)
    for dataset, one in comparisons.items():
        ours, theirs = (one.results[side][0] for side in SIDES)
        table.add_row(
            dataset,
            str(one.num_rows),
            f"{one.max_difference:.1e}",
            f"{ours.acc:.4f} / {theirs.acc:.4f}",
            f"{ours.acc_norm:.4f} / {theirs.acc_norm:.4f}",
            " / ".join(f"{one.seconds(side):.1f}" for side in SIDES),
            " / ".join(str(one.batch_sizes[side]) for side in SIDES),
            f"{one.ratio:.2f}x",
        )
    return table


def failures(comparisons: dict[str, Comparison]) -> list[str]:
    """Returns the disagreements of the two sides, and the goal if it is missed."""
    failed = []
    for dataset, one in comparisons.items():
        ours, theirs = (one.results[side][0] for side in SIDES)
        if not one.max_difference <= MAX_DIFFERENCE:
            failed.append(f"{dataset}: log-likelihoods differ by {one.max_difference:.1e}, over {MAX_DIFFERENCE:.0e}.")
        if (ours.acc, ours.acc_norm) != (theirs.acc, theirs.acc_norm):
            failed.append(f"{dataset}: accuracies differ.")
    if "hellaswag" in comparisons and not comparisons["hellaswag"].ratio >= MIN_RATIO:
        failed.append(f"hellaswag: {comparisons['hellaswag'].ratio:.2f} times as fast, {MIN_RATIO} is the goal.")
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.option_scoring", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200, help="of each dataset (default: %(default)s)")
    parser.add_argument("--datasets", nargs="+", choices=TASKS, default=list(TASKS), help="default: all")
    parser.add_argument("--repeats", type=int, default=2, help="processes a side and dataset (default: %(default)s)")
    parser.add_argument("--role", nargs=2, metavar=("JOB", "RESULT"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    quiet_libraries()
    if options.role:
        job, result = map(Path, options.role)
        write_json(result, asdict(score(json.loads(job.read_text(encoding="utf-8")))))
        return 0
    if min(options.rows, options.repeats) < 1:
        parser.error(f"--rows and --repeats must be 1 or more, got {options.rows} and {options.repeats}.")
    make_venv(VENV, "lm_eval", LM_EVAL_VERSION, extra="hf")
    MODEL.source(ASSETS_DIR)  # converted here, not in a timed process
    busy_percent = psutil.cpu_percent(interval=1.0)
    with tempfile.TemporaryDirectory() as folder:
        comparisons = {
            dataset: compare(dataset, options.rows, options.repeats, Path(folder)) for dataset in options.datasets
        }
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 140)  # a pipe has no width; do not cut columns for it
    console.print(results_table(comparisons))
    machine = environment()
    console.print(
        f"cpu ({machine['platform']}), {machine['num_threads']} threads, torch {machine['packages']['torch']}. "
        f"Seconds: tokenizing and scoring, the fastest of {options.repeats}. Batch size: questions / options.",
        highlight=False,
    )
    if busy_percent > BUSY_PERCENT:
        console.print(f"[yellow]Busy machine[/]: {busy_percent:.0f} % of the cores were taken before the start.")
    failed = failures(comparisons)
    for line in failed:
        console.print(f"[red]FAILED[/] {line}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
