"""SAT: the specification's numbers, and that omission is exact, constant within a step, and resumable."""

import dataclasses
import json
from functools import cache, partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

from baselines.sat import STATE_FILE, Sat, num_omitted
from baselines.sat_constant import SatConstant
from baselines.sat_units import (
    OBSERVING_METRICS,
    SELECTION_METRICS,
    SELECTIONS,
    Block,
    ChannelStatistics,
    activation_scores,
    find_blocks,
    magnitude_scores,
    select_units,
    unit_channels,
    wanda_scores,
)
from gradpruner.encoding import TrainingRow
from gradpruner.evaluate.likelihood import Likelihood
from gradpruner.finetune.result import load_finetuned, read_result
from gradpruner.finetune.run import CHECKPOINTS_FOLDER, COMPLETE_MARK, finetune
from gradpruner.finetune.spec import TrainingSpec
from gradpruner.models.architectures import lora_targets
from gradpruner.models.spec import ModelSpec
from gradpruner.pipeline.run import Pipeline
from gradpruner.tasks import JsonLines

# 4 KV groups of 2 query heads each, 10 MLP channels: at a rate of 0.4, 1 group and 4 channels are omitted.
TINY = {
    "vocab_size": 80, "hidden_size": 16, "intermediate_size": 10, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 4, "max_position_embeddings": 64, "initializer_range": 0.2,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
ARCHITECTURES = {
    "llama": {},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "smollm3": {},
}
ROWS = [TrainingRow((*range(2, 4 + index % 5), 60 + index % 7, 1), 2) for index in range(12)]
SPEC = {
    "learning_rate": 1e-2,
    "batch_size": 4,
    "micro_batch_size": 2,
    "epochs": 4,
    "save_steps": 2,
    "warmup_fraction": 0.0,
}
NUM_STEPS = 12
SAT = Sat(rungs=2, dense_tail=0.25, refresh=2)  # rungs at steps 0 and 5, dense from step 9


def make_model(architecture="llama"):
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture.split()[0], **TINY, **ARCHITECTURES[architecture])
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):  # the default zeros and ones would hide an ignored parameter
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model.train()


def with_lora(model, **changes):
    model = get_peft_model(model, LoraConfig(r=2, target_modules=lora_targets(model), **changes))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zeros by default
            nn.init.normal_(parameter, std=0.3)
    return model.train()


def batch(padding=0):
    input_ids = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
    mask = torch.ones_like(input_ids)
    filler = torch.full((2, padding), 1)
    return {"input_ids": torch.cat([filler, input_ids], 1), "attention_mask": torch.cat([0 * filler, mask], 1)}


def loss_of(model):
    inputs = batch()
    return model(**inputs, labels=inputs["input_ids"]).loss


def gradients(model):
    model.zero_grad()
    loss_of(model).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def is_plain(model):
    return not any("forward" in vars(module) or module._forward_pre_hooks for module in model.modules())


# The specification's numbers (4.4)

X = torch.tensor([[1.0, -1.0], [2.0, 0.5]])
GATE = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
UP = torch.tensor([[1.0, 1.0], [1.0, -1.0], [2.0, 0.0]])
DOWN = torch.tensor([[1.0, 2.0, -1.0], [0.0, 1.0, 1.0]])
NORMS = torch.tensor([4.403985, 0.712223, 9.241418])


def linear(weight):
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    module.weight.data = weight.clone()
    return module


@pytest.fixture
def mlp():
    gate, up, down = linear(GATE), linear(UP), linear(DOWN)
    return Block("mlp", 3, (gate, up), down), lambda: down(nn.functional.silu(gate(X)) * up(X))


def test_oracle_dense_and_gathered(mlp):
    block, forward = mlp
    dense = torch.tensor([[-1.075766, -0.537883], [-3.903744, 9.708263]])
    torch.testing.assert_close(forward(), dense, atol=1e-6, rtol=0)
    block.omit_all_but(torch.tensor([0, 2]))
    output = forward()
    torch.testing.assert_close(output, torch.tensor([[0.0, 0.0], [-4.837433, 9.241418]]), atol=1e-6, rtol=0)
    output.sum().backward()
    expected = torch.tensor([[4.403985, 0.0, 9.241418]] * 2)
    torch.testing.assert_close(block.output.weight.grad, expected, atol=1e-6, rtol=0)
    assert all(not module.weight.grad[1].any() for module in block.inputs)
    block.restore()
    torch.testing.assert_close(forward(), dense, atol=1e-6, rtol=0)


def test_oracle_rescale_multiplies_by_units_over_kept(mlp):
    block, forward = mlp
    block.omit_all_but(torch.tensor([0, 2]), rescale=True)
    torch.testing.assert_close(forward()[1], 1.5 * torch.tensor([-4.837433, 9.241418]), atol=2e-6, rtol=0)


def test_oracle_scores(mlp):
    block, _ = mlp
    scores = {metric: block.scores(metric, NORMS.double().square()) for metric in SELECTION_METRICS}
    assert scores["activation"].tolist() == pytest.approx([4.403985, 0.712223, 9.241418], abs=1e-6)
    assert scores["wanda"].tolist() == pytest.approx([4.403985, 2.136669, 18.482836], abs=2e-6)
    assert scores["magnitude"].tolist() == [1 + 2 + 1, 1 + 2 + 5, 2 + 4 + 2]
    assert scores["uniform"].tolist() == [1, 1, 1]


def test_scores_of_groups_sum_over_their_channels():
    assert wanda_scores(DOWN[:, [0, 1, 1, 2]], torch.tensor([1.0, 2.0, 3.0, 4.0]), 2).tolist() == [7, 17]
    assert activation_scores(torch.tensor([3.0, 4.0, 5.0, 12.0]), 2).tolist() == [5, 13]
    assert magnitude_scores([torch.tensor([[1.0], [2.0], [3.0], [4.0]]), torch.tensor([[1.0], [1.0]])], 2).tolist() == [
        6,
        26,
    ]


@pytest.mark.parametrize(
    ("step", "rate"), [(0, 0.4), (199, 0.4), (200, 0.3), (399, 0.3), (400, 0.2), (600, 0.1), (799, 0.1), (800, 0.0)]
)
def test_oracle_ladder(step, rate):
    assert Sat().rate_at(step, 1000) == pytest.approx(rate)
    assert Sat(ladder="none").rate_at(step, 1000) == pytest.approx(0.4 if step < 800 else 0.0)


def test_the_ladder_averages_half_the_rate_times_what_is_not_tail():
    assert sum(Sat().rate_at(step, 1000) for step in range(1000)) / 1000 == pytest.approx(0.2)


@pytest.mark.parametrize(("num_steps", "tail"), [(1, 0.2), (3, 0.0), (7, 0.0), (10, 0.3), (10, 0.9), (30, 0.1)])
def test_the_ladder_only_goes_down(num_steps, tail):
    rates = [Sat(dense_tail=tail).rate_at(step, num_steps) for step in range(num_steps)]
    assert rates == sorted(rates, reverse=True) and rates[0] == pytest.approx(0.4)
    assert sum(rate == 0 for rate in rates) == int(num_steps * tail + 1e-9)


@pytest.mark.parametrize(
    ("rate", "units", "omitted"),
    [(0.4, 8, 3), (0.4, 14336, 5734), (0.29, 100, 29), (0.4 * 3 / 4, 10, 3), (0.99, 2, 1), (0.99, 1, 0), (0, 8, 0)],
)
def test_oracle_counts(rate, units, omitted):
    assert num_omitted(rate, units) == omitted


# Selection


def select(scores, num_kept, selection="topk", seed=0):
    scores = torch.tensor(scores, dtype=torch.float64)
    return select_units(scores, num_kept, selection, torch.Generator().manual_seed(seed)).tolist()


def test_topk_keeps_the_highest_and_of_equal_ones_the_first():
    assert select([0.1, 0.5, 0.2, 0.5, 0.5], 2) == [1, 3]
    assert select([1.0] * 4, 3) == [0, 1, 2]


def test_sample_draws_without_replacement_in_proportion_to_the_scores():
    scores = [1.0, 2.0, 5.0]
    drawn = [tuple(select(scores, 1, "sample", seed)) for seed in range(4000)]
    assert [drawn.count((unit,)) / 4000 for unit in range(3)] == pytest.approx([1 / 8, 2 / 8, 5 / 8], abs=0.03)
    # {0, 1} is 0 then 1, or 1 then 0: 1/8 * 2/7 + 2/8 * 1/6.
    pairs = [tuple(select(scores, 2, "sample", seed)) for seed in range(4000)]
    assert pairs.count((0, 1)) / 4000 == pytest.approx(1 / 28 + 1 / 24, abs=0.02)
    assert set(pairs) == {(0, 1), (0, 2), (1, 2)}


def test_sample_takes_zero_scores_last_and_in_order():
    assert {tuple(select([0.0, 3.0, 0.0, 1e-30, 0.0], 3, "sample", seed)) for seed in range(50)} == {(0, 1, 3)}


# Gathering


def rows_of_group(group, width):
    return set(range(group * width, (group + 1) * width))


def test_units_of_a_model():
    attention, mlp = find_blocks(make_model())[2:]
    assert (attention.name, attention.num_units) == ("layers.1.self_attn", 4)
    assert (mlp.name, mlp.num_units) == ("layers.1.mlp", 10)
    found = [(dim, set(indices.tolist())) for _, dim, indices in attention.slices(torch.tensor([2]))]
    query, kv = rows_of_group(2, 2 * 4), rows_of_group(2, 4)
    assert found == [(0, query), (0, kv), (0, kv), (1, query)]
    assert [(dim, indices.tolist()) for _, dim, indices in mlp.slices(torch.tensor([3, 7]))] == [
        *[(0, [3, 7])] * 2,
        (1, [3, 7]),
    ]


@pytest.mark.parametrize("wrap", [lambda model: model, with_lora], ids=["full", "lora"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("rescale", [False, True])
def test_gathered_is_masked(architecture, wrap, rescale):
    model = wrap(make_model(architecture))
    blocks = find_blocks(model)
    kept = [torch.tensor([0, 2, 3]) if block.num_units == 4 else torch.tensor([0, 3, 4, 8]) for block in blocks]
    hooks = []
    for block, units in zip(blocks, kept, strict=True):
        mask = torch.zeros(block.output.in_features)
        mask[unit_channels(units, len(mask) // block.num_units)] = block.num_units / len(units) if rescale else 1.0
        hooks.append(block.output.register_forward_pre_hook(lambda _, args, mask=mask: (args[0] * mask,)))
    masked_loss, masked = loss_of(model), gradients(model)
    for hook in hooks:
        hook.remove()
    dense_loss, dense = loss_of(model), gradients(model)
    for block, units in zip(blocks, kept, strict=True):
        block.omit_all_but(units, rescale)
    torch.testing.assert_close(loss_of(model), masked_loss, atol=1e-6, rtol=0)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, masked[name], atol=1e-6, rtol=1e-5, msg=name)
    assert abs(dense_loss - masked_loss) > 1e-3
    for block in blocks:
        block.restore()
    assert all(torch.equal(gradient, dense[name]) for name, gradient in gradients(model).items())
    assert is_plain(model)


def test_products_shrink_and_gathered_weights_are_not_kept_for_the_backward_pass():
    model = make_model()
    widths, saved = [], set()
    for block in find_blocks(model):
        block.omit_all_but(torch.tensor([1, 3]))
        block.output.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[-1]))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.add(tuple(tensor.shape)) or tensor, lambda t: t):
        loss_of(model)
    assert widths == [2 * 2 * 4, 2] * 2
    assert (10, 16) in saved and (16, 10) in saved and not {(2, 16), (16, 2)} & saved


def test_scores_see_the_adapter():
    model = with_lora(make_model())
    mean_square = torch.rand(10, dtype=torch.float64)
    found = [find_blocks(model)[1].scores(metric, mean_square) for metric in SELECTION_METRICS]
    merged = find_blocks(model.merge_and_unload())[1]
    for metric, scores in zip(SELECTION_METRICS, found, strict=True):
        torch.testing.assert_close(scores, merged.scores(metric, mean_square))


def test_dead_units_score_zero_leave_first_and_are_not_missed():
    model = make_model().eval()
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data[:, 8:16] = 0  # KV group 1
        layer.mlp.down_proj.weight.data[:, 7] = 0
    blocks = find_blocks(model)
    statistics = ChannelStatistics(model, blocks)
    with torch.no_grad():
        before = model(**batch()).logits
    assert statistics.update()
    statistics.close()
    for block, mean_square in zip(blocks, statistics.mean_square, strict=True):
        dead = 1 if block.num_units == 4 else 7
        scores = block.scores("wanda", mean_square)
        assert scores[dead] == 0 and (scores > 0).sum() == block.num_units - 1
        for selection in SELECTIONS:
            kept = select(scores.tolist(), block.num_units - 1, selection)
            assert sorted(set(range(block.num_units)) - set(kept)) == [dead]
        block.omit_all_but(torch.tensor(kept))
    with torch.no_grad():
        torch.testing.assert_close(model(**batch()).logits, before, atol=1e-6, rtol=1e-5)


# Statistics


@torch.no_grad()
def test_statistics_are_means_over_real_tokens():
    model = make_model()
    blocks = find_blocks(model)
    seen = {}
    for index, block in enumerate(blocks):
        block.output.register_forward_pre_hook(lambda _, args, index=index: seen.update({index: args[0]}))
    model(**batch())
    expected = [
        [float((seen[index][..., channel].double() ** 2).mean()) for channel in range(block.output.in_features)]
        for index, block in enumerate(blocks)
    ]
    statistics = ChannelStatistics(model, blocks)
    assert not statistics.update()
    for padding in (3, 0):
        inputs = batch(padding)
        position_ids = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
        model(**inputs, position_ids=position_ids)
        model(input_ids=batch()["input_ids"])  # no mask: all are real
    assert statistics.update()
    for found, values in zip(statistics.mean_square, expected, strict=True):
        assert found.tolist() == pytest.approx(values, rel=1e-4)
    statistics.close()


def test_what_is_left_out_keeps_its_statistics():
    model = make_model()
    mlp = find_blocks(model)[1]
    statistics = ChannelStatistics(model, [mlp])
    model(**batch())
    statistics.update()
    before = statistics.mean_square[0].clone()
    kept = torch.tensor([2, 5])
    mlp.omit_all_but(kept)
    statistics.watch([kept])
    mlp.inputs[0].weight.data *= 3
    model(**batch())
    assert statistics.update()
    changed = (statistics.mean_square[0] != before).nonzero().flatten()
    assert changed.tolist() == [2, 5]


# Through finetune


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    folder = tmp_path_factory.mktemp("assets")
    config = {key: value for key, value in TINY.items() if not key.endswith(("vocab_size", "_token_id"))}
    return lambda **changes: ModelSpec("random:llama", config=config | changes).load(folder)


def run(load, directory, callbacks=(), **changes):
    """Returns the final weights and the result of the run."""
    spec = TrainingSpec(**{**SPEC, **changes})
    finetune(load(), ROWS, 1, spec, directory, 0, callbacks)
    return load_finetuned(load(), spec, directory).state_dict(), read_result(directory)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def losses(result):
    return [entry["loss"] for entry in result["history"]]


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


class ZeroGradients(TrainerCallback):
    """Callback that records, per step, how many columns of o_proj and down_proj weights have no gradient at all."""

    def __init__(self):
        self.columns = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        gradients = [
            parameter.grad
            for name, parameter in model.named_parameters()
            if parameter.grad is not None and ("o_proj" in name or "down_proj" in name) and "lora_B" not in name
        ]
        self.columns.append(sorted({int((~gradient.any(dim=0)).sum()) for gradient in gradients}))


@pytest.fixture(scope="module")
def plain(load, tmp_path_factory):
    """Returns the outcome of training without SAT, by mode."""
    return cache(lambda mode: run(load, tmp_path_factory.mktemp("plain"), mode=mode))


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("rate", [0.0, 0.05])  # 0.05 of 4 groups and 10 channels rounds to none, but callbacks run
def test_omitting_nothing_is_plain_training(load, plain, tmp_path, mode, rate):
    weights, result = run(load, tmp_path, Sat(omission_rate=rate, refresh=1).callbacks(), mode=mode)
    expected_weights, expected = plain(mode)
    assert same(weights, expected_weights) and result["history"] == expected["history"]


def test_rate_zero_touches_nothing():
    assert Sat(omission_rate=0.0).callbacks() == []


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("metric", SELECTION_METRICS)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_every_metric_trains_and_leaves_a_plain_model(load, plain, tmp_path, mode, metric, selection):
    model = load()
    spec = TrainingSpec(**{**SPEC, "mode": mode})
    sat = dataclasses.replace(SAT, metric=metric, selection=selection)
    finetune(model, ROWS, 1, spec, tmp_path, 0, sat.callbacks())
    assert is_plain(model)
    found, dense = losses(read_result(tmp_path)), losses(plain(mode)[1])
    assert (found[0] == dense[0]) == (metric in OBSERVING_METRICS)
    assert found[1] != dense[1] and found[-1] < found[0]


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_units_are_constant_within_a_step_and_follow_the_ladder(load, tmp_path, mode):
    probe = ZeroGradients()
    sat = dataclasses.replace(SAT, metric="magnitude", refresh=1)
    run(load, tmp_path, [*sat.callbacks(), probe], mode=mode, micro_batch_size=1)
    # If a group of 8 channels, or one of 4 MLP channels, were omitted in only some of the 4 micro batches, there would
    # be fewer. LoRA's B is zero at first, and so is the gradient of A.
    first = [10, 32] if mode == "lora" else [4, 8]
    assert probe.columns == [first, *[[4, 8]] * 4, *[[0, 2]] * 4, *[[0]] * 3]


def test_statistics_make_the_first_step_dense(load, tmp_path):
    probe = ZeroGradients()
    run(load, tmp_path, [*SAT.callbacks(), probe], mode="full")
    assert probe.columns == [[0], *[[4, 8]] * 4, *[[0, 2]] * 4, *[[0]] * 3]


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("sat", [SAT, dataclasses.replace(SAT, metric="magnitude", refresh=3)], ids=["wanda", "magn"])
def test_an_interrupted_run_ends_like_an_undisturbed_one(load, tmp_path, mode, sat):
    whole, expected = run(load, tmp_path / "whole", sat.callbacks(), mode=mode, save_steps=1)
    for step in (1, 4, 5, 8, 11):  # after the dense step, between selections, at a rung, off a rung, in the dense tail
        with pytest.raises(KeyboardInterrupt):
            run(load, tmp_path / "killed", [*sat.callbacks(), KillAt(step)], mode=mode, save_steps=1)
    resumed, result = run(load, tmp_path / "killed", sat.callbacks(), mode=mode, save_steps=1)
    assert result["steps"] == NUM_STEPS
    assert same(whole, resumed) and losses(result) == losses(expected)


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_gradient_checkpointing_changes_nothing(load, tmp_path, mode):
    sat = dataclasses.replace(SAT, refresh=3)
    states = []
    for checkpointing in (False, True):
        changes = {"mode": mode, "gradient_checkpointing": checkpointing}
        folder = tmp_path / str(checkpointing)
        with pytest.raises(KeyboardInterrupt):
            run(load, folder, [*sat.callbacks(), KillAt(5)], **changes)
        state = load_file(folder / CHECKPOINTS_FOLDER / "checkpoint-4" / STATE_FILE)
        weights, result = run(load, folder, sat.callbacks(), **changes)
        states.append((state, weights, losses(result)))
    (state, weights, history), (other_state, other_weights, other_history) = states
    assert same(state, other_state)  # including token counts: a replay does not count
    assert same(weights, other_weights) and history == other_history


def test_seeds_and_steps_draw_differently(load, tmp_path):
    def kept(seed, step):
        folder = tmp_path / f"{seed}-{step}"
        sat = dataclasses.replace(SAT, seed=seed, metric="uniform", refresh=1)
        with pytest.raises(KeyboardInterrupt):
            run(load, folder, [*sat.callbacks(), KillAt(step)], save_steps=step)
        state = load_file(folder / CHECKPOINTS_FOLDER / f"checkpoint-{step}" / STATE_FILE)
        return {name: value.tolist() for name, value in state.items()}

    assert kept(0, 1) == kept(0, 1)
    assert kept(0, 1) != kept(1, 1)
    assert kept(0, 1) != kept(0, 2)
    assert kept(0, 1)["layers.0.mlp.kept"] != kept(0, 1)["layers.1.mlp.kept"]


def test_a_checkpoint_is_marked_whole_after_its_callbacks(load, tmp_path):
    class KilledWhileSaving(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(load, tmp_path, [KilledWhileSaving()])
    folder = tmp_path / CHECKPOINTS_FOLDER / "checkpoint-2"
    assert (folder / "trainer_state.json").is_file() and not (folder / COMPLETE_MARK).exists()


def test_a_checkpoint_without_its_state_is_refused(load, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(load, tmp_path, [KillAt(3)])
    with pytest.raises(ValueError, match=r"holds the units that are left out, got none in .*checkpoint-2.*Delete"):
        run(load, tmp_path, SAT.callbacks())


@pytest.mark.parametrize("frozen", [False, True])
def test_adamw_moves_what_is_left_out_unless_frozen(load, tmp_path, frozen):
    """Checks an oracle: w = 1, lr 1e-3, decay 0.1, gradients 1 then 0 give 0.998900, 0.998130."""

    class Watch(TrainerCallback):
        values = ()

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            for layer in model.model.layers:
                layer.mlp.down_proj.weight.data.fill_(1.0)

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            gradient = model.model.layers[0].mlp.down_proj.weight.grad
            if state.global_step == 0:
                self.rises = gradient > 0
            else:
                self.left_out = ~gradient.any(dim=0)

        def on_step_end(self, args, state, control, model=None, **kwargs):
            self.values = (*self.values, model.model.layers[0].mlp.down_proj.weight.detach().clone())

    sat = dataclasses.replace(SAT, freeze_omitted=frozen)
    watch, training = Watch(), {"mode": "full", "max_steps": 2, "learning_rate": 1e-3}
    run(load, tmp_path, [*sat.callbacks(), watch], lr_scheduler="constant", **training)
    first, second = (values[:, watch.left_out][watch.rises[:, watch.left_out]] for values in watch.values)
    assert len(first) > 10
    torch.testing.assert_close(first, torch.full_like(first, 0.998900), atol=2e-6, rtol=0)
    expected = 0.998900 if frozen else 0.998130
    torch.testing.assert_close(second, torch.full_like(first, expected), atol=2e-6, rtol=0)


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_freezing_keeps_just_what_is_left_out(load, tmp_path, mode):
    class Watch(TrainerCallback):
        """Callback that records which rows of the watched tensors change in the fifth step."""

        def on_step_begin(self, args, state, control, model=None, **kwargs):
            layer = (model.get_base_model() if mode == "lora" else model).model.layers[0]
            value, gate, down = layer.self_attn.v_proj, layer.mlp.gate_proj, layer.mlp.down_proj
            if mode == "lora":
                self.tensors = [*(each.lora_B.default.weight for each in (value, gate)), down.lora_A.default.weight.T]
            else:
                self.tensors = [value.weight, gate.weight, down.weight.T, value.bias[:, None]]
            self.before = [tensor.detach().clone() for tensor in self.tensors]

        def on_step_end(self, args, state, control, **kwargs):
            pairs = zip(self.before, self.tensors, strict=True)
            self.moved = [(one != other).any(dim=1).nonzero().flatten().tolist() for one, other in pairs]

    sat, watch = dataclasses.replace(SAT, freeze_omitted=True), Watch()
    with pytest.raises(KeyboardInterrupt):
        run(partial(load, attention_bias=True), tmp_path, [*sat.callbacks(), KillAt(5), watch], mode=mode, save_steps=5)
    kept = load_file(tmp_path / CHECKPOINTS_FOLDER / "checkpoint-5" / STATE_FILE)
    channels, groups = kept["layers.0.mlp.kept"].tolist(), kept["layers.0.self_attn.kept"].tolist()
    values = sorted(set().union(*(rows_of_group(group, 4) for group in groups)))
    assert (len(groups), len(channels)) == (3, 6)
    assert watch.moved == [values, channels, channels, *([values] if mode == "full" else [])]


# Refusals


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"omission_rate": 1.0}, r"omission_rate must be in \[0, 1\), got 1\.0\. Change method\.omission_rate"),
        ({"omission_rate": -0.1}, r"omission_rate must be in \[0, 1\), got -0\.1"),
        ({"dense_tail": 1.0}, r"dense_tail must be in \[0, 1\), got 1\.0\. Change method\.dense_tail"),
        ({"rungs": 0}, r"rungs must be 1 or more, got 0\. Raise method\.rungs"),
        ({"refresh": 0}, r"refresh must be 1 or more, got 0\. Raise method\.refresh"),
        ({"ladder": "rope"}, r"method\.ladder must be one of steps, none, got 'rope'"),
        ({"metric": "luck"}, r"method\.metric must be one of uniform, magnitude, wanda, activation, got 'luck'"),
        ({"selection": "best"}, r"method\.selection must be one of sample, topk, got 'best'"),
    ],
)
def test_bad_settings(settings, match):
    with pytest.raises(ValueError, match=match):
        Sat(**settings)


def test_another_architecture_is_refused_from_its_config():
    config = AutoConfig.for_model("olmo2", **TINY)
    with pytest.raises(ValueError, match=r"method=sat .*llama, mistral, .*got model type 'olmo2'"):
        Sat().shape(config)
    assert len(Sat(omission_rate=0.0).shape(config).layers) == 2
    with pytest.raises(ValueError, match=r"got model type 'olmo2'"):
        find_blocks(AutoModelForCausalLM.from_config(config))


def test_other_adapters_are_refused():
    model = with_lora(make_model(), use_dora=True)
    with pytest.raises(ValueError, match=r"got layers\.0\.self_attn\.q_proj with DoraLinearVariant\. Train all"):
        find_blocks(model)


def test_other_linears_are_refused():
    class Quantized(nn.Linear):
        pass

    model = make_model()
    model.model.layers[1].mlp.down_proj = Quantized(10, 16)
    with pytest.raises(ValueError, match=r"got layers\.1\.mlp\.down_proj with Quantized\. .*not quantized"):
        find_blocks(model)


# Through the pipeline


def test_from_end_to_end(tmp_path):
    rows = [{"question": f"{n} + 1?", "options": [str(n + 1), "x"], "answer": 0} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = JsonLines(
        train_file=str(tmp_path / "rows.jsonl"), test_file=str(tmp_path / "rows.jsonl"), prompt="{question}",
        choice=" {choice}", answer_field="answer", choices_field="options", max_length=64,
    )  # fmt: skip
    config = {key: value for key, value in TINY.items() if not key.endswith(("vocab_size", "_token_id"))}
    training = TrainingSpec(learning_rate=1e-2, batch_size=4, micro_batch_size=4, max_steps=4)
    model = ModelSpec("random:llama", config=config)
    pipeline = Pipeline(model, task, SAT, training, Likelihood(), 0, tmp_path / "cache")
    outcome = pipeline.run()
    assert outcome.plan.pruned_layers == () and outcome.plan.method == "sat"
    assert outcome.num_parameters == pipeline.num_dense_parameters
    assert is_plain(pipeline.load_result())


def test_sat_without_a_dense_tail_omits_up_to_the_last_step():
    constant = SatConstant()
    assert [constant.rate_at(step, 10) for step in range(10)] == [0.4] * 10
    assert [Sat().rate_at(step, 10) for step in (0, 7, 8, 9)] == [0.4, pytest.approx(0.1), 0.0, 0.0]


def test_variants_name_a_schedule_that_is_not_the_usual_one():
    assert Sat().variant() == "omission0.4-wanda-sample" and SAT.variant() == "omission0.4-wanda-sample-tail0.25"
    assert SatConstant().variant() == "omission0.4-wanda-sample-none-tail0.0"


def test_a_record_says_that_no_code_exists(tmp_path):
    for method in (Sat(), SatConstant()):
        notes = method.prune(make_model(), tmp_path).report["notes"]
        assert any("no code of its authors exists" in note and "3 to 5 points below" in note for note in notes)
