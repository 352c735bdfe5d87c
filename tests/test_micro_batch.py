"""`finetune.micro_batch_size=auto` takes the most rows that fit, and changes nothing else."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainerCallback

from gradpruner.encoding import TrainingRow
from gradpruner.finetune import micro_batch
from gradpruner.finetune.micro_batch import settle_for, settle_micro_batch, training_memory
from gradpruner.finetune.result import load_finetuned
from gradpruner.finetune.run import finetune
from gradpruner.finetune.spec import TrainingSpec

CPU, GPU = torch.device("cpu"), torch.device("cuda")
ROWS = [TrainingRow((*range(2, 6 + index % 9), 60 + index % 7, 1), 2) for index in range(24)]
SPEC = TrainingSpec(mode="full", learning_rate=1e-2, batch_size=8, micro_batch_size="auto", epochs=2, save_steps=1)


@given(st.integers(1, 96), st.integers(0, 10_000), st.integers(1, 300), st.sampled_from([CPU, GPU]))
def test_it_is_the_largest_divisor_that_fits(batch_size, free, row_bytes, device):
    auto = TrainingSpec(batch_size=batch_size, micro_batch_size="auto")
    chosen = settle_micro_batch(auto, lambda spec: 100 + row_bytes * spec.micro_batch_size, free, device)
    usable = free * (0.9 if device == GPU else 0.5)
    fits = [n for n in range(1, batch_size + 1) if batch_size % n == 0 and 100 + row_bytes * n <= usable]
    assert chosen == dataclasses.replace(auto, micro_batch_size=max(fits, default=1))


def test_a_number_is_unchanged():
    spec = TrainingSpec(batch_size=8, micro_batch_size=4)
    assert settle_micro_batch(spec, lambda spec: pytest.fail("estimated"), 0, CPU) is spec


@given(st.integers(1, 64), st.integers(1, 500), st.floats(0.1, 5))
def test_steps_do_not_depend_on_it(batch_size, num_rows, epochs):
    auto = TrainingSpec(batch_size=batch_size, micro_batch_size="auto", epochs=epochs)
    sizes = [n for n in range(1, batch_size + 1) if batch_size % n == 0]
    assert {auto.num_steps(num_rows)} == {
        dataclasses.replace(auto, micro_batch_size=n).num_steps(num_rows) for n in sizes
    }


@pytest.fixture
def memory(monkeypatch, tiny_llama):
    """Returns `memory(rows)`, which pretends that micro batches of so many rows fit just so."""
    model = tiny_llama()
    held = sum(parameter.nbytes for parameter in model.parameters())

    def memory(num_rows):
        spec = dataclasses.replace(SPEC, micro_batch_size=num_rows)
        needed = training_memory(spec, ROWS, model.config, torch.float32, "sdpa").total
        free = lambda device: round(needed / micro_batch.USABLE["cpu"]) - held + 1  # noqa: E731
        monkeypatch.setattr(micro_batch, "free_bytes", free)

    return memory


@pytest.mark.parametrize("num_rows", [1, 2, 4])
def test_weights_that_are_loaded_count_as_free(memory, tiny_llama, num_rows):
    memory(num_rows)
    assert settle_for(tiny_llama(), SPEC, ROWS).micro_batch_size == num_rows


def test_training_is_that_of_any_number(memory, tiny_llama, tmp_path):
    found = {}
    for size in ("auto", 2, 8):
        memory(2)
        spec = dataclasses.replace(SPEC, micro_batch_size=size)
        account = finetune(tiny_llama(), ROWS, 1, spec, tmp_path / str(size))
        found[size] = account, load_finetuned(tiny_llama(), spec, tmp_path / str(size)).state_dict()
    assert [account["micro_batch_size"] for account, _ in found.values()] == [2, 2, 8]
    for size, equal in ((2, {"atol": 0, "rtol": 0}), (8, {"atol": 1e-4, "rtol": 1e-3})):
        for name, value in found["auto"][1].items():
            torch.testing.assert_close(value, found[size][1][name], **equal)
        assert found[size][0]["steps"] == found["auto"][0]["steps"] == SPEC.num_steps(len(ROWS)) == 6


class KillAt(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_a_run_that_goes_on_keeps_its_number(memory, tiny_llama, tmp_path):
    memory(4)
    whole = finetune(tiny_llama(), ROWS, 1, SPEC, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        finetune(tiny_llama(), ROWS, 1, SPEC, tmp_path / "killed", callbacks=[KillAt()])
    memory(1)
    resumed = finetune(tiny_llama(), ROWS, 1, SPEC, tmp_path / "killed")
    assert whole["micro_batch_size"] == resumed["micro_batch_size"] == 4
    assert whole["history"] == resumed["history"]


@pytest.mark.parametrize("size", ["many", 0, -2])
def test_other_words_and_numbers_are_refused(size):
    with pytest.raises(ValueError, match=rf"must be a number of rows above 0, or auto, got {size!r}\. Set finetune\."):
        TrainingSpec(micro_batch_size=size)
