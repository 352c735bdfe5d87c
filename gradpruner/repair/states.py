"""What the fit of a map sees: states of the dense and of the pruned model around a run of pruned layers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gradpruner.encoding import IGNORED, Batch
from gradpruner.hidden_states import decode, watch_layers
from gradpruner.models.architectures import decoder_layers, linear_sublayers
from gradpruner.plan import PruningPlan, preceding_kept_layer
from gradpruner.surgery import only_layers

DOWN_PROJ = "mlp.down_proj"
# Their layers add the output of down_proj to the residual stream unchanged.
PLAIN_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3")
# In these, norms come between: of attention, and of the MLP. A scale of its channels can go into the weight of a norm;
# a matrix cannot, and in front of a norm it would change what the norm divides by.
NORMED_MODEL_TYPES = ("gemma2", "gemma3_text", "olmo2")
ATTENTION_NORM, MLP_NORM = "post_attention_layernorm", "post_feedforward_layernorm"


@dataclass(frozen=True)
class PrunedRun:
    """Run of consecutive pruned layers; numbers are 0-based positions in the dense model.

    Attributes:
        absorber: the kept layer before the run.
        last: last layer of the run, whose output is the target; the absorber itself where nothing was pruned behind it.
    """

    absorber: int
    last: int


@dataclass(frozen=True)
class Tokens:
    """States at the tokens of a batch, without padding and the first token of each row, an outlier in most models.

    Attributes:
        outputs: M, what the MLP of the absorber adds to the residual stream, (tokens, d).
        missing: Z - Y, what it would have to add to reach the dense model's state, (tokens, d).
        target: Z, the dense model's state behind the run, (tokens, d).
        answers: True where the next token is one of an answer, (tokens,) bool.
    """

    outputs: Tensor
    missing: Tensor
    target: Tensor
    answers: Tensor


def pruned_runs(plan: PruningPlan) -> list[PrunedRun]:
    """Returns the runs of a plan that have a kept layer before them, in order of depth."""
    runs = []
    for layer in plan.pruned_layers:
        absorber = preceding_kept_layer(layer, plan.pruned_layers)
        if absorber is not None and layer + 1 not in plan.pruned_layers:
            runs.append(PrunedRun(absorber, layer))
    return runs


def down_proj(model: PreTrainedModel, position: int) -> nn.Linear:
    """Returns `down_proj` of the layer at this position of the pruned model."""
    return linear_sublayers(decoder_layers(model)[position])[DOWN_PROJ]


def stream_outputs(model: PreTrainedModel, position: int) -> tuple[nn.Module, nn.Module]:
    """Returns what adds to the residual stream in the layer at this position: of attention, and of the MLP."""
    layer = decoder_layers(model)[position]
    if model.config.model_type in NORMED_MODEL_TYPES:
        return layer.get_submodule(ATTENTION_NORM), layer.get_submodule(MLP_NORM)
    return linear_sublayers(layer)["self_attn.o_proj"], linear_sublayers(layer)[DOWN_PROJ]


def read_states(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    plan: PruningPlan,
    run: PrunedRun,
    batches: Sequence[Batch],
    stream_scale: float = 1.0,
) -> Iterator[Tokens]:
    """Yields the states around a run, batch by batch; later layers are not run.

    Args:
        model: the pruned model, with all earlier runs repaired.
        dense: the dense model.
        plan: the plan that was applied to `model`.
        run: the run to read.
        batches: dicts of `input_ids`, `attention_mask` and perhaps `labels`, each (B, T).
        stream_scale: how large the residual stream of `model` is, by design, as a fraction of that of `dense`.
    """
    position = plan.kept_layers.index(run.absorber)
    _, mlp = stream_outputs(model, position)
    device = next(mlp.parameters()).device  # of M, of the sums and of the map; the target may come from another one
    for batch in batches:
        mask = batch["attention_mask"].to(device)
        tokens = mask.bool() & (mask.cumsum(-1) > 1)
        target = _output(dense, run.last, batch).to(device)[tokens] * stream_scale
        outputs: list[Tensor] = []
        handle = mlp.register_forward_hook(lambda _module, _inputs, output, seen=outputs: seen.append(output))
        try:
            after = _output(model, position, batch).to(device)[tokens]
        finally:
            handle.remove()
        added = outputs[0][tokens]
        yield Tokens(added, target - (after - added), target, _before_answers(batch).to(device)[tokens])


def _before_answers(batch: Batch) -> Tensor:
    """Returns where the next token is one of an answer, (B, T) bool; nowhere without `labels`."""
    before = torch.zeros(batch["input_ids"].shape, dtype=torch.bool)
    if "labels" in batch:
        before[:, :-1] = batch["labels"][:, 1:].cpu() != IGNORED
    return before


def _output(model: PreTrainedModel, layer: int, batch: Batch) -> Tensor:
    """Returns the raw output of a layer, (B, T, d)."""
    seen: list[Tensor] = []

    def note(index: int, before: Tensor, after: Tensor) -> None:
        if index == layer:
            seen.append(after)

    with only_layers(model, tuple(range(layer + 1))), watch_layers(model, note):
        decode(model, batch)
    return seen[0]
