"""Runs that a GPU cannot hold are refused before weights load, with settings that would fit; the GPU is pretended."""

import dataclasses
import math
import re

import pytest
import torch

from baselines.minitron import Minitron
from baselines.sat import Sat
from gradpruner.dense import Dense
from gradpruner.finetune import micro_batch
from gradpruner.finetune.spec import TrainingSpec
from gradpruner.grad_pruner import GradPruner
from gradpruner.models.counting import count_model
from gradpruner.models.memory import MemoryEstimate, estimate_training_memory
from gradpruner.models.spec import ModelSpec
from gradpruner.pipeline import estimate
from gradpruner.pipeline.estimate import check_memory, importance_memory, settle_micro_batch, training_memory

CONFIG = {
    "num_hidden_layers": 6,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
METHOD = GradPruner(sparsity=0.5, merge_count=1, steps=3, batch_size=4)
LORA = TrainingSpec(batch_size=8, micro_batch_size=4, epochs=1)
FULL = dataclasses.replace(LORA, mode="full")


@pytest.fixture
def make(make_pipeline):
    """Returns `make(method, training, **fields)`, which makes a run."""
    return lambda method=METHOD, training=LORA, **fields: make_pipeline(CONFIG, method, training, **fields)


def quick_estimate(config, batch_size, length, *others, recompute=False, shape=None, **settings):
    """Stands in for the estimator: larger for more layers, more rows, and without recomputing."""
    weights = 10**6 * (len(shape.layers) if shape else config.num_hidden_layers)
    activations = 10**5 * batch_size * (1 if recompute else 3)
    return MemoryEstimate(weights, 0, 0, activations, 0, factors=1000 if settings.get("keep_factors") else 0)


@pytest.fixture
def gpu(monkeypatch):
    """Returns `gpu(free)`, which pretends that there is a GPU with that many bytes free."""
    for module in (estimate, micro_batch):
        monkeypatch.setattr(module, "estimate_training_memory", quick_estimate)

    def gpu(free, unused=0):
        monkeypatch.setattr(estimate, "default_device", lambda: torch.device("cuda"))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free - unused, 2 * free))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10 + unused)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Pretended 9000")

    return gpu


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    monkeypatch.setattr(ModelSpec, "load", lambda *args: pytest.fail("a weight was loaded"))


def trained(pipeline, **changes):
    """Estimated bytes of the fine-tune of the pruned model, with some settings changed."""
    training = dataclasses.replace(pipeline.training, **changes)
    return training_memory(pipeline, training, pipeline.rows, pipeline.config, pipeline.shape).total


def refusal(pipeline):
    with pytest.raises(ValueError, match=r"of GPU memory, got .* free on Pretended 9000\. ") as caught:
        pipeline.check()
    return str(caught.value)


# ---- estimates ----


@pytest.mark.parametrize("training", [LORA, FULL, dataclasses.replace(FULL, batch_size=4, gradient_checkpointing=True)])
def test_the_estimate_of_a_fine_tune_has_the_settings_of_the_run(make, training):
    pipeline = make(training=training)
    lengths, answers = zip(*((len(row.input_ids), row.num_answer_tokens) for row in pipeline.rows), strict=True)
    expected = estimate_training_memory(
        pipeline.config,
        4,
        max(lengths),
        1 + max(answers),
        torch.float32,
        lora_rank=8 if training.mode == "lora" else None,
        recompute=training.gradient_checkpointing,
        accumulate=training.batch_size > 4,
        overhead=estimate.allocator_overhead(),
        shape=pipeline.shape,
    )
    assert training_memory(pipeline, training, pipeline.rows, pipeline.config, pipeline.shape) == expected
    dense = training_memory(pipeline, training, pipeline.rows, pipeline.config)
    assert dense.total > expected.total


def test_a_micro_batch_has_no_more_rows_than_there_are(make):
    few = dataclasses.replace(LORA, micro_batch_size=8)
    pipeline = make(training=few)
    alone, of_one = pipeline.rows[:1], dataclasses.replace(few, micro_batch_size=1, batch_size=1)
    assert training_memory(pipeline, few, alone, pipeline.config) == training_memory(
        pipeline, of_one, alone, pipeline.config
    )


def test_the_importance_run_holds_factors_besides(make):
    pipeline = make()
    found = importance_memory(pipeline, pipeline.resolved_method)
    assert found.factors == 4 * count_model(pipeline.config).num_lora_parameters(8)
    lighter = dataclasses.replace(pipeline.resolved_method, batch_size=1, gradient_checkpointing=True)
    assert importance_memory(pipeline, lighter).total < found.total


# ---- refusals ----


def test_nothing_is_refused_on_a_cpu_or_where_it_fits(make, gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: pytest.fail("a GPU was asked"))
    pipeline = make()
    pipeline.check()
    largest = max(trained(pipeline), importance_memory(pipeline, pipeline.resolved_method).total)
    gpu(largest)
    pipeline.check()
    gpu(largest, unused=largest // 2)  # memory that torch holds from an earlier run but does not use
    pipeline.check()
    gpu(largest - 1)
    refusal(pipeline)
    pipeline.check(resources=False)  # a dry run


def test_the_first_settings_that_fit_are_named(make, gpu):
    pipeline = make(Dense())
    order = [
        ("finetune.gradient_checkpointing=true", {"gradient_checkpointing": True}),
        ("finetune.micro_batch_size=2", {"micro_batch_size": 2}),
        (
            "finetune.gradient_checkpointing=true finetune.micro_batch_size=2",
            {"gradient_checkpointing": True, "micro_batch_size": 2},
        ),
        ("finetune.micro_batch_size=1", {"micro_batch_size": 1}),
        (
            "finetune.gradient_checkpointing=true finetune.micro_batch_size=1",
            {"gradient_checkpointing": True, "micro_batch_size": 1},
        ),
    ]
    needed, seen = trained(pipeline), set()
    for free in range(min(trained(pipeline, **changes) for _, changes in order), needed, 50_000):
        gpu(free)
        settings, _ = next(each for each in order if trained(pipeline, **each[1]) <= free)
        message = refusal(pipeline)
        assert message.startswith("The fine-tune needs about") and message.endswith(f"It would fit with {settings}.")
        seen.add(settings)
    assert len(seen) == 3  # the second and fourth fit only where an earlier one does
    assert f"about {needed / 2**30:.1f} GiB of GPU memory" in message


def test_gradient_checkpointing_that_is_on_is_not_named(make, gpu):
    training = dataclasses.replace(LORA, gradient_checkpointing=True)
    pipeline = make(Dense(), training)
    gpu(trained(pipeline) - 1)
    assert refusal(pipeline).endswith("It would fit with finetune.micro_batch_size=2.")


def test_micro_batches_divide_the_batch(make, gpu):
    training = dataclasses.replace(LORA, batch_size=6, micro_batch_size=6, gradient_checkpointing=True)
    pipeline = make(Dense(), training)
    for rows, larger in ((3, 6), (2, 3), (1, 2)):
        gpu(trained(pipeline, micro_batch_size=larger) - 1)
        assert refusal(pipeline).endswith(f"It would fit with finetune.micro_batch_size={rows}.")


def test_settings_that_are_named_fit(make, gpu):
    pipeline = make(Dense())
    gpu(trained(pipeline) - 1)
    assert "finetune.gradient_checkpointing=true" in refusal(pipeline)
    make(Dense(), dataclasses.replace(LORA, gradient_checkpointing=True)).check()


@pytest.mark.parametrize(("training", "advice"), [(LORA, "Use a GPU"), (FULL, "Use finetune=lora, a GPU")])
def test_where_nothing_fits_that_is_said(make, gpu, training, advice):
    gpu(1000)
    message = refusal(make(Dense(), training))
    least = trained(make(Dense(), training), gradient_checkpointing=True, micro_batch_size=1)
    assert re.search(
        rf"No smaller batch would fit: one row at a time with gradient checkpointing needs {least / 2**30:.1f} GiB\. "
        rf"{advice} with more memory, a smaller model, or shorter rows \(dataset\.max_length\)\.$",
        message,
    )


def test_auto_takes_what_fits_and_is_refused_where_one_row_does_not(make, gpu):
    auto = dataclasses.replace(LORA, micro_batch_size="auto")
    pipeline = make(Dense(), auto)
    for rows in (1, 2, 4, 8):
        needed = trained(pipeline, micro_batch_size=rows)
        gpu(math.ceil(needed / 0.9))
        pipeline.check()
        settled = settle_micro_batch(pipeline, auto, pipeline.rows, pipeline.config)
        assert settled == dataclasses.replace(auto, micro_batch_size=rows)
    gpu(trained(pipeline, micro_batch_size=1) - 1)
    assert refusal(pipeline).endswith("It would fit with finetune.gradient_checkpointing=true.")


def test_the_importance_run_is_refused_first(make, gpu):
    pipeline = make(dataclasses.replace(METHOD, gradient_checkpointing=True, accumulation=3))
    method = pipeline.resolved_method
    gpu(importance_memory(pipeline, method).total - 1)
    message = refusal(pipeline)
    assert message.startswith("The importance run needs about")
    assert message.endswith("It would fit with method.batch_size=2 method.accumulation=6.")


def test_cached_stages_need_no_memory(make, gpu):
    pipeline = make()
    gpu(1000)
    assert refusal(pipeline).startswith("The importance run")
    for stage in ("measure", "finetune"):
        pipeline._folders()[stage].mkdir(parents=True)
    pipeline.check()
    with pytest.raises(ValueError, match="The fine-tune needs about"):
        check_memory(pipeline, ["measure"])


def test_distillation_holds_the_dense_model_too(make, gpu):
    training = {"mode": "full", "batch_size": 4, "micro_batch_size": 2, "epochs": 1}
    method = Minitron(sparsity=0.4, num_rows=4, recover_on="jsonl", recover_training=training)
    pipeline = make(method, recovery_task=make().task)
    recovery = pipeline.recovery.training
    own = training_memory(pipeline, recovery, pipeline.recovery_rows, pipeline.config, pipeline.shape).total
    teacher = 4 * count_model(pipeline.config).num_parameters
    gpu(own + teacher - 1)
    message = refusal(pipeline)
    assert message.startswith("The training before the fine-tune needs about")
    assert re.search(r"It would fit with method\.recover_training\.(gradient_checkpointing|micro_batch_size)=", message)
    gpu(max(own + teacher, trained(pipeline)))
    pipeline.check()


def test_a_method_that_prunes_while_it_trains_starts_dense(make, gpu, monkeypatch):
    pipeline = make(Sat(), FULL)
    dense = training_memory(pipeline, FULL, pipeline.rows, pipeline.config).total
    gpu(dense - 1)
    refusal(pipeline)
    gpu(dense)
    pipeline.check()
