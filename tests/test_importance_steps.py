"""Too few importance steps are warned about, with what to change."""

import logging

import pytest
import torch

from gradpruner import GradPruner
from gradpruner.grad_pruner import step_warnings


@pytest.mark.parametrize(
    ("steps", "estimate", "with_gradient"),
    [
        (2, "product", 1),  # LoRA's B starts at zero, so the first product of Eq. 2 is zero
        (4, "product", 3),
        (2, "tangent", 2),
        (4, "tangent", 4),
    ],
)
def test_few_steps_are_warned_about(tiny_llama, make_batches, caplog, steps, estimate, with_gradient):
    method = GradPruner(num_pruned_layers=2, merge_count=1, steps=steps, batch_size=2, gradient_estimate=estimate)
    with caplog.at_level(logging.WARNING):
        report = method.compress(tiny_llama(), make_batches(steps)).report
    [warning] = [text for text in report["warnings"] if "rank the layers" in text]
    assert warning == (
        f"Only {steps} importance steps rank the layers, {with_gradient} of them with a gradient: below 5, a few rows "
        "may decide. Raise method.steps or method.fraction, or lower finetune.batch_size, which gives method.fraction "
        "more steps."
    )
    assert warning in caplog.text


@pytest.mark.parametrize("steps", [5, 6])
def test_enough_steps_are_not(tiny_llama, make_batches, steps):
    method = GradPruner(num_pruned_layers=2, merge_count=1, steps=steps, batch_size=2)
    report = method.compress(tiny_llama(), make_batches(steps)).report
    assert not [text for text in report["warnings"] if "rank the layers" in text]


def test_the_remedy_is_one():
    """Lower `finetune.batch_size` or a larger fraction gives `fraction` enough steps."""
    epochs, rows = 3, 500  # PubMedQA
    steps = {
        (batch_size, fraction): GradPruner(sparsity=0.4, merge_count=1, steps=None, fraction=fraction)
        .resolve(6, -(-rows // batch_size) * epochs)
        .steps
        for batch_size, fraction in [(64, 0.01), (4, 0.02), (64, 0.25)]
    }
    assert steps == {(64, 0.01): 2, (4, 0.02): 8, (64, 0.25): 6}
    warned = {count: bool(step_warnings(torch.ones(count, 6))) for count in steps.values()}
    assert warned == {2: True, 8: False, 6: False}
