"""The processes of one run: which one this is, and how they wait for each other and end together.

`torchrun` and `accelerate launch` start several processes, which train one model. Rank 0 alone writes files. The
others wait for it through the key-value store of torch.distributed: a collective such as `torch.distributed.barrier`
has a time limit, which a long stage on rank 0 would exceed. With one process nothing here starts torch.distributed.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

from gradpruner.messages import first_line

logger = logging.getLogger(__name__)

T = TypeVar("T")

COLLECTIVE_LIMIT = timedelta(hours=2)  # of a collective, such as the average of gradients while rank 0 saves
LONGEST_PAUSE = 0.5  # seconds between two looks for what another process sends
SECONDS_FOR_REASON = 3.0  # that a process waits for the reason of another one that has ended
SECONDS_FOR_OTHERS = 10.0  # that a process waits for the others to note a failure or to leave
LAUNCH_VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK"),
    *("ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"),
    *("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_ERROR_FILE"),
)
_store: list[Any] = []  # the torch.distributed.Store of this run, once it is needed
_num_exchanges = [0]  # every rank makes the same exchanges in the same order, so that their numbers agree


class PeerFailedError(RuntimeError):
    """Another process of the run failed; the message is that process's."""


def count() -> int:
    """Returns the number of processes of the run."""
    if (distributed := _joined()) is not None:
        return int(distributed.get_world_size())
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Returns the number of this process among them, from 0."""
    if (distributed := _joined()) is not None:
        return int(distributed.get_rank())
    return int(os.environ.get("RANK", "0")) if count() > 1 else 0


def local_rank() -> int:
    """Returns the number of this process among those of the run on this machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", str(rank()))) if count() > 1 else 0


def count_on_machine() -> int:
    """Returns the number of processes of the run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(count()))) if count() > 1 else 1


def is_main() -> bool:
    """Returns whether this is rank 0, which writes."""
    return rank() == 0


def start() -> None:
    """Gives this process its GPU and joins the other processes; does nothing with one process or if it has joined.

    Raises:
        ValueError: if the launcher's variables are incomplete, or there are fewer GPUs than processes.
    """
    if count() == 1 or _joined() is not None:
        return
    import torch
    from torch import distributed

    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise ValueError(
            f"A run on several processes needs a launcher, got WORLD_SIZE={os.environ['WORLD_SIZE']} without "
            f"{' and '.join(missing)}. Start it with torchrun or accelerate launch, or unset WORLD_SIZE."
        )
    backend = "gloo"
    if torch.cuda.is_available():
        num_gpus = torch.cuda.device_count()
        if local_rank() >= num_gpus:
            raise ValueError(
                f"Every process needs a GPU of its own, got LOCAL_RANK={local_rank()} and {num_gpus} visible GPUs. "
                f"Start at most {num_gpus} processes on this machine (torchrun --nproc-per-node={num_gpus})."
            )
        torch.cuda.set_device(local_rank())
        backend = "cuda:nccl,cpu:gloo"
    distributed.init_process_group(backend, timeout=COLLECTIVE_LIMIT)


def finish() -> None:
    """Leaves the other processes, at the end of a command. Rank 0 may keep the store, so it leaves last."""
    distributed = _joined()
    if count() == 1 or distributed is None:
        return
    store, names = _shared_store(), [f"{other} has left" for other in range(1, count())]
    with suppress(RuntimeError):  # the store ended with the process that kept it
        if is_main():
            deadline = time.monotonic() + SECONDS_FOR_OTHERS
            while time.monotonic() < deadline and not (store.check(names) or store.check(["failure"])):
                time.sleep(LONGEST_PAUSE / 10)
        else:
            store.set(f"{rank()} has left", b"")
    _store.clear()
    distributed.destroy_process_group()


def broadcast(value: T) -> T:
    """Returns rank 0's value on every rank; waits for rank 0 as long as it takes.

    Args:
        value: anything that JSON has, below a megabyte; ignored on other ranks than 0.

    Raises:
        PeerFailedError: if another process fails meanwhile.
    """
    if count() == 1:
        return value
    key = f"{_next_exchange()}/0"
    if is_main():
        _shared_store().set(key, json.dumps(value))
        return value
    received: T = json.loads(_wait_for(key))
    return received


def gather(value: T) -> list[T]:
    """Returns the values of all ranks, on every rank; see `broadcast`."""
    if count() == 1:
        return [value]
    exchange = _next_exchange()
    _shared_store().set(f"{exchange}/{rank()}", json.dumps(value))
    return [json.loads(_wait_for(f"{exchange}/{other}")) for other in range(count())]


def wait_for_all() -> None:
    """Returns once every rank has come here; waits as long as it takes."""
    gather(None)


@contextmanager
def main_first() -> Iterator[None]:
    """Runs the block on rank 0, then on the others: what rank 0 makes and files, the others find."""
    if not is_main():
        wait_for_all()
    yield
    if is_main():
        wait_for_all()


def alone() -> dict[str, str]:
    """Returns this process's environment for a process of its own that is no part of the run."""
    return {name: value for name, value in os.environ.items() if name not in LAUNCH_VARIABLES}


def report(failure: str) -> bool:
    """Tells the other processes that this one failed and why.

    Returns:
        Whether this process is the first to fail, so that it is the one to show the failure.
    """
    if count() == 1 or _joined() is None:
        return True
    try:
        if is_main():
            _shared_store().set("0 has noted it", b"")
        is_first: bool = _shared_store().add("failures", 1) == 1
        if is_first:
            _shared_store().set("failure", failure.encode())
    except RuntimeError:  # the store ended with the process that kept it
        return True
    return is_first


def leave() -> None:
    """Ends this process's part in a failed run, so that no collective waits for it.

    Another process than rank 0 stays for some seconds, in which rank 0 can note the failure: the launcher ends all
    processes when the first one exits.
    """
    if count() == 1 or _joined() is None:
        return
    store = _shared_store()
    finish()
    deadline = time.monotonic() + SECONDS_FOR_OTHERS
    try:
        while rank() and time.monotonic() < deadline and not store.check(["0 has noted it"]):
            time.sleep(LONGEST_PAUSE / 10)
    except RuntimeError:
        return


def cause_of(error: Exception) -> Exception:
    """Returns the failure of another process if it is behind an error of this one, else the error."""
    distributed = _joined()
    if count() == 1 or distributed is None or isinstance(error, PeerFailedError):
        return error
    if not (isinstance(error, distributed.DistError) or "gloo" in str(error) or "NCCL" in str(error)):
        return error
    deadline = time.monotonic() + SECONDS_FOR_REASON
    while time.monotonic() < deadline:
        try:
            _raise_failure()
        except PeerFailedError as failure:
            return failure
        except RuntimeError:
            break
        time.sleep(LONGEST_PAUSE / 5)
    lost = first_line(error).split(". ")[0]
    return PeerFailedError(
        f"Another process of the run ended without a message, as one does that is killed or that the system ends for "
        f"lack of memory, got {lost!r}. Run the same command again: finished stages and checkpoints are kept."
    )


def _joined() -> Any:
    """Returns the module torch.distributed if it is started, else None.

    Does not import it: torch takes seconds, and a command asks how many processes there are before it needs torch.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return distributed


def _next_exchange() -> int:
    _num_exchanges[0] += 1
    return _num_exchanges[0]


def _shared_store() -> Any:
    """Returns the store that the launcher or rank 0 keeps."""
    start()
    if not _store:
        from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

        _store.append(PrefixStore("gradpruner", _get_default_store()))
    return _store[0]


def _wait_for(key: str) -> bytes:
    store, pause = _shared_store(), 0.001
    while not store.check([key]):
        _raise_failure()
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
    value: bytes = store.get(key)
    return value


def _raise_failure() -> None:
    """Raises PeerFailedError if a process has reported a failure."""
    if _shared_store().check(["failure"]):
        raise PeerFailedError(_shared_store().get("failure").decode())
