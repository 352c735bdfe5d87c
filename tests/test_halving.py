"""Successive halving: which candidates go on, what they train on, and that nobody else's weights change."""

import pytest
import torch
from test_repair import make_model

from gradpruner import halving
from gradpruner.batch_rows import training_rows
from gradpruner.encoding import TrainingRow, collate
from gradpruner.finetune.run import finetune
from gradpruner.finetune.spec import TrainingSpec
from gradpruner.halving import HalvingSettings, halve
from gradpruner.hidden_states import answer_nll
from gradpruner.plan import PruningPlan
from gradpruner.repair.judged import divide_rows
from gradpruner.surgery import apply_plan, sharing_copy

SETTINGS = HalvingSettings((2, 3), learning_rate=1e-2, batch_size=6, seed=5)


class Named:
    def __init__(self, name):
        self.name = name

    def eval(self):
        return self


@pytest.mark.parametrize("number", [1, 3, 8])
def test_the_better_half_goes_on(number, monkeypatch):
    """The same as a tournament by hand over random scores of each candidate and round."""
    torch.manual_seed(number)
    scores = torch.rand(number, 3).tolist()
    steps, calls = (8, 16, 32), []
    monkeypatch.setattr(halving, "finetune", lambda model, rows, pad, spec, *args, **kwargs: calls.append(
        (model.name, spec.max_steps)))  # fmt: skip
    monkeypatch.setattr(halving, "training_rows", lambda batches: [])
    monkeypatch.setattr(halving, "answer_nll", lambda model, rows: scores[model.name][steps.index(calls[-1][1])])
    found = halve(range(number), Named, [], [], HalvingSettings(steps, 1e-3, 4, 0))
    alive, expected, out = list(range(number)), [], []
    for index, size in enumerate(steps):
        expected += [(name, size) for name in alive]
        best = sorted(alive, key=lambda name: scores[name][index])
        alive, lost = best[: max(1, len(best) // 2)], best[max(1, len(best) // 2) :]
        out = [*lost, *out]
    assert sorted(calls) == sorted(expected)
    assert [name for name, _ in found] == [*alive, *out]
    assert all(nlls == tuple(scores[name][: len(nlls)]) for name, nlls in found)


def test_scores_are_those_of_short_fine_tunes(make_batches, tmp_path):
    model, batches = make_model(), make_batches(5, batch_size=6)
    fitted, choosing, _ = divide_rows(batches)
    before = [weight.detach().clone() for weight in model.parameters()]

    def make(layer):
        plan = PruningPlan(num_hidden_layers=6, pruned_layers=(layer,))
        return apply_plan(sharing_copy(model), plan)

    found = dict(halve([1, 2, 3, 4], make, fitted, choosing, SETTINGS))
    assert all(torch.equal(weight, old) for weight, old in zip(model.parameters(), before, strict=True))
    assert sorted(map(len, found.values())) == [1, 1, 2, 2]
    rows = [row for batch in fitted for row in rows_by_hand(batch)]
    for layer, nlls in found.items():
        for steps, nll in zip(SETTINGS.steps, nlls, strict=False):
            own = make(layer)
            spec = TrainingSpec(learning_rate=1e-2, batch_size=6, micro_batch_size=6, max_steps=steps)
            finetune(own, rows, 1, spec, tmp_path / f"{layer}-{steps}", 5)
            assert answer_nll(own.eval(), choosing) == pytest.approx(nll, abs=1e-6)


def rows_by_hand(batch):
    for ids, mask, labels in zip(
        *(batch[name].tolist() for name in ("input_ids", "attention_mask", "labels")), strict=True
    ):
        start = mask.index(1)
        first = next(place for place, label in enumerate(labels) if label != -100)
        yield TrainingRow(tuple(ids[start:]), len(ids) - first)


def test_rows_of_batches_are_the_rows_they_were_made_of():
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in range(4, 24):
        ids = tuple(torch.randint(2, 90, (length,), generator=generator).tolist())
        answers = int(torch.randint(1, length, (1,), generator=generator))
        start = length - answers
        gaps = ((start + 1, start + 2),) if answers > 3 else ()
        if answers > 7:
            gaps = (*gaps, (start + 4, start + 6))
        rows.append(TrainingRow(ids, answers, gaps))
    batches = [collate(rows[start : start + 6], 1) for start in range(0, len(rows), 6)]
    assert any(len(row.gaps) == 2 for row in rows) and training_rows(batches) == rows
