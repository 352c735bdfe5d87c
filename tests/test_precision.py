"""Float formats of a fine-tune: low precision must learn what float32 learns, and merging must not lose it unseen."""

import copy
import dataclasses
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional

from gradpruner.encoding import TrainingRow
from gradpruner.finetune import precision as precision_module
from gradpruner.finetune.precision import convert_weights, resolve_precision, trained_dtype
from gradpruner.finetune.result import load_finetuned, merge_for_checkpoint, read_result, update_survival
from gradpruner.finetune.run import finetune
from gradpruner.finetune.spec import TrainingSpec
from gradpruner.hidden_states import decode, head_logits
from gradpruner.models.memory import estimate_training_memory

FULL = TrainingSpec(
    mode="full",
    learning_rate=1e-5,
    batch_size=16,
    micro_batch_size=16,
    max_steps=100,
    save_steps=1000,
    weight_decay=0.1,
)
LORA = dataclasses.replace(FULL, mode="lora", max_steps=24)


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(2, 258, (64, 16), generator=generator).tolist()
    return [TrainingRow(tuple(row), 12) for row in tokens]


def loss_of(model, rows):
    """Of the answer tokens, by hand."""
    ids = torch.tensor([row.input_ids for row in rows])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, 3:-1].float()
    return float(functional.cross_entropy(logits.flatten(0, 1), ids[:, 4:].flatten()))


@pytest.fixture
def train(tiny_llama, rows, tmp_path):
    """Trains 100 steps; gives the decrease of the loss and which weights changed."""

    def train(precision, dtype):
        model = tiny_llama(dtype=dtype, hidden_size=64, num_hidden_layers=3, initializer_range=0.02)
        start = copy.deepcopy(model)
        spec = dataclasses.replace(FULL, precision=precision, merge_dtype="float32")
        folder = tmp_path / precision
        finetune(model, rows, 1, spec, folder)
        tuned = load_finetuned(copy.deepcopy(start), spec, folder)
        changed = [
            (new.float() != old.float()).flatten()
            for new, old in zip(tuned.parameters(), start.parameters(), strict=True)
        ]
        convert_weights(start, torch.float32)
        return loss_of(start, rows) - loss_of(tuned, rows), torch.cat(changed)

    return train


@pytest.mark.parametrize(
    ("precision", "compiled"),
    # torchao compiles a step for every shape of a weight, which takes most of a minute and changes no rule of rounding.
    [("bf16_mixed", True), ("bf16_stochastic", False), pytest.param("bf16_stochastic", True, marks=pytest.mark.slow)],
)
@pytest.mark.filterwarnings("ignore:.*_stable_hash_for_caching.*")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_low_precision_learns_what_float32_learns(train, precision, compiled, monkeypatch):
    expected, changed_in_float32 = train("float32", torch.float32)
    if not compiled:
        monkeypatch.setattr(torch, "compile", lambda function, **settings: function)
    decrease, changed = train(precision, torch.bfloat16)
    assert expected > 0.01
    assert decrease == pytest.approx(expected, rel=0.02)
    # Rounding by chance may put a weight back to where it started.
    least = 0.99 if precision == "bf16_mixed" else 0.75
    assert float((changed & changed_in_float32).sum() / changed_in_float32.sum()) > least


def test_a_model_in_bfloat16_is_trained_in_float32(tiny_llama, rows, tmp_path):
    model = tiny_llama(dtype=torch.bfloat16)
    frequencies = model.model.rotary_emb.inv_freq.clone()
    finetune(model, rows, 1, dataclasses.replace(FULL, max_steps=2), tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    assert read_result(tmp_path)["precision"] == "float32"
    kept = load_finetuned(tiny_llama(dtype=torch.bfloat16), FULL, tmp_path)
    wide = load_finetuned(tiny_llama(dtype=torch.bfloat16), dataclasses.replace(FULL, merge_dtype="float32"), tmp_path)
    assert (kept.dtype, wide.dtype) == (torch.bfloat16, torch.float32)
    for trained, narrow, same in zip(model.parameters(), kept.parameters(), wide.parameters(), strict=True):
        assert torch.equal(narrow, trained.bfloat16()) and torch.equal(same, trained)


@pytest.mark.parametrize(
    ("mode", "device", "expected"),
    [
        ("full", "cuda", "bf16_mixed"),
        ("full", "cpu", "float32"),
        ("lora", "cuda", "float32"),
        ("lora", "cpu", "float32"),
    ],
)
def test_what_auto_is(monkeypatch, mode, device, expected):
    monkeypatch.setattr(precision_module, "default_device", lambda: torch.device(device))
    assert resolve_precision(dataclasses.replace(FULL, mode=mode)) == expected


def test_weights_that_are_updated():
    assert [trained_dtype(name) for name in ("float32", "bf16_mixed", "bf16_stochastic")] == [
        torch.float32, torch.float32, torch.bfloat16,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"precision": "fp16"}, r"Training in float16 is not offered, got finetune\.precision=fp16.*Use .*bf16_mixed"),
        ({"precision": "half"}, r"finetune\.precision must be one of auto, float32, bf16_mixed, .* got 'half'"),
        ({"precision": "bf16_stochastic", "mode": "lora"}, r"is for full fine-tuning, got mode=lora.*precision=auto"),
        ({"merge_dtype": "float16"}, r"finetune\.merge_dtype must be one of auto, float32, bfloat16, got 'float16'"),
    ],
)
def test_what_is_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(FULL, **changes)


def test_stochastic_rounding_without_torchao(monkeypatch):
    monkeypatch.setattr(precision_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs torchao .*, got an environment without it\. Run `pip install"):
        resolve_precision(dataclasses.replace(FULL, precision="bf16_stochastic"))


def test_a_loss_of_ones_own_is_computed_in_mixed_precision_too(tiny_llama, rows, tmp_path):
    dtypes = set()

    def loss(model, batch):
        states = decode(model, batch)[:, :-1]
        logits = head_logits(model, states)
        dtypes.add(logits.dtype)
        chosen = batch["labels"][:, 1:] != -100
        total = functional.cross_entropy(logits.float()[chosen], batch["labels"][:, 1:][chosen], reduction="sum")
        return total, int(chosen.sum())

    for precision in ("bf16_mixed", "float32"):
        spec = dataclasses.replace(FULL, precision=precision, max_steps=2)
        finetune(tiny_llama(), rows, 1, spec, tmp_path / precision, loss=loss)
        assert dtypes == {torch.bfloat16 if precision == "bf16_mixed" else torch.float32}
        dtypes.clear()


# Merging adapters


def with_adapters(model, scale):
    """A PeftModel whose update is small beside the weights."""
    tuned = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"]))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    return tuned


@torch.no_grad()
def survival_by_hand(tuned, dtype):
    kept = total = 0.0
    for layer in tuned.base_model.model.model.layers:
        for module in (layer.self_attn.q_proj, layer.mlp.down_proj):
            weight = module.base_layer.weight.double()
            update = 2.0 * module.lora_B["default"].weight.double() @ module.lora_A["default"].weight.double()
            rounded = (weight + update).to(dtype).double()
            kept += float(((rounded - weight) * update).sum())
            total += float((update**2).sum())
    return kept / total


@pytest.mark.parametrize("scale", [1e-5, 1e-4, 1e-3, 1e-1])
def test_how_much_of_an_update_survives(tiny_llama, scale, caplog):
    tuned = with_adapters(tiny_llama(dtype=torch.bfloat16), scale)
    with caplog.at_level(logging.WARNING):
        survival = update_survival(tuned, LORA)
    assert survival == pytest.approx(survival_by_hand(tuned, torch.bfloat16), abs=2e-3)
    assert ("survive merging into bfloat16 weights. Set finetune.merge_dtype=float32" in caplog.text) == (
        survival < 0.95
    )
    assert update_survival(tuned, dataclasses.replace(LORA, merge_dtype="float32")) == pytest.approx(1.0, abs=1e-3)


def test_nothing_is_lost_of_no_update(tiny_llama):
    assert update_survival(with_adapters(tiny_llama(), 0.0), LORA) == 1.0


@pytest.mark.filterwarnings("ignore:.*Merge lora module.*")
def test_an_adapter_of_bfloat16_weights_is_evaluated_unmerged(tiny_llama, rows, tmp_path):
    def start():
        return tiny_llama(dtype=torch.bfloat16)

    account = finetune(start(), rows, 1, LORA, tmp_path)
    assert 0.0 <= account["update_survival"] < 0.95
    evaluated = load_finetuned(start(), LORA, tmp_path)
    assert hasattr(evaluated, "peft_config") and evaluated.base_model.model.dtype == torch.bfloat16
    saved = merge_for_checkpoint(evaluated, LORA)
    assert not hasattr(saved, "peft_config") and saved.dtype == torch.bfloat16
    wide = dataclasses.replace(LORA, merge_dtype="float32")
    merged = load_finetuned(start(), wide, tmp_path)
    assert not hasattr(merged, "peft_config") and merged.dtype == torch.float32
    base = dict(start().named_parameters())
    changed = sum(int((new != base[name].float()).sum()) for name, new in merged.named_parameters() if "_proj" in name)
    lost = sum(int((new != base[name]).sum()) for name, new in saved.named_parameters() if "_proj" in name)
    assert lost < 0.5 * changed  # of the checkpoint in bfloat16, most entries are the old ones


def test_float32_adapters_are_merged_as_ever(tiny_llama, rows, tmp_path):
    account = finetune(tiny_llama(), rows, 1, LORA, tmp_path)
    assert account["update_survival"] == pytest.approx(1.0, abs=1e-3) and account["precision"] == "float32"
    merged = load_finetuned(tiny_llama(), LORA, tmp_path)
    assert not hasattr(merged, "peft_config") and merge_for_checkpoint(merged, LORA) is merged


def test_a_result_that_is_there_is_returned(tiny_llama, rows, tmp_path, monkeypatch):
    """A kill between the end of training and the cache's rename must not throw the training away."""
    first = finetune(tiny_llama(), rows, 1, LORA, tmp_path)
    monkeypatch.setattr(
        "gradpruner.finetune.run._FinetuneTrainer", lambda *args, **kwargs: pytest.fail("trained again")
    )
    assert finetune(tiny_llama(), rows, 1, LORA, tmp_path) == first


# Memory by the estimator


def estimate(model, precision, dtype=torch.bfloat16, **settings):
    return estimate_training_memory(model.config, 16, 64, 8, dtype, precision=precision, accumulate=True, **settings)


def test_bytes_per_parameter(tiny_llama):
    model = tiny_llama(hidden_size=64, intermediate_size=256)
    count = sum(parameter.numel() for parameter in model.parameters())
    for precision, weight, gradient, moments in [
        ("float32", 4, 4, 8),
        ("bf16_mixed", 4, 4, 8),
        ("bf16_stochastic", 2, 2, 2 * (1 + 4 / 256)),
    ]:
        found = estimate(model, precision)
        assert (found.weights, found.gradients) == (weight * count, gradient * count)
        assert found.moments == pytest.approx(moments * count, rel=1e-3)


def test_mixed_precision_saves_activations(tiny_llama):
    model = tiny_llama(hidden_size=64, intermediate_size=256)
    full, mixed = (estimate(model, precision).activations for precision in ("float32", "bf16_mixed"))
    assert 0.4 * full < mixed < 0.9 * full


def test_adapters_are_float32_whatever_the_precision(tiny_llama):
    model = tiny_llama()
    assert estimate(model, "float32", lora_rank=4) == estimate(model, None, lora_rank=4)
