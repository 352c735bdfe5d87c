"""A model's answers to one fixed text, recorded when it is saved, so that a reloaded checkpoint can be compared.

`experiments/verify.py` compares, in a process that does not import this package. The two share only `probe.json`.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROBE_FILE = "probe.json"
PROBE_VERSION = 1
# An accent, digits, a line break and quotes, so that a changed tokenizer shows; 108 tokens for a byte tokenizer.
TEXT = 'The café on 3rd Street opened in 1987.\nIt sells tea and "honey" cakes. About 250 people visit it every day.'
NUM_POSITIONS = 8
TOP_K = 8
NUM_NEW_TOKENS = 16


@torch.no_grad()
def make_probe(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Runs the model on `TEXT`; the model is unchanged.

    Returns:
        JSON-ready: `text`, its `token_ids`, the text that they decode to (`decoded`), the `dtype` of the weights;
        `positions`, evenly spread up to and including the last one, each with its `top` as pairs of token id and
        log-probability (float32); the greedy `continuation`, and one of the `margins` per token of it: log-probability
        above the runner-up, small where another device or kernel may choose another token.

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
    """Returns the log-probability of every next token after each of `token_ids`, float32, (T, vocabulary)."""
    logits = model(input_ids=torch.tensor([token_ids], device=model.device), use_cache=False).logits[0]
    log_probabilities: Tensor = logits.float().log_softmax(-1)
    if not bool(log_probabilities.isfinite().all()):
        raise ValueError(
            "The model to be saved answers with NaN or infinity, so its checkpoint would be of no use. "
            "Fine-tune with a lower learning rate, or in another dtype (float16 overflows above 65504)."
        )
    return log_probabilities


def _top(log_probabilities: Tensor) -> list[tuple[int, float]]:
    """Returns the `TOP_K` likeliest tokens of a position, likeliest first."""
    values, token_ids = log_probabilities.topk(min(TOP_K, log_probabilities.numel()))
    return list(zip(token_ids.tolist(), values.tolist(), strict=True))


def _greedy(model: PreTrainedModel, token_ids: list[int]) -> tuple[list[int], list[float]]:
    """Returns the greedy continuation and its margins.

    There is no key-value cache, no generation settings and no stop at an end-of-text token: this is the plainest
    definition, and `generate()` has to agree with it.
    """
    continuation: list[int] = []
    margins: list[float] = []
    for _ in range(NUM_NEW_TOKENS):
        log_probabilities = _log_probabilities(model, token_ids + continuation)[-1]
        best, runner_up = log_probabilities.topk(2).values.tolist()
        continuation.append(int(log_probabilities.argmax()))  # as in generate(): topk may name another of equal ones
        margins.append(best - runner_up)
    return continuation, margins
