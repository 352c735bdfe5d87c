"""What a model says about one fixed text, recorded when it is saved, so that a reloaded checkpoint can be compared.

`experiments/verify.py` does the comparing, in a process that knows nothing of this package; `probe.json` is all they
share.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROBE_FILE = "probe.json"
PROBE_VERSION = 1
# An accent, digits, a line break and quotes, so that a changed tokenizer shows; 108 tokens to a byte tokenizer.
TEXT = 'The café on 3rd Street opened in 1987.\nIt sells tea and "honey" cakes. About 250 people visit it every day.'
NUM_POSITIONS = 8
TOP_K = 8
NUM_NEW_TOKENS = 16


@torch.no_grad()
def make_probe(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Asks the model about `TEXT`; leaves it as it is.

    Returns:
        JSON-ready: `text`, its `token_ids`, what they decode to (`decoded`), the `dtype` of the weights; `positions`,
        evenly spread and the last one among them, each with its `top` as pairs of token id and log-probability
        (float32); the greedy `continuation`, and for each of its tokens the `margins`, log-probability above the
        runner-up, small where another device or kernel may choose otherwise.

    Raises:
        ValueError: if the model answers with NaN or infinity.
    """
    token_ids: list[int] = list(tokenizer(TEXT)["input_ids"])
    was_training = model.training
    model.eval()
    try:
        log_probabilities = _log_probabilities(model, token_ids)  # (T, vocabulary)
        last = len(token_ids) - 1
        positions = sorted({round(last * step / (NUM_POSITIONS - 1)) for step in range(NUM_POSITIONS)})
        recorded = [{"position": position, "top": _top(log_probabilities[position])} for position in positions]
        continuation, margins = _greedy(model, token_ids)
    finally:
        model.train(was_training)
    return {
        "version": PROBE_VERSION,
        "text": TEXT,
        "token_ids": token_ids,
        "decoded": tokenizer.decode(token_ids, skip_special_tokens=True),
        "dtype": str(model.dtype).removeprefix("torch."),
        "positions": recorded,
        "continuation": continuation,
        "margins": margins,
    }


def _log_probabilities(model: PreTrainedModel, token_ids: list[int]) -> Tensor:
    """Log-probability of every next token after each of `token_ids`, float32, (T, vocabulary)."""
    logits = model(input_ids=torch.tensor([token_ids], device=model.device), use_cache=False).logits[0]
    log_probabilities: Tensor = logits.float().log_softmax(-1)
    if not bool(log_probabilities.isfinite().all()):
        raise ValueError(
            "The model to be saved answers with NaN or infinity, so its checkpoint would be of no use. "
            "Fine-tune with a lower learning rate, or in another dtype (float16 overflows above 65504)."
        )
    return log_probabilities


def _top(log_probabilities: Tensor) -> list[tuple[int, float]]:
    """The `TOP_K` likeliest tokens of a position, likeliest first."""
    values, token_ids = log_probabilities.topk(min(TOP_K, log_probabilities.numel()))
    return list(zip(token_ids.tolist(), values.tolist(), strict=True))


def _greedy(model: PreTrainedModel, token_ids: list[int]) -> tuple[list[int], list[float]]:
    """Greedy continuation and its margins.

    Without a key-value cache, without generation settings and past any end-of-text token: the plainest definition
    there is, and what `generate()` has to agree with.
    """
    continuation: list[int] = []
    margins: list[float] = []
    for _ in range(NUM_NEW_TOKENS):
        log_probabilities = _log_probabilities(model, token_ids + continuation)[-1]
        best, runner_up = log_probabilities.topk(2).values.tolist()
        continuation.append(int(log_probabilities.argmax()))  # as generate() does: of equal ones, topk may name another
        margins.append(best - runner_up)
    return continuation, margins
