"""Closed-form repair: against numpy, on exactly linear blocks, and through methods and the pipeline."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from baselines.last import Last
from baselines.shortgpt import ShortGpt
from gradpruner.checkpoints.streaming import prune_checkpoint
from gradpruner.evaluate.likelihood import Likelihood
from gradpruner.finetune.spec import TrainingSpec
from gradpruner.grad_pruner import GradPruner
from gradpruner.models.architectures import linear_sublayers
from gradpruner.models.spec import ModelSpec
from gradpruner.partial_pass import PartialPass
from gradpruner.pipeline.run import Pipeline
from gradpruner.plan import PruningPlan
from gradpruner.repair import least_squares, maps, repair
from gradpruner.repair.maps import RIDGES, best_ridge, fold, solve
from gradpruner.repair.states import PrunedRun, pruned_runs
from gradpruner.surgery import apply_plan, sharing_copy

TINY = {
    "vocab_size": 258, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
EYE = torch.eye(5, dtype=torch.float64)
PLAN = PruningPlan(num_hidden_layers=6, pruned_layers=(1, 2, 4))
DATA = [(torch.randn(40, 5), torch.randn(40, 5)) for _ in range(2)]


def make_model(model_type="llama", **config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(TINY | config))).eval()


def logits(model, batch):
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


# ---- the fit ----


def test_a_small_lambda_gives_numpys_least_squares():
    m, z = (torch.cat(side).double().numpy() for side in zip(*DATA, strict=True))
    expected, *_ = np.linalg.lstsq(m, z, rcond=None)
    for towards in ("identity", "zero"):
        ours = solve(DATA, towards).apply(EYE, 0.0).numpy()
        np.testing.assert_allclose(ours, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("towards", "origin"), [("identity", np.eye(5)), ("zero", np.zeros((5, 5)))])
@pytest.mark.parametrize("ridge", [1e-3, 0.5, 10.0])
def test_lambda_is_that_of_the_augmented_problem(towards, origin, ridge):
    m, z = (torch.cat(side).double().numpy() for side in zip(*DATA, strict=True))
    penalty = ridge * np.linalg.eigvalsh(m.T @ m).mean()
    rows = np.concatenate([m, np.sqrt(penalty) * np.eye(5)])
    targets = np.concatenate([z - m @ origin, np.zeros((5, 5))])
    change, *_ = np.linalg.lstsq(rows, targets, rcond=None)
    np.testing.assert_allclose(solve(DATA, towards).apply(EYE, ridge).numpy(), origin + change, rtol=1e-7, atol=1e-9)


def test_a_large_lambda_is_the_plain_drop():
    assert torch.allclose(solve(DATA).apply(EYE, 1e15), EYE, atol=1e-9)
    assert torch.allclose(solve(DATA, "zero").apply(EYE, 1e15), 0 * EYE, atol=1e-9)


def test_sums_do_not_depend_on_batches():
    whole = [tuple(torch.cat(side) for side in zip(*DATA, strict=True))]
    single = [(m[None], z[None]) for pairs in DATA for m, z in zip(*pairs, strict=True)]
    maps = [solve(pairs).apply(EYE, 0.1) for pairs in (DATA, whole, single)]
    assert all(torch.allclose(each, maps[0], rtol=1e-9) for each in maps)
    assert solve(single).num_tokens == 80


@pytest.mark.parametrize("towards", ["identity", "zero"])
def test_held_out_errors_are_those_of_the_maps(towards):
    solution = solve(DATA[:1], towards)
    ridge, repaired, dropped = best_ridge(solution, DATA[1:])
    m, z = (side.double() for side in DATA[1])
    errors = {each: float((m @ solution.apply(EYE, each) - z).square().sum() / z.square().sum()) for each in RIDGES}
    assert repaired == pytest.approx(min(errors.values()), rel=1e-9) and errors[ridge] == min(errors.values())
    assert dropped == pytest.approx(float((m - z).square().sum() / z.square().sum()), rel=1e-9)


@pytest.mark.parametrize("towards", ["identity", "zero"])
def test_folding_multiplies_the_output(towards, monkeypatch):
    monkeypatch.setattr(maps, "BLOCK", 2)  # processes the weight in several blocks of columns
    linear, solution, x = torch.nn.Linear(7, 5), solve(DATA, towards), torch.randn(9, 7)
    before, expected = linear.weight.data, linear(x).double() @ solution.apply(EYE, 0.1)
    copied = before.clone()
    with torch.no_grad():
        fold(linear, solution, 0.1)
    torch.testing.assert_close(linear(x).double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(before, copied)  # a model that shares the tensor keeps the old weight


class LiveMatrices(TorchDispatchMode):
    """Peak number of live float64 tensors with `numel` entries or more, not counted during the decomposition."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.storages, self.most = numel, [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64:
                storage = tensor.untyped_storage()
                if storage.nbytes() >= 8 * self.numel and storage.data_ptr() not in {ptr for ptr, _ in self.alive()}:
                    self.storages.append((storage.data_ptr(), StorageWeakRef(storage)))
        if "eigh" not in str(func):
            self.most = max(self.most, len(self.alive()))
        return out

    def alive(self):
        self.storages = [(ptr, ref) for ptr, ref in self.storages if not ref.expired()]
        return self.storages


def test_a_fit_takes_two_matrices(monkeypatch):
    monkeypatch.setattr(maps, "BLOCK", 8)
    pairs = [(torch.randn(16, 64), torch.randn(16, 64)) for _ in range(8)]
    linear = torch.nn.Linear(96, 64)
    with torch.no_grad(), LiveMatrices(64 * 64) as live:
        solution = solve(pairs)
        ridge, *_ = best_ridge(solution, pairs[:2])
        fold(linear, solution, ridge)
    assert live.most == 2


# ---- on models ----


def test_runs():
    def runs(pruned):
        return pruned_runs(PruningPlan(num_hidden_layers=6, pruned_layers=pruned))

    assert runs((1, 2, 4)) == [PrunedRun(0, 2), PrunedRun(3, 4)]
    assert runs((4, 5)) == [PrunedRun(3, 5)]
    assert runs((0, 1, 3)) == [PrunedRun(2, 3)]  # no kept layer comes before layer 0
    assert runs(()) == []


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3"])
def test_what_a_pruned_layer_did_linearly_is_absorbed(model_type, make_batches, monkeypatch):
    """The target is replaced by Y + M A with a random A: the repaired layer must reproduce this target."""
    batches = make_batches(8, batch_size=4)
    dense = make_model(model_type, hidden_size=8, head_dim=2)
    linear_map = torch.eye(8) + 0.3 * torch.randn(8, 8)
    plan = PruningPlan(num_hidden_layers=6, pruned_layers=(2, 3))
    model = apply_plan(copy.deepcopy(dense), plan)
    original = copy.deepcopy(model)

    def split(of, batch):
        seen = {}
        layer = of.model.layers[1]
        handle = layer.mlp.down_proj.register_forward_hook(lambda m, i, o: seen.update(m=o))
        [after] = PartialPass(of, [batch]).after(1)
        handle.remove()
        return after - seen["m"], seen["m"]

    def target(self, number):
        assert self._model is dense
        y, m = split(original, self._batches[number])
        return y + m @ linear_map

    monkeypatch.setattr(PartialPass, "state", target)
    [fit] = repair(model, dense, plan, batches)
    assert (fit.absorber, fit.last, fit.applied) == (1, 3, True) and fit.error_repaired < 1e-5 < fit.error_dropped
    y, m = split(original, batches[0])
    mask = batches[0]["attention_mask"].bool()
    [after] = PartialPass(model, batches[:1]).after(1)
    torch.testing.assert_close(after[mask], (y + m @ linear_map)[mask], rtol=1e-3, atol=1e-3)


def test_padding_batches_and_order_of_layers_do_not_matter(make_batches):
    [whole] = make_batches(1, batch_size=16)
    single = [{name: values[row : row + 1] for name, values in whole.items()} for row in range(16)]
    longer = {
        name: functional.pad(values, (3, 0), value=-100 if name == "labels" else 0) for name, values in whole.items()
    }
    dense, results = make_model(), []
    for batches in ([whole], single, [longer]):
        model = apply_plan(copy.deepcopy(dense), PLAN)
        fits = repair(model, dense, PLAN, batches)
        results.append((fits, model.model.layers[0].mlp.down_proj.weight, model.model.layers[1].mlp.down_proj.weight))
    for fits, *weights in results[1:]:
        assert [fit.num_tokens for fit in fits] == [fit.num_tokens for fit in results[0][0]]
        for one, other in zip(weights, results[0][1:], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    # Padding and first tokens do not count. Rows have 12, 11, 10 and 9 tokens; every fifth row is held out.
    counts = [12 - row % 4 - 1 for row in range(16) if row % 5 != 4]
    assert results[0][0][0].num_tokens == sum(counts)


def test_the_dense_model_and_all_else_stay(make_batches):
    dense, batches = make_model(), make_batches(4, batch_size=4)
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    model = apply_plan(copy.deepcopy(dense), PLAN)
    pruned = {name: value.clone() for name, value in model.state_dict().items()}
    fits = repair(model, dense, PLAN, batches)
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, pruned[name])}
    assert changed <= {"model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight"}
    assert len(changed) == sum(fit.applied for fit in fits)
    assert len(dense.model.layers) == dense.config.num_hidden_layers == 6 and len(model.model.layers) == 3
    assert not any(module._forward_hooks for each in (model, dense) for module in each.modules())


@pytest.mark.parametrize("tied", [False, True])
def test_a_sharing_copy_costs_what_changes(tied, make_batches):
    """The dense model is unchanged, and only merged or repaired weights exist twice."""
    dense, batches = make_model(tie_word_embeddings=tied), make_batches(4, batch_size=4)
    before = copy.deepcopy(dense)
    plan = dataclasses.replace(PLAN, absorbed_by={1: 0}, merge_rule="sign_average", density=0.5)

    def igia(layer, name):
        return linear_sublayers(before.model.layers[layer])[name].weight.abs()

    model, alone = (apply_plan(start, plan, igia) for start in (sharing_copy(dense), copy.deepcopy(before)))
    assert repair(model, dense, plan, batches) == repair(alone, before, plan, batches)
    assert all(torch.equal(*both) for both in zip(dense.parameters(), before.parameters(), strict=True))
    assert all(torch.equal(*both) for both in zip(model.parameters(), alone.parameters(), strict=True))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    shared = {weight.data_ptr() for weight in dense.parameters()}
    own = {name for name, weight in model.named_parameters() if weight.data_ptr() not in shared}
    merged = {f"model.layers.0.{name}.weight" for name in linear_sublayers(model.model.layers[0])}
    assert own == merged | {"model.layers.1.mlp.down_proj.weight"}


def test_a_fit_that_does_not_help_is_not_applied(make_batches):
    """Dropping layers that do nothing causes no error to repair."""
    dense, batches = make_model(), make_batches(4, batch_size=4)
    for layer in (1, 2):
        dense.model.layers[layer].self_attn.o_proj.weight.data.zero_()
        dense.model.layers[layer].mlp.down_proj.weight.data.zero_()
    plan = PruningPlan(num_hidden_layers=6, pruned_layers=(1, 2))
    model = apply_plan(copy.deepcopy(dense), plan)
    [fit] = repair(model, dense, plan, batches)
    assert not fit.applied and fit.error_dropped == pytest.approx(0, abs=1e-12)
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, dense.model.layers[0].mlp.down_proj.weight)


@pytest.mark.parametrize(("dropped", "applied"), [(1e-15, False), (1e-13, True)])  # float32: eps^2 = 1.4e-14
def test_rounding_is_nothing_to_mend(dropped, applied, make_batches, monkeypatch):
    monkeypatch.setattr(least_squares, "best_ridge", lambda *_: (10.0, dropped / 2, dropped))
    model = make_model()
    [fit, *_] = repair(apply_plan(copy.deepcopy(model), PLAN), model, PLAN, make_batches(2, batch_size=4))
    assert fit.applied == applied


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "olmo2"])
def test_architectures_with_a_norm_after_down_proj_are_refused(model_type, make_batches):
    config = AutoConfig.for_model(model_type, **TINY)
    match = rf"must reach the residual stream as it is; known for llama, .*got model type '{model_type}'\. Set"
    with pytest.raises(ValueError, match=match):
        Last(num_pruned_layers=2, repair="least_squares").shape(config)


def test_one_row_is_not_enough(make_batches):
    model = make_model()
    with pytest.raises(ValueError, match=r"chooses lambda on others, got 1 rows\. Give it more"):
        repair(apply_plan(copy.deepcopy(model), PLAN), model, PLAN, make_batches(1, batch_size=1))


# ---- through methods ----


@pytest.mark.parametrize(
    "method",
    [
        Last(num_pruned_layers=2, repair="least_squares"),
        ShortGpt(num_pruned_layers=2, repair="least_squares"),
        GradPruner(num_pruned_layers=2, merge_count=0, steps=2, batch_size=2, merge_rule="least_squares"),
        GradPruner(num_pruned_layers=2, merge_count=1, steps=2, batch_size=2, repair="least_squares"),
    ],
)
def test_compress_repairs(method, make_batches):
    batches = make_batches(6, batch_size=2)
    model = make_model()
    plan = method.compress(model, batches).plan
    assert len(plan.details["repair"]) == len(pruned_runs(plan)) >= 1
    json.dumps(plan.to_dict(), allow_nan=False)
    no_merge = {"merge_rule": "none"} if getattr(method, "merge_rule", None) == "least_squares" else {}
    plain = dataclasses.replace(method, repair="none", **no_merge)
    unrepaired = make_model()
    plain.compress(unrepaired, batches)
    applied = any(fit["applied"] for fit in plan.details["repair"])
    assert torch.equal(logits(model, batches[0]), logits(unrepaired, batches[0])) != applied


@pytest.fixture
def make_pipeline(make_sums_task, tmp_path):
    task = make_sums_task(12)
    training = TrainingSpec(learning_rate=1e-2, batch_size=4, micro_batch_size=4, max_steps=2)
    config = {key: value for key, value in TINY.items() if not key.endswith(("vocab_size", "_token_id"))}

    def make(method):
        model = ModelSpec("random:llama", config=config)
        return Pipeline(model, task, method, training, Likelihood(), 0, tmp_path / "cache")

    return make


def test_a_stage_of_its_own(make_pipeline):
    plain, repaired = Last(num_pruned_layers=2), Last(num_pruned_layers=2, repair="least_squares")
    before, after = make_pipeline(plain).run(), make_pipeline(repaired).run()
    assert before.plan.pruned_layers == after.plan.pruned_layers == (3, 4)
    assert "repair" not in before.plan.details and [fit["absorber"] for fit in after.plan.details["repair"]] == [2]
    assert after.metrics_before["answer_nll"] != before.metrics_before["answer_nll"]
    again = make_pipeline(repaired)
    assert all(again.stages().values()) and "repair" in again.stages()
    assert again.run() == after
    fewer = make_pipeline(dataclasses.replace(repaired, repair_rows=4)).stages()
    assert fewer["measure"] and not fewer["repair"] and not fewer["finetune"]
    model = make_pipeline(repaired).load_result()
    assert len(model.model.layers) == 4


def test_repaired_plans_are_not_for_streaming(tmp_path):
    plan = PLAN.with_details(repair=[{"absorber": 0}])
    with pytest.raises(ValueError, match=r"got one of method=.* that repairs\. Run the method with save_checkpoint"):
        prune_checkpoint(plan, None, tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (
            lambda: Last(num_pruned_layers=2, repair="magic"),
            r"method\.repair must be one of none, least_squares, judged, got",
        ),
        (lambda: Last(num_pruned_layers=2, repair="least_squares", repair_rows=1), r"repair_rows must be 2 or more"),
    ],
)
def test_what_is_refused(build, match):
    with pytest.raises(ValueError, match=match):
        build()
