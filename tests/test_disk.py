"""What a run asks of the disk, against the bytes that tiny runs really write."""

import dataclasses
import shutil
from pathlib import Path

import pytest
from transformers import TrainerCallback

from baselines.minitron import Minitron
from baselines.sat import Sat
from gradpruner.checkpoints.checkpoint import save_checkpoint
from gradpruner.dense import Dense
from gradpruner.finetune.spec import TrainingSpec
from gradpruner.grad_pruner import GradPruner
from gradpruner.models.counting import count_model
from gradpruner.models.offline_configs import OfflineModelSpec
from gradpruner.models.spec import ModelSpec
from gradpruner.pipeline import disk
from gradpruner.pipeline.disk import (
    SMALL_BYTES,
    Writes,
    checkpoint_bytes,
    factor_bytes,
    needed_bytes,
    repair_bytes,
    result_bytes,
    saved_model_bytes,
    stage_writes,
    training_writes,
)

# Wide enough that the names in a file's header are below 10 % of its tensors.
CONFIG = {
    "num_hidden_layers": 6,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
METHOD = GradPruner(sparsity=0.5, merge_count=1, steps=3, batch_size=2)
LORA = TrainingSpec(learning_rate=1e-3, batch_size=4, micro_batch_size=2, epochs=4, save_steps=2)  # 8 steps
FULL = dataclasses.replace(LORA, mode="full")
GIB = 2**30


@pytest.fixture
def make(make_pipeline):
    """Returns `make(method, training, **fields)`, which makes a run."""
    return lambda method=METHOD, training=LORA, **fields: make_pipeline(CONFIG, method, training, **fields)


@pytest.fixture
def free(monkeypatch):
    """Returns `free(num_bytes)`, which sets the free space of the disk."""
    usage = shutil.disk_usage("/")
    return lambda num_bytes: monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage._replace(free=num_bytes))


def size(folder, pattern="**/*"):
    return sum(file.stat().st_size for file in Path(folder).glob(pattern) if file.is_file())


def about(num_bytes):
    return pytest.approx(num_bytes, rel=0.1)


def folder_of(pipeline, stage):
    [folder] = [path for path in (pipeline.cache_dir / "stages" / stage).iterdir() if path.is_dir()]
    return folder


@pytest.mark.parametrize("estimate", ["product", "tangent"])
def test_factors(make, estimate):
    method = dataclasses.replace(METHOD, gradient_estimate=estimate, lora_rank=4)
    pipeline = make(method)
    pipeline.run()
    counted = factor_bytes(count_model(pipeline.config), 4, 3, estimate)
    assert size(folder_of(pipeline, "measure"), "step-*.safetensors") == about(counted)
    # q, o: 64 + 64; k, v: 64 + 32; gate, up, down: 64 + 96; rank 4 or 8; float32; 3 steps of 6 layers
    assert counted == (8 if estimate == "tangent" else 4) * 4 * 3 * 6 * (2 * 128 + 2 * 96 + 3 * 160)


@pytest.mark.parametrize("training", [dataclasses.replace(LORA, lora_rank=64), FULL])
def test_result_and_checkpoints_of_a_fine_tune(make, training, monkeypatch):
    remove = shutil.rmtree
    monkeypatch.setattr(  # keeps all checkpoints
        "gradpruner.finetune.run.shutil.rmtree",
        lambda path, **settings: None if Path(path).name.startswith("checkpoint") else remove(path, **settings),
    )
    pipeline = make(training=training)
    pipeline.run()
    counts, folder = count_model(pipeline.config, pipeline.shape), folder_of(pipeline, "finetune")
    result = size(folder, "adapter/adapter_model.safetensors") + size(folder, "model.safetensors")
    assert result == about(result_bytes(counts, training))
    checkpoints = sorted((folder / "checkpoints").iterdir())
    assert [checkpoint.name for checkpoint in checkpoints] == [f"checkpoint-{step}" for step in (2, 4, 6, 8)]
    for checkpoint in checkpoints:
        # The rest (state of the Trainer and of random numbers) does not grow with the model.
        written = size(checkpoint, "*model.safetensors") + size(checkpoint, "optimizer.pt")
        assert written == about(checkpoint_bytes(counts, training))


@pytest.mark.parametrize(
    ("num_rows", "save_steps", "during", "after"),
    [(8, 2, 3, 2), (8, 3, 3, 2), (8, 5, 2, 2), (8, 8, 1, 1), (8, 50, 1, 1), (80, 50, 2, 2)],
)
def test_checkpoints_that_exist_at_once(make, num_rows, save_steps, during, after):
    pipeline = make()
    counts = count_model(pipeline.config, pipeline.shape)
    training = dataclasses.replace(FULL, save_steps=save_steps)  # 8 or 80 steps
    result, checkpoint = result_bytes(counts, training), checkpoint_bytes(counts, training)
    assert checkpoint == 3 * result == 12 * counts.num_parameters
    expected = max(during * checkpoint, after * checkpoint + result)
    assert training_writes(counts, training, num_rows) == Writes(result + SMALL_BYTES, expected + SMALL_BYTES)


def test_a_fine_tune_never_has_more_on_the_disk(make, monkeypatch):
    pipeline, sizes = make(training=FULL), []
    written = stage_writes(pipeline)["finetune"]

    class Watch(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):  # when older checkpoints are deleted
            sizes.append(size(Path(args.output_dir)))

    monkeypatch.setattr(GradPruner, "callbacks", lambda self: [Watch()])
    pipeline.run()
    assert len(sizes) == 4 and written.peak / 2 < max(sizes) <= written.peak


def test_repaired_sublayers(make):
    method = GradPruner(
        num_pruned_layers=3, merge_count=0, merge_rule="none", repair="least_squares", steps=2, batch_size=2
    )
    pipeline = make(method)
    pipeline.run()
    counted = repair_bytes(pipeline.config, 3, pipeline.base_model.torch_dtype)
    assert 0 < size(folder_of(pipeline, "repair"), "repair.safetensors") <= 1.1 * counted
    assert counted == 3 * 64 * (96 + 1) * 4


@pytest.mark.parametrize("training", [FULL, dataclasses.replace(LORA, merge_adapter=False)])
def test_the_saved_model(make, training, tmp_path):
    pipeline = make(training=training)
    outcome = pipeline.run()
    save_checkpoint(pipeline.load_result(), pipeline.tokenizer, outcome.plan, tmp_path / "saved", "tiny")
    assert size(tmp_path / "saved", "**/*.safetensors") == about(saved_model_bytes(pipeline))


def test_all_that_a_run_writes(make):
    pipeline = make(training=FULL)
    pipeline.run()
    for stage, written in stage_writes(pipeline).items():
        assert size(folder_of(pipeline, stage)) <= written.result, stage


# ---- what is still to be written ----


def test_stages_add_up(tmp_path):
    writes = {"a": Writes(10, 15), "b": Writes(2, 30), "c": Writes(5, 7)}
    folders = {name: tmp_path / name for name in writes}
    assert needed_bytes(writes, folders) == 10 + 30
    (tmp_path / "a").mkdir()
    assert needed_bytes(writes, folders) == 30
    (tmp_path / "b.partial" / "checkpoints").mkdir(parents=True)
    (tmp_path / "b.partial" / "checkpoints" / "weights").write_bytes(b"x" * 12)
    assert needed_bytes(writes, folders) == 30 - 12
    (tmp_path / "b.partial").rename(tmp_path / "b")
    assert needed_bytes(writes, folders) == 7
    (tmp_path / "c").mkdir()
    assert needed_bytes(writes, folders) == 0


def test_a_full_disk_is_refused_before_weights(make, free, monkeypatch):
    monkeypatch.setattr(ModelSpec, "load", lambda *args: pytest.fail("a weight was loaded"))
    free(1000)
    with pytest.raises(ValueError, match=r"Not enough disk space in .*needed, 0\.0 GB free\. Free some, or set cache_"):
        make().run()
    make().check(resources=False)


def test_a_cached_run_needs_nothing(make, free):
    make(training=FULL).run()
    free(0)
    make(training=FULL).run()


def test_an_interrupted_run_counts_what_it_left(make, free, monkeypatch):
    class Kill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 7:
                raise KeyboardInterrupt

    pipeline = make(training=FULL)
    needed = needed_bytes(stage_writes(pipeline), pipeline._folders())
    monkeypatch.setattr(GradPruner, "callbacks", lambda self: [Kill()])
    with pytest.raises(KeyboardInterrupt):
        make(training=FULL).run()
    monkeypatch.undo()
    written = size(pipeline.cache_dir / "stages")
    rest = needed_bytes(stage_writes(pipeline), pipeline._folders())
    assert rest == pytest.approx(needed - written, abs=2 * SMALL_BYTES) and rest < needed / 2


def test_the_saved_model_is_counted_on_its_disk(make, free, tmp_path):
    pipeline = make(training=FULL)
    pipeline.run()
    saved = saved_model_bytes(pipeline)
    free(saved - 1)
    with pytest.raises(ValueError, match=r"Not enough disk space in .*cache"):
        pipeline.check(save_to=tmp_path / "not" / "there" / "yet")
    free(saved)
    pipeline.check(save_to=tmp_path / "not" / "there" / "yet")


def test_the_saved_model_on_another_disk(make, free, tmp_path, monkeypatch):
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system")
    pipeline = make(training=FULL)
    pipeline.run()
    free(saved_model_bytes(pipeline) - 1)
    with pytest.raises(ValueError, match=r"Not enough disk space in /dev/shm: .*set output_dir to another disk"):
        pipeline.check(save_to=other / "run" / "checkpoint")


def test_recovery_and_pruning_while_training(make, tmp_path):
    training = {"mode": "full", "batch_size": 4, "micro_batch_size": 2, "epochs": 1}
    method = Minitron(sparsity=0.4, num_rows=4, recover_on="jsonl", recover_training=training)
    pipeline = make(method, recovery_task=make().task)
    counts = count_model(pipeline.config, pipeline.shape)
    assert stage_writes(pipeline)["recover"].result == 4 * counts.num_parameters + SMALL_BYTES
    assert list(stage_writes(pipeline)) == ["measure", "prune", "recover", "finetune", "predict", "evaluate"]
    dense = count_model(pipeline.config).num_parameters
    assert stage_writes(make(Sat(), FULL))["finetune"].result == 4 * dense + SMALL_BYTES


# ---- the paper's scale ----


def test_an_8b_model(make, tmp_path, monkeypatch, tiny_tokenizer):
    monkeypatch.setattr(OfflineModelSpec, "load_tokenizer", lambda self, folder: tiny_tokenizer)
    model = OfflineModelSpec("meta-llama/Llama-3.1-8B", dtype="bfloat16")
    figure2 = dataclasses.replace(METHOD, num_pruned_layers=13, sparsity=None, steps=755)
    writes = stage_writes(make(figure2, model=model))
    assert writes["measure"].result / 1e9 == pytest.approx(63.3, abs=0.1)  # 755 steps of 84 MB
    assert max(written.peak for stage, written in writes.items() if stage != "measure") < GIB
    full = stage_writes(make(Dense(), dataclasses.replace(FULL, precision="bf16_mixed"), model=model))
    assert full["finetune"].result / 1e9 == pytest.approx(32.1, abs=0.1)
    assert full["finetune"].peak / 1e9 == pytest.approx(9 * 32.1, abs=1)  # three checkpoints of weights and two moments
    half = stage_writes(make(Dense(), dataclasses.replace(FULL, precision="bf16_stochastic"), model=model))
    assert half["finetune"].result / 1e9 == pytest.approx(16.1, abs=0.1)
