"""`finetune.tune_dense_first`: the method compresses the dense model after that model's own fine-tune on the task."""

import dataclasses

import pytest
import torch
from test_repair import make_pipeline  # noqa: F401

from baselines.last import Last
from baselines.llm_pruner import LlmPruner
from baselines.small_dense import SmallDense
from gradpruner.dense import Dense
from gradpruner.finetune.spec import TrainingSpec
from gradpruner.grad_pruner import GradPruner
from gradpruner.method import Recovery
from gradpruner.models.spec import ModelSpec

IMPORTANCE = {"num_pruned_layers": 2, "steps": 2, "batch_size": 4, "learning_rate": 1e-2}
METHODS = [
    pytest.param(Dense(), marks=pytest.mark.slow),
    pytest.param(Last(num_pruned_layers=2, repair="judged"), marks=pytest.mark.slow),
    GradPruner(**IMPORTANCE, merge_count=1, repair="least_squares"),
    LlmPruner(sparsity=0.4, num_rows=4),
]


def changed(pipeline, **changes):
    return dataclasses.replace(pipeline, training=dataclasses.replace(pipeline.training, **changes))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_the_method_sees_the_tuned_model(method, make_pipeline, tmp_path):  # noqa: F811
    """The same as to fine-tune the dense model, save it, and give the saved model to the method."""
    dense = make_pipeline(Dense())
    dense.run()
    folder = tmp_path / "tuned"
    dense.load_result().save_pretrained(folder)
    dense.tokenizer.save_pretrained(folder)
    by_hand = dataclasses.replace(make_pipeline(method), model=ModelSpec(str(folder)))
    expected = by_hand.run()
    pipeline = changed(make_pipeline(method), tune_dense_first=True)
    before = pipeline.stages()
    assert before["tuned_dense"] and not before["measure"] and not before["finetune"]  # a dense run made it
    found = pipeline.run()
    assert found.plan == expected.plan and found.report.get("losses") == expected.report.get("losses")
    assert found.metrics == expected.metrics and found.metrics_before == expected.metrics_before
    plain = make_pipeline(method).run()
    assert found.metrics_before != plain.metrics_before and found.metrics != plain.metrics
    for own, theirs in zip(pipeline.load_result().parameters(), by_hand.load_result().parameters(), strict=True):
        assert torch.equal(own, theirs)


def test_its_cost_counts_and_its_stages_are_found_again(make_pipeline):  # noqa: F811
    dense = make_pipeline(Dense()).run()
    method = Last(num_pruned_layers=2)
    first = changed(make_pipeline(method), tune_dense_first=True).run()
    assert first.compression["seconds"] > dense.training["train_seconds"]
    assert make_pipeline(method).run().compression["seconds"] < first.compression["seconds"]
    again = changed(make_pipeline(method), tune_dense_first=True)
    assert all(again.stages().values()) and again.run() == first
    both = changed(make_pipeline(method), tune_dense_first=True, loss="distill", tuned_teacher=0.5)
    assert both.stages()["measure"] and both.stage_ids()["tuned_dense"] == again.stage_ids()["tuned_dense"]
    assert [stage.label for stage in again.planned()][:2] == ["tuned dense", "measure"]


def test_what_cannot_start_from_the_tuned_model(make_pipeline):  # noqa: F811
    small = make_pipeline(SmallDense(path="random:llama", config={"num_hidden_layers": 2}))
    match = r"is what the method compresses .*, got method=small_dense, which starts from .*\. Set finetune\.tune_dense"
    with pytest.raises(ValueError, match=match):
        changed(small, tune_dense_first=True).check()
    with pytest.raises(ValueError, match=r"starts from the pruned model, got tune_dense_first=true\. Leave it out"):
        Recovery(TrainingSpec(tune_dense_first=True))
