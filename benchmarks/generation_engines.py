"""Generated answers of transformers and of vLLM: equal tokens, and tokens per second.

    python -m benchmarks.generation_engines

SmolLM2-135M without 12 of its 30 layers, float32, answers ARC-Easy questions greedily, as `evaluation=generate` does
with either engine: the same batches of token ids, the same ends. vLLM runs in `.venv-vllm` (`make vllm`). Loading is
not timed; the first batch is a warm-up. Exits with 1 if an answer differs although transformers' best token leads the
second by over `TIE`, in log-probability, where the answers part.
"""

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from experiments.config import load_option
from gradpruner.encoding import Encoder
from gradpruner.evaluate.base import Question
from gradpruner.evaluate.generate import Generation, end_tokens
from gradpruner.evaluate.vllm_engine import JOB_FILE, VllmWorker, prepare
from gradpruner.evaluate.vllm_python import find_vllm
from gradpruner.models.spec import ModelSpec
from gradpruner.plan import PruningPlan
from gradpruner.runtime import environment, quiet_libraries
from gradpruner.surgery import apply_plan
from gradpruner.tasks.arc_easy import ArcEasy

ROOT = Path(__file__).resolve().parents[1]
ASSETS_DIR = ROOT / ".cache" / "assets"
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
MODEL = ModelSpec("packaged:smollm2-135m", dtype="float32")
PRUNED = (4, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27)  # spread out, so that the model still writes text
TIE = 1e-3
BUSY_PERCENT = 10.0  # of all cores, by other processes


@dataclass(frozen=True)
class Result:
    """Answers of one engine to all questions.

    Attributes:
        tokens: per question, up to the token that ended it.
        seconds: of all batches after the warm-up.
    """

    tokens: list[list[int]]
    seconds: float

    @property
    def num_tokens(self) -> int:
        """Number of generated tokens."""
        return sum(map(len, self.tokens))

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second."""
        return self.num_tokens / self.seconds


@dataclass(frozen=True)
class Comparison:
    """Results of both engines, and transformers' lead of the best token where answers first differ."""

    ours: Result
    vllm: Result
    leads: list[float]


def pruned_model() -> PreTrainedModel:
    """Returns the model without `PRUNED`."""
    model = MODEL.load(ASSETS_DIR)
    count = model.config.num_hidden_layers
    return apply_plan(model, PruningPlan(num_hidden_layers=count, pruned_layers=PRUNED, method="benchmark")).eval()


def answer(answer_batch: Callable[[Sequence[Question]], list[list[int]]], batches: Sequence[Sequence[Question]],
           ends: set[int]) -> Result:  # fmt: skip
    """Answers a batch to warm up, then all batches."""
    answer_batch(batches[0])
    start = time.perf_counter()
    answers = [tokens for batch in batches for tokens in answer_batch(batch)]
    seconds = time.perf_counter() - start
    cut = [next((at + 1 for at, token in enumerate(tokens) if token in ends), len(tokens)) for tokens in answers]
    return Result([tokens[:end] for tokens, end in zip(answers, cut, strict=True)], seconds)


@torch.inference_mode()
def lead(model: PreTrainedModel, prompt: list[int], ours: list[int], theirs: list[int]) -> float:
    """Returns how far transformers' best token leads its second where two answers first differ."""
    same = next((at for at, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), len(theirs))
    logits = model(torch.tensor([prompt + ours[:same]])).logits[0, -1].log_softmax(-1)
    best, second = logits.topk(2).values.tolist()
    return float(best - second)


def compare(evaluation: Generation, questions: Sequence[Question], encoder: Encoder) -> Comparison:
    """Answers all questions with transformers, then with vLLM."""
    size = evaluation.batch_size
    batches = [questions[start : start + size] for start in range(0, len(questions), size)]
    model = pruned_model()
    ends = end_tokens(model, encoder)
    with torch.inference_mode():
        ours = answer(lambda batch: evaluation.generate(model, encoder, batch), batches, ends)
    with tempfile.TemporaryDirectory() as folder:
        prepare(lambda: model, evaluation, encoder, questions, Path(folder))
        gc.collect()
        with VllmWorker(str(PYTHON), Path(folder) / JOB_FILE) as worker:
            theirs = answer(lambda batch: worker.answer([question.prompt for question in batch]), batches, ends)
    leads = [
        lead(model, question.prompt, own, other)
        for question, own, other in zip(questions, ours.tokens, theirs.tokens, strict=True)
        if own != other
    ]
    return Comparison(ours, theirs, leads)


def results_table(comparisons: dict[int, Comparison], num_rows: int) -> Table:
    """Returns a table with one row per batch size."""
    table = Table(
        title=f"Greedy answers: transformers / vLLM, {MODEL.name} without {len(PRUNED)} layers, {num_rows} rows"
    )
    for column in ("batch size", "equal answers", "tokens", "seconds", "tokens / s", "ratio"):
        table.add_column(column, justify="right", no_wrap=True)
    for size, one in comparisons.items():
        table.add_row(
            str(size),
            f"{num_rows - len(one.leads)} of {num_rows}",
            f"{one.ours.num_tokens} / {one.vllm.num_tokens}",
            f"{one.ours.seconds:.1f} / {one.vllm.seconds:.1f}",
            f"{one.ours.tokens_per_second:.1f} / {one.vllm.tokens_per_second:.1f}",
            f"{one.vllm.tokens_per_second / one.ours.tokens_per_second:.2f}x",
        )
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.generation_engines", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--rows", type=int, default=64, help="questions (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=64, help="at most, per answer (default: %(default)s)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 64], help="default: %(default)s")
    options = parser.parse_args(arguments)
    if min(options.rows, options.new_tokens, *options.batch_sizes) < 1:
        parser.error("--rows, --new-tokens and --batch-sizes must be 1 or more.")
    quiet_libraries()
    versions = find_vllm(str(PYTHON))
    arc = load_option("dataset", "arc_easy")
    task = ArcEasy(
        **{key: arc[key] for key in ("prompt", "prompt_with_options", "choice")},
        **{"show_options": True, "max_test_samples": options.rows, "max_new_tokens": options.new_tokens},
    )
    examples, encoder = task.load("test", seed=0), Encoder(MODEL.load_tokenizer(ASSETS_DIR), task.max_length)
    busy_percent = psutil.cpu_percent(interval=1.0)
    comparisons = {}
    for size in options.batch_sizes:
        evaluation = Generation(batch_size=size, engine="vllm", vllm_python=str(PYTHON)).resolve(task, examples)
        questions = sorted(evaluation.questions(examples, encoder), key=lambda question: -len(question.prompt))
        comparisons[size] = compare(evaluation, questions, encoder)
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 140)  # a pipe has no width; do not cut columns for it
    console.print(results_table(comparisons, len(examples)))
    machine = environment()
    console.print(
        f"cpu ({machine['platform']}), {machine['num_threads']} threads, torch {machine['packages']['torch']}, "
        f"transformers {machine['packages']['transformers']}; {versions}.",
        highlight=False,
    )
    if busy_percent > BUSY_PERCENT:
        console.print(f"[yellow]Busy machine[/]: {busy_percent:.0f} % of the cores were taken before the start.")
    failed = 0
    for size, one in comparisons.items():
        for value in one.leads:
            is_tie = value <= TIE
            failed += not is_tie
            console.print(f"batch size {size}: an answer differs where the best token leads by {value:.1e}"
                          + (", a tie" if is_tie else ": [red]FAILED[/]"))  # fmt: skip
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
