"""Third part of `make test-vllm`: `evaluation.engine=vllm` gives the answers of transformers, in runs of this project.

    python -m tests.vllm.check_engine .venv-vllm/bin/python

Each model answers the same questions with both engines; predictions must be equal in all but rounding. A worker is
killed after its first batch, and the same call must go on with the others. Prints one line per check and exits with 1
if one fails.
"""

import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from gradpruner.encoding import Encoder
from gradpruner.evaluate.base import JOURNAL_FILE, predict_all
from gradpruner.evaluate.generate import Generation
from gradpruner.evaluate.vllm_engine import VllmWorker, generate_with_vllm
from gradpruner.files import read_jsonl
from gradpruner.models.spec import ModelSpec
from gradpruner.plan import PruningPlan
from gradpruner.runtime import quiet_libraries
from gradpruner.surgery import apply_plan
from gradpruner.tasks.arc_easy import ArcEasy
from tests.vllm.make_checkpoints import ASSETS, LLAMA3, SMOLLM2_PRUNED

NUM_ROWS, BATCH_SIZE, NUM_NEW_TOKENS = 12, 4, 32
MODELS = {
    "tiny-llama": (ModelSpec("random:llama", dtype="float32", config=LLAMA3), (1, 4)),
    "smollm2-135m": (ModelSpec("packaged:smollm2-135m", dtype="float32"), SMOLLM2_PRUNED),
}


def check(name: str, python: str, folder: Path) -> str:
    """Returns one line about a model."""
    spec, pruned = MODELS[name]
    model, tokenizer = spec.load(ASSETS), spec.load_tokenizer(ASSETS)
    plan = PruningPlan(num_hidden_layers=model.config.num_hidden_layers, pruned_layers=pruned, method="test")
    model = apply_plan(model, plan).eval()
    task = ArcEasy(prompt="Question: {question}\nAnswer:", choice=" {choice}", max_test_samples=NUM_ROWS,
                   max_new_tokens=NUM_NEW_TOKENS)  # fmt: skip
    examples, encoder = task.load("test", seed=0), Encoder(tokenizer, task.max_length)
    rows: dict[str, list[dict[str, Any]]] = {}
    for engine in ("transformers", "vllm"):
        evaluation = Generation(BATCH_SIZE, engine=engine, vllm_python=python).resolve(task, examples)
        questions = evaluation.questions(examples, encoder)
        own = folder / f"{name}-{engine}"
        own.mkdir()
        if engine == "transformers":
            rows[engine] = read_jsonl(predict_all(lambda: model, evaluation, encoder, questions, own))
            continue
        with mock.patch.object(VllmWorker, "answer", _killed_later()):
            try:
                generate_with_vllm(lambda: model, evaluation, encoder, questions, own)
            except ChildProcessError as error:
                print(f"{name}: as planned: {str(error).splitlines()[0]}", flush=True)
        num_kept = len(read_jsonl(own / JOURNAL_FILE))
        rows[engine] = read_jsonl(generate_with_vllm(lambda: model, evaluation, encoder, questions, own))
    equal = sum(ours["generated"] == theirs["generated"] for ours, theirs in zip(*rows.values(), strict=True))
    nll = max(abs(ours["answer_nll"] - theirs["answer_nll"]) for ours, theirs in zip(*rows.values(), strict=True))
    is_good = equal == NUM_ROWS and num_kept == BATCH_SIZE and nll < 1e-3
    tokens = sum(row["generated_tokens"] for row in rows["vllm"])
    return (
        f"{'ok' if is_good else 'FAILED':8}{name:16}{equal} of {NUM_ROWS} answers are equal, with {tokens} tokens; "
        f"{num_kept} answers kept of a killed worker"
    )


def _killed_later() -> Any:
    """Returns `VllmWorker.answer`, which kills the worker before its second batch."""
    original, calls = VllmWorker.answer, []

    def answer(self: VllmWorker, prompts: Any) -> list[list[int]]:
        calls.append(1)
        if len(calls) == 2:
            assert self.process is not None
            os.kill(self.process.pid, signal.SIGKILL)
        return original(self, prompts)

    return answer


def main(python: str) -> int:
    """Returns the exit status."""
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        lines = [check(name, python, Path(folder)) for name in MODELS]
    print("\n" + "\n".join(lines))
    return int(any(line.startswith("FAILED") for line in lines))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
