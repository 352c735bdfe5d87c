"""Which layers to prune: criteria propose sets of layers, the likelihood of held-out answers decides.

Beyond the paper, whose early gradients become one voice among several. The pool for a number of layers n:

- `igia`: the n layers of least importance (Eq. 4);
- `block_influence`: the n layers that turn their input the least (ShortGPT, arXiv:2403.03853);
- `angular`: the block of n layers with the smallest angle between its ends (arXiv:2403.17887);
- `last`: the n layers before the final one;
- `greedy`, if asked for: layer by layer, the one without which the answers lose the least;
- edits of the best of these: a run of pruned layers grows by a layer at one end while it or another one shrinks.

Each set is scored by the answer NLL of the model without it. If asked for, the best few are repaired (see
`repair.judged`) and scored again, and the best of those is taken; or they train for a few steps (see `halving`), and
the one that ends best is.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from transformers import PreTrainedModel

from gradpruner.encoding import Batch
from gradpruner.halving import HalvingSettings, halve
from gradpruner.hidden_states import answer_nll
from gradpruner.layer_scores import influence_and_distances, nearest_block
from gradpruner.models.architectures import decoder_layers
from gradpruner.plan import PruningPlan, lowest_layers, number_runs
from gradpruner.progress import Steps
from gradpruner.repair.judged import JudgedFit, divide_rows, judged_repair
from gradpruner.surgery import apply_plan, only_layers, sharing_copy

Layers = tuple[int, ...]


@dataclass(frozen=True)
class CandidateSettings:
    """How many sets are looked at.

    Attributes:
        num_edits: edits of the best set that are scored.
        num_repaired: sets that are repaired, the best first; 0: the choice is made before repair.
        greedy_width: layers that are scored again for each one that `greedy` prunes; 0: no greedy set, which costs a
            pass over the rows for every layer, and this many for every layer pruned.
        refit: whether the repair also refits kept layers.
        halving: short fine-tunes that decide among the best sets, unrepaired; None: there are none.
    """

    num_edits: int = 8
    num_repaired: int = 0
    greedy_width: int = 0
    refit: bool = False
    halving: HalvingSettings | None = None


@dataclass(frozen=True)
class Candidate:
    """A set of layers to prune.

    Attributes:
        names: criteria that proposed it.
        layers: the set, ascending.
        nll: answer NLL without these layers, in nats per token.
        nll_repaired: the same after repair, or None.
        nlls_trained: the same after the short fine-tune of each round that the set took part in.
    """

    names: tuple[str, ...]
    layers: Layers
    nll: float
    nll_repaired: float | None = None
    nlls_trained: tuple[float, ...] = ()

    def __str__(self) -> str:
        after = "" if self.nll_repaired is None else f", {self.nll_repaired:.2f} repaired"
        if self.nlls_trained:
            after = f", {self.nlls_trained[-1]:.2f} after a short fine-tune"
        return f"{number_runs(self.layers)} ({', '.join(self.names)}; NLL {self.nll:.2f}{after})"


@dataclass(frozen=True)
class Choice:
    """All candidates, the chosen one first.

    Attributes:
        candidates: in order of the NLL that the choice was made by.
        dense_nll: answer NLL of the dense model on the same rows.
        dense_passes: work of scoring, in passes of the dense model over the rows of the choice; repair and short
            fine-tunes not counted.
    """

    candidates: tuple[Candidate, ...]
    dense_nll: float
    dense_passes: float

    @property
    def layers(self) -> Layers:
        """The set to prune."""
        return self.candidates[0].layers

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON-ready form."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class LayerScores:
    """What the criteria say of the layers of a model; serves every number of layers.

    Attributes:
        importance: of each layer, see `igia.layer_importance`.
        influence: Block Influence of each layer.
        distances: angles between all states, (L+1, L+1), see `layer_scores.angular_distances`.
    """

    importance: Sequence[float]
    influence: list[float]
    distances: list[list[float]]

    @classmethod
    def measure(cls, model: PreTrainedModel, importance: Sequence[float], batches: list[Batch]) -> Self:
        """Returns the scores; one pass over the batches."""
        return cls(importance, *influence_and_distances(model, batches))

    def sets(self, num_pruned_layers: int) -> dict[str, Layers]:
        """Returns the set of each criterion."""
        num_layers = len(self.importance)
        end = num_layers - 1 if num_pruned_layers < num_layers else num_layers
        return {
            "igia": lowest_layers(self.importance, num_pruned_layers),
            "block_influence": lowest_layers(self.influence, num_pruned_layers),
            "angular": nearest_block(self.distances, num_pruned_layers),
            "last": tuple(range(end - num_pruned_layers, end)),
        }


def choose_layers(
    model: PreTrainedModel,
    scores: LayerScores,
    num_pruned_layers: int,
    batches: Sequence[Batch],
    settings: CandidateSettings,
) -> Choice:
    """Returns the candidates, the best first.

    Args:
        model: the dense model; unchanged.
        scores: of its layers.
        num_pruned_layers: n, at least 1.
        batches: distinct training rows, dicts of `input_ids`, `attention_mask`, `labels`, each (B, T).
        settings: how many sets to look at.

    Raises:
        ValueError: if there are fewer than ten rows, or rows without answers.
    """
    fitted, choosing, _ = divide_rows(batches)
    with Steps("candidates", "set") as steps:
        scorer = _Scorer(model, choosing, steps.advance)
        for name, layers in scores.sets(num_pruned_layers).items():
            scorer.add(name, layers)
        if settings.greedy_width:
            scorer.add("greedy", greedy(scorer.nll, scorer.num_layers, num_pruned_layers, settings.greedy_width))
        for layers in edits(scorer.ranked()[0].layers, scores.influence)[: settings.num_edits]:
            scorer.add("edit", layers)
    ranked = scorer.ranked()
    repaired = [_repaired(model, each, batches, settings.refit) for each in ranked[: settings.num_repaired]]
    repaired.sort(key=lambda each: (each.nll_repaired, each.layers))
    first = repaired
    if settings.halving is not None:
        first = _trained(model, ranked[: settings.halving.num_candidates], fitted, choosing, settings.halving)
    return Choice((*first, *ranked[len(first) :]), scorer.nll(()), scorer.dense_passes)


class _Scorer:
    """Answer NLL of the dense model without a set of layers; every set is scored once."""

    def __init__(self, model: PreTrainedModel, rows: Sequence[Batch], on_score: Callable[[], Any]) -> None:
        self._model, self._rows, self._on_score = model, rows, on_score
        self._found: dict[Layers, float] = {}
        self._names: dict[Layers, list[str]] = {}
        self.num_layers = len(decoder_layers(model))
        self.dense_passes = 0.0

    def nll(self, layers: Layers) -> float:
        if layers not in self._found:
            kept = tuple(layer for layer in range(self.num_layers) if layer not in layers)
            with only_layers(self._model, kept):
                self._found[layers] = answer_nll(self._model, self._rows)
            self.dense_passes += len(kept) / self.num_layers
            self._on_score()
        return self._found[layers]

    def add(self, name: str, layers: Layers) -> None:
        """Scores a candidate; one that was proposed already gets another name."""
        self.nll(layers)
        self._names.setdefault(layers, []).append(name)

    def ranked(self) -> list[Candidate]:
        """Returns the candidates, the best first; of equal ones the first layers."""
        found = [Candidate(tuple(names), layers, self._found[layers]) for layers, names in self._names.items()]
        return sorted(found, key=lambda candidate: (candidate.nll, candidate.layers))


def greedy(nll: Callable[[Layers], float], num_layers: int, num_pruned_layers: int, width: int) -> Layers:
    """Returns the set that arises when, one after the other, the layer goes whose loss costs the least.

    Only the `width` layers that were the cheapest when they were last scored are scored again for each removal, as the
    lazy form of greedy selection does; with `width` = `num_layers` the selection is exact.

    Args:
        nll: returns the NLL without a set of layers.
        num_layers: layers of the model.
        num_pruned_layers: layers to remove.
        width: layers to score again for each removal, 1 or more.
    """
    last_scores = {layer: nll((layer,)) for layer in range(num_layers)}
    removed: list[int] = []
    while len(removed) < num_pruned_layers:
        if removed:
            promising = sorted(last_scores, key=lambda layer: (last_scores[layer], layer))[:width]
            for layer in promising:
                last_scores[layer] = nll(tuple(sorted([*removed, layer])))
            best = min(promising, key=lambda layer: (last_scores[layer], layer))
        else:
            best = min(last_scores, key=lambda layer: (last_scores[layer], layer))
        removed.append(best)
        del last_scores[best]
    return tuple(sorted(removed))


def edits(layers: Layers, scores: Sequence[float]) -> list[Layers]:
    """Returns the sets in which a run of pruned layers grew by one while it or another one shrank by one.

    Args:
        layers: the set to edit, ascending.
        scores: of every layer; sets that trade a layer for one with a lower score come first.
    """
    pruned, kept = set(layers), set(range(len(scores))) - set(layers)
    shrinking = [layer for layer in pruned if {layer - 1, layer + 1} - pruned]
    growing = [layer for layer in kept if {layer - 1, layer + 1} & pruned]
    pairs = [(back, new) for back in shrinking for new in growing if {new - 1, new + 1} & (pruned - {back})]
    pairs.sort(key=lambda pair: (scores[pair[1]] - scores[pair[0]], pair))
    return [tuple(sorted(pruned - {back} | {new})) for back, new in pairs]


def _trained(
    model: PreTrainedModel,
    candidates: Sequence[Candidate],
    fitted: Sequence[Batch],
    choosing: Sequence[Batch],
    settings: HalvingSettings,
) -> list[Candidate]:
    """Returns the candidates in the order of successive halving."""

    def make(candidate: Candidate) -> PreTrainedModel:
        return apply_plan(sharing_copy(model), _plan(model, candidate))

    ranked = halve(candidates, make, fitted, choosing, settings)
    return [dataclasses.replace(candidate, nlls_trained=nlls) for candidate, nlls in ranked]


def _plan(model: PreTrainedModel, candidate: Candidate) -> PruningPlan:
    return PruningPlan(num_hidden_layers=len(decoder_layers(model)), pruned_layers=candidate.layers)


def _repaired(model: PreTrainedModel, candidate: Candidate, batches: Sequence[Batch], refit: bool) -> Candidate:
    """Returns the candidate with its NLL after repair."""
    plan = _plan(model, candidate)
    fits: list[JudgedFit] = judged_repair(apply_plan(sharing_copy(model), plan), model, plan, batches, refit)
    after = fits[-1].options[fits[-1].chosen] if fits else candidate.nll
    return dataclasses.replace(candidate, nll_repaired=after)
