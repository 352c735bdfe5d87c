"""Distillation: divergence by hand, chunks, compared tokens, hidden states, and training."""

import pytest
import torch
from torch.nn import functional

from gradpruner import hidden_states
from gradpruner.encoding import TrainingRow, collate
from gradpruner.finetune.distill import Distillation, DistillationLoss, add_states_loss, kl_divergence, states_loss
from gradpruner.finetune.run import finetune
from gradpruner.finetune.spec import TrainingSpec
from gradpruner.method import Recovery
from gradpruner.plan import PruningPlan, WidthPlan
from gradpruner.surgery import apply_plan

TEACHER, STUDENT = torch.tensor([[2.0, 1, 0]]), torch.tensor([[1.0, 1, 1]])
WHOLE = PruningPlan(num_hidden_layers=6)


def test_divergence_by_hand():
    assert float(kl_divergence(TEACHER, STUDENT)) == pytest.approx(0.266217, abs=1e-6)
    assert float(kl_divergence(TEACHER, STUDENT, 2.0)) == pytest.approx(0.313684, abs=1e-6)
    assert float(kl_divergence(STUDENT, TEACHER)) == pytest.approx(0.308994, abs=1e-6)  # forward is not backward
    assert float(kl_divergence(TEACHER, TEACHER)) == 0
    assert float(kl_divergence(TEACHER.expand(5, 3), STUDENT.expand(5, 3))) == pytest.approx(5 * 0.266217, abs=1e-5)


def test_states_weigh_as_much_as_logits():
    logits, states = torch.tensor(0.4, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    total = add_states_loss(logits, states)
    assert float(total.detach()) == pytest.approx(0.8)
    total.backward()
    assert float(logits.grad) == 1 and float(states.grad) == pytest.approx(0.2)


def answers_everywhere(batch):
    """Returns the batch with labels on all real tokens but the first of each row."""
    mask = batch["attention_mask"]
    labels = torch.where((mask.cumsum(-1) > 1) & mask.bool(), batch["input_ids"], -100)
    return {**batch, "labels": labels}


def by_hand(student, teacher, batch):
    """Computes the loss token by token over whole logits."""
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "position_ids": positions}
    p, q = (model(**inputs).logits.softmax(-1) for model in (teacher, student))
    total, count = 0.0, 0
    for row in range(len(batch["labels"])):
        for t in range(batch["labels"].shape[1] - 1):
            if batch["labels"][row, t + 1] != -100:
                total = total + (p[row, t] * (p[row, t] / q[row, t]).log()).sum()
                count += 1
    return total, count


@pytest.mark.parametrize("chunk", [1, 7, 10**6])
def test_loss_and_gradient_do_not_depend_on_chunks(chunk, tiny_llama, make_batches, monkeypatch):
    monkeypatch.setattr(hidden_states, "CHUNK_LOGITS", chunk * 258)
    batch = answers_everywhere(make_batches(1, batch_size=3)[0])
    teacher, student = tiny_llama(), tiny_llama(seed=1)
    total, count = DistillationLoss(teacher, Distillation(), WHOLE)(student, batch)
    expected, expected_count = by_hand(student, teacher, batch)
    assert count == expected_count == int(batch["attention_mask"].sum()) - 3
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    parameters = list(student.parameters())
    ours, theirs = (torch.autograd.grad(loss, parameters) for loss in (total, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())


def test_the_teacher_itself_has_nothing_to_learn(tiny_llama, make_batches):
    batch = answers_everywhere(make_batches(1)[0])
    for states in (False, True):
        total, _ = DistillationLoss(tiny_llama(), Distillation(states=states), WHOLE)(tiny_llama(), batch)
        assert float(total.detach()) == pytest.approx(0.0, abs=1e-6)


def test_padding_does_not_count(tiny_llama, make_batches):
    batch = answers_everywhere(make_batches(1)[0])
    longer = {
        name: functional.pad(values, (5, 0), value=-100 if name == "labels" else 0) for name, values in batch.items()
    }
    for states in (False, True):
        loss = DistillationLoss(tiny_llama(), Distillation(states=states), WHOLE)
        one, other = (float(loss(tiny_llama(seed=1), each)[0].detach()) for each in (batch, longer))
        assert one == pytest.approx(other, rel=1e-5)


def test_states_of_a_shallower_and_narrower_student():
    real = torch.tensor([[False, True]])
    teacher = [torch.full((1, 2, 3), float(layer)) + torch.arange(3.0) for layer in range(5)]
    # Layers 0, 2, 3 are kept: 0 is compared with the input of 2 (output of 1), 2 with itself, 3 with the last output.
    width = WidthPlan(((0,),) * 3, ((0,),) * 3, (0, 2))
    plan = PruningPlan(num_hidden_layers=5, pruned_layers=(1, 4), width=width)
    student = [teacher[layer][..., [0, 2]].clone() for layer in (1, 2, 4)]
    assert float(states_loss(student, teacher, plan, real)) == 0
    student[0][0, 0] = 99.0  # padding
    assert float(states_loss(student, teacher, plan, real)) == 0
    student[1][0, 1, 0] += 3.0  # 9 / 2 channels / 3 layers
    assert float(states_loss(student, teacher, plan, real)) == pytest.approx(1.5)


@pytest.mark.parametrize("states", [False, True])
def test_training_brings_the_student_nearer(states, tiny_llama, tmp_path):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 258, (16, 12), generator=generator).tolist()
    rows = [TrainingRow(tuple(row), len(row) - 1) for row in ids]
    plan = PruningPlan(num_hidden_layers=6, pruned_layers=(2, 3))
    student = apply_plan(tiny_llama(), plan)
    loss = DistillationLoss(tiny_llama(), Distillation(states=states), plan)
    batch = collate(rows, 1)
    before = float(loss(student, batch)[0].detach())
    spec = TrainingSpec(
        mode="full", learning_rate=1e-2, batch_size=8, micro_batch_size=4, max_steps=12, min_lr_ratio=0.1,
        weight_decay=0.0,
    )  # fmt: skip
    result = finetune(student, rows, 1, spec, tmp_path, loss=loss)
    assert float(loss(student.eval(), batch)[0].detach()) < 0.9 * before
    assert result["history"][-1]["learning_rate"] >= 1e-3
    assert result["history"][0]["loss"] == pytest.approx(before / (16 * 11), rel=0.5)


def test_accumulation_is_one_batch(tiny_llama, tmp_path):
    ids = torch.randint(2, 258, (8, 12), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [TrainingRow(tuple(row[: 12 - n % 4]), 11 - n % 4) for n, row in enumerate(ids)]
    losses = []
    for micro in (8, 2):
        spec = TrainingSpec(mode="full", learning_rate=1e-3, batch_size=8, micro_batch_size=micro, max_steps=3)
        loss = DistillationLoss(tiny_llama(seed=1), Distillation(), WHOLE)
        result = finetune(tiny_llama(), rows, 1, spec, tmp_path / str(micro), loss=loss)
        losses.append([entry["loss"] for entry in result["history"]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: Distillation(temperature=0.0), r"temperature must be above 0, got 0\.0\. MINITRON's is 1"),
        (lambda: Distillation(tokens="some"), r"distillation tokens must be one of all, answer, got 'some'"),
        (
            lambda: Recovery(TrainingSpec(mode="lora"), Distillation()),
            r"Distillation trains all weights, got mode=lora\. Leave it out of method\.recover_training",
        ),
        (lambda: TrainingSpec(min_lr_ratio=1.5), r"min_lr_ratio is where a cosine schedule ends, .* got 1\.5"),
        (
            lambda: TrainingSpec(min_lr_ratio=0.1, lr_scheduler="linear"),
            r"got 0\.1 with lr_scheduler=linear\. Set finetune\.min_lr_ratio=0",
        ),
    ],
)
def test_what_is_refused(build, match):
    with pytest.raises(ValueError, match=match):
        build()
