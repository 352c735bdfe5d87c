"""What a teacher predicts on training rows, computed once and kept on disk, so that no teacher is in memory to train.

Per predicted token: the ids and log-probabilities of the `TOP` likeliest tokens, and the log-probability of all others
together. Asked for, and not offered for pruned students, in unsloth#11556 and trl#3055.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from gradpruner.checks import check_choice
from gradpruner.encoding import IGNORED, Batch, TrainingRow, collate
from gradpruner.hidden_states import CHUNK_LOGITS, decode, head_logits
from gradpruner.progress import track

TOP = 64
PROMPT, ANSWERS = "prompt", "answers"
TOKENS = (PROMPT, ANSWERS)
IDS_FILE, LOG_PROBS_FILE, REST_FILE, STARTS_FILE = "ids.npy", "log_probs.npy", "rest.npy", "starts.npy"
BATCH_SIZE = 8
ENTRY_BYTES = 8  # an id and a log-probability


@dataclass(frozen=True)
class Predictions:
    """A teacher's predictions of n tokens.

    Attributes:
        ids: likeliest tokens, (n, k) int64.
        log_probs: their log-probabilities, (n, k) float32.
        rest: log-probability of all other tokens together, (n,) float32; -inf where there are none.
    """

    ids: Tensor
    log_probs: Tensor
    rest: Tensor


def predicted(batch: Batch, tokens: str) -> Tensor:
    """Returns which positions predict a token of this kind, (B, T - 1) bool.

    Args:
        batch: `input_ids`, `attention_mask`, `labels`, each (B, T).
        tokens: `answers`, those with a label; `prompt`, all other real tokens but the first of a row.
    """
    check_choice("tokens of a teacher", tokens, TOKENS)
    answers = batch["labels"][:, 1:] != IGNORED
    if tokens == ANSWERS:
        return answers
    mask = batch["attention_mask"].bool()
    return mask[:, :-1] & mask[:, 1:] & ~answers


@torch.no_grad()
def write_predictions(
    model: PreTrainedModel, rows: Sequence[TrainingRow], pad_token_id: int, tokens: str, directory: Path
) -> None:
    """Writes what the model predicts for the tokens of every row.

    Args:
        model: the teacher.
        rows: training rows; a student's batches name them by their position here.
        pad_token_id: id to pad with.
        tokens: one of `TOKENS`.
        directory: where to write.
    """
    model.eval()
    counts = [int(predicted(collate([row], pad_token_id), tokens).sum()) for row in rows]
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    np.save(directory / STARTS_FILE, starts)
    num_tokens, k = int(starts[-1]), min(TOP, model.config.vocab_size)
    ids = open_memmap(directory / IDS_FILE, mode="w+", dtype=np.int32, shape=(num_tokens, k))
    log_probs = open_memmap(directory / LOG_PROBS_FILE, mode="w+", dtype=np.float32, shape=(num_tokens, k))
    rest = open_memmap(directory / REST_FILE, mode="w+", dtype=np.float32, shape=(num_tokens,))
    at = 0
    for start in track(range(0, len(rows), BATCH_SIZE), f"teacher, {tokens}", "batch"):
        batch = collate(rows[start : start + BATCH_SIZE], pad_token_id)
        states = decode(model, batch)
        states = states[:, :-1][predicted(batch, tokens).to(states.device)]  # (n, d)
        for chunk in torch.split(states, max(1, CHUNK_LOGITS // model.config.vocab_size)):
            found = top_predictions(head_logits(model, chunk), k)
            place = slice(at, at + len(chunk))
            ids[place], log_probs[place] = found.ids.cpu().numpy(), found.log_probs.cpu().numpy()
            rest[place] = found.rest.cpu().numpy()
            at += len(chunk)
    for array in (ids, log_probs, rest):
        array.flush()


def top_predictions(logits: Tensor, k: int) -> Predictions:
    """Returns the k likeliest tokens of each row of logits, (n, V)."""
    log_probs = logits.float().log_softmax(-1)
    top = log_probs.topk(k, dim=-1)
    return Predictions(top.indices, top.values, rest_log_prob(logits, top.indices))


def rest_log_prob(logits: Tensor, ids: Tensor) -> Tensor:
    """Returns the log-probability of all tokens but these together.

    Args:
        logits: (n, V).
        ids: (n, k).

    Returns:
        (n,) float32; -inf if k = V.
    """
    wide = logits.float()
    others = wide.scatter(-1, ids, -torch.inf)
    return others.logsumexp(-1) - wide.logsumexp(-1)


class Teacher:
    """Predictions that `write_predictions` wrote, read row by row.

    Args:
        directory: their folder.
    """

    def __init__(self, directory: Path) -> None:
        self._starts: NDArray[np.int64] = np.load(directory / STARTS_FILE)
        self._files = [np.load(directory / name, mmap_mode="r") for name in (IDS_FILE, LOG_PROBS_FILE, REST_FILE)]

    def of_rows(self, rows: Tensor) -> Predictions:
        """Returns the predictions of these rows, one row after the other; a row that there is not has none.

        Args:
            rows: positions among the training rows, (B,) int64.
        """
        known = [int(row) for row in rows if int(row) < len(self._starts) - 1]
        places = [slice(int(self._starts[row]), int(self._starts[row + 1])) for row in known]
        ids, log_probs, rest = (
            torch.from_numpy(np.concatenate([file[:0], *(file[place] for place in places)])) for file in self._files
        )
        return Predictions(ids.long(), log_probs, rest)
