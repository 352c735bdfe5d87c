"""Generates greedily with vLLM, in an environment that has it. `vllm_engine` starts this file.

    python vllm_worker.py            prints {"package": ..., "versions": {...}}, or null where there is no vLLM
    python vllm_worker.py JOB.json   answers batches until stdin ends

A batch is a line of JSON on stdin, a list of prompts as token ids. Its answers are a line on stdout, a list of lists of
token ids, each with the token that ended it. The first line on stdout is `READY`, once the model is loaded. JOB.json is
what `vllm_engine` wrote; the model is in the folder `checkpoint` beside it. This file imports nothing of this project.
"""

import importlib.util
import json
import os
import queue
import signal
import sys
import threading
import time
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

READY = "ready"
CHECKPOINT = "checkpoint"  # folder
MAX_SEQUENCES = 256  # answered at once, at most; vLLM queues the rest of a batch
GRACE_SECONDS = 2.0  # for the batch at hand, once there is nobody to answer
KILL_SECONDS = 10.0  # from SIGTERM to SIGKILL


def main(arguments: list[str]) -> None:
    """Runs either form of the command."""
    # Modules beside this file, such as metrics.py, must not take the place of others of that name.
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != here]
    if arguments:
        answer_batches(Path(arguments[0]), claim_stdout())
    else:
        print(json.dumps(find_versions()))


def find_versions() -> dict[str, Any] | None:
    """Returns vLLM's distribution, whose name depends on the build, and the versions that decide answers."""
    if importlib.util.find_spec("vllm") is None:
        return None
    package = metadata.packages_distributions().get("vllm", ["vllm"])[0]
    versions = {}
    for name in (package, "torch", "transformers"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"package": package, "versions": versions}


def answer_batches(job_file: Path, answers: TextIO) -> None:
    """Loads the model and answers batches until stdin ends."""
    from vllm import LLM, SamplingParams

    job = json.loads(job_file.read_text(encoding="utf-8"))
    model = LLM(
        str(job_file.parent / CHECKPOINT),
        skip_tokenizer_init=True,
        generation_config="vllm",  # not the checkpoint's, which may have penalties
        dtype=job["dtype"],  # not `auto`, which rounds float32 weights
        max_model_len=job["max_length"],
        max_num_seqs=min(job["batch_size"], MAX_SEQUENCES),
        enable_prefix_caching=False,  # answers must not depend on the batches before
        enforce_eager=job["enforce_eager"],
        disable_log_stats=True,
        seed=0,
    )
    sampling = SamplingParams(
        temperature=0, max_tokens=job["max_new_tokens"], stop_token_ids=job["ends"], ignore_eos=True, detokenize=False
    )
    # Started only now: vLLM may fork, and a fork must not copy a thread that holds the lock of stdin.
    batches: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    is_done = threading.Event()
    threading.Thread(target=_read_batches, args=(batches, is_done), daemon=True).start()
    _write(answers, READY)
    while (line := batches.get()) is not None:
        prompts = [{"prompt_token_ids": ids} for ids in json.loads(line)]
        outputs = model.generate(prompts, sampling, use_tqdm=False)
        _write(answers, [list(output.outputs[0].token_ids) for output in outputs])
    is_done.set()


def claim_stdout() -> TextIO:
    """Returns what was stdout; all else that is written there, by child processes too, goes to stderr from now on."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return answers


def _read_batches(batches: "queue.SimpleQueue[str | None]", is_done: threading.Event) -> None:
    """Queues the lines of stdin, then None; ends the processes of a batch that nobody waits for any more."""
    for line in sys.stdin:
        batches.put(line)
    batches.put(None)
    if is_done.wait(GRACE_SECONDS):  # vLLM takes seconds to end, and would leave shared memory behind if killed
        return
    for stop in (signal.SIGTERM, signal.SIGKILL):
        if os.getpgrp() == os.getpid():
            os.killpg(os.getpgrp(), stop)
        os.kill(os.getpid(), stop)
        time.sleep(KILL_SECONDS)


def _write(stream: TextIO, answer: object) -> None:
    stream.write(json.dumps(answer) + "\n")
    stream.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
