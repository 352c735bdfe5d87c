"""Runs on 1, 2 and 3 gloo processes: the same plan, losses and predictions; failures that end all; resume."""

import json
import math
import os
import time
import warnings

import pytest
import torch
from safetensors.torch import load_file

from gradpruner import processes
from gradpruner.encoding import TrainingRow
from gradpruner.evaluate.base import JOURNAL_FILE, PREDICTIONS_FILE, predict_all
from gradpruner.finetune.micro_batch import settle_micro_batch
from gradpruner.finetune.order import make_sampler, num_blank_rows
from gradpruner.finetune.parallel import check_layout, parallel_arguments
from gradpruner.finetune.run import finetune
from gradpruner.finetune.spec import TrainingSpec
from gradpruner.importance import split_batch
from gradpruner.models.memory import estimate_training_memory
from tests import several_processes
from tests.evaluate.test_predictions import QUESTIONS, Echo

COUNTS = (1, 2, 3)


def run(job, folder, count, seconds=300):
    """Runs a job on several processes; returns exit codes and the seconds since the first one ended."""
    started, _store = several_processes.start(job, folder, count)
    deadline, first_end = time.monotonic() + seconds, math.inf
    while any(process.is_alive() for process in started) and time.monotonic() < deadline:
        if not all(process.is_alive() for process in started):
            first_end = min(first_end, time.monotonic())
        time.sleep(0.05)
    hanging = [process for process in started if process.is_alive()]
    for process in hanging:
        process.kill()
    assert not hanging
    return [process.exitcode for process in started], time.monotonic() - first_end


def run_for_each_count(job, tmp_path_factory, counts=COUNTS, again_after=()):
    """Runs a job on so many processes, one after the other; returns the folders that it wrote to.

    If a process of a job ends by one of the signals `again_after`, the job runs once more, in another folder.
    """
    made = {}
    for count in counts:
        made[count] = tmp_path_factory.mktemp(f"{job.__name__}{count}")
        codes, _ = run(job, made[count], count)
        if {-signal for signal in again_after}.intersection(codes):
            warnings.warn(f"{job.__name__} ended with {codes} on {count} processes and runs once more", stacklevel=2)
            made[count] = tmp_path_factory.mktemp(f"{job.__name__}{count}-again")
            codes, _ = run(job, made[count], count)
        assert codes == [0] * count
    return made


def read_results(folders):
    return {count: json.loads((folder / "results.json").read_text()) for count, folder in folders.items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return run_for_each_count(several_processes.all_jobs, tmp_path_factory)


@pytest.fixture(scope="module")
def results(folders):
    return read_results(folders)


@pytest.mark.parametrize("count", COUNTS[1:])
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_gradients_of_a_step_equal_those_of_one_process(folders, mode, count):
    expected, own = (load_file(folders[each] / f"gradients-{mode}.safetensors") for each in (1, count))
    assert own.keys() == expected.keys() and max(value.abs().max() for value in own.values()) > 0.1
    for name, value in own.items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("count", COUNTS[1:])
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_fine_tune_has_the_same_steps_losses_and_tokens(results, mode, count):
    expected, own = (results[each]["training"][mode] for each in (1, count))
    assert own["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    assert own["steps"] == expected["steps"] == 6  # 26 rows in batches of 12, twice: the last batch of an epoch has 2
    assert own["tokens"] == expected["tokens"] == 2 * sum(len(row.input_ids) for row in several_processes.ROWS)


@pytest.mark.parametrize("count", COUNTS[1:])
def test_distillation_has_the_same_losses(results, count):
    assert results[count]["distillation"] == pytest.approx(results[1]["distillation"], abs=1e-5)


@pytest.mark.parametrize("count", COUNTS[1:])
def test_importance_is_the_same(results, count):
    expected, own = (results[each]["importance"] for each in (1, count))
    assert own["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    torch.testing.assert_close(torch.tensor(own["energies"]), torch.tensor(expected["energies"]), atol=1e-7, rtol=1e-3)


@pytest.mark.parametrize("count", COUNTS[1:])
@pytest.mark.parametrize("job", ["pipeline", "tuned_first"])
def test_a_run_has_the_same_plan_losses_predictions_and_keys(results, job, count):
    expected, own = (results[each][job] for each in (1, count))
    assert own["plan"][0] == expected["plan"][0] and own["plan"][1] == pytest.approx(expected["plan"][1], rel=1e-4)
    assert own["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    assert own["stage_ids"] == expected["stage_ids"]
    assert [row["id"] for row in own["predictions"]] == [row["id"] for row in expected["predictions"]]
    for row, other in zip(own["predictions"], expected["predictions"], strict=True):
        assert row["log_likelihoods"] == pytest.approx(other["log_likelihoods"], abs=1e-4)


@pytest.mark.parametrize("count", COUNTS[1:])
@pytest.mark.parametrize("mode", ["lora", "full", "distil"])
def test_a_divided_model_has_the_same_gradients_and_is_put_together_again(results, mode, count):
    found = results[count]["sharded"][mode]
    assert found["gradients"] < 1e-4 and found["weights"] == 0.0 and found.get("energies", 0.0) < 1e-3


@pytest.mark.parametrize("count", COUNTS[1:])
def test_any_process_can_make_a_model_that_is_not_downloaded(results, count):
    assert results[count]["made_by_another"] == results[1]["made_by_another"] != 0


def record(folder):
    return json.loads((folder / "run" / "record.json").read_text())


def outputs(folder, ranks):
    return [json.loads((folder / f"output{rank}.json").read_text())[2] for rank in ranks]


def test_kill_9_of_a_process_ends_all_and_more_processes_resume(tmp_path):
    codes, seconds = run(several_processes.killed, tmp_path / "killed", 3)
    assert codes[1] == -9 and codes[0] == codes[2] == 1 and seconds < 60
    [told] = [text for text in outputs(tmp_path / "killed", (0, 2)) if "Error" in text]
    assert told.count("Error") == 1 and "Another process of the run ended without a message" in told
    assert "killed" in record(tmp_path / "killed")["error"] and "Traceback" not in told
    checkpoints = list((tmp_path / "killed/cache/stages/finetune").glob("*.partial/checkpoints/*/complete.json"))
    assert [file.parent.name for file in checkpoints] == ["checkpoint-2"]
    assert run(several_processes.run_command, tmp_path / "killed", 2)[0] == [0, 0]
    assert run(several_processes.run_command, tmp_path / "whole", 1)[0] == [0]
    resumed, whole = record(tmp_path / "killed"), record(tmp_path / "whole")
    assert "Resuming fine-tuning" in outputs(tmp_path / "killed", (0,))[0]
    assert resumed["status"] == "finished" and resumed["pruning"]["pruned_layers"] == whole["pruning"]["pruned_layers"]
    assert resumed["finetune"]["steps"] == whole["finetune"]["steps"] == 6
    assert resumed["finetune"]["tokens"] == whole["finetune"]["tokens"]
    assert resumed["finetune"]["loss"] == pytest.approx(whole["finetune"]["loss"], abs=1e-5)
    assert resumed["metrics"]["answer_nll"] == pytest.approx(whole["metrics"]["answer_nll"], abs=1e-4)


def test_nan_on_one_process_ends_all_with_one_message(tmp_path):
    codes, seconds = run(several_processes.diverging, tmp_path, 2)
    assert codes == [1, 1] and seconds < 60
    told = "".join(outputs(tmp_path, (0, 1)))
    assert told.count("Error") == 1 and "Error: The loss is" in told and "Traceback" not in told
    assert "The loss is" in record(tmp_path)["error"]


# ---- without processes: what the environment says ----


@pytest.fixture
def several(monkeypatch):
    """Pretends that this is one of several processes; nothing that it waits for comes."""

    def pretend(count, rank=0):
        monkeypatch.setattr(processes, "count", lambda: count)
        monkeypatch.setattr(processes, "rank", lambda: rank)

    return pretend


@pytest.mark.parametrize(
    ("count", "changes", "match"),
    [
        (3, {}, r"multiple of micro_batch_size times processes, got 64, 8 and 3 processes. Change finetune.batch_size"),
        (2, {"batch_size": 8}, r"got 8, 8 and 2 processes"),
        (3, {"micro_batch_size": "auto"}, r"got 64, auto and 3 processes"),
    ],
)
def test_a_batch_that_cannot_be_divided_is_refused(several, tmp_path, count, changes, match):
    several(count)
    with pytest.raises(ValueError, match=match):
        finetune(None, [], 1, TrainingSpec(**changes), tmp_path)


def test_accumulation_is_counted_per_process(several):
    assert TrainingSpec(batch_size=24, micro_batch_size=2).accumulation == 12
    several(3)
    assert TrainingSpec(batch_size=24, micro_batch_size=2).accumulation == 4


def test_auto_divides_the_rows_of_a_process(several):
    several(3)
    spec = TrainingSpec(batch_size=24, micro_batch_size="auto")
    settled = settle_micro_batch(spec, lambda tried: 0, 1, torch.device("cpu"))
    assert settled.micro_batch_size == 8 and settled.accumulation == 1


def test_blank_rows_make_micro_batches_equal(several):
    spec, lengths = TrainingSpec(batch_size=12, micro_batch_size=2), list(range(1, 14))
    alone = list(make_sampler(spec, lengths, 0))
    several(3)
    assert num_blank_rows(spec, 12) == 0 and num_blank_rows(spec, 13) == 5
    assert list(make_sampler(spec, lengths, 0)) == [*alone, *[13] * 5]


def test_a_batch_is_split_by_rows():
    batch = {name: torch.arange(4).reshape(2, 2) for name in ("input_ids", "labels")}
    pieces = split_batch(batch, 3)
    assert [piece["input_ids"].tolist() for piece in pieces] == [[[0, 1]], [[2, 3]], [[0, 1]]]
    assert [piece["labels"].tolist() for piece in pieces] == [[[0, 1]], [[2, 3]], [[-100, -100]]]


def test_a_launcher_without_ranks_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        ValueError, match=r"needs a launcher, got WORLD_SIZE=2 without RANK and .*Start it with torchrun"
    ):
        processes.start()


def test_a_process_without_a_gpu_of_its_own_is_refused(monkeypatch):
    for name, value in {
        "WORLD_SIZE": "4",
        "RANK": "3",
        "LOCAL_RANK": "3",
        "MASTER_ADDR": "",
        "MASTER_PORT": "",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"GPU of its own, got LOCAL_RANK=3 and 2 visible GPUs. Start at most 2"):
        processes.start()


def test_folders_that_differ_are_refused(several, monkeypatch, tmp_path):
    several(2)
    monkeypatch.setattr(processes, "gather", lambda value: [value, "/elsewhere"])
    rows = [TrainingRow((1, 2), 1)] * 4
    with pytest.raises(ValueError, match=r"must be given the same folder, got /elsewhere, .*Choose it on rank 0"):
        finetune(None, rows, 1, TrainingSpec(batch_size=4, micro_batch_size=2), tmp_path)


def test_a_process_of_its_own_inherits_no_rank(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert not {"WORLD_SIZE", "RANK"} & set(processes.alone()) and processes.alone()["PATH"] == os.environ["PATH"]


def test_one_process_starts_nothing():
    processes.start()
    assert not torch.distributed.is_initialized() and processes.gather(1) == [1] and processes.broadcast(2) == 2


@pytest.mark.parametrize("count", [1, 2, 4])
def test_journals_of_other_numbers_of_processes_are_merged(several, monkeypatch, tmp_path, count):
    expected = predict_all(list, Echo(2), None, QUESTIONS, tmp_path).read_text()
    lines = {json.loads(line)["id"]: line.decode() for line in expected.encode().splitlines(keepends=True)}
    several(count)
    (tmp_path / JOURNAL_FILE).write_text(lines["1"] + lines["3"] + lines["2"] + lines["0"] + lines["5"])  # torn
    (tmp_path / JOURNAL_FILE.replace(".partial", ".partial2")).write_text(lines["5"] + lines["6"] + lines["4"])
    seen = []
    monkeypatch.setattr(processes, "wait_for_all", lambda: None)
    assert predict_all(lambda: seen, Echo(2), None, QUESTIONS, tmp_path).read_text() == expected
    assert not seen and [path.name for path in tmp_path.iterdir()] == [PREDICTIONS_FILE]


def test_fsdp_divides_by_decoder_layers(several, tiny_llama, tmp_path):
    several(2)
    spec = TrainingSpec(mode="full", parallel="fsdp", gradient_checkpointing=True)
    arguments = parallel_arguments(tiny_llama(), spec)
    config = arguments["fsdp_config"]
    assert arguments["fsdp"] is True and config["version"] == 2 and config["state_dict_type"] == "SHARDED_STATE_DICT"
    assert config["transformer_layer_cls_to_wrap"] == ["LlamaDecoderLayer"] and "activation_checkpointing" not in config


@pytest.mark.parametrize("precision", ["float32", "bf16_mixed"])
def test_deepspeed_keeps_float32_weights(several, tiny_llama, precision):
    several(2)
    spec = TrainingSpec(mode="full", parallel="deepspeed_zero3")
    config = parallel_arguments(tiny_llama(), spec, precision)["deepspeed"]
    assert config["zero_optimization"]["stage"] == 3 and not config["bf16"]["enabled"]
    assert config["torch_autocast"]["enabled"] == (precision == "bf16_mixed")
    assert config["train_micro_batch_size_per_gpu"] == config["gradient_accumulation_steps"] == "auto"


@pytest.mark.parametrize(
    ("layout", "parallel", "count", "match"),
    [
        (
            "deepspeed_zero3 on 2 processes",
            "ddp",
            1,
            r"got ddp and a checkpoint of deepspeed_zero3 on 2 processes: .*-2\.",
        ),
        (
            "deepspeed_zero3 on 2 processes",
            "deepspeed_zero3",
            3,
            r"got deepspeed_zero3 on 3 processes and a checkpoint",
        ),
        ("ddp", "fsdp", 2, r"got fsdp and a checkpoint of ddp: .*Start it as before, or delete the checkpoint"),
    ],
)
def test_a_checkpoint_that_is_divided_otherwise_is_refused(several, layout, parallel, count, match):
    several(count)
    with pytest.raises(ValueError, match=match):
        check_layout(TrainingSpec(parallel=parallel), "checkpoint-2", layout)


@pytest.mark.parametrize("layout", ["ddp", None])  # earlier checkpoints do not say
def test_ddp_resumes_on_any_number_of_processes(several, layout):
    several(3)
    check_layout(TrainingSpec(), "checkpoint-2", layout)
    check_layout(TrainingSpec(parallel="fsdp"), None, None)


def test_one_process_trains_with_the_arguments_it_always_had(tiny_llama):
    assert parallel_arguments(tiny_llama(), TrainingSpec()) == {}


def test_the_memory_of_a_divided_model_shrinks_with_the_processes(tiny_llama):
    def estimate(shards):
        return estimate_training_memory(
            tiny_llama().config, 1, 8, 4, torch.float32, precision="float32", accumulate=True, shards=shards
        )

    one, four = estimate(1), estimate(4)
    assert four.moments == one.moments / 4 and four.gradients == one.gradients / 4
    assert one.weights / 4 < four.weights < one.weights and four.activations == one.activations
    assert estimate(10_000).total == one.weights  # before they are divided
