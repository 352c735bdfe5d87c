"""APT: the specification's numbers, masks equal slices, growth leaves outputs unchanged, and runs resume."""

import dataclasses
import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback, TrainingArguments

from baselines.apt.adapters import adapters, grow, narrow_with_adapters
from baselines.apt.distill import StateMap, distillation_loss, drawn_layers, layer_loss
from baselines.apt.growth import grown_ranks, rank_salience
from baselines.apt.hooks import UnitHooks, _Sums, static_scores
from baselines.apt.method import Apt
from baselines.apt.schedule import Schedule, kept_fraction, learning_rate_factors
from baselines.apt.scores import (
    Costs,
    Units,
    densest_units,
    excess_kurtosis,
    group_scores,
    keep_one,
    running,
    salience,
    unit_costs,
    width_plan,
)
from baselines.apt.teacher import make_teacher
from baselines.apt.training import STATE_FILE, AptTraining
from baselines.apt_fast import AptFast
from gradpruner.budget import target_parameters
from gradpruner.encoding import TrainingRow
from gradpruner.evaluate.likelihood import Likelihood
from gradpruner.finetune.result import PLAN_FILE, load_finetuned
from gradpruner.finetune.run import CHECKPOINTS_FOLDER, finetune
from gradpruner.finetune.spec import TrainingSpec
from gradpruner.models.architectures import count_parameters, decoder_layers, lora_targets
from gradpruner.models.counting import count_model
from gradpruner.models.shape import LayerShape, ModelShape, config_shape, model_shape
from gradpruner.models.spec import ModelSpec
from gradpruner.pipeline.run import Pipeline
from gradpruner.plan import PruningPlan
from gradpruner.surgery import sharing_copy
from gradpruner.tasks import JsonLines
from gradpruner.width_surgery import narrow

# 4 KV groups of 2 query heads each; hidden channels are pruned in multiples of 8.
TINY = {
    "vocab_size": 80, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.2, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
MODEL_TYPES = ("llama", "mistral", "qwen2")
ROWS = [TrainingRow((*range(2, 4 + index % 5), 60 + index % 7, 1), 2) for index in range(12)]
NUM_STEPS = 12
SPEC = TrainingSpec(
    learning_rate=1e-2, batch_size=4, micro_batch_size=2, max_steps=NUM_STEPS, lora_rank=2, lora_alpha=3
)
OFTEN = dataclasses.replace(SPEC, save_steps=1, lora_dropout=0.1)
# Masks move from step 1 on, cuts are after steps 3, 5 and 7, distillation is from step 5 to step 9. Windows are of two
# steps, in which a mask moves by 0.002 x 200 / 2 = 0.2 per step.
APT = Apt(
    sparsity=0.5, num_cuts=3, prune_end=7 / 12, sparsity_warmup=0.0, distil_end=9 / 12, max_rank=6, mask_step=0.002
)


def make_config(model_type="llama", **changes):
    config = AutoConfig.for_model(model_type, **(TINY | changes))
    if model_type == "qwen3":
        config.head_dim = 4
    return config


def make_model(model_type="llama", seed=0, **changes):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(make_config(model_type, **changes))
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):  # the default zeros and ones would hide an ignored parameter
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


def with_lora(model, rank=2):
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=3, target_modules=lora_targets(model)))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zeros by default
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def batch(padding=0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 80, (2, 9), generator=generator)
    labels = ids.clone()
    labels[:, :6] = -100
    rows = {"input_ids": (ids, 1), "attention_mask": (torch.ones_like(ids), 0), "labels": (labels, -100)}
    return {name: functional.pad(value, (padding, 0), value=filler) for name, (value, filler) in rows.items()}


@torch.no_grad()
def logits(model, inputs=None):
    inputs = inputs or batch()
    return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits


def some_units(config, hidden=True, seed=0):
    """Returns about half of all units, some of each layer."""
    shape = config_shape(config)
    generator = torch.Generator().manual_seed(seed)
    scores = Units.full(shape, 0.0).combine(lambda values: torch.rand(values.shape, generator=generator).double())
    kept = keep_one(scores, 8).combine(lambda values: values > 0.5)
    order = scores.hidden.argsort()
    kept.hidden[:] = True
    kept.hidden[order[: 16 if hidden else 0]] = False
    return kept


# The specification's numbers (5.6)


@pytest.mark.parametrize(
    ("values", "expected"), [([0, 0, 0, 10], -1.6875), ([1, 2, 3, 4], -2.0775), ([10] + [0] * 15, 9.363281)]
)
def test_oracle_kurtosis(values, expected):
    values = torch.tensor(values, dtype=torch.float64)
    assert float(excess_kurtosis(values, 0)) == pytest.approx(expected, abs=1e-6)
    assert float(excess_kurtosis(3e-9 * values.float(), 0)) == pytest.approx(expected, abs=1e-4)  # at any scale


def test_kurtosis_of_equal_values_adds_nothing():
    assert excess_kurtosis(torch.zeros(3, 2), 0).tolist() == excess_kurtosis(torch.ones(1, 2), 0).tolist() == [-3, -3]


H, DH = torch.tensor([[1.0, -2.0], [3.0, 0.5]]), torch.tensor([[0.5, 0.1], [-0.2, 0.4]])


def test_oracle_salience_is_a_product_of_sums_over_real_tokens():
    activation = functional.pad(H, (0, 0, 1, 0), value=7.0)[None].requires_grad_()  # (1, 3, 2), the first is padding
    sums = _Sums(2, activation.device)
    sums.add(activation, torch.tensor([0.0, 1.0, 1.0]).view(1, 3, 1))
    (activation * functional.pad(DH, (0, 0, 1, 0), value=5.0)).sum().backward()
    assert sums.value.tolist() == [4, -1.5]
    per_channel = salience(sums.absolute, sums.gradient)
    assert per_channel.tolist() == pytest.approx([2.8, 1.25])
    flat = torch.zeros(3, 2)  # no outliers
    assert group_scores(per_channel, flat, 1, 2).tolist() == pytest.approx([4.05])
    assert group_scores(per_channel, flat, 2, 1).tolist() == pytest.approx([2.8, 1.25])


def test_oracle_running_scores():
    def units(value):
        return Units(torch.tensor([value]), torch.tensor([-math.inf]), torch.tensor([0.0]))

    first = running(units(0.0), units(2.0))
    assert first.groups.item() == pytest.approx(0.3)
    assert running(first, units(4.0)).groups.item() == pytest.approx(0.855)
    assert running(first, units(4.0)).channels.item() == -math.inf


@pytest.mark.parametrize(
    ("part", "expected"), [(-0.5, 1), (0, 1), (0.25, 0.76875), (0.5, 0.65), (0.75, 0.60625), (1, 0.6), (2, 0.6)]
)
def test_oracle_kept_fraction(part, expected):
    assert kept_fraction(100 + part * 80, 100, 180, 0.6) == pytest.approx(expected)


def test_oracle_unit_costs():
    llama = ModelShape(4096, (LayerShape(32, 32, 11008),) * 32)
    assert unit_costs(llama, 128) == (2_097_536, 12_289, 1_581_248)
    assert unit_costs(ModelShape(4096, (LayerShape(32, 8, 14336),) * 32), 128)[0] == 5_242_880 + 6 * 128


def test_oracle_search_takes_the_exact_prefix():
    order = ["d0", "d1", "h0", "d2", "n0", "n2", "h1", "d3", "n1", "n3"]
    cost, scores = {"h": 16, "n": 3, "d": 28}, {"h": torch.zeros(1, 2), "n": torch.zeros(1, 4), "d": torch.zeros(4)}
    for place, unit in enumerate(order):
        scores[unit[0]].view(-1)[int(unit[1])] = (10 - place) * cost[unit[0]]
    scores = Units(scores["h"].double(), scores["n"].double(), scores["d"].double())
    costs = Costs(group=8, channel=3)
    lengths = {}
    for budget in [0, 0.5, 15.9, 16, 24, 33, 42, 65, 66, 67.2, 88, 100, 111, 112]:
        kept, lengths[budget] = densest_units(scores, list(cost.values()), costs, budget)
        assert costs.count(*(int(values.sum()) for values in (kept.hidden, kept.groups, kept.channels))) <= budget
    # C = 0, 0, 0, 16, 24, 33, 42, 66, 88, 100, 112
    assert list(lengths.values()) == [2, 2, 2, 3, 4, 5, 6, 6, 7, 7, 8, 9, 9, 10]
    kept, _ = densest_units(scores, list(cost.values()), costs, 67.2)
    assert kept.groups.tolist() == [[True, True]] and kept.channels.tolist() == [[True, False, True, False]]
    assert kept.hidden.tolist() == [True, True, True, False]


def test_oracle_ranks():
    assert grown_ranks([8] * 4, [32] * 4, [1.0, 4.0, 2.0, 3.0], 2048, 64) == [8, 24, 8, 24]
    assert grown_ranks([8] * 4, [32] * 4, [1.0, 4.0, 2.0, 3.0], 2048, 20) == [8, 20, 8, 20]
    assert grown_ranks([8] * 4, [32] * 4, [1.0, 4.0, 2.0, 3.0], 512, 64) == [8] * 4  # none shrinks


def test_adapters_at_the_largest_rank_make_room_for_others():
    # 144 ranks of 1 parameter each, target 200: 8 ((200 - 144) / 16 + 1) = 36.
    assert grown_ranks([64, 64, 8, 8], [1] * 4, [9.0, 8.0, 1.0, 2.0], 200, 64) == [64, 64, 36, 36]
    # One left of four: 8 ((240 - 200) / 8 + 1) = 48.
    assert grown_ranks([64, 64, 64, 8], [1] * 4, [9.0, 8.0, 7.0, 1.0], 240, 64) == [64, 64, 64, 48]
    assert grown_ranks([64] * 4, [1] * 4, [1.0] * 4, 512, 64) == [64] * 4


def test_schedule_of_the_script():
    # 15 epochs of 1,625 steps: 200 steps before pruning, then 16 cuts up to epoch 5 with an epoch of sparsity warm-up.
    steps = 24_375
    schedule = Schedule.of(steps, 200 / steps, 8125 / steps, 1.0, 16, 1625 / steps)
    # In the code: int(linspace(200, 8125, 17)), which is 695, 1190, 1685, 2181, 2676, ...; here rounded up.
    assert [cut - 200 for cut in schedule.cuts[:5]] == [math.ceil(7925 * n / 16) for n in range(1, 6)]
    assert schedule.cuts[-1] == 8125 and len(schedule.cuts) == 16
    parts = [schedule.kept_part(cut, 0.7) for cut in schedule.cuts]
    assert parts[:3] == [1.0] * 3 and parts[-1] == 0.7  # up to step 1,825 nothing is pruned
    assert parts[3] == pytest.approx(0.7 + 0.3 * ((8125 - schedule.cuts[3]) / (8125 - 1825)) ** 3)
    assert schedule.distil_start == schedule.cuts[4]
    # Masks move in the last 200 steps before a cut.
    assert [cut - schedule.window_start(cut) for cut in schedule.cuts] == [200] * 16
    short = Schedule.of(80, 0.2, 0.5, 0.777, 4)
    assert short.cuts == (22, 28, 34, 40) and [short.window_start(cut) for cut in short.cuts] == [16, 22, 28, 34]


def test_the_learning_rate_restarts_at_its_peak(tmp_path):
    arguments = TrainingArguments(
        output_dir=str(tmp_path), lr_scheduler_type="cosine", warmup_steps=0.1, use_cpu=True, report_to="none"
    )
    factor = learning_rate_factors(arguments, (20, 60), 100)

    def cosine(step, length):  # warm-up over a tenth, then half a period
        warmup = math.ceil(length / 10)
        if step < warmup:
            return step / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (length - warmup)))

    for step in range(100):
        start, length = (0, 100) if step < 20 else (20, 40) if step < 60 else (60, 40)
        assert factor(step) == pytest.approx(cosine(step - start, length)), step
    assert factor(19) == pytest.approx(0.9755, abs=1e-4) and factor(24) == factor(64) == 1.0
    assert factor(59) == factor(99) < 0.01  # before each restart the rate has decayed
    assert [learning_rate_factors(arguments, (0, 100), 100)(step) for step in (5, 50)] == [0.5, cosine(50, 100)]


def test_oracle_rank_salience():
    factor, gradient = torch.tensor([[1.0, 2.0], [3.0, -1.0]]), torch.tensor([[1.0, -1.0], [1.0, 1.0]])
    assert rank_salience(factor, gradient) == (abs(1 - 2) + abs(3 - 1)) / 2


# Costs and choice of units


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", [*MODEL_TYPES, "qwen3", "smollm3"])
def test_costs_are_parameter_counts(model_type, tied):
    config = make_config(model_type, tie_word_embeddings=tied)
    costs = Costs.of(config, "total")
    narrow_shape = ModelShape(16, (LayerShape(2, 1, 5),) * 3 + (LayerShape(6, 3, 7),))
    for shape in (config_shape(config), narrow_shape):
        counts = count_model(config, shape)
        assert costs.of_shape(shape) == counts.num_parameters
        tables = (1 if tied else 2) * config.vocab_size * shape.hidden_size
        assert Costs.of(config, "native").of_shape(shape) == counts.num_parameters - tables
        without = counts.num_parameters - config.vocab_size * shape.hidden_size
        assert Costs.of(config, "layers").of_shape(shape) == without == counts.num_parameters_without_embedding


def test_hidden_channels_that_make_no_multiple_leave_and_free_their_budget():
    scores = Units(torch.tensor([[9.0, 1.0]]), torch.tensor([[9.0, 8.0]]), torch.tensor([9.0, 7.0, 6.0, 5.0]))
    kept, length = densest_units(scores.combine(Tensor.double), [1, 1, 1], Costs(2, 1), 8, multiple=2)
    assert kept.hidden.tolist() == [True, True, False, False]
    assert (kept.groups.tolist(), kept.channels.tolist(), length) == ([[True, False]], [[True, True]], 6)


def test_of_equal_units_the_first_leaves_and_what_has_left_stays_away():
    scores = Units(torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([[9.0, -math.inf]]), torch.tensor([9.0]))
    kept, _ = densest_units(scores.combine(Tensor.double), [1, 1, 1], Costs(1, 1), 3)
    assert kept.groups.tolist() == [[False, True, True]] and kept.channels.tolist() == [[True, False]]
    kept, _ = densest_units(scores.combine(Tensor.double), [1, 1, 1], Costs(1, 1), 99)
    assert kept.channels.tolist() == [[True, False]]


def test_every_layer_keeps_something():
    shape = config_shape(make_config())
    scores = Units.full(shape, 0.0)
    scores.groups[0] += 100  # without `keep_one` no other layer keeps any
    raised = keep_one(scores, 8)
    assert [int(values.isinf().sum()) for values in raised.all()] == [4, 4, 8]
    assert not scores.groups.isinf().any()
    costs = Costs.of(make_config(), "total")
    smallest = costs.of_shape(ModelShape(8, (LayerShape(2, 1, 1),) * 4))
    kept, _ = densest_units(raised, unit_costs(shape, 4), costs, smallest, 8)
    assert kept.groups.sum(1).tolist() == kept.channels.sum(1).tolist() == [1] * 4 and int(kept.hidden.sum()) == 8


def kurtosis_by_loops(values):
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return sum(((value - mean) / deviation) ** 4 for value in values) / len(values) - 3


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_scores_are_those_of_slow_loops(model_type):
    model, inputs = make_model(model_type), batch(padding=3)
    seen = {}

    def record(name):
        def hook(module, args, output):
            seen[name] = (args[0], output)
            args[0].retain_grad()
            output.retain_grad()

        return hook

    for index, layer in enumerate(decoder_layers(model)):
        layer.self_attn.o_proj.register_forward_hook(record((index, "groups")))
        layer.mlp.down_proj.register_forward_hook(record((index, "channels")))
    model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=inputs["labels"],
          position_ids=(inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)).loss.backward()  # fmt: skip
    real = inputs["attention_mask"].bool()
    expected = Units.full(config_shape(model.config), 0.0)
    for (index, kind), (into, out) in seen.items():
        layer = decoder_layers(model)[index]
        weight = (layer.self_attn.o_proj if kind == "groups" else layer.mlp.down_proj).weight.detach()
        values, gradients = into.detach()[real], into.grad[real]
        mean = values.mean(0)
        products = [float(values[:, j].abs().sum() * gradients[:, j].abs().sum()) for j in range(len(mean))]
        if kind == "channels":
            for j, product in enumerate(products):
                expected.channels[index, j] = product + math.sqrt(
                    max(0, kurtosis_by_loops((weight[:, j] * mean[j]).tolist()))
                )
        else:
            for head in range(8):
                own = range(head * 4, head * 4 + 4)
                entries = [value for j in own for value in (weight[:, j] * mean[j]).tolist()]
                score = sum(products[j] for j in own) + math.sqrt(max(0, kurtosis_by_loops(entries)))
                expected.groups[index, head // 2] += score
        values, gradients = out.detach()[real], out.grad[real]
        for i in range(32):
            product = float(values[:, i].abs().sum() * gradients[:, i].abs().sum())
            expected.hidden[i] += product + math.sqrt(max(0, kurtosis_by_loops((weight[i] * mean).tolist())))
    found = static_scores(make_model(model_type), [inputs])
    for own, other in zip(found.all(), expected.all(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-4)


def test_scores_of_a_model_with_adapters_are_those_of_the_merged_one():
    tuned, inputs = with_lora(make_model()), batch(padding=1)
    whole = Units.full(config_shape(make_config()), True)
    hooks = UnitHooks(tuned.get_base_model(), whole)
    tuned(**inputs).loss.backward()
    own = hooks.scores()
    hooks.remove()
    merged = tuned.merge_and_unload()
    merged.requires_grad_(True)
    hooks = UnitHooks(merged, whole)
    merged(**inputs).loss.backward()
    expected = hooks.scores()
    for values, others in zip(own.all(), expected.all(), strict=True):
        torch.testing.assert_close(values, others, rtol=1e-3, atol=1e-4)


def test_kurtosis_is_of_the_weight_with_its_adapter():
    model = with_lora(make_model(hidden_size=32))
    down = decoder_layers(model)[0].mlp.down_proj
    with torch.no_grad():
        down.base_layer.weight.zero_()
        down.lora_A["default"].weight.copy_(torch.eye(2, 24))  # (rank, inputs): rank r reads channel r
        down.lora_B["default"].weight.zero_()
        down.lora_B["default"].weight[3, 0] = 1.0  # channel 0 writes to hidden channel 3 alone
    hooks = UnitHooks(model.get_base_model(), Units.full(config_shape(model.config), True))
    model(**batch()).loss.backward()
    into = hooks._into[0, "mlp.down_proj"]
    rest = float(hooks.scores().channels[0, 0]) - float(salience(into.absolute, into.gradient)[0])
    # One of 32 entries is not 0: its deviation from the mean is 31/32, the others' -1/32, the variance 1/32.
    fourth = ((31 / 32) ** 4 + 31 / 32**4) / (1 / 32) ** 2 / 32
    assert rest == pytest.approx(math.sqrt(fourth - 3), rel=1e-4)


# Masks and slices


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_masked_model_is_the_sliced_one(model_type, hidden):
    model = make_model(model_type)
    kept = some_units(model.config, hidden)
    hooks = UnitHooks(model, Units.full(config_shape(model.config), True))
    dense = logits(model)
    hooks.mask(kept.combine(Tensor.double))
    masked = logits(model)
    hooks.mask(kept.combine(lambda values: torch.ones_like(values, dtype=torch.float64)))
    assert torch.equal(logits(model), dense)
    hooks.remove()
    assert torch.equal(logits(model), dense) and (masked - dense).abs().max() > 0.1
    narrow(model, width_plan(kept, 2, Units.full(config_shape(model.config), True)))
    torch.testing.assert_close(logits(model), masked, rtol=0, atol=1e-5)


def test_masks_and_scores_of_a_narrow_model_keep_the_numbers_of_the_dense_one():
    model = make_model()
    whole, kept = Units.full(config_shape(model.config), True), some_units(model.config)
    fewer = kept.combine(torch.clone)
    for values in (*fewer.groups, *fewer.channels):
        values[values.nonzero()[0]] = values.sum() == 1
    narrow(model, width_plan(kept, 2, whole))
    hooks = UnitHooks(model, kept)
    hooks.mask(fewer.combine(Tensor.double))
    masked = logits(model)
    hooks.mask(kept.combine(Tensor.double))
    model(**batch()).loss.backward()
    scores = hooks.scores()
    hooks.remove()
    assert all(torch.equal(own.isinf(), ~had) for own, had in zip(scores.all(), kept.all(), strict=True))
    reference = make_model()
    narrow(reference, width_plan(fewer, 2, whole))
    torch.testing.assert_close(logits(reference), masked, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_adapters_are_sliced_with_the_model(model_type):
    model = with_lora(make_model(model_type))
    kept, whole = some_units(model.config), Units.full(config_shape(model.config), True)
    optimizer = torch.optim.AdamW(parameter for parameter in model.parameters() if parameter.requires_grad)
    model(**batch()).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    hooks = UnitHooks(model.get_base_model(), whole)
    hooks.mask(kept.combine(Tensor.double))
    masked = logits(model)
    hooks.remove()
    state = {
        name: optimizer.state[parameter] for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    plan = width_plan(kept, 2, whole)
    narrow_with_adapters(model, plan, optimizer)
    torch.testing.assert_close(logits(model), masked, rtol=0, atol=1e-5)
    columns = torch.tensor(plan.hidden)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        assert parameter in set(optimizer.param_groups[0]["params"])
        moment = optimizer.state[parameter]["exp_avg"]
        assert moment.shape == parameter.shape and optimizer.state[parameter]["step"] == 1
        if "gate_proj.lora_A" in name:
            assert torch.equal(moment, state[name]["exp_avg"][:, columns])
    assert len(optimizer.state) == len(optimizer.param_groups[0]["params"]) == 2 * 7 * 4
    model(**batch()).loss.backward()
    optimizer.step()
    merged = model.merge_and_unload()
    assert model_shape(merged).hidden_size == 16


def test_growing_ranks_changes_nothing_but_what_can_be_learnt():
    model = with_lora(make_model())
    optimizer = torch.optim.AdamW(parameter for parameter in model.parameters() if parameter.requires_grad)
    model(**batch()).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    before, own = logits(model), adapters(model)
    ranks = {name: 2 + index % 3 * 2 for index, name in enumerate(own)}
    grow(model, ranks, optimizer, torch.Generator().manual_seed(0))
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    for name, layer in own.items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert (len(a), b.shape[1], layer.r["default"]) == (ranks[name],) * 3
        assert layer.scaling["default"] == pytest.approx(1.5)
        assert not b[:, 2:].any() and bool(a.any(dim=1).all())
        # Only adapters that did not grow keep their moments.
        assert (a in optimizer.state) == (b in optimizer.state) == (ranks[name] == 2)
    model(**batch()).loss.backward()
    assert all(layer.lora_B["default"].weight.grad[:, 2:].any() for name, layer in own.items() if ranks[name] > 2)
    optimizer.step()


# apt_fast


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_measuring_leaves_the_model_as_it_was(model_type, tmp_path):
    model = make_model(model_type)
    weights, before = state(model), logits(model)
    AptFast().measure(model, [batch()], tmp_path)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model), before)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    "settings", [{"sparsity": 0.0}, {"sparsity": 0.0, "match": "total"}, {"match": "native", "gamma": 1.0}]
)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_pruning_nothing_changes_nothing(model_type, settings):
    model = make_model(model_type)
    before, method = logits(model), AptFast(**settings)
    assert method.shape(model.config) == config_shape(model.config)
    assert method.compress(model, [batch()]).plan.width is None
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("match", ["layers", "total", "native"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_budget_is_met(model_type, match):
    model = make_model(model_type)
    config = make_config(model_type)
    method = AptFast(sparsity=0.4, match=match, gamma=0.6)
    costs, budget = method.budget(config)
    if match != "native":
        assert budget == target_parameters(config, 0.4, match)
    compressed = method.compress(model, [batch()])
    size = costs.of_shape(model_shape(model))
    biggest = max(unit_costs(config_shape(config), 4)[0], 8 * (unit_costs(config_shape(config), 4)[2] + 160))
    assert budget - biggest < size <= budget
    assert count_parameters(model) == Costs.of(config, "total").of_shape(model_shape(model))
    assert compressed.plan.method == "apt_fast" and all(
        0 < part <= 1 for part in compressed.report["kept_part"].values()
    )
    dry = costs.of_shape(method.shape(config))
    assert budget - 4 * (3 * 32 + 2) < dry <= budget


def test_query_heads_still_read_their_kv_heads():
    dense, model = make_model(), make_model()
    plan = AptFast(sparsity=0.5, match="native", gamma=0.3).compress(model, [batch()]).plan.width
    assert any(len(heads) < 8 for heads in plan.heads)
    hidden = list(range(32)) if plan.hidden is None else list(plan.hidden)
    assert len(hidden) % 8 == 0
    for old, new, heads in zip(decoder_layers(dense), decoder_layers(model), plan.heads, strict=True):
        assert new.self_attn.num_key_value_groups == 2
        assert new.self_attn.q_proj.out_features == 2 * new.self_attn.k_proj.out_features == 4 * len(heads)
        for place, head in enumerate(heads):
            group, own_group = head // 2, place // 2
            for name, number, own in (
                ("q_proj", head, place),
                ("k_proj", group, own_group),
                ("v_proj", group, own_group),
            ):
                rows = old.self_attn.get_submodule(name).weight[number * 4 : number * 4 + 4][:, hidden]
                assert torch.equal(new.self_attn.get_submodule(name).weight[own * 4 : own * 4 + 4], rows)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_dead_units_score_nothing_leave_first_and_are_not_missed(model_type):
    model = make_model(model_type)
    layer = decoder_layers(model)[2]
    layer.self_attn.o_proj.weight.data[:, 8:16] = 0  # KV group 1
    layer.mlp.down_proj.weight.data[:, 5] = 0
    before = logits(model)
    scores = static_scores(model, [batch(), batch(seed=1)])
    assert scores.groups[2, 1] == 0 and scores.channels[2, 5] == 0
    assert int((scores.groups == 0).sum()) == 1 and int((scores.channels == 0).sum()) == 1
    costs = Costs.of(model.config, "total")
    without = costs.count(32, 15, 95)
    kept, _ = densest_units(keep_one(scores, 8), unit_costs(config_shape(model.config), 4), costs, without, 8)
    assert kept.groups.sum() == 15 and kept.channels.sum() == 95 and bool(kept.hidden.all())
    assert not kept.groups[2, 1] and not kept.channels[2, 5]
    narrow(model, width_plan(kept, 2, Units.full(config_shape(model.config), True)))
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)


def test_padding_and_repetition_do_not_matter():
    plain, padded = (static_scores(make_model(), [batch(padding=count)]) for count in (0, 4))
    for own, other in zip(plain.all(), padded.all(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-4)
    plans = [AptFast().compress(make_model(), [batch(), batch(seed=1)]).plan.to_dict() for _ in range(2)]
    assert plans[0] == plans[1]


# apt, in training


@pytest.mark.parametrize(
    ("num_steps", "start", "cuts", "distil_end"),
    [
        (24375, 244, tuple(244 + math.ceil(7873 * cut / 16) for cut in range(1, 17)), 18939),
        (48, 1, tuple(range(2, 17)), 37),
        (4, 1, (1,), 3),
        (1, 1, (1,), 1),
    ],
)
def test_schedule(num_steps, start, cuts, distil_end):
    found = Apt().schedule(num_steps)
    assert (found.start, found.distil_end) == (start, distil_end)
    assert found.cuts == cuts


def test_progress_and_next_cut():
    schedule = Schedule(10, 10.0, (20, 30), 50)
    assert [schedule.progress(step) for step in (5, 10, 15, 30, 40)] == [0, 0, 0.25, 1, 1]
    assert [schedule.next_cut(step) for step in (10, 19, 20, 29)] == [20, 20, 30, 30]


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    folder = tmp_path_factory.mktemp("assets")
    config = {key: value for key, value in TINY.items() if not key.endswith(("vocab_size", "_token_id"))}
    return lambda model_type="llama": ModelSpec(f"random:{model_type}", config=config).load(folder)


class Watched(AptTraining):
    """APT that records the outputs of the masked model right before a cut and of the pruned model right after it."""

    def __init__(self, apt):
        super().__init__(apt)
        self.pairs, self.masks, self.losses = [], [], []

    def _cut(self, kept, step, optimizer):
        self._model.eval()
        self._hooks.mask(kept.combine(Tensor.double))
        masked = logits(self._model)
        super()._cut(kept, step, optimizer)
        self.pairs.append((masked, logits(self._model)))
        self._model.train()

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        self.masks.append(self._masks)


def train(load, directory, callbacks, spec=SPEC, model_type="llama"):
    finetune(load(model_type), ROWS, 1, spec, directory, 0, callbacks)
    return load_finetuned(load(model_type), spec, directory)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_prunes_while_it_trains(load, tmp_path, model_type):
    watched = Watched(APT)
    model = train(load, tmp_path, [watched], model_type=model_type)
    dense = load(model_type)
    _, budget = APT.budget(dense.config)
    report = json.loads((tmp_path / "report.json").read_text())
    assert [cut["step"] for cut in report["cuts"]] == [3, 5, 7] and len(watched.pairs) == 3
    for masked, pruned in watched.pairs:
        torch.testing.assert_close(pruned, masked, rtol=0, atol=1e-5)
    sizes = [cut["num_parameters"] for cut in report["cuts"]]
    assert count_parameters(dense) > sizes[0] > sizes[1] > sizes[2] == count_parameters(model)
    assert count_model(dense.config, model_shape(model)).num_parameters_without_embedding <= budget
    assert report["shape"] == model_shape(model).to_dict() and report["num_parameters"] == sizes[2]
    first = count_model(dense.config).num_lora_parameters(2)
    assert first < report["cuts"][-1]["num_adapter_parameters"] <= 4 * first
    ranks = json.loads((tmp_path / "adapter/adapter_config.json").read_text())["rank_pattern"]
    assert ranks and max(ranks.values()) <= 6 and min(ranks.values()) > 2
    assert PruningPlan.load(tmp_path / PLAN_FILE) == watched.plan
    assert not model.training and not any(module._forward_hooks for module in model.modules())
    assert watched._teacher is None  # after step 9
    assert [entry["step"] for entry in report["evaluations"]] == [1, 3, 5]  # at the start of each window
    nlls = [entry["answer_nll"] for entry in report["evaluations"]]
    assert [entry["is_teacher"] for entry in report["evaluations"]] == [
        all(nll < before for before in nlls[:index]) for index, nll in enumerate(nlls)
    ]
    moving = watched.masks[1].channels  # after step 2: masks have moved since step 1
    assert moving.min() == pytest.approx(0.6) and moving.max() == 1
    assert all(bool(((values == 0) | (values == 1)).all()) for values in watched.masks[2].all())


def test_what_is_left_can_be_trained_and_a_teacher_helps_it_only_while_asked(load, tmp_path):
    losses = {}
    for name, apt in {"taught": APT, "alone": dataclasses.replace(APT, distil=False)}.items():
        train(load, tmp_path / name, apt.callbacks())
        history = json.loads((tmp_path / name / "training.json").read_text())["history"]
        losses[name] = [entry["loss"] for entry in history]
    assert losses["taught"][:5] == pytest.approx(losses["alone"][:5], rel=1e-5)  # distillation begins after step 5
    assert losses["taught"][5] != pytest.approx(losses["alone"][5], rel=1e-2)
    assert losses["alone"][-1] < losses["alone"][0]


def test_at_target_0_only_adapters_change(load, tmp_path):
    apt = Apt(sparsity=0.0, num_cuts=2, prune_end=0.5, growth=2.0)
    watched = Watched(apt)
    model = train(load, tmp_path, [watched])
    assert watched.plan.width is None and model_shape(model) == model_shape(load())
    for masked, pruned in watched.pairs:
        torch.testing.assert_close(pruned, masked, rtol=0, atol=1e-5)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, load().state_dict()[name])}
    assert changed and all(name.endswith("_proj.weight") for name in changed)


def test_the_teacher_is_replaced_only_by_a_better_state(load, tmp_path, monkeypatch):
    found, teachers = iter([3.0, 3.5, 2.5]), []

    class Noted(AptTraining):
        def on_step_end(self, args, state, control, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            teachers.append(self._teacher)

    monkeypatch.setattr("baselines.apt.training.answer_nll", lambda *args: next(found))
    train(load, tmp_path, [Noted(APT)])
    report = json.loads((tmp_path / "report.json").read_text())
    assert [entry["is_teacher"] for entry in report["evaluations"]] == [True, False, True]
    first, second, third, fourth, fifth = (teachers[step - 1] for step in (1, 2, 3, 4, 5))
    assert first is second is third is fourth is not fifth
    assert first.kept.parts() == {"groups": 1.0, "channels": 1.0, "hidden": 1.0}  # of before the first cut
    sizes = [sum(v.numel() for n, v in each.model.named_parameters() if "lora_" not in n) for each in (first, fifth)]
    assert sizes[1] == report["cuts"][1]["num_parameters"] < sizes[0]
    ranks = {len(value) for name, value in fifth.adapter_state.items() if ".lora_A." in name}
    assert max(ranks) > 2  # a later teacher has the ranks of its time


def test_the_learning_rate_of_a_run_restarts(load, tmp_path):
    for name, apt in {"taught": APT, "alone": dataclasses.replace(APT, distil=False)}.items():
        train(load, tmp_path / name, apt.callbacks())
    rates = {
        name: [
            entry["learning_rate"] for entry in json.loads((tmp_path / name / "training.json").read_text())["history"]
        ]
        for name in ("taught", "alone")
    }
    # Restarts after steps 5 and 9 of 12, with one step of warm-up each.
    assert rates["taught"][:5] == rates["alone"][:5] and rates["taught"][1] == 1e-2
    assert [rates["taught"][step] for step in (5, 6, 9, 10)] == pytest.approx([0.0, 1e-2, 0.0, 1e-2])
    assert all(rate < 6e-3 for rate in rates["alone"][6:])


@pytest.mark.parametrize(
    ("settings", "steps", "match"),
    [
        ({}, 1875, r"must be min_interval=200 steps apart, got 605 steps for 16 cuts in a training of 1875 steps\. "
         r"Train longer .*lower method\.num_cuts to 3, or lower method\.min_interval"),
        ({"num_cuts": 1}, 105, r"got 34 steps for 1 cuts .* Train longer \(finetune\.epochs\), lower method\.min_inte"),
    ],
)  # fmt: skip
def test_cuts_too_close_are_refused_where_asked(settings, steps, match):
    with pytest.raises(ValueError, match=match):
        Apt(min_interval=200, **settings).resolve(30, steps)
    assert Apt(**settings).resolve(30, steps).min_interval == 1
    assert Apt(min_interval=200, num_cuts=3).resolve(30, 1875).num_cuts == 3


def test_unmerged_adapters_compute_the_same(load, tmp_path):
    merged = train(load, tmp_path, APT.callbacks())
    apart = load_finetuned(load(), dataclasses.replace(SPEC, merge_adapter=False), tmp_path)
    torch.testing.assert_close(logits(apart), logits(merged), rtol=0, atol=1e-4)


class Kill(TrainerCallback):
    def __init__(self, step):
        self._step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self._step:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def undisturbed(load, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return train(load, folder, APT.callbacks(), OFTEN).state_dict(), (folder / "report.json").read_text()


@pytest.mark.parametrize("step", [2, 5, 7, 11])  # killed before APT acts in that step
def test_an_interrupted_run_ends_like_an_undisturbed_one(load, tmp_path, undisturbed, step):
    with pytest.raises(KeyboardInterrupt):
        train(load, tmp_path, [Kill(step), *APT.callbacks()], OFTEN)
    assert (tmp_path / CHECKPOINTS_FOLDER / f"checkpoint-{step - 1}" / STATE_FILE).is_file()
    resumed = train(load, tmp_path, APT.callbacks(), OFTEN).state_dict()
    weights, report = undisturbed
    assert weights.keys() == resumed.keys() and all(
        torch.equal(value, resumed[name]) for name, value in weights.items()
    )
    assert (tmp_path / "report.json").read_text() == report


def test_a_checkpoint_of_another_method_is_refused(load, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(load, tmp_path, [Kill(2)], OFTEN)
    with pytest.raises(ValueError, match=r"method=apt holds scores and masks, got none in .*apt\.safetensors\. Delete"):
        train(load, tmp_path, APT.callbacks(), OFTEN)


# Distillation


def test_the_teacher_shares_weights_and_stays_when_the_student_shrinks():
    dense = make_model()
    copy = sharing_copy(dense)
    student = with_lora(dense)
    before = logits(student)
    adapter_state = {name: value.clone() for name, value in student.state_dict().items() if "lora_" in name}
    adapter_state = {name.replace(".default", ""): value for name, value in adapter_state.items()}
    random_state = torch.get_rng_state()
    teacher = make_teacher(copy, LoraConfig(r=2, lora_alpha=3, target_modules=lora_targets(copy)), adapter_state)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert teacher.lm_head.weight.data_ptr() == student.get_base_model().lm_head.weight.data_ptr()
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    optimizer = torch.optim.AdamW(parameter for parameter in student.parameters() if parameter.requires_grad)
    plan = width_plan(some_units(teacher.config), 2, Units.full(config_shape(teacher.config), True))
    narrow_with_adapters(student, plan, optimizer)
    assert torch.equal(logits(teacher), before) and teacher.config.hidden_size == 32


def test_distillation_loss_is_that_of_its_parts():
    student, teacher, inputs = make_model(seed=1), make_model(), batch(padding=2)
    state_map = StateMap(32, 2, 2.0)
    settings = {
        "layers": [1, 3], "hidden": torch.arange(32), "state_map": state_map, "layer_weight": 0.9, "logit_weight": 0.1,
        "temperature": 2 / 3,
    }  # fmt: skip
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    outputs = [
        model(
            inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            position_ids=positions,
            output_hidden_states=True,
        )
        for model in (student, teacher)
    ]
    chosen = inputs["labels"][:, 1:] != -100
    own = outputs[0].logits[:, :-1][chosen]
    answers = functional.cross_entropy(own, inputs["labels"][:, 1:][chosen])
    real = inputs["attention_mask"].bool()
    # Mean over all 18 real tokens, prompts included: the sum, divided by 2 rows and 9 tokens.
    soft = [(output.logits[real] * 1.5).softmax(-1) for output in outputs]
    divergence = (2 / 3) ** 2 * (soft[1] * (soft[1].log() - soft[0].log())).sum() / 2 / 9

    def states(output, layer):
        values = output.hidden_states[layer + 1][real]
        return values / values.square().mean(-1, keepdim=True).sqrt()

    # hidden_states[-1] is after the final norm, so layer 3 cannot be compared
    compared = sum((states(outputs[0], layer) - states(outputs[1], layer)).square().mean() for layer in (0, 1, 2))
    for mu in (0.0, 0.3, 1.0):
        total, count = distillation_loss(student, teacher, inputs, mu=mu, **(settings | {"layers": [0, 1, 2]}))
        assert count == 6
        expected = mu * (0.9 * compared + 0.1 * divergence) + (1 - mu) * answers
        torch.testing.assert_close(total / count, expected, rtol=1e-4, atol=1e-5)
    state_map.b.weight.data.fill_(0.1)
    total, count = distillation_loss(student, teacher, inputs, mu=1.0, **settings)
    total.backward()
    assert all(parameter.grad.any() for parameter in state_map.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_model_agrees_with_itself_also_in_bfloat16():
    states = torch.randn(5, 8).bfloat16() * 1e4
    loss = layer_loss(states, states, StateMap(8, 2, 2.0))
    assert loss.dtype == torch.float32 and loss == 0


def test_drawn_layers_are_one_of_each_quarter():
    draws = [drawn_layers(30, 0, step) for step in range(200)]
    assert {len(draw) for draw in draws} == {4} and draws == [drawn_layers(30, 0, step) for step in range(200)]
    seen = [set(draw[quarter] for draw in draws) for quarter in range(4)]
    assert seen == [set(range(7)), set(range(7, 15)), set(range(15, 22)), set(range(22, 30))]
    assert drawn_layers(2, 0, 5) == [0, 1]


# apt_fast in training

FAST = AptFast(sparsity=0.5, growth_start=1 / 12, growth_end=7 / 12, max_rank=6)  # grows after steps 3, 5 and 7


class Ranks(TrainerCallback):
    """Records the number of adapter parameters after each step."""

    def __init__(self):
        self.counts = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.counts.append(sum(value.numel() for name, value in model.named_parameters() if "lora_" in name))


def test_apt_fast_grows_ranks(load, tmp_path):
    ranks = Ranks()
    train(load, tmp_path, [*FAST.callbacks(), ranks], OFTEN)
    first = count_model(make_config()).num_lora_parameters(2)
    steps = [step for step in range(2, 13) if ranks.counts[step - 1] > ranks.counts[step - 2]]
    assert ranks.counts[0] == first and steps == [3, 5, 7]
    for step, target in {3: 2, 5: 3, 7: 4}.items():  # linearly to 4 times as many
        assert ranks.counts[step - 1] <= target * first
    own = json.loads((tmp_path / "adapter/adapter_config.json").read_text())["rank_pattern"]
    assert own and max(own.values()) <= 6


def test_apt_fast_resumes_with_its_ranks(load, tmp_path):
    whole = train(load, tmp_path / "whole", FAST.callbacks(), OFTEN).state_dict()
    with pytest.raises(KeyboardInterrupt):
        train(load, tmp_path / "killed", [Kill(6), *FAST.callbacks()], OFTEN)
    resumed = train(load, tmp_path / "killed", FAST.callbacks(), OFTEN).state_dict()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_apt_fast_refuses_a_checkpoint_without_saliences(load, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(load, tmp_path, [Kill(2)], OFTEN)
    with pytest.raises(ValueError, match=r"method=apt_fast holds the salience of adapters, got none in .*\. Delete"):
        train(load, tmp_path, FAST.callbacks(), OFTEN)


# Settings and the pipeline


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (
            lambda: AptFast(gamma=0.0),
            r"gamma is the part of the parameters that stays, in \(0, 1\], got 0\.0.*gamma=0\.6",
        ),
        (lambda: AptFast(num_rows=0), r"num_rows must be 1 or more, got 0\. Raise method\.num_rows"),
        (lambda: AptFast(sparsity=1.0), r"sparsity is the fraction to prune, in \[0, 1\), got 1\.0"),
        (lambda: AptFast(match="depth"), r"method\.match must be one of layers, total, native, got 'depth'"),
        (lambda: Apt(num_cuts=0), r"num_cuts must be 1 or more, got 0"),
        (lambda: Apt(sparsity_warmup=2.0), r"sparsity_warmup is a fraction .* got 2\.0\. APT's is 0\.067"),
        (lambda: Apt(evaluation_rows=0), r"evaluation_rows must be 1 or more, got 0"),
        (lambda: AptFast(num_growths=0), r"num_growths must be 1 or more, got 0"),
        (lambda: AptFast(growth_start=0.5), r"in this order, got 0\.5 and 0\.25\. APT's are 0\.062 and 0\.25"),
        (lambda: Apt(growth=0.5), r"growth must be 1 or more, got 0\.5"),
        (lambda: Apt(mask_step=0.0), r"mask_step must be above 0, got 0\.0\. Raise method\.mask_step"),
        (lambda: Apt(prune_end=0.9), r"in this order, got 0\.01, 0\.9 and 0\.777\. APT's are 0\.01, 0\.333 and 0\.777"),
        (
            lambda: AptFast(match="native", gamma=0.01).shape(make_config()),
            r"method=apt_fast keeps a KV group and an MLP channel in every layer: .*, got a budget of .*\. Lower",
        ),
        (lambda: Apt().shape(make_config("gemma2")), r"method=apt makes layers narrower, which is known for llama"),
        (lambda: AptFast().compress(make_model(), []), r"method=apt_fast looks at data, got no batches"),
    ],
)
def test_bad_settings(build, match):
    with pytest.raises(ValueError, match=match):
        build()


@pytest.fixture
def make_pipeline(tmp_path):
    rows = [{"question": f"{n} + 1?", "options": [str(n + 1), "x"], "answer": 0} for n in range(8)]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = JsonLines(
        train_file=str(tmp_path / "train.jsonl"), test_file=str(tmp_path / "test.jsonl"), prompt="{question}",
        choice=" {choice}", answer_field="answer", choices_field="options", max_length=60,
    )  # fmt: skip

    def make(method, model_type="llama", training=SPEC):
        config = {key: value for key, value in TINY.items() if not key.endswith(("vocab_size", "_token_id"))}
        model = ModelSpec(f"random:{model_type}", config=config)
        return Pipeline(model, task, method, training, Likelihood(), 0, tmp_path / "cache", evaluate_before=False)

    return make


@pytest.mark.parametrize(
    ("method", "model_type"),
    [(APT, "llama"), (APT, "qwen2"), *((AptFast(sparsity=0.5, num_rows=4), each) for each in MODEL_TYPES)],
)
def test_from_end_to_end(method, model_type, make_pipeline):
    pipeline = make_pipeline(method, model_type)
    outcome = pipeline.run()
    model = pipeline.load_result()
    assert outcome.plan.method == method.name and outcome.plan.width is not None
    assert outcome.num_parameters == count_parameters(model) < pipeline.num_dense_parameters
    assert outcome.shape.to_dict() == model_shape(model).to_dict()
    assert outcome.training["steps"] == NUM_STEPS and 0 <= outcome.metrics["accuracy"] <= 1
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    assert model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape == (1, 10)
    json.dumps([outcome.plan.to_dict(), outcome.report], allow_nan=False)
    again = make_pipeline(method, model_type).load_result()
    assert torch.equal(logits(again), logits(model))


def test_a_run_that_was_killed_between_cuts_goes_on(make_pipeline, monkeypatch, tmp_path):
    with monkeypatch.context() as patched:
        patched.setattr(Apt, "callbacks", lambda apt: [AptTraining(apt), Kill(6)])
        with pytest.raises(KeyboardInterrupt):
            make_pipeline(APT, training=OFTEN).run()
    killed = make_pipeline(APT, training=OFTEN)
    outcome = killed.run()
    assert outcome.training["steps"] == NUM_STEPS and [cut["step"] for cut in outcome.report["cuts"]] == [3, 5, 7]
    (tmp_path / "cache").rename(tmp_path / "old")
    whole = make_pipeline(APT, training=OFTEN)
    assert whole.run().plan == outcome.plan
    first, second = (pipeline.load_result().state_dict() for pipeline in (whole, killed))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_sweep_over_budgets_measures_once(make_pipeline, tmp_path):
    for sparsity in (0.25, 0.5):
        make_pipeline(AptFast(sparsity=sparsity, num_rows=4), training=dataclasses.replace(SPEC, max_steps=1)).run()
    assert len([path for path in (tmp_path / "cache/stages/measure").iterdir() if path.is_dir()]) == 1


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"mode": "full"}, r"APT prunes and grows LoRA adapters, so it needs finetune=lora, got finetune=full\. Use"),
        ({"gradient_checkpointing": True}, r"would count twice, got gradient_checkpointing=true\. Set finetune\."),
    ],
)
def test_training_that_does_not_fit_is_refused_before_weights_are_loaded(changes, match, make_pipeline, monkeypatch):
    monkeypatch.setattr(ModelSpec, "load", lambda *args: pytest.fail("loaded weights"))
    with pytest.raises(ValueError, match=match):
        make_pipeline(APT, training=dataclasses.replace(SPEC, **changes)).run()
    if "mode" in changes:
        with pytest.raises(ValueError, match=match):
            make_pipeline(AptFast(), training=dataclasses.replace(SPEC, **changes)).run()


def test_variants_tell_runs_apart():
    assert Apt().variant() == AptFast().variant() == "sparsity0.4"
    assert Apt(distil=False, match="total").variant() == "sparsity0.4-total-alone"
    assert AptFast(match="native", gamma=0.7).variant() == "gamma0.7"
