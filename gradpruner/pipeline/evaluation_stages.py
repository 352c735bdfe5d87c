"""The stages that ask something of a model: its answers, their metrics, and how long it takes. See `stages`."""

import dataclasses
from pathlib import Path

from transformers import PreTrainedModel

from gradpruner.evaluate.base import PREDICTIONS_FILE, predict_all
from gradpruner.evaluate.generate import Generation
from gradpruner.evaluate.vllm_engine import generate_with_vllm
from gradpruner.files import read_jsonl, write_json, write_jsonl
from gradpruner.finetune.result import merge_for_checkpoint
from gradpruner.models.shape import ModelShape, config_shape
from gradpruner.pipeline.code_version import code_version
from gradpruner.pipeline.runner import ModelStage, Stage, StageRunner, libraries
from gradpruner.pipeline.setup import Setup
from gradpruner.pipeline.speed import ROLES, compare, workload_like
from gradpruner.runtime import environment
from gradpruner.tasks import fingerprint

METRICS_FILE = "metrics.json"
SPEED_FILE = "speed.json"


def predict_stage(setup: Setup, runner: StageRunner, weights: ModelStage) -> Stage:
    """What a model answers to the test examples."""
    evaluation = setup.resolved_evaluation

    def compute(directory: Path) -> None:
        encoder = setup.encoder(setup.tested_task)
        predict_all(lambda: runner.model(weights), evaluation, encoder, setup.questions, directory)

    key = {
        "weights": weights.id,
        "examples": fingerprint(setup.test_examples),
        "max_length": setup.tested_task.max_length,
        "chat_template": setup.model.chat_template,
        "evaluation": {"name": evaluation.name, **evaluation.prediction_settings()},
        "code": code_version(predict_stage, type(evaluation)),
        "libraries": libraries(),
    }
    return Stage("predict", key, compute, resumable=True, together=True, needs=(weights,))


def vllm_stage(setup: Setup, runner: StageRunner, weights: ModelStage) -> Stage:
    """What a model answers to the test examples, as `predict_stage`, where vLLM generates the answers."""
    evaluation = setup.resolved_evaluation
    assert isinstance(evaluation, Generation)

    def load_model() -> PreTrainedModel:
        # Taken, although the fine-tune may start from it: vLLM needs the memory.
        return merge_for_checkpoint(runner.take(weights), setup.training)

    def compute(directory: Path) -> None:
        encoder = setup.encoder(setup.tested_task)
        generate_with_vllm(load_model, evaluation, encoder, setup.questions, directory)

    key = {**predict_stage(setup, runner, weights).key, "code": code_version(vllm_stage, type(evaluation))}
    return Stage("predict", key, compute, resumable=True, needs=(weights,))


def evaluate_stage(setup: Setup, runner: StageRunner, predicted: Stage) -> Stage:
    """Metrics of given answers, and what each answer scored."""
    evaluation = setup.resolved_evaluation

    def compute(directory: Path) -> None:
        predictions = read_jsonl(runner.folder(predicted) / PREDICTIONS_FILE)
        measured, rows = evaluation.measure(predictions, setup.test_examples)
        write_jsonl(directory / PREDICTIONS_FILE, rows)
        write_json(directory / METRICS_FILE, measured)

    key = {
        "predictions": predicted.id,
        "evaluation": evaluation.measurement_settings(),
        "code": code_version(evaluate_stage, type(evaluation)),
        "libraries": libraries(),
    }
    return Stage("evaluate", key, compute, needs=(predicted,))


def speed_stage(setup: Setup, shape: ModelShape) -> Stage:
    """Training steps and inference of the dense model and of one of `shape`, timed in turns; all runs alike share it.

    A method that acts while the model trains has training steps unlike another's: those are left out then.
    """
    workload = workload_like(setup.base_model, setup.training, setup.rows)
    roles = ("infer",) if setup.resolved_method.callbacks() else ROLES
    dense, own = (setup.dense_config, config_shape(setup.dense_config)), (setup.config, shape)

    def compute(directory: Path) -> None:
        write_json(directory / SPEED_FILE, compare(dense, own, workload, roles))

    machine = environment()
    models = {"dense": dense, "own": own}
    key = {
        "models": {name: [config.to_dict(), sizes.to_dict()] for name, (config, sizes) in models.items()},
        "workload": dataclasses.asdict(workload),
        "roles": list(roles),
        "machine": {name: machine[name] for name in ("device", "platform", "num_threads", "packages")},
        "code": code_version(speed_stage),
    }
    return Stage("speed", key, compute)
