"""Timing in fresh processes: what is measured, what each process receives, and how results are combined."""

import dataclasses
import json

import pytest
import torch
from transformers import Trainer

from gradpruner.models.shape import LayerShape, ModelShape, config_shape, model_shape
from gradpruner.pipeline import speed, speed_process
from gradpruner.pipeline.speed import Phase, measure, ratios
from gradpruner.pipeline.speed_process import Workload, random_model

SMALL = Workload(
    train_rows=2, train_tokens=8, answer_tokens=2, prompt_tokens=6, new_tokens=3, repeats=2, rounds=1, lora_rank=2
)


def test_a_model_is_measured_in_a_process_of_its_own(tiny_llama):
    config = tiny_llama().config
    uneven = ModelShape(32, (LayerShape(2, 1, 5), *config_shape(config).layers[1:3]))
    phases = measure({"own": (config, uneven)}, SMALL)["own"]
    assert set(phases) == {"train", "prefill", "decode"}
    assert [len(phases[name].seconds) for name in ("train", "prefill", "decode")] == [2, 2, 6]
    assert [phases[name].tokens for name in ("train", "prefill", "decode")] == [16, 6, 1]
    assert all(second > 0 for phase in phases.values() for second in phase.seconds)
    assert set(ratios(phases, phases)["prefill"]) == {"time", "memory"}
    json.dumps([phase.to_dict() for phase in phases.values()], allow_nan=False)


def test_models_take_turns(monkeypatch, tiny_llama):
    calls = []

    def fake(role, config, shape, workload):
        calls.append((role, len(shape.layers)))
        name = "train" if role == "train" else "prefill"
        return {name: Phase((float(len(calls)),), 10, 100 + len(calls))}

    monkeypatch.setattr(speed, "_in_fresh_process", fake)
    config = tiny_llama().config
    dense = config_shape(config)
    models = {"dense": (config, dense), "own": (config, dataclasses.replace(dense, layers=dense.layers[:2]))}
    found = measure(models, dataclasses.replace(SMALL, rounds=2))
    turn = [("train", 6), ("train", 2), ("infer", 6), ("infer", 2)]
    assert calls == turn * 2
    assert found["dense"]["train"] == Phase((1.0, 5.0), 10, 105)
    assert found["own"]["prefill"] == Phase((4.0, 8.0), 10, 108)
    calls.clear()
    measure(models, SMALL, ("infer",))
    assert [role for role, _ in calls] == ["infer"] * 2


def test_summaries():
    phase = Phase((4.0, 1.0, 3.0), 6, 50)
    values = phase.to_dict()
    assert values["median_seconds"] == 3.0 and values["tokens_per_second"] == 2.0 and values["repeats"] == 3
    assert values["quartile_seconds"] == [1.0, 4.0] and values["peak_memory_bytes"] == 50
    assert Phase((2.0,), 1, 1).to_dict()["quartile_seconds"] == [2.0, 2.0]
    assert ratios({"x": phase}, {"x": Phase((6.0,), 6, 100)}) == {"x": {"time": 0.5, "memory": 0.5}}


@pytest.mark.parametrize("layers", [(LayerShape(4, 2, 48),) * 2, (LayerShape(2, 1, 7), LayerShape(4, 2, 48))])
def test_random_models_have_the_shape_and_finite_weights(layers, tiny_llama):
    model = random_model(tiny_llama().config, ModelShape(32, layers), SMALL)
    assert model_shape(model).layers == layers and not model.training
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_random_weights_are_drawn_on_the_device(tiny_llama, monkeypatch):
    """The meta device stands in for a GPU."""
    monkeypatch.setattr(speed_process, "default_device", lambda: torch.device("meta"))
    config, drawn = tiny_llama().config, []
    monkeypatch.setattr(torch.nn.init, "normal_", lambda tensor, *args, **kwargs: drawn.append(tensor) or tensor)
    model = random_model(config, config_shape(config), SMALL)
    assert {value.device.type for value in (*model.parameters(), *drawn)} == {"meta"}


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_timed_fine_tune_writes_no_checkpoint(mode, tiny_llama, monkeypatch):
    monkeypatch.setattr(Trainer, "_save_checkpoint", lambda *args, **kwargs: pytest.fail("wrote a checkpoint"))
    config = tiny_llama().config
    workload = dataclasses.replace(SMALL, mode=mode)
    timed = speed_process._train(random_model(config, config_shape(config), workload), workload)
    assert len(timed["train"]["seconds"]) == SMALL.repeats


def test_a_process_that_fails_says_why(tiny_llama, monkeypatch):
    config = tiny_llama().config
    monkeypatch.setattr(config, "to_json_string", lambda **kwargs: json.dumps({"model_type": "unheard_of"}))
    with pytest.raises(RuntimeError, match=r"Measuring \(infer\) ended with status 1:[\s\S]*unheard_of"):
        measure({"dense": (config, config_shape(config))}, SMALL, ("infer",))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"dtype": "float12"}, r"dtype must be one of float32, bfloat16, float16, got 'float12'"),
        ({"repeats": 0}, r"repeats must be 1 or more, got 0\. Raise it"),
        ({"answer_tokens": 8}, r"answer_tokens must be fewer than the 8 train_tokens, got 8"),
    ],
)
def test_workloads_that_cannot_work(changes, match):
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(SMALL, **changes)
