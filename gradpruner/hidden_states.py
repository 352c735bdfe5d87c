"""What a decoder makes of a batch, layer by layer: for methods that look at activations.

Padding has states, too; whoever adds up states has to leave it out by the attention mask.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from gradpruner.encoding import IGNORED, Batch, position_ids, trim_to_answers
from gradpruner.models.architectures import decoder_layers

CHUNK_LOGITS = 2**24  # logits that exist at a time: 64 MiB in float32
OnLayer = Callable[[int, Tensor, Tensor], None]  # (layer, its input, its output), the latter two (B, T, d)


@contextmanager
def watch_layers(model: PreTrainedModel, on_layer: OnLayer) -> Iterator[None]:
    """Calls `on_layer` for every decoder layer of every forward pass while it is open.

    The output of the last layer is the raw one: transformers' `hidden_states[-1]` is that after the final norm.
    """

    def hook(index: int) -> Callable[..., None]:
        def call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            states = args[0] if args else kwargs["hidden_states"]
            on_layer(index, states, output[0] if isinstance(output, tuple) else output)

        return call

    handles = [
        layer.register_forward_hook(hook(index), with_kwargs=True) for index, layer in enumerate(decoder_layers(model))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def last_hidden_state(model: PreTrainedModel, batch: Batch) -> Tensor:
    """States after the final norm, (B, T, d), without logits and without a graph."""
    return decode(model, batch)


def decode(model: PreTrainedModel, batch: Batch) -> Tensor:
    """States after the final norm, (B, T, d), without logits."""
    mask = batch["attention_mask"].to(model.device)
    output = model.get_decoder()(
        input_ids=batch["input_ids"].to(model.device),
        attention_mask=mask,
        position_ids=position_ids(mask),
        use_cache=False,
    )
    states: Tensor = output.last_hidden_state
    return states


def head_logits(model: PreTrainedModel, states: Tensor) -> Tensor:
    """Logits of states after the final norm, (..., d) to (..., vocabulary), capped where the architecture does so."""
    logits: Tensor = model.get_output_embeddings()(states)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def sum_over_tokens(function: Callable[..., Tensor], vocab_size: int, *states: Tensor) -> Tensor:
    """The sum of a function of states over chunks of tokens, with logits for one chunk at a time, backwards, too.

    Args:
        function: takes the tensors of a chunk and gives a scalar; called again in the backward pass.
        vocab_size: logits of a token.
        *states: one row a token.
    """
    size = max(1, CHUNK_LOGITS // vocab_size)
    chunks = zip(*(torch.split(each, size) for each in states), strict=True)
    return torch.stack([checkpoint(function, *chunk, use_reentrant=False) for chunk in chunks]).sum()


def text_loss(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of all real tokens of a batch but the first of each row.

    Returns:
        Sum over tokens, a scalar; and how many tokens these are in each row, (B,).
    """
    on_device = {name: values.to(model.device) for name, values in batch.items()}
    mask = on_device["attention_mask"].bool()
    real = mask[:, :-1] & mask[:, 1:]
    states, targets = decode(model, on_device)[:, :-1][real], on_device["input_ids"][:, 1:][real]

    def loss(chunk: Tensor, tokens: Tensor) -> Tensor:
        return functional.cross_entropy(head_logits(model, chunk).float(), tokens, reduction="sum")

    return sum_over_tokens(loss, model.config.vocab_size, states, targets), real.sum(dim=1)


def answer_loss(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, int]:
    """Negative log-likelihood of the answer tokens of a batch, summed, and how many tokens these are."""
    num_tokens = int((batch["labels"][:, 1:] != IGNORED).sum())
    on_device = {name: values.to(model.device) for name, values in batch.items()}
    output = model(**trim_to_answers(on_device), use_cache=False)
    loss: Tensor = output.loss * num_tokens
    return loss, num_tokens


@torch.no_grad()
def answer_nll(model: PreTrainedModel, batches: Iterable[Batch]) -> float:
    """Negative log-likelihood per answer token, over all answer tokens of the batches."""
    total, num_tokens = 0.0, 0
    for batch in batches:
        loss, count = answer_loss(model, batch)
        total += float(loss)
        num_tokens += count
    return total / num_tokens
