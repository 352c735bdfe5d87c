"""Generate answers with vLLM, which runs in an environment of its own: it needs an older transformers than we do.

Our process scores the reference answers, saves the model, and starts `vllm_worker` with the Python of that environment.
Batches travel as token ids, and our tokenizer decodes the answers. They go through the journal of `predict_all` like
those of transformers: an interrupted evaluation continues with the next batch. Batches are fixed, and vLLM shares
nothing between them, so a continued evaluation ends with the same file.
"""

import dataclasses
import json
import os
import re
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil
from accelerate.utils.memory import clear_device_cache  # type: ignore[import-untyped]
from transformers import PreTrainedModel

from gradpruner import processes
from gradpruner.checkpoints.checkpoint import MAX_SHARD_SIZE, SHAPE_FILE
from gradpruner.checkpoints.older_readers import add_older_keys
from gradpruner.encoding import Encoder
from gradpruner.evaluate import vllm_worker
from gradpruner.evaluate.base import PREDICTIONS_FILE, Question, predict_all
from gradpruner.evaluate.generate import Generation, end_tokens, prediction_rows
from gradpruner.evaluate.vllm_python import python_path
from gradpruner.files import read_jsonl, write_json
from gradpruner.models.shape import ModelShape, config_shape, describe_shape, model_shape
from gradpruner.runtime import default_device
from gradpruner.waiting import say_if_waiting

WORK_FOLDER = "vllm"  # holds what follows until all questions are answered
JOB_FILE = "job.json"  # written last
SCORES_FOLDER = "references"
LOG_FILE = "worker.log"
END_LINES = 15  # of the worker's stderr in an error
NUM_REASONS = 3
STOP_SECONDS = 10.0
POLL_SECONDS = 1.0
# Unless the environment has them. Without a size of the key-value cache, vLLM on a CPU takes nearly all memory for it.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
SOCKETS_VARIABLE = "VLLM_RPC_BASE_PATH"
_REASON = re.compile(r"\b[A-Za-z_.]*(?:Error|Exception|Interrupt): .*")


def generate_with_vllm(
    load_model: Callable[[], PreTrainedModel],
    evaluation: Generation,
    encoder: Encoder,
    questions: Sequence[Question],
    directory: Path,
) -> Path:
    """Answers every question with vLLM and writes `predictions.jsonl`, as `predict_all` does.

    Args:
        load_model: returns the model as its checkpoint has it; called only if needed. Nothing else may hold the model,
            since vLLM needs the memory.
        evaluation: how to answer, resolved.
        encoder: the encoder that made the questions.
        questions: the questions to answer.
        directory: folder to write to; what an interrupted call finished there is not done again.

    Raises:
        ChildProcessError: if vLLM fails, with the end of what it wrote to stderr.
        ValueError: if the layers of the model differ in width.
    """
    work = directory / WORK_FOLDER
    with ExitStack() as stack:

        def start() -> _Answerer:
            if not (work / JOB_FILE).is_file():
                prepare(load_model, evaluation, encoder, questions, work)
            clear_device_cache(garbage_collection=True)
            job = json.loads((work / JOB_FILE).read_text(encoding="utf-8"))
            scores = read_jsonl(work / SCORES_FOLDER / PREDICTIONS_FILE)
            worker = stack.enter_context(VllmWorker(str(evaluation.vllm_python), work / JOB_FILE))
            return _Answerer(worker, set(job["ends"]), {row["id"]: (row["score"], row["num_tokens"]) for row in scores})

        path = predict_all(start, _VllmGeneration(**_fields(evaluation)), encoder, questions, directory)
    shutil.rmtree(work, ignore_errors=True)
    return path


def check_stock_shape(shape: ModelShape, stock: ModelShape) -> None:
    """Refuses a model that vLLM cannot load.

    Args:
        shape: shape of the model.
        stock: shape of the model that its config.json describes.

    Raises:
        ValueError: if they differ.
    """
    if shape != stock:
        sizes = "; ".join(f"{name}: {size}" for name, size in describe_shape(shape).items())
        raise ValueError(
            f"vLLM builds a model from config.json alone and reads no {SHAPE_FILE}, got layers that config.json cannot "
            f"describe ({sizes}). Set evaluation.engine=transformers, or choose a method that prunes whole layers."
        )


def prepare(
    load_model: Callable[[], PreTrainedModel],
    evaluation: Generation,
    encoder: Encoder,
    questions: Sequence[Question],
    work: Path,
) -> None:
    """Writes all that a worker needs, and the scores of the reference answers, to the folder `work`.

    Raises:
        ValueError: if the layers of the model differ in width.
    """
    model = load_model()
    check_stock_shape(model_shape(model), config_shape(model.config))
    (work / SCORES_FOLDER).mkdir(parents=True, exist_ok=True)
    scoring = _ReferenceScores(**_fields(evaluation))
    predict_all(lambda: model, scoring, encoder, questions, work / SCORES_FOLDER)
    checkpoint = work / vllm_worker.CHECKPOINT
    shutil.rmtree(checkpoint, ignore_errors=True)
    model.save_pretrained(checkpoint, max_shard_size=MAX_SHARD_SIZE)
    add_older_keys(checkpoint)
    assert evaluation.max_new_tokens is not None
    job = {
        "ends": sorted(end_tokens(model, encoder)),
        "max_new_tokens": evaluation.max_new_tokens,
        "max_length": max(len(question.prompt) for question in questions) + evaluation.max_new_tokens,
        "batch_size": evaluation.batch_size,
        "dtype": evaluation.for_dtype(model.dtype).vllm_dtype,
        "enforce_eager": default_device().type == "cpu",  # which may lack what compiling needs
    }
    write_json(work / JOB_FILE, job)


def _fields(evaluation: Generation) -> dict[str, Any]:
    return {field.name: getattr(evaluation, field.name) for field in dataclasses.fields(evaluation)}


class VllmWorker:
    """A process that answers batches until the context is left.

    Args:
        python: Python of an environment that has vLLM.
        job_file: the worker's job; the checkpoint and the log lie beside it.
    """

    def __init__(self, python: str, job_file: Path) -> None:
        self._python, self._job_file = python_path(python), job_file
        self._log = job_file.with_name(LOG_FILE)
        self._sockets: tempfile.TemporaryDirectory[str] | None = None  # vLLM leaves them where it makes them
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self._sockets = tempfile.TemporaryDirectory(prefix="gradpruner-vllm-")
        own = {SOCKETS_VARIABLE: self._sockets.name}
        with self._log.open("w", encoding="utf-8") as log:
            # In a session of its own: Ctrl-C is for us, and we end all processes of vLLM at once.
            self.process = subprocess.Popen(
                [self._python, str(vllm_worker.__file__), str(self._job_file.absolute())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
                env=ENVIRONMENT | processes.alone() | own,  # vLLM would take the launcher's variables for its own
                start_new_session=True,
            )
        try:
            with say_if_waiting(f"vLLM to load the model; it writes to {self._log}"):
                self._receive()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, error: type[BaseException] | None, *details: object) -> None:
        if error is None and self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()  # at which it ends by itself
            with say_if_waiting("vLLM to end"), suppress(subprocess.TimeoutExpired):
                self.process.wait(3 * STOP_SECONDS)
        self._stop()

    def answer(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Returns the generated tokens of each prompt, with the token that ended it.

        Raises:
            ChildProcessError: if vLLM fails.
        """
        assert self.process is not None and self.process.stdin is not None
        with suppress(BrokenPipeError):  # `_receive` says why
            self.process.stdin.write(json.dumps(prompts) + "\n")
            self.process.stdin.flush()
        answers: list[list[int]] = self._receive()
        return answers

    def _receive(self) -> Any:
        assert self.process is not None and self.process.stdout is not None
        # vLLM's processes hold the pipe as well, so it does not end with the worker.
        stream, is_ready = self.process.stdout, False
        while not is_ready and self.process.poll() is None:
            is_ready = bool(select.select([stream], [], [], POLL_SECONDS)[0])
        line = stream.readline() if is_ready else ""
        if line.endswith("\n"):
            return json.loads(line)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_SECONDS)
        raise ChildProcessError(self._failure(self.process.poll()))

    def _failure(self, status: int | None) -> str:
        """Returns the message for a worker that has ended: the errors in its log, and the end of the log."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        reasons = dict.fromkeys(found[0] for line in lines if (found := _REASON.search(line)))
        named = "; ".join(list(reasons)[:NUM_REASONS]) or "it names no error"
        how = "was killed, as the system does when memory runs out" if status == -signal.SIGKILL else f"status {status}"
        end = "\n  ".join(lines[-END_LINES:])
        return (
            f"vLLM could not answer the questions, got a worker that ended ({how}): {named}. Correct that and run the "
            "same command again, which keeps the answers so far, or set evaluation.engine=transformers. The end of "
            f"{self._log}:\n  {end}"
        )

    def _stop(self) -> None:
        """Ends the worker and the processes that it has started."""
        process = self.process
        if process is None:
            return
        for stop in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, stop)
            # Not killed at once: a process of Python's then frees the shared memory of those that have ended.
            deadline = time.monotonic() + STOP_SECONDS
            while (process.poll() is None or _is_running(process.pid)) and time.monotonic() < deadline:
                time.sleep(0.05)
        for stream in (process.stdin, process.stdout):
            with suppress(OSError):  # what is left in a buffer cannot be written any more
                stream and stream.close()
        self.process = None
        if self._sockets is not None:
            self._sockets.cleanup()


def _is_running(group: int) -> bool:
    """Returns whether any process of a group runs; those that have ended may stay listed as zombies."""
    for process in psutil.process_iter(["status"]):
        with suppress(ProcessLookupError):
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                return True
    return False


@dataclass(frozen=True)
class _Answerer:
    """What stands where other evaluations have the model.

    Attributes:
        worker: a started worker.
        ends: ids that end an answer.
        scores: score and number of tokens of each reference answer, by the id of its question.
    """

    worker: VllmWorker
    ends: set[int]
    scores: dict[str, tuple[float, int]]


class _VllmGeneration(Generation):
    """Generation whose answers come from a worker."""

    def predict(self, model: Any, encoder: Encoder, batch: Sequence[Question]) -> list[dict[str, Any]]:
        """Answers a batch; `model` is an `_Answerer`."""
        answers = model.worker.answer([question.prompt for question in batch])
        scores = [model.scores[question.example.id] for question in batch]
        return prediction_rows(encoder, batch, scores, answers, model.ends)


class _ReferenceScores(Generation):
    """Generation that generates nothing, and only scores the reference answers."""

    def predict(self, model: PreTrainedModel, encoder: Encoder, batch: Sequence[Question]) -> list[dict[str, Any]]:
        """Scores a batch."""
        scores = self.score_references(model, batch)
        return [
            {"id": question.example.id, "score": score, "num_tokens": num_tokens}
            for question, (score, num_tokens) in zip(batch, scores, strict=True)
        ]
