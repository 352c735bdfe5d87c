"""Hidden states of a decoder, layer by layer, for methods that look at activations.

Padding has states, too: a caller that sums states must exclude padding by the attention mask.
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

CHUNK_LOGITS = 2**24  # logits in memory at a time: 64 MiB in float32
ToLogits = Callable[[Tensor], Tensor]  # (..., d) to (..., vocabulary)
OnLayer = Callable[[int, Tensor, Tensor], None]  # (layer, its input, its output), the latter two (B, T, d)


@contextmanager
def watch_layers(model: PreTrainedModel, on_layer: OnLayer) -> Iterator[None]:
    """Calls `on_layer` for every decoder layer of every forward pass while the context is open.

    Input and output are on the device of the layer, which differs between layers if the model is spread over devices.
    The output of the last layer is the raw one; transformers' `hidden_states[-1]` is the state after the final norm.
    """

    def hook(index: int) -> Callable[..., None]:
        def call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            on_layer(index, before.to(after.device), after)

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
    """Returns states after the final norm, (B, T, d); computes neither logits nor an autograd graph."""
    return decode(model, batch)


def decode(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Returns states after the final norm, (B, T, d), on the device of that norm; computes no logits."""
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
    """Returns the logits of states after the final norm, (..., d) to (..., vocabulary), capped if the model does so."""
    return _capped(model, model.get_output_embeddings()(states))


def within_head(model: PreTrainedModel, states: Tensor, function: Callable[[Tensor, ToLogits], Tensor]) -> Tensor:
    """Returns `function(states, to_logits)`, computed within one call of the output layer.

    FSDP gathers the weights of a layer, and averages their gradients, whenever it is called. All processes must call it
    equally often, so a loss over chunks, whose number depends on a process's own rows, calls it once.

    Args:
        model: the model.
        states: states after the final norm, (..., d).
        function: takes the states, and a function that maps some of them to their logits; it may keep that for the
            backward pass.
    """
    head = model.get_output_embeddings()
    of_instance, forward = vars(head).get("forward"), head.forward
    head.forward = lambda given: function(given, lambda some: _capped(model, forward(some)))
    try:
        total: Tensor = head(states)
    finally:
        del head.forward
        if of_instance is not None:
            head.forward = of_instance
    return total


def _capped(model: PreTrainedModel, logits: Tensor) -> Tensor:
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def sum_over_tokens(function: Callable[..., Tensor], vocab_size: int, *states: Tensor) -> Tensor:
    """Returns the sum of a function over all states, with logits of one chunk at a time, also in the backward pass.

    Args:
        function: takes the tensors of a chunk and returns a scalar; called again in the backward pass.
        vocab_size: logits per token.
        *states: tensors with one row per token.
    """
    size = max(1, CHUNK_LOGITS // vocab_size)
    chunks = zip(*(torch.split(each, size) for each in states), strict=True)
    return torch.stack([checkpoint(function, *chunk, use_reentrant=False) for chunk in chunks]).sum()


def text_loss(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Computes the negative log-likelihood of all real tokens of a batch except the first of each row.

    Returns:
        The sum over these tokens, a scalar; and the number of these tokens per row, (B,).
    """
    on_device = {name: values.to(model.device) for name, values in batch.items()}
    mask = on_device["attention_mask"].bool()
    real = mask[:, :-1] & mask[:, 1:]
    states, targets = decode(model, on_device)[:, :-1], on_device["input_ids"][:, 1:][real]
    states, targets = states[real.to(states.device)], targets.to(states.device)

    def loss(chunk: Tensor, tokens: Tensor) -> Tensor:
        logits = head_logits(model, chunk).float()
        return functional.cross_entropy(logits, tokens.to(logits.device), reduction="sum")

    return sum_over_tokens(loss, model.config.vocab_size, states, targets), real.sum(dim=1)


def answer_loss(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, int]:
    """Returns the summed negative log-likelihood of the answer tokens of a batch, and the number of these tokens."""
    num_tokens = int((batch["labels"][:, 1:] != IGNORED).sum())
    on_device = {name: values.to(model.device) for name, values in batch.items()}
    output = model(**trim_to_answers(on_device), use_cache=False)
    loss: Tensor = output.loss * num_tokens
    return loss, num_tokens


@torch.no_grad()
def answer_nll(model: PreTrainedModel, batches: Iterable[Batch]) -> float:
    """Returns the negative log-likelihood per answer token, over all answer tokens of the batches."""
    total, num_tokens = 0.0, 0
    for batch in batches:
        loss, count = answer_loss(model, batch)
        total += float(loss)
        num_tokens += count
    return total / num_tokens
