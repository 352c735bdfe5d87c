"""Fine-tuning: trained weights, written files, and equal results of interrupted and undisturbed runs."""

import json

import pytest
import torch
from transformers import TrainerCallback

from gradpruner.encoding import TrainingRow
from gradpruner.finetune.result import load_finetuned, read_result
from gradpruner.finetune.run import CHECKPOINTS_FOLDER, finetune
from gradpruner.finetune.spec import TrainingSpec
from gradpruner.finetune.trainer import DivergedError
from gradpruner.models.spec import ModelSpec

CONFIG = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
ROWS = [TrainingRow((*range(2, 4 + index % 5), 60 + index % 7, 1), 2) for index in range(12)]
SPEC = {"learning_rate": 1e-2, "batch_size": 4, "micro_batch_size": 2, "epochs": 3, "save_steps": 2}


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    folder = tmp_path_factory.mktemp("assets")
    return lambda: ModelSpec("random:llama", config=CONFIG).load(folder)


def run(load, directory, callbacks=(), seed=0, **changes):
    spec = TrainingSpec(**{**SPEC, **changes})
    finetune(load(), ROWS, 1, spec, directory, seed, callbacks)
    return load_finetuned(load(), spec, directory), read_result(directory)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_learns_and_leaves_no_checkpoints(load, tmp_path, mode):
    model, result = run(load, tmp_path, mode=mode, epochs=20)
    losses = [entry["loss"] for entry in result["history"]]
    assert losses[-1] < losses[0] - 0.1
    assert result["steps"] == len(losses) == TrainingSpec(**{**SPEC, "epochs": 20}).num_steps(len(ROWS)) == 60
    assert result["tokens"] == 20 * sum(len(row.input_ids) for row in ROWS)
    assert not (tmp_path / CHECKPOINTS_FOLDER).exists()
    assert not model.training and not same(weights(model), weights(load()))


def test_lora_changes_linear_weights_only(load, tmp_path):
    model, _ = run(load, tmp_path, mode="lora")
    changed = {name for name, value in weights(model).items() if not torch.equal(value, load().state_dict()[name])}
    assert changed == {name for name in load().state_dict() if name.endswith("_proj.weight")}


def test_unmerged_adapter_computes_the_same(load, tmp_path):
    merged, _ = run(load, tmp_path / "a", mode="lora")
    apart, _ = run(load, tmp_path / "b", mode="lora", merge_adapter=False)
    ids = torch.tensor([[2, 3, 4, 5]])
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, apart(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_same_seed_same_weights(load, tmp_path, mode):
    first, _ = run(load, tmp_path / "a", mode=mode)
    second, _ = run(load, tmp_path / "b", mode=mode)
    other, _ = run(load, tmp_path / "c", mode=mode, seed=1)
    assert same(weights(first), weights(second))
    assert not same(weights(first), weights(other))


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("grouped", [True, False])
def test_an_interrupted_run_ends_like_an_undisturbed_one(load, tmp_path, mode, grouped):
    changes = {"mode": mode, "group_by_length": grouped, "lora_dropout": 0.1}
    whole, expected = run(load, tmp_path / "whole", **changes)
    for step in (3, 7):  # in the first and in the third epoch
        with pytest.raises(KeyboardInterrupt):
            run(load, tmp_path / "killed", [KillAt(step)], **changes)
    resumed, result = run(load, tmp_path / "killed", **changes)
    assert same(weights(whole), weights(resumed))
    assert [entry["loss"] for entry in result["history"]] == [entry["loss"] for entry in expected["history"]]
    assert (result["steps"], result["tokens"]) == (expected["steps"], expected["tokens"])


def test_a_half_written_checkpoint_is_not_resumed_from(load, tmp_path):
    whole, _ = run(load, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(load, tmp_path / "killed", [KillAt(5)])
    newest = tmp_path / "killed" / CHECKPOINTS_FOLDER / "checkpoint-4"
    (newest / "complete.json").unlink()
    (newest / "trainer_state.json").write_text("{")
    resumed, _ = run(load, tmp_path / "killed")
    assert same(weights(whole), weights(resumed))


def test_accumulation_does_not_change_the_step(load, tmp_path):
    rows = {"mode": "full", "group_by_length": False, "epochs": 1}
    small, _ = run(load, tmp_path / "a", micro_batch_size=1, **rows)
    large, _ = run(load, tmp_path / "b", micro_batch_size=4, **rows)
    for name, value in weights(small).items():
        torch.testing.assert_close(value, large.state_dict()[name], atol=2e-4, rtol=1e-3)


class PoisonAt(TrainerCallback):
    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 3:
            next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))


def test_a_nan_loss_stops_the_run_and_keeps_the_last_good_checkpoint(load, tmp_path):
    with pytest.raises(
        DivergedError, match=r"The loss is nan at step 4 of 9 .*Lower the learning rate.*checkpoint-2\."
    ):
        run(load, tmp_path, [PoisonAt()], mode="full")
    assert (tmp_path / CHECKPOINTS_FOLDER / "checkpoint-2" / "complete.json").is_file()


class PoisonGradientAt(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(float("inf"))


def test_a_nan_before_the_first_checkpoint_says_so(load, tmp_path):
    with pytest.raises(DivergedError, match="No checkpoint had been written yet"):
        run(load, tmp_path, [PoisonGradientAt()], mode="full", save_steps=100)


def test_account_is_json(load, tmp_path):
    run(load, tmp_path)
    result = json.loads((tmp_path / "training.json").read_text())
    measured = {"steps", "tokens", "train_seconds", "peak_memory_bytes", "loss", "history"}
    assert measured | {"precision", "micro_batch_size", "update_survival"} == set(result)
    assert result["peak_memory_bytes"] > 0 and result["train_seconds"] > 0


@pytest.mark.parametrize(
    ("num_rows", "changes", "steps"),
    [
        (12, {}, 9),
        (13, {}, 12),
        (1, {"epochs": 1}, 1),
        (12, {"epochs": 0.5}, 2),
        (12, {"max_steps": 5}, 5),
    ],
)
def test_planned_steps_are_those_of_the_trainer(load, tmp_path, num_rows, changes, steps):
    spec = TrainingSpec(**{**SPEC, **changes})
    rows = (ROWS * 2)[:num_rows]
    assert spec.num_steps(num_rows) == steps
    assert finetune(load(), rows, 1, spec, tmp_path)["steps"] == steps
