"""Width pruning through the pipeline: stages, recovery between pruning and fine-tuning, resuming, verification."""

import dataclasses
import json

import pytest
import torch
from transformers import TrainerCallback

from baselines.kernel_igia import KernelIgia
from baselines.llm_pruner import LlmPruner
from baselines.minitron import Minitron
from experiments import verify
from gradpruner.checkpoints.checkpoint import save_checkpoint
from gradpruner.evaluate.likelihood import Likelihood
from gradpruner.finetune.spec import TrainingSpec
from gradpruner.models.shape import model_shape
from gradpruner.models.spec import ModelSpec
from gradpruner.pipeline import stages
from gradpruner.pipeline.run import Pipeline
from gradpruner.tasks import JsonLines

TINY = {
    "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 5, "num_attention_heads": 6,
    "num_key_value_heads": 3, "max_position_embeddings": 256, "initializer_range": 0.1,
}  # fmt: skip
RECOVER = {
    "recover_on": "other",
    "recover_training": {
        "learning_rate": 1e-2, "batch_size": 4, "micro_batch_size": 2, "max_steps": 4, "save_steps": 2,
    },
}  # fmt: skip
METHODS = {
    "llm_pruner": LlmPruner(first_layer=1, end_layer=5),
    "llm_pruner-uniform": LlmPruner(uniform=True),
    "llm_pruner-recovered": LlmPruner(first_layer=1, end_layer=5, **RECOVER),
    "minitron": Minitron(),
    "minitron-depth": Minitron(axes="depth", **RECOVER, distil_states=True),
    "minitron-distilled": Minitron(**RECOVER),
    "kernel_igia": KernelIgia(sparsity=0.4, steps=2, batch_size=2, lora_rank=2),
}


@pytest.fixture
def make(tmp_path):
    def task(name):
        rows = [{"question": f"{name} {n} + 1?", "options": [str(n + 1), "x"], "answer": 0} for n in range(8)]
        for split in ("train", "test"):
            file = tmp_path / f"{name}-{split}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return JsonLines(
            train_file=str(tmp_path / f"{name}-train.jsonl"), test_file=str(tmp_path / f"{name}-test.jsonl"),
            prompt="{question}", choice=" {choice}", answer_field="answer", choices_field="options", max_length=128,
        )  # fmt: skip

    def pipeline(method, mode="lora", cache="cache", model_type="llama"):
        training = TrainingSpec(mode=mode, learning_rate=1e-2, batch_size=4, micro_batch_size=4, max_steps=2)
        model = ModelSpec(f"random:{model_type}", config=TINY)
        other = task("other") if getattr(method, "recover_on", None) else None
        return Pipeline(
            model, task("own"), method, training, Likelihood(), 0, tmp_path / cache, recovery_task=other
        )  # fmt: skip

    return pipeline


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_from_end_to_end(name, mode, make, tmp_path):
    pipeline = make(METHODS[name], mode)
    outcome = pipeline.run()
    assert outcome.training["steps"] == 2 and 0 <= outcome.metrics["accuracy"] <= 1
    model = pipeline.load_result()
    assert model_shape(model) == pipeline.shape
    assert outcome.shape.to_dict() == pipeline.shape.to_dict()
    assert outcome.num_parameters < 0.8 * pipeline.num_dense_parameters
    assert (outcome.recovery is not None) == bool(getattr(METHODS[name], "recover_on", None))
    again = make(METHODS[name], mode)
    assert again.run() == outcome and all(again.stages().values())


@pytest.mark.parametrize(
    "name", ["llm_pruner", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llm_pruner-uniform", "minitron"))]
)
def test_checkpoints_are_verified(name, make, tmp_path):
    pipeline = make(METHODS[name])
    plan = pipeline.run().plan
    save_checkpoint(pipeline.load_result(), pipeline.tokenizer, plan, tmp_path / "saved", "tiny")
    checks = {check.name: check.ok for check in verify.verify(tmp_path / "saved")}
    assert False not in checks.values(), checks
    assert ("own loader" in checks) == (name == "llm_pruner")
    if name == "llm_pruner":
        file = tmp_path / "saved" / "shape.json"
        shape = json.loads(file.read_text())
        shape["intermediate_size"][1] += 1
        file.write_text(json.dumps(shape))
        [load] = [check for check in verify.verify(tmp_path / "saved") if check.name == "load"]
        assert load.ok is False and "do not fit its shape.json" in load.details


def weights(pipeline):
    return {name: value.clone() for name, value in pipeline.load_result().state_dict().items()}


class Stop(TrainerCallback):
    """Callback that kills the training after step `step`."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "name",
    [
        "llm_pruner-recovered",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("minitron-depth", "minitron-distilled")),
    ],
)
def test_a_recovery_that_was_killed_goes_on(name, make, monkeypatch):
    whole = make(METHODS[name], cache="whole")
    whole.run()
    train = stages.finetune

    def killed(*args, **kwargs):
        return train(*args, **kwargs, callbacks=[Stop(3)]) if "description" in kwargs else train(*args, **kwargs)

    monkeypatch.setattr(stages, "finetune", killed)
    with pytest.raises(KeyboardInterrupt):
        make(METHODS[name]).run()
    monkeypatch.setattr(stages, "finetune", train)
    resumed = make(METHODS[name])
    assert not resumed.stages()["recover"]
    resumed.run()
    for key, value in weights(resumed).items():
        assert torch.equal(value, weights(whole)[key]), key


def test_recovery_is_what_the_fine_tune_starts_from(make):
    plain, distilled = (make(method) for method in (Minitron(), Minitron(**RECOVER)))
    before, after = plain.run(), distilled.run()
    assert before.plan == after.plan
    assert before.metrics_before["answer_nll"] != after.metrics_before["answer_nll"]
    assert after.recovery["steps"] == 4 and after.recovery["loss"] > 0
    # Recovery settings change the keys of the recovery and later stages, and no earlier key.
    changed = dataclasses.replace(METHODS["minitron-distilled"], temperature=2.0)
    found = make(changed).stages()
    assert found["measure"] and found["prune"] and not found["recover"] and not found["finetune"]


def test_all_tokens_or_those_of_the_answers(make):
    everything = make(Minitron(**RECOVER)).recovery_rows
    answers = make(Minitron(**RECOVER, distil_tokens="answer")).recovery_rows
    assert [row.num_answer_tokens for row in everything] == [len(row.input_ids) - 1 for row in everything]
    assert all(row.num_answer_tokens == 3 for row in answers)


def test_an_unknown_architecture_is_refused_before_weights_are_read(make, monkeypatch):
    monkeypatch.setattr(ModelSpec, "load", lambda *args: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=r"method=llm_pruner makes layers narrower, .*got model type 'olmo2'"):
        make(LlmPruner(), model_type="olmo2").run()
    with pytest.raises(ValueError, match=r"No MLP width leaves"):
        make(LlmPruner(sparsity=0.8, first_layer=1, end_layer=2)).run()
