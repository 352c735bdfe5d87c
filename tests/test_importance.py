import copy
import importlib.util
import json
import warnings

import oracles
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import set_seed

from gradpruner import importance
from gradpruner.finetune.trainer import DivergedError
from gradpruner.gradients import EarlyGradients
from gradpruner.importance import record_early_gradients
from gradpruner.importance_spec import LORA_INITS, ImportanceSpec
from gradpruner.models.architectures import linear_sublayers

ADAPTERS = [{"lora_init": init} for init in (*LORA_INITS, "pissa_niter_4")] + [
    {"adapter": "dora"},
    {"adapter": "qlora"},
]


@pytest.fixture
def record(tmp_path):
    """Returns `record(model, batches, **settings of ImportanceSpec)`, which writes to a new folder per call."""
    runs = iter(range(1000))

    def run(model, batches, **settings):
        spec = ImportanceSpec(**({"steps": 3, "batch_size": 2, "lora_rank": 4, "learning_rate": 1e-3} | settings))
        return record_early_gradients(model, batches, spec, tmp_path / str(next(runs)))

    return run


def linears(model):
    return {
        (index, name): linear
        for index, layer in enumerate(model.model.layers)
        for name, linear in linear_sublayers(layer).items()
    }


def hand_made_steps(model, batches, steps, rate=1e-3, rank=4, alpha=32, seed=0):
    """Runs LoRA without peft or Trainer: hooks add the adapters, the optimizer is plain AdamW, the loss is written out.

    peft only draws the initial A, so that both runs start with the same weights.

    Returns:
        per step, the mean loss over tokens and {(layer, sublayer): (a, b, grad_a, grad_b)}.
    """
    model = copy.deepcopy(model).train().requires_grad_(False)
    set_seed(seed)
    targets = sorted({name.rsplit(".", 1)[-1] for _, name in linears(model)})
    drawn = get_peft_model(copy.deepcopy(model), LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets))
    adapters = {}
    for (layer, name), linear in linears(model).items():
        a = drawn.get_submodule(f"base_model.model.model.layers.{layer}.{name}.lora_A.default").weight
        a = a.detach().clone().requires_grad_()
        b = torch.zeros(linear.out_features, rank, requires_grad=True)
        adapters[layer, name] = (a, b)
        linear.register_forward_hook(
            lambda module, inputs, output, a=a, b=b: output + alpha / rank * (inputs[0] @ a.T) @ b.T
        )
    optimizer = torch.optim.AdamW([each for pair in adapters.values() for each in pair], lr=rate, weight_decay=0.0)
    history = []
    for step in range(steps):
        batch = batches[step]
        positions = (batch["attention_mask"].cumsum(dim=1) - 1).clamp_min(0)
        logits = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            position_ids=positions,
            use_cache=False,
        ).logits
        log_probabilities = torch.log_softmax(logits[:, :-1].float(), dim=-1)
        targets = batch["labels"][:, 1:]
        with_loss = targets != -100
        chosen = log_probabilities.gather(2, targets.clamp_min(0).unsqueeze(2)).squeeze(2)
        loss = -(chosen * with_loss).sum() / with_loss.sum()
        optimizer.zero_grad()
        loss.backward()
        snapshot = {
            key: tuple(each.detach().clone() for each in (a, b, a.grad, b.grad)) for key, (a, b) in adapters.items()
        }
        history.append((loss.item(), snapshot))
        optimizer.step()
    return history


def test_factors_are_the_gradients_of_a_hand_written_lora_run(tiny_llama, make_batches, record):
    model, batches = tiny_llama(), make_batches(3)
    expected = hand_made_steps(model, batches, 3)
    gradients = record(model, batches)
    assert gradients.losses == pytest.approx([loss for loss, _ in expected], rel=1e-5)
    for index, (layer, name) in enumerate(expected[0][1]):
        factors = gradients.factors(layer, name)
        assert len(factors) == 3
        for step, (left, right) in enumerate(factors):
            _, _, grad_a, grad_b = expected[step][1][layer, name]
            oracles.close(left, grad_b, rtol=1e-5)
            oracles.close(right, grad_a, rtol=1e-5)
            found = gradients.energies[step, layer, index % 7].item()
            assert found == pytest.approx(torch.linalg.norm(grad_b.double() @ grad_a.double()).item() ** 2, rel=1e-4)


def test_tangent_factors_agree_with_the_hand_written_run(tiny_mistral, make_batches, record):
    model, batches = tiny_mistral(num_hidden_layers=2), make_batches(3)
    expected = hand_made_steps(model, batches, 3)
    gradients = record(model, batches, gradient_estimate="tangent")
    for layer, name in expected[0][1]:
        for step, (left, right) in enumerate(gradients.factors(layer, name)):
            a, b, grad_a, grad_b = expected[step][1][layer, name]
            oracles.close(left @ right, grad_b.double() @ a.double() + b.double() @ grad_a.double(), rtol=1e-5)


def test_energies_are_those_of_the_factors(tiny_llama, make_batches, record):
    gradients = record(tiny_llama(num_hidden_layers=2), make_batches(2), steps=2, gradient_estimate="tangent")
    assert gradients.energies.shape == (2, 2, 7)
    assert gradients.energies.dtype == torch.float64
    assert set(gradients.sublayers) == set(linear_sublayers(tiny_llama().model.layers[0]))
    for layer in range(2):
        for index, name in enumerate(gradients.sublayers):
            for step, (left, right) in enumerate(gradients.factors(layer, name)):
                expected = oracles.energy(left, right)
                assert gradients.energies[step, layer, index].item() == pytest.approx(expected, rel=1e-9)


def test_first_step_is_zero_for_product_only(tiny_llama, make_batches, record):
    batches = make_batches(2)
    product = record(tiny_llama(), batches, steps=2).energies
    assert not product[0].any()
    assert (product[1] > 0).all()
    assert (record(tiny_llama(), batches, steps=2, gradient_estimate="tangent").energies > 0).all()


@pytest.mark.parametrize("settings", ADAPTERS, ids=lambda settings: next(iter(settings.values())))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_is_as_before(tiny_llama, make_batches, record, settings, dtype):
    model = tiny_llama(num_hidden_layers=2, dtype=dtype)
    model.train()
    model.config.use_cache = False
    frozen = {"model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    modules = [(name, type(module)) for name, module in model.named_modules()]
    config = model.config.to_dict()

    assert record(model, make_batches(2), steps=2, **settings).energies.any()

    assert [(name, type(module)) for name, module in model.named_modules()] == modules
    after = model.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], value) for name, value in weights.items())
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == frozen
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training
    assert model.config.to_dict() == config


def test_evaluation_mode_and_cache_come_back(tiny_llama, make_batches, record):
    model = tiny_llama()
    record(model, make_batches(3))
    assert not any(module.training for module in model.modules())
    assert model.config.use_cache
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_model_can_be_saved_as_an_ordinary_checkpoint_afterwards(tiny_llama, make_batches, record, tmp_path):
    model = tiny_llama()
    record(model, make_batches(3))
    model.save_pretrained(tmp_path / "saved")
    assert {file.name for file in (tmp_path / "saved").iterdir()} >= {"config.json", "model.safetensors"}
    assert not list((tmp_path / "saved").glob("adapter*"))


def test_tied_embeddings(tiny_llama, make_batches, record):
    model = tiny_llama(tie_word_embeddings=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    record(model, make_batches(3), lora_init="pissa")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_qlora_is_lora_beside_rounded_weights(tiny_llama, make_batches, record):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    def make():
        return tiny_llama(num_hidden_layers=2, attention_bias=True)

    batches, model, rounded = make_batches(2), make(), make()
    with torch.no_grad():
        for linear in linears(rounded).values():
            linear.weight.copy_(
                dequantize_4bit(*quantize_4bit(linear.weight, compress_statistics=True, quant_type="nf4"))
            )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = record(model, batches, steps=2, adapter="qlora")
    expected, plain = (record(each, batches, steps=2) for each in (rounded, model))
    torch.testing.assert_close(found.energies, expected.energies, rtol=1e-4, atol=0.0)
    for layer, name in linears(model):
        grads_b = [run.factors(layer, name)[0][0] for run in (found, plain)]
        assert not torch.equal(*grads_b)
        assert torch.cosine_similarity(*(grad.flatten() for grad in grads_b), dim=0) > 0.5
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_qlora_weights_are_in_four_bits(tiny_llama, make_batches, record, monkeypatch):
    dtypes = set()
    recorder = importance._GradientRecorder._factors

    def watched(self, module):
        dtypes.add((type(module).__name__, module.get_base_layer().weight.dtype))
        return recorder(self, module)

    monkeypatch.setattr(importance._GradientRecorder, "_factors", watched)
    record(tiny_llama(num_hidden_layers=2), make_batches(2), steps=2, adapter="qlora")
    assert dtypes == {("Linear4bit", torch.uint8)}


@pytest.mark.parametrize("settings", ADAPTERS, ids=lambda settings: next(iter(settings.values())))
def test_second_run_on_the_same_model_is_the_same_and_silent(tiny_llama, make_batches, record, settings):
    model, batches = tiny_llama(num_hidden_layers=2), make_batches(3)
    first = record(model, batches, **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        second = record(model, batches, **settings)
    assert caught == []
    assert torch.equal(first.energies, second.energies)
    assert first.losses == second.losses


def test_seed_decides(tiny_llama, make_batches, record):
    batches = make_batches(3)
    runs = []
    for seed, global_seed in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(global_seed)
        runs.append(record(tiny_llama(), batches, seed=seed).energies)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_result_can_be_read_back(tiny_llama, make_batches, record):
    gradients = record(tiny_llama(), make_batches(3))
    loaded = EarlyGradients.load(gradients.directory)
    assert torch.equal(loaded.energies, gradients.energies)
    assert (loaded.losses, loaded.sublayers) == (gradients.losses, gradients.sublayers)
    assert loaded.train_seconds > 0
    assert loaded.peak_memory_bytes > 0
    names = sorted(file.name for file in gradients.directory.iterdir())
    assert names == ["importance.json", *(f"step-0000{step}.safetensors" for step in range(3))]
    json.dumps(json.loads((gradients.directory / "importance.json").read_text()), allow_nan=False)


def test_padding_side_does_not_matter(tiny_llama, make_batches, record):
    left, right = (
        record(tiny_llama(), make_batches(3, batch_size=3, padding=side), gradient_estimate="tangent").energies
        for side in ("left", "right")
    )
    torch.testing.assert_close(left, right, rtol=1e-3, atol=0.0)


# Clipping


def gradient_norms(gradients):
    """Returns the norm of the whole gradient per step."""
    squares = torch.zeros(len(gradients.energies), dtype=torch.float64)
    for layer in range(gradients.energies.shape[1]):
        for name in gradients.sublayers:
            for step, factors in enumerate(gradients.factors(layer, name)):
                squares[step] += sum(factor.double().pow(2).sum() for factor in factors)
    return squares.sqrt()


def test_gradients_are_clipped_only_when_asked(tiny_llama, make_batches, record):
    batches = make_batches(3)
    free = record(tiny_llama(), batches)
    assert (gradient_norms(free) > 0.1).all()
    clipped = record(tiny_llama(), batches, max_grad_norm=0.1)
    assert gradient_norms(clipped).tolist() == pytest.approx([0.1] * 3, rel=1e-4)
    generous = record(tiny_llama(), batches, max_grad_norm=1e6)
    assert torch.equal(generous.energies, free.energies)


def test_norms_above_transformers_default_of_one_are_kept(tiny_llama, make_batches, record):
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    assert gradient_norms(record(model, make_batches(3)))[0] > 1.5


# Accumulation


def test_accumulation_is_the_mean_over_tokens(tiny_llama, make_batches, record):
    batches = make_batches(4)
    for batch in batches[::2]:
        batch["labels"][0] = -100  # unequal token counts, so that a mean of means would differ
    joined = [
        {key: torch.cat([first[key], second[key]]) for key in first}
        for first, second in zip(batches[::2], batches[1::2], strict=True)
    ]
    one = record(tiny_llama(), joined, steps=2)
    two = record(tiny_llama(), batches, steps=2, accumulation=2)
    assert one.energies.shape == two.energies.shape
    for layer in range(6):
        for name in one.sublayers:
            for first, second in zip(one.factors(layer, name), two.factors(layer, name), strict=True):
                oracles.close(second[0], first[0], rtol=1e-4)
                oracles.close(second[1], first[1], rtol=1e-4)


# Memory


class Shapes(TorchDispatchMode):
    """Sizes of all tensors that torch operations return."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.sizes += [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        return result


@pytest.mark.parametrize("estimate", ["product", "tangent"])
def test_scoring_never_forms_a_matrix_of_the_weight_s_size(tiny_llama, make_batches, record, monkeypatch, estimate):
    model = tiny_llama()
    seen = Shapes()
    original = importance._GradientRecorder.on_pre_optimizer_step

    def watched(self, *args, **kwargs):
        with seen:
            return original(self, *args, **kwargs)

    monkeypatch.setattr(importance._GradientRecorder, "on_pre_optimizer_step", watched)
    record(model, make_batches(3), gradient_estimate=estimate)
    smallest = min(linear.weight.numel() for linear in linears(model).values())
    assert seen.sizes
    assert max(seen.sizes) < smallest


# Batches


def test_takes_no_more_batches_than_it_needs(tiny_llama, make_batches, record):
    batches = iter(make_batches(7))
    record(tiny_llama(), batches, steps=2, accumulation=3)
    assert len(list(batches)) == 1


def test_batches_are_taken_in_order(tiny_llama, make_batches, record):
    batches = make_batches(3)
    forth, back = record(tiny_llama(), batches).losses, record(tiny_llama(), batches[::-1]).losses
    first, last = (hand_made_steps(tiny_llama(), [batch], 1)[0][0] for batch in (batches[0], batches[-1]))
    assert (forth[0], back[0]) == (pytest.approx(first, rel=1e-5), pytest.approx(last, rel=1e-5))
    assert first != pytest.approx(last, rel=1e-3)


def test_too_few_batches(tiny_llama, make_batches, record):
    with pytest.raises(
        ValueError, match=r"3 importance steps need 6 batches, got 5\. Give more batches or lower steps"
    ):
        record(tiny_llama(), make_batches(5), accumulation=2)


def test_no_gradient_anywhere(tiny_llama, make_batches, record):
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    with pytest.raises(ValueError, match=r"All gradients were exactly zero in 3 importance steps.*Raise method"):
        record(model, make_batches(3))


def test_batches_without_labels_are_refused(tiny_llama, make_batches, record):
    batches = make_batches(4)
    batches[1]["labels"].fill_(-100)
    batches[2]["labels"][:, 1:] = -100
    batches[2]["labels"][:, 0] = 5  # nothing predicts the first token
    message = r"needs a label other than -100 after its first column, got none in batches \[1, 2\]\. Label the answer"
    model = tiny_llama()
    with pytest.raises(ValueError, match=message):
        record(model, batches, steps=4)
    assert_clean(model)


def test_a_row_without_labels_is_fine(tiny_llama, make_batches, record):
    batches = make_batches(3)
    for batch in batches:
        batch["labels"][0] = -100
    assert record(tiny_llama(), batches).energies.any()


# Divergence


def assert_clean(model):
    assert not [name for name, _ in model.named_modules() if "lora" in name or "base_layer" in name]
    assert not hasattr(model, "peft_config")
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not model.training


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_damaged_layers_are_named(tiny_llama, make_batches, record, value):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = value
        model.model.layers[4].input_layernorm.weight[0] = value
    with pytest.raises(ValueError, match=r"weights of decoder layers \[2, 4\] hold NaN or infinity.*Load an undamaged"):
        record(model, make_batches(3))
    assert_clean(model)


def test_nan_outside_the_layers(tiny_llama, make_batches, record):
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[:4] = 3e38  # finite, but the logits overflow
    with pytest.raises(DivergedError, match=r"The loss is nan at step 1 of 3 \(learning rate 0\.001\).*the weights"):
        record(model, make_batches(3))
    assert_clean(model)


def test_nan_gradients_name_the_layers(tiny_llama, make_batches, record):
    """The loss is finite, but the gradients of layers 0 to 2 are NaN."""
    model = tiny_llama()

    def spoil(module, inputs, output):
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * float("nan"))

    handle = model.model.layers[2].mlp.register_forward_hook(spoil)
    message = r"Gradients of layers \[0, 1, 2\] are NaN or infinite at importance step 1\. Lower method\.learning_rate"
    with pytest.raises(ValueError, match=message):
        record(model, make_batches(3))
    handle.remove()
    assert_clean(model)


def test_runaway_learning_rate(tiny_llama, make_batches, record):
    model = tiny_llama()
    with pytest.raises((DivergedError, ValueError), match=r"[Ll]ower (the|method\.)\s*learning[ _]rate"):
        record(model, make_batches(6), steps=6, learning_rate=1e30)
    assert_clean(model)


@pytest.mark.parametrize("settings", [{}, {"lora_init": "pissa"}, {"adapter": "qlora"}])
def test_failing_adapter_init_leaves_the_model_clean(tiny_llama, make_batches, record, monkeypatch, settings):
    """When the failure occurs, some sublayers are wrapped and PiSSA has changed their weights."""
    model, batches = tiny_llama(), make_batches(3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    original, calls = LoraLayer.update_layer, []

    def fail_at_the_tenth(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == 10:
            raise RuntimeError("out of memory, say")
        return original(self, *args, **kwargs)

    with monkeypatch.context() as broken, pytest.raises(RuntimeError, match="out of memory, say"):
        broken.setattr(LoraLayer, "update_layer", fail_at_the_tenth)
        record(model, batches, **settings)
    assert_clean(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert record(model, batches, **settings).energies.any()


# Gradient checkpointing


def test_gradient_checkpointing_changes_nothing(tiny_llama, make_batches, record):
    batches = make_batches(3)
    plain = record(tiny_llama(), batches)
    model = tiny_llama()
    checkpointed = record(model, batches, gradient_checkpointing=True)
    torch.testing.assert_close(checkpointed.energies, plain.energies, rtol=1e-5, atol=0.0)
    assert not model.is_activation_checkpointing
    assert_clean(model)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_checkpointing_of_the_caller_stays_on(tiny_llama, make_batches, record, checkpointing):
    model = tiny_llama()
    model.activation_checkpointing_enable()
    record(model, make_batches(3), gradient_checkpointing=checkpointing)
    assert model.is_activation_checkpointing
    assert_clean(model)


@pytest.mark.parametrize("before", [False, True])
def test_gradient_checkpointing_leaves_hooks_as_they_were(tiny_llama, make_batches, record, before):
    model = tiny_llama()
    if before:
        model.activation_checkpointing_enable()  # adds its own hook

    def hooks():
        return [(name, *module._forward_hooks.values()) for name, module in model.named_modules()]

    expected = hooks()
    record(model, make_batches(3), gradient_checkpointing=True)
    assert hooks() == expected


# Settings


@pytest.mark.parametrize("steps", [1, 0, -3])
def test_fewer_than_two_steps(steps):
    with pytest.raises(ValueError, match=rf"at least 2 steps, got steps={steps}\. LoRA's B starts at zero"):
        ImportanceSpec(steps=steps)


def test_mica():
    with pytest.raises(
        ValueError, match=r"'mica' freezes B, .* Use one of default, gaussian, pissa, olora, orthogonal"
    ):
        ImportanceSpec(lora_init="mica")


@pytest.mark.parametrize("init", ["loftq", "pissa_niter_", "pissa_niter_x", "xpissa_niter_4", ""])
def test_unknown_init(init):
    message = f"one of default, gaussian, pissa, olora, orthogonal or pissa_niter_<n>, got {init!r}"
    with pytest.raises(ValueError, match=message):
        ImportanceSpec(lora_init=init)


def test_unknown_adapter():
    with pytest.raises(ValueError, match="adapter must be one of lora, dora, qlora, got 'ia3'"):
        ImportanceSpec(adapter="ia3")


def test_qlora_without_bitsandbytes(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs bitsandbytes .*, got an environment without it\. Run `pip install"):
        ImportanceSpec(adapter="qlora")


def test_qlora_needs_an_init_that_leaves_the_weights_alone():
    with pytest.raises(ValueError, match=r"got lora_init='pissa'\. Use one of default, gaussian, or adapter=lora"):
        ImportanceSpec(adapter="qlora", lora_init="pissa")


def test_unknown_estimate():
    with pytest.raises(ValueError, match="gradient_estimate must be one of product, tangent, got 'exact'"):
        ImportanceSpec(gradient_estimate="exact")


@pytest.mark.parametrize("name", ["batch_size", "accumulation", "lora_rank", "lora_alpha", "learning_rate"])
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_settings_that_must_be_positive(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be above 0, got {value}\. Raise method\.{name}"):
        ImportanceSpec(**{name: value})


def test_negative_max_grad_norm():
    with pytest.raises(ValueError, match=r"max_grad_norm must be 0 \(no clipping\) or above, got -1"):
        ImportanceSpec(max_grad_norm=-1.0)
