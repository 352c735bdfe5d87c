"""What the fit of a map sees: states of the dense and of the pruned model around a run of pruned layers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gradpruner.encoding import IGNORED, Batch
from gradpruner.models.architectures import decoder_layers, linear_sublayers
from gradpruner.partial_pass import PartialPass
from gradpruner.plan import PruningPlan, preceding_kept_layer

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


class RunStates:
    """States of both models around runs of pruned layers, in order of depth; all layers but absorbers run once.

    Args:
        model: the pruned model; a caller repairs it from the absorber of the run that was read on.
        dense: the dense model.
        plan: the plan that was applied to `model`.
        batches: dicts of `input_ids`, `attention_mask` and perhaps `labels`, each (B, T).
    """

    def __init__(
        self, model: PreTrainedModel, dense: PreTrainedModel, plan: PruningPlan, batches: Sequence[Batch]
    ) -> None:
        self._model, self._plan, self._batches = model, plan, batches
        self._dense, self._pruned = PartialPass(dense, batches), PartialPass(model, batches)

    def read(self, run: PrunedRun, stream_scale: float = 1.0) -> Iterator[Tokens]:
        """Yields the states around a run, batch by batch.

        Args:
            run: the run, not before the one that was read last, with all earlier ones repaired.
            stream_scale: how large the residual stream of the pruned model is, by design, as a fraction of the other.
        """
        position = self._plan.kept_layers.index(run.absorber)
        self._dense.advance(run.last + 1)
        self._pruned.advance(position)
        _, mlp = stream_outputs(self._model, position)
        device = next(mlp.parameters()).device  # of M, of the sums and of the map
        outputs: list[Tensor] = []
        handle = mlp.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
        try:
            for number, after in enumerate(self._pruned.after(position)):
                batch = self._batches[number]
                mask = batch["attention_mask"].to(device)
                tokens = mask.bool() & (mask.cumsum(-1) > 1)
                target = self._dense.state(number).to(device)[tokens] * stream_scale
                added = outputs.pop()[tokens]
                missing = target - (after.to(device)[tokens] - added)
                yield Tokens(added, missing, target, _before_answers(batch).to(device)[tokens])
        finally:
            handle.remove()


def _before_answers(batch: Batch) -> Tensor:
    """Returns where the next token is one of an answer, (B, T) bool; nowhere without `labels`."""
    before = torch.zeros(batch["input_ids"].shape, dtype=torch.bool)
    if "labels" in batch:
        before[:, :-1] = batch["labels"][:, 1:].cpu() != IGNORED
    return before
