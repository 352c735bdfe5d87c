"""Repair whose every change is judged by the answers: squared error proposes, held-out answers decide.

Beyond the paper. For every run of pruned layers, in order of depth, these changes compete:

- `none`;
- `magnitude`: the residual stream behind the cut is alpha times as large, with alpha = mean over tokens of
  |Z| / |X| for X the state before and Z the dense model's state behind the run (magnitude compensation, Prune&Comp,
  arXiv:2507.18212). Norms take scale out of what layers read, so instead of all that comes before the cut, all that
  later layers add is divided by alpha: tied embeddings keep their size.
- `channels`: one factor per channel of the absorber's MLP output M, with the least squared error;
- `map`: the linear map of M (see `maps`), for two lambdas from that with the least squared error on held-out tokens
  up, each fitted to all tokens alike, or with the tokens of answers weighing as much as all others together.

The negative log-likelihood (NLL) of held-out answers chooses, and nothing is accepted that does not lower it. With
`refit`, the kept layers behind the first cut are changed, too, each towards the dense model's own state: by a map with
weighted answers, which was the best change of nearly all of them, or else a factor per channel. Rows are divided: seven
of ten for fits, two for the choice, one for an NLL that no choice has seen.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gradpruner.answer_judge import AnswerJudge
from gradpruner.batch_rows import by_length, split_rows
from gradpruner.encoding import IGNORED, Batch
from gradpruner.hidden_states import answer_nll
from gradpruner.plan import PruningPlan
from gradpruner.progress import Steps
from gradpruner.repair.maps import RIDGES, Sums, best_ridge, fold, scale
from gradpruner.repair.states import (
    NORMED_MODEL_TYPES,
    PLAIN_MODEL_TYPES,
    PrunedRun,
    RunStates,
    Tokens,
    down_proj,
    pruned_runs,
    stream_outputs,
)

NONE, MAGNITUDE, CHANNELS, MAP = "none", "magnitude", "channels", "map"
FEWEST_ROWS = 10
NUM_RIDGES = 2  # lambdas that are judged, from the one with the least squared error up
CHANNEL_RIDGE = 1e-2
# Norms take scale out of all that these models' layers read; OLMo 2 has no norm there.
SCALE_FREE_MODEL_TYPES = (*PLAIN_MODEL_TYPES, "gemma2", "gemma3_text")


@dataclass(frozen=True)
class JudgedFit:
    """Result for one run.

    Attributes:
        absorber: layer whose output is changed.
        last: last layer of the run; the absorber itself if it is refitted.
        num_tokens: number of tokens in the fit.
        chosen: what was done, one of the names in `options`.
        options: answer NLL on the rows of the choice with each change; `none` is that before.
        fresh_nll_before: answer NLL on rows that no choice has seen, before the change.
        fresh_nll_after: the same after it.
    """

    absorber: int
    last: int
    num_tokens: int
    chosen: str
    options: dict[str, float]
    fresh_nll_before: float
    fresh_nll_after: float

    @property
    def applied(self) -> bool:
        """Whether anything was changed."""
        return self.chosen != NONE


@dataclass(frozen=True)
class _Change:
    """A change that competes: what it is called, how it is made, and which modules it touches."""

    name: str
    make: Callable[[], None]
    modules: Sequence[nn.Module]


@torch.no_grad()
def judged_repair(
    model: PreTrainedModel, dense: PreTrainedModel, plan: PruningPlan, batches: Sequence[Batch], refit: bool = False
) -> list[JudgedFit]:
    """Repairs the pruned model in place.

    Args:
        model: the pruned model.
        dense: the dense model; unchanged.
        plan: the plan that was applied to `model`.
        batches: dicts of `input_ids`, `attention_mask`, `labels`, each (B, T).
        refit: also refit the kept layers behind the first cut.

    Returns:
        One result per run, and per refitted layer, in order of depth.

    Raises:
        ValueError: if there are fewer than ten rows, or some of the row groups have no answer tokens.
    """
    fitted, choosing, fresh = divide_rows(batches)
    judge, stream_scale = AnswerJudge(model, choosing), 1.0
    to_fit, to_choose = (RunStates(model, dense, plan, rows) for rows in (fitted, choosing))
    fits: list[JudgedFit] = []
    now, fresh_now = judge.nll(), answer_nll(model, fresh)
    runs = _runs(plan, refit)
    with Steps("repair, judged by the answers", "run", len(runs)) as steps:
        for run in runs:
            position = plan.kept_layers.index(run.absorber)
            judge.advance(position)
            proposals = _Proposals(model, plan, run)
            proposals.fit(to_fit.read(run, stream_scale), _answer_weight(fitted))
            held_out = list(to_choose.read(run, stream_scale))
            options, best, best_change = {NONE: now}, now, None
            for change in proposals.changes(held_out):
                before = [(parameter, parameter.data) for module in change.modules for parameter in module.parameters()]
                change.make()
                options[change.name] = nll = judge.nll()
                for parameter, data in before:
                    parameter.data = data
                if nll < best:
                    best, best_change = nll, change
            fresh_before = fresh_now
            if best_change is not None:
                best_change.make()
                now, fresh_now = best, answer_nll(model, fresh)
                if best_change.name == MAGNITUDE:
                    stream_scale /= proposals.alpha
            chosen = NONE if best_change is None else best_change.name
            fits.append(
                JudgedFit(run.absorber, run.last, proposals.num_tokens, chosen, options, fresh_before, fresh_now)
            )
            steps.advance(note=f"nll {now:.3f}")
    return fits


class _Proposals:
    """What squared error proposes for one run."""

    def __init__(self, model: PreTrainedModel, plan: PruningPlan, run: PrunedRun) -> None:
        self._model, self._run = model, run
        self._position = plan.kept_layers.index(run.absorber)
        self._plain, self._weighted = Sums(), Sums()
        self._ratios, self._weight = 0.0, 1.0
        self.num_tokens = 0

    @property
    def alpha(self) -> float:
        """Mean over tokens of |Z| / |X|."""
        return self._ratios / self.num_tokens

    def fit(self, states: Iterator[Tokens], answer_weight: float) -> None:
        """Sums what the changes are computed from, in one pass."""
        self._weight = answer_weight
        for tokens in states:
            self._plain.add(tokens.outputs, tokens.missing)
            self._weighted.add(*self._weigh(tokens))
            before = tokens.target - tokens.missing + tokens.outputs  # X = Y + M
            norms = tokens.target.double().norm(dim=-1) / before.double().norm(dim=-1)
            self._ratios += float(norms.sum())
            self.num_tokens += len(norms)

    def _weigh(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Returns M and R times the roots of the tokens' weights."""
        roots = torch.where(tokens.answers, self._weight**0.5, 1.0).double()[:, None]
        return tokens.outputs.double() * roots, tokens.missing.double() * roots

    def changes(self, held_out: Sequence[Tokens]) -> Iterator[_Change]:
        """Yields the changes; the model must be as it was when the next one is asked for."""
        model, position = self._model, self._position
        model_type = model.config.model_type
        later = range(position + 1, model.config.num_hidden_layers)
        is_cut = self._run.last != self._run.absorber
        if is_cut and later and model_type in SCALE_FREE_MODEL_TYPES:
            modules = [module for index in later for module in stream_outputs(model, index)]
            alpha = self.alpha

            def divide() -> None:
                for module in modules:
                    scale(module, 1.0 / alpha)

            yield _Change(MAGNITUDE, divide, modules)
        if is_cut or model_type in NORMED_MODEL_TYPES:
            _, mlp = stream_outputs(model, position)
            factors = self._plain.channel_scales(CHANNEL_RIDGE)
            yield _Change(CHANNELS, lambda: scale(mlp, factors), [mlp])
        if model_type in NORMED_MODEL_TYPES:
            return
        linear = down_proj(model, position)
        kinds = [(self._weighted, f"{MAP}, answers weighted", [self._weigh(tokens) for tokens in held_out])]
        if is_cut:
            kinds.insert(0, (self._plain, MAP, [(tokens.outputs, tokens.missing) for tokens in held_out]))
        for sums, label, pairs in kinds:
            solution = sums.solve()
            best, _, _ = best_ridge(solution, pairs)
            first = RIDGES.index(best)
            for ridge in RIDGES[first : first + NUM_RIDGES]:
                yield _Change(f"{label}, lambda {ridge:g}", partial(fold, linear, solution, ridge), [linear])


def _runs(plan: PruningPlan, refit: bool) -> list[PrunedRun]:
    """Returns the runs of a plan, and with `refit` the kept layers behind the first one, in order of depth."""
    runs = pruned_runs(plan)
    if not refit or not runs:
        return runs
    absorbers = {run.absorber for run in runs}
    others = [layer for layer in plan.kept_layers if layer > runs[0].last and layer not in absorbers]
    return sorted([*runs, *(PrunedRun(layer, layer) for layer in others)], key=lambda run: run.absorber)


def check_num_rows(num_rows: int, num_available: int | None = None) -> None:
    """Raises ValueError if rows are too few to be divided.

    Args:
        num_rows: rows to divide.
        num_available: training rows that there are, if known.
    """
    if num_rows >= FEWEST_ROWS:
        return
    of_all = "" if num_available in (None, num_rows) else f" of {num_available}"
    raise ValueError(
        "Candidates and changes are chosen by rows that they were not fitted on, which takes "
        f"{FEWEST_ROWS} rows at least, got {num_rows}{of_all}. Give more training rows, or raise method.repair_rows; "
        "with few rows, method.repair=least_squares and method.candidates=false need none for the choice."
    )


def divide_rows(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch], list[Batch]]:
    """Returns the rows of fits, of the choice, and of neither: seven, two and one of ten.

    Raises:
        ValueError: if there are fewer than ten rows, or rows without answers.
    """
    check_num_rows(sum(len(batch["input_ids"]) for batch in batches))
    rest, choosing = split_rows(batches, 5, 4)
    fitted, fresh = split_rows(rest, 8, 3)
    if not all(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in (*choosing[:1], *fresh[:1])):
        raise ValueError(
            "repair=judged measures the likelihood of answers, got rows without answer tokens. Give rows with answers, "
            "or set method.repair=least_squares."
        )
    return by_length(fitted), by_length(choosing), by_length(fresh)


def _answer_weight(batches: Sequence[Batch]) -> float:
    """Returns the weight with which answer tokens weigh as much as all others together, at least 1."""
    answers = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches)
    others = sum(int(batch["attention_mask"].sum()) for batch in batches) - answers
    return max(1.0, others / max(1, answers))
