"""Losses with the prompt's signal: slow loops over whole logits, batching, stored predictions, training, a run."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from test_repair import make_pipeline  # noqa: F401

from baselines.apt import Apt
from baselines.last import Last
from baselines.small_dense import SmallDense
from gradpruner import hidden_states
from gradpruner.dense import Dense
from gradpruner.encoding import TrainingRow, collate
from gradpruner.finetune import losses, teacher
from gradpruner.finetune.losses import SignalLoss
from gradpruner.finetune.order import ROW
from gradpruner.finetune.run import finetune
from gradpruner.finetune.spec import TrainingSpec
from gradpruner.finetune.teacher import ANSWERS, PROMPT, Teacher, predicted, write_predictions
from gradpruner.method import Recovery

ROWS = [
    TrainingRow(tuple(range(5, 14)), 3),
    TrainingRow((7, 9, 200, 31), 2),
    TrainingRow(tuple(range(40, 52)), 7, gaps=((7, 9),)),  # two turns of an assistant, the user's between them
    TrainingRow((3, 8, 8, 9, 100, 101), 1),
]


def batch_of(*numbers):
    return {**collate([ROWS[number] for number in numbers], 1), ROW: torch.tensor(numbers)}


def tokens_of(row):
    """Returns positions of answer tokens and of the prompt's, the first token of the row in neither."""
    first = len(row.input_ids) - row.num_answer_tokens
    inside = {position for start, end in row.gaps for position in range(start, end)}
    answers = [position for position in range(first, len(row.input_ids)) if position not in inside]
    return answers, [position for position in range(1, len(row.input_ids)) if position not in answers]


def log_probs(model, row):
    with torch.no_grad():
        return model(input_ids=torch.tensor([row.input_ids])).logits[0].double().log_softmax(-1)


def divergence(teacher_row, student_row, k):
    """Returns KL over the k likeliest tokens and all others as one, in plain Python."""
    top = sorted(range(len(teacher_row)), key=lambda token: -teacher_row[token])[:k]
    p, q = ([math.exp(row[token]) for token in top] for row in (teacher_row.tolist(), student_row.tolist()))
    p.append(1 - sum(p))
    q.append(1 - sum(q))
    return sum(one * math.log(one / other) for one, other in zip(p, q, strict=True) if one > 1e-15)


def by_hand(student, dense, tuned, weight, fraction, k=64):
    total = count = 0.0
    for row in ROWS:
        answers, prompt = tokens_of(row)
        own, of_dense, of_tuned = (log_probs(model, row) if model else None for model in (student, dense, tuned))
        for position in answers:
            total -= (1 - fraction) * float(own[position - 1, row.input_ids[position]])
            if fraction:
                total += fraction * divergence(of_tuned[position - 1], own[position - 1], k)
        for position in prompt:
            loss = -float(own[position - 1, row.input_ids[position]])
            if dense is not None:
                loss = divergence(of_dense[position - 1], own[position - 1], k)
            total += weight * len(answers) / len(prompt) * loss
        count += len(answers)
    return total, count


@pytest.fixture
def models(tiny_llama):
    """A student and two teachers with different weights."""
    made = [tiny_llama() for _ in range(3)]
    for number, model in enumerate(made[1:]):
        torch.manual_seed(number)
        for weight in model.parameters():
            weight.data = torch.randn_like(weight) * 0.3
    return made


@pytest.fixture
def teachers(models, tmp_path):
    def make(model, tokens):
        folder = tmp_path / f"{id(model)}-{tokens}"
        folder.mkdir()
        write_predictions(model, ROWS, 1, tokens, folder)
        return Teacher(folder)

    _, dense, tuned = models
    return make(dense, PROMPT), make(tuned, ANSWERS)


@pytest.mark.parametrize(("weight", "fraction"), [(1.0, 0.0), (0.3, 0.5), (2.0, 1.0), (0.0, 0.5)])
@pytest.mark.parametrize("chunk", [3, 10**6])
def test_the_loss_is_that_of_slow_loops(weight, fraction, chunk, models, teachers, monkeypatch):
    monkeypatch.setattr(hidden_states, "CHUNK_LOGITS", chunk * 258)
    student, dense, tuned = models
    loss, count = SignalLoss(weight, *teachers, fraction)(student, batch_of(0, 1, 2, 3))
    expected, num_answers = by_hand(student, dense, tuned, weight, fraction)
    assert count == num_answers == 3 + 2 + 5 + 1
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_all_tokens_by_slow_loops(weight, models):
    loss, count = SignalLoss(weight)(models[0], batch_of(0, 1, 2, 3))
    expected, num_answers = by_hand(models[0], None, None, weight, 0.0)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4) and count == num_answers


def test_batches_and_order_do_not_matter(models, teachers):
    signal, student = SignalLoss(0.7, *teachers, 0.4), models[0]
    whole, count = signal(student, batch_of(0, 1, 2, 3))
    parts = [signal(student, batch_of(*rows)) for rows in ((2,), (3, 0), (1,))]
    assert sum(float(loss.detach()) for loss, _ in parts) == pytest.approx(float(whole.detach()), rel=1e-5)
    assert sum(number for _, number in parts) == count


def test_a_teacher_of_itself_has_nothing_to_say(models, tmp_path):
    """KL of equal models is 0, with gradient 0, whatever the rounding of what is stored."""
    student = models[0]
    write_predictions(student, ROWS, 1, PROMPT, tmp_path)
    signal = SignalLoss(1.0, Teacher(tmp_path))
    plain, _ = SignalLoss(0.0)(student, batch_of(0, 1, 2, 3))
    taught, _ = signal(student, batch_of(0, 1, 2, 3))
    assert float(taught.detach()) == pytest.approx(float(plain.detach()), abs=1e-4)


def test_gradients_are_those_of_the_whole_vocabulary(models, teachers, monkeypatch):
    """With all tokens among the likeliest, the gradient is that of torch's own KL."""
    student, dense, _ = models
    monkeypatch.setattr(teacher, "TOP", 10**6)
    [row], batch = ROWS[:1], batch_of(0)
    predictions = teacher.top_predictions(dense(input_ids=torch.tensor([row.input_ids])).logits[0].detach(), 258)
    assert predictions.rest.isinf().all()
    states = hidden_states.decode(student, batch)[0]
    logits = hidden_states.head_logits(student, states)
    ours = losses._kl_divergence(logits, predictions.ids, predictions.log_probs, predictions.rest).sum()
    own = torch.nn.functional.kl_div(
        logits.log_softmax(-1), log_probs(dense, row).float(), reduction="sum", log_target=True
    )
    gradients = [torch.autograd.grad(each, student.parameters(), retain_graph=True) for each in (ours, own)]
    assert float(ours.detach()) == pytest.approx(float(own.detach()), rel=1e-4)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


# ---- stored predictions ----


def test_stored_predictions_are_the_models(models, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher, "TOP", 10)
    monkeypatch.setattr(teacher, "BATCH_SIZE", 3)
    for tokens in (PROMPT, ANSWERS):
        (tmp_path / tokens).mkdir()
        write_predictions(models[1], ROWS, 1, tokens, tmp_path / tokens)
        found = Teacher(tmp_path / tokens).of_rows(torch.tensor([2, 99, 0]))  # 99: the blank row of several processes
        expected = []
        for number in (2, 0):
            answers, prompt = tokens_of(ROWS[number])
            every = log_probs(models[1], ROWS[number])
            expected += [every[position - 1] for position in (answers if tokens == ANSWERS else prompt)]
        assert found.ids.shape == (len(expected), 10)
        for ids, values, rest, row in zip(found.ids, found.log_probs, found.rest, expected, strict=True):
            assert values.tolist() == pytest.approx(sorted(row.tolist(), reverse=True)[:10], abs=1e-4)
            assert row[ids].tolist() == pytest.approx(values.tolist(), abs=1e-4)
            assert math.exp(rest) == pytest.approx(1 - float(row[ids].exp().sum()), abs=1e-5)
    assert np.load(tmp_path / PROMPT / teacher.IDS_FILE, mmap_mode="r").dtype == np.int32


def test_every_token_but_the_first_is_of_one_kind():
    batch = batch_of(0, 1, 2, 3)
    prompt, answers = predicted(batch, PROMPT), predicted(batch, ANSWERS)
    assert not (prompt & answers).any()
    assert (prompt | answers).sum(1).tolist() == [len(row.input_ids) - 1 for row in ROWS]
    with pytest.raises(ValueError, match=r"tokens of a teacher must be one of prompt, answers, got 'all'"):
        predicted(batch, "all")


# ---- training ----


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_micro_batches_do_not_change_the_training(mode, tiny_llama, tmp_path, teachers):
    accounts = []
    for size in (4, 1):
        spec = TrainingSpec(mode, 1e-3, batch_size=4, micro_batch_size=size, max_steps=3, group_by_length=False)
        model = tiny_llama()
        loss = SignalLoss(0.5, *teachers, 0.5)
        accounts.append(finetune(model, ROWS, 1, spec, tmp_path / f"{mode}{size}", loss=loss))
    whole, single = ([entry["loss"] for entry in account["history"]] for account in accounts)
    assert single == pytest.approx(whole, rel=1e-4) and whole[-1] < whole[0]


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: TrainingSpec(loss="both"), r"finetune\.loss must be one of answers, all_tokens, distill, got 'both'"),
        (lambda: TrainingSpec(prompt_weight=-1.0), r"0 or above, got -1\.0\. Set finetune\.prompt_weight"),
        (lambda: TrainingSpec(tuned_teacher=0.5), r"in \[0, 1\], got 0\.5 with loss=answers\. Set finetune\.tuned"),
        (lambda: TrainingSpec(loss="distill", tuned_teacher=1.5), r"in \[0, 1\], got 1\.5 with loss=distill\. Set"),
        (lambda: Recovery(TrainingSpec(loss="all_tokens")), r"has a loss of its own, got loss=all_tokens\. Leave it"),
        (
            lambda: Apt(sparsity=0.4).check_training(TrainingSpec(loss="distill")),
            r"earlier states of its own model, got finetune\.loss=distill\. Set method\.distil=false",
        ),
    ],
)
def test_what_is_refused(build, match):
    with pytest.raises(ValueError, match=match):
        build()


# ---- in a run ----


def test_a_run_learns_from_stages_of_the_dense_model(make_pipeline):  # noqa: F811
    """The teachers are made once for all students, the tuned one by the fine-tune that a dense run makes, too."""

    def make(method, **changes):
        pipeline = make_pipeline(method)
        return dataclasses.replace(pipeline, training=dataclasses.replace(pipeline.training, **changes))

    signal = {"loss": "distill", "tuned_teacher": 0.5}
    method = Last(num_pruned_layers=2)
    plain = make(method).run()
    dense = make(Dense()).run()
    before = make(method, **signal).stages()
    new = {"teach_prompts", "teach_answers", "finetune", "predict", "evaluate"}
    assert {name for name, found in before.items() if not found} == new and before["tuned_dense"]
    taught = make(method, **signal).run()
    assert all(make(method, **signal).stages().values()) and make(method, **signal).run() == taught
    assert taught.training["history"] != plain.training["history"]
    assert taught.compression["seconds"] > dense.training["train_seconds"]
    other = make(Last(num_pruned_layers=3), **signal).stages()
    assert other["teach_prompts"] and other["teach_answers"] and not other["finetune"]
    weaker = make(method, **signal, prompt_weight=0.0).stages()
    assert "teach_prompts" not in weaker and weaker["teach_answers"]
    alone = make(method, loss="all_tokens").stages()
    assert not [name for name in alone if name.startswith("teach")] and not alone["finetune"]


def test_a_teacher_needs_the_students_tokens(make_pipeline):  # noqa: F811
    plain = make_pipeline(SmallDense(path="random:llama", config={"num_hidden_layers": 2}))
    training = dataclasses.replace(plain.training, loss="distill")
    larger = dataclasses.replace(plain.model, config={**plain.model.config, "vocab_size": 400})
    match = r"with the same tokens, got .* whose tokenizers or vocabularies differ\. Set finetune\.loss=all_tokens"
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(plain, model=larger, training=training).stages()
    assert "teach_prompts" in dataclasses.replace(plain, training=training).stages()
