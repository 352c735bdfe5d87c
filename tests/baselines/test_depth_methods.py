"""Properties of every method that drops layers."""

import dataclasses
import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from baselines.angular import Angular
from baselines.igia_only import IgiaOnly
from baselines.laco import LaCo
from baselines.last import Last
from baselines.magnitude import Magnitude
from baselines.perplexity import Perplexity
from baselines.random import Random
from baselines.shortgpt import ShortGpt
from baselines.small_dense import SmallDense
from baselines.taylor_depth import TaylorDepth
from gradpruner.dense import Dense
from gradpruner.evaluate.likelihood import Likelihood
from gradpruner.finetune.spec import TrainingSpec
from gradpruner.grad_pruner import GradPruner
from gradpruner.models.spec import ModelSpec
from gradpruner.pipeline.run import Pipeline
from gradpruner.pipeline.stages import calibration_batches

METHODS = {
    "gradpruner": (GradPruner, {"merge_count": 1, "steps": 2, "batch_size": 2, "lora_rank": 2}),
    "igia_only": (IgiaOnly, {"steps": 2, "batch_size": 2, "lora_rank": 2}),
    "laco": (LaCo, {}),
    "laco-paper": (LaCo, {"rule": "paper"}),
    "shortgpt": (ShortGpt, {}),
    "shortgpt-iterative": (ShortGpt, {"iterative": True}),
    "angular": (Angular, {}),
    "perplexity": (Perplexity, {}),
    "taylor_depth": (TaylorDepth, {}),
    "magnitude": (Magnitude, {}),
    "last": (Last, {}),
    "random": (Random, {}),
}
LOOK_AT_DATA = ("laco", "laco-paper", "shortgpt", "shortgpt-iterative", "angular", "perplexity", "taylor_depth")
FIND_AN_IDENTITY = ("shortgpt", "shortgpt-iterative", "angular", "taylor_depth")  # LoRA gradients flow, so do not
TINY = {
    "vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.1, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
ARCHITECTURES = {
    "llama": {},
    "qwen3": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4, "sliding_window_pattern": 3},
}


def method(name, num_pruned_layers=2, **changes):
    cls, settings = METHODS[name]
    return cls(num_pruned_layers=num_pruned_layers, **(settings | changes))


@pytest.fixture(params=METHODS)
def name(request):
    return request.param


@pytest.fixture
def make_model():
    def make(model_type="llama"):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(model_type, **TINY, **ARCHITECTURES[model_type])
        ).eval()

    return make


def logits(model, batch):
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def test_pruning_none_changes_nothing(name, make_model, make_batches):
    batches = make_batches(2)
    model = make_model()
    before = logits(model, batches[0])
    changes = {"merge_count": 0} if name == "gradpruner" else {}
    compressed = method(name, 0, **changes).compress(model, batches)
    assert compressed.plan.pruned_layers == ()
    assert torch.equal(logits(model, batches[0]), before)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_measuring_leaves_the_model_as_it_was(name, model_type, make_model, make_batches, tmp_path):
    model, batches = make_model(model_type), make_batches(2)
    weights, config, before = state(model), model.config.to_dict(), logits(model, batches[0])
    layers, indices = list(model.model.layers), [layer.self_attn.layer_idx for layer in model.model.layers]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    method(name).resolve(6).measure(model, batches, tmp_path / "measured")
    assert list(model.model.layers) == layers and model.config.to_dict() == config
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == indices
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert torch.equal(logits(model, batches[0]), before)
    assert not any(layer._forward_hooks for layer in model.model.layers)


def test_counts_and_report(name, make_model, make_batches):
    for num_pruned in (1, 2, 4):
        model = make_model()
        compressed = method(name, num_pruned).compress(model, make_batches(2))
        plan = compressed.plan
        assert len(plan.pruned_layers) == num_pruned
        assert len(model.model.layers) == model.config.num_hidden_layers == 6 - num_pruned
        assert plan.method == method(name).name
        if name not in ("laco", "laco-paper"):
            assert len(plan.layer_importance) == 6
        json.dumps([plan.to_dict(), compressed.report], allow_nan=False)
        assert type(plan).from_dict(json.loads(json.dumps(plan.to_dict()))).to_dict() == plan.to_dict()


@pytest.mark.parametrize(("layers", "expected"), [(32, 13), (30, 12), (40, 16), (16, 6)])
def test_forty_percent(name, layers, expected):
    cls, settings = METHODS[name]
    assert cls(sparsity=0.4, **settings).resolve(layers).num_pruned_layers == expected


def test_the_same_seed_and_data_give_the_same(name, make_model, make_batches):
    plans = [method(name, seed=3) if hasattr(method(name), "seed") else method(name) for _ in range(2)]
    first, second = (each.compress(make_model(), make_batches(2)).plan.to_dict() for each in plans)
    assert first == second


@pytest.mark.parametrize("data_method", LOOK_AT_DATA)
def test_neither_batch_size_nor_padding_count(data_method, make_model, make_batches):
    [whole] = make_batches(1, batch_size=6)
    longer = {
        key: torch.nn.functional.pad(value, (5, 0), value=-100 if key == "labels" else 0)
        for key, value in whole.items()
    }
    single = [{key: value[row : row + 1] for key, value in whole.items()} for row in range(6)]
    uneven = [{key: value[:4] for key, value in whole.items()}, {key: value[4:] for key, value in longer.items()}]
    plans = [
        method(data_method).compress(make_model(), batches).plan for batches in ([whole], single, uneven, [longer])
    ]
    for plan in plans[1:]:
        assert plan.pruned_layers == plans[0].pruned_layers
        assert plan.layer_importance == pytest.approx(plans[0].layer_importance, rel=1e-4, abs=1e-5)
        if "laco" in data_method:
            found = [[trial["similarity"] for trial in each.details["trials"]] for each in (plan, plans[0])]
            assert found[0] == pytest.approx(found[1], abs=1e-5)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("finder", FIND_AN_IDENTITY)
def test_a_layer_that_does_nothing_leaves_first_and_is_not_missed(finder, model_type, make_model, make_batches):
    model, batches = make_model(model_type), make_batches(2)
    idle = model.model.layers[3]
    idle.self_attn.o_proj.weight.data.zero_()
    idle.mlp.down_proj.weight.data.zero_()
    before = logits(model, batches[0])
    plan = method(finder, 1).compress(model, batches).plan
    assert plan.pruned_layers == (3,)
    if finder != "shortgpt-iterative":  # whose scores are an order
        assert plan.layer_importance[3] == pytest.approx(0.0, abs=1e-6)
    torch.testing.assert_close(logits(model, batches[0]), before)


@pytest.mark.parametrize("data_method", LOOK_AT_DATA)
def test_no_data_is_refused(data_method, make_model):
    with pytest.raises(ValueError, match=r"looks at data, got no batches\. .* compress\(\) some"):
        method(data_method).compress(make_model(), [])


def test_bad_weights_are_named(name, make_model, make_batches):
    model = make_model()
    model.model.layers[4].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"decoder layers \[4\] hold NaN or infinity"):
        method(name).compress(model, make_batches(2))


def test_scores_that_are_not_finite_are_named(make_model, tmp_path):
    from baselines.layer_dropping import Scores

    class Broken(Last):
        def score_layers(self, model, batches):
            return Scores([0.0, float("nan"), float("inf")])

    with pytest.raises(ValueError, match=r"The scores of layers \[1, 2\] are NaN or infinite with method=last\. Check"):
        Broken(num_pruned_layers=1).measure(make_model(), (), tmp_path)


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: Last(), r"Give either sparsity or num_pruned_layers, got sparsity=None and num_pruned_layers=None"),
        (lambda: Last(sparsity=1.2), r"sparsity is the fraction of decoder layers to prune, in \[0, 1\), got 1\.2"),
        (lambda: Last(num_pruned_layers=5).resolve(6), r"leave at least 2 of the model's 6 decoder layers, got 5"),
        (lambda: ShortGpt(sparsity=0.4, num_rows=0), r"num_rows must be 1 or more, got 0\. Raise method\.num_rows"),
        (lambda: Angular(sparsity=0.4, batch_size=0), r"batch_size must be 1 or more, got 0"),
        (
            lambda: IgiaOnly(sparsity=0.4, merge_count=1),
            r"igia_only merges nothing, got merge_count=1.*method=gradpruner",
        ),
    ],
)
def test_bad_settings(build, match):
    with pytest.raises(ValueError, match=match):
        build()


# Through the pipeline


@pytest.fixture
def make_pipeline(make_sums_task, tmp_path):
    task = make_sums_task(8)
    training = TrainingSpec(learning_rate=1e-2, batch_size=4, micro_batch_size=4, max_steps=2)

    def make(method, model_type="llama"):
        config = {key: value for key, value in TINY.items() if not key.endswith(("vocab_size", "_token_id"))}
        model = ModelSpec(f"random:{model_type}", config=config | ARCHITECTURES[model_type])
        return Pipeline(model, task, method, training, Likelihood(), 0, tmp_path / "cache")

    return make


# Every method on one architecture, a merging one on all; `test_architectures.py` tests in what these differ.
OTHERS = [("laco", model_type) for model_type in ARCHITECTURES if model_type != "llama"]


@pytest.mark.parametrize(("name", "model_type"), [*((name, "llama") for name in METHODS), *OTHERS])
def test_from_end_to_end(name, model_type, make_pipeline, tmp_path):
    pipeline = make_pipeline(method(name), model_type)
    outcome = pipeline.run()
    assert len(outcome.plan.kept_layers) == 4 and outcome.training["steps"] == 2
    assert 0 <= outcome.metrics["accuracy"] <= 1
    assert outcome.compression["seconds"] > 0 and outcome.compression["peak_memory_bytes"] > 0
    model = pipeline.load_result()
    model.save_pretrained(tmp_path / "saved")
    pipeline.tokenizer.save_pretrained(tmp_path / "saved")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, model(ids).logits)
    assert plain.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape == (1, 10)


def entries(tmp_path, stage):
    return [path for path in (tmp_path / "cache/stages" / stage).iterdir() if path.is_dir()]


def test_igia_only_shares_gradpruners_importance_run(make_pipeline, tmp_path):
    merged, unmerged = (make_pipeline(method(name)).run() for name in ("gradpruner", "igia_only"))
    assert len(entries(tmp_path, "measure")) == 1
    assert merged.plan.pruned_layers == unmerged.plan.pruned_layers
    assert merged.plan.absorbed_by and not unmerged.plan.absorbed_by
    assert (merged.plan.method, unmerged.plan.method) == ("gradpruner", "igia_only")


def test_a_sweep_over_sparsity_measures_once(make_pipeline, tmp_path):
    for each in ("angular", "shortgpt", "taylor_depth"):
        for num_pruned in (1, 3):
            make_pipeline(method(each, num_pruned)).run()
    assert len(entries(tmp_path, "measure")) == 3


def test_calibration_takes_no_row_twice(make_pipeline):
    def batches_of(**settings):
        pipeline = make_pipeline(method("shortgpt", **settings))
        return list(calibration_batches(pipeline, pipeline.resolved_method.calibration()))

    [batch] = batches_of()
    assert len({tuple(row.tolist()) for row in batch["input_ids"]}) == len(batch["input_ids"]) == 8
    batches = batches_of(num_rows=5, batch_size=2)
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2, 1]


def test_small_dense_is_another_model(make_pipeline, tmp_path):
    small = SmallDense(path="random:llama", config={**TINY, "num_hidden_layers": 3})
    small = dataclasses.replace(small, config={k: v for k, v in small.config.items() if k != "vocab_size"})
    pipeline = make_pipeline(small)
    outcome = pipeline.run()
    assert outcome.plan.num_hidden_layers == 3 and outcome.plan.pruned_layers == ()
    assert pipeline.dense_config.num_hidden_layers == 6
    assert outcome.num_parameters < pipeline.num_dense_parameters
    assert pipeline.load_result().config.num_hidden_layers == 3
    assert make_pipeline(Dense()).run().plan.num_hidden_layers == 6
    assert small.variant() == "random-llama"
