"""What each stage of a run depends on: the keys by which the cache knows it.

A key holds everything that its stage's result depends on, code included, and nothing else: what is left out of it may
vary within a sweep without the stage being computed again.
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from types import ModuleType
from typing import TYPE_CHECKING, Any

from gradpruner import (
    architectures,
    budget,
    counting,
    distill,
    encoding,
    finetune,
    gradients,
    hidden_states,
    igia,
    importance,
    merge,
    plan,
    repair,
    shape,
    speed,
    stability,
    surgery,
    trainer,
    width_surgery,
)
from gradpruner.cache import code_version, content_hash
from gradpruner.encoding import TrainingRow
from gradpruner.evaluate import accuracy, base, bertscore_f1, likelihood, metrics, rouge_l
from gradpruner.method import Method
from gradpruner.runtime import environment
from gradpruner.tasks import fingerprint

if TYPE_CHECKING:
    from gradpruner.pipeline import Pipeline

Key = dict[str, Any]  # JSON-ready


class StageKeys:
    """The keys of one pipeline's stages."""

    def __init__(self, pipeline: "Pipeline") -> None:
        self._pipeline = pipeline

    @cached_property
    def measure(self) -> Key:
        """Model, calibration rows and the settings that the method names; neither counts nor rules."""
        pipeline, method = self._pipeline, self._pipeline.resolved_method
        model, needs_data = pipeline.base_model, method.calibration() is not None
        sources = (importance, gradients, igia, encoding, trainer, surgery, hidden_states, budget, counting, shape)
        return {
            "model": model.fingerprint(pipeline.assets_dir),
            "dtype": str(model.torch_dtype),  # not `auto`: a CPU and a GPU may share a cache
            "attn_implementation": model.attn_implementation,
            "method": method.measured_as.name,
            "settings": method.measurement_settings(),
            "rows": self._rows if needs_data else None,
            "code": code_version(*_modules(method.measured_as), *sources),
        }

    @cached_property
    def prune(self) -> Key:
        """What was measured, and all settings of the method."""
        method = self._pipeline.resolved_method
        return {
            "measure": content_hash(self.measure),
            "method": method.name,
            "settings": method.prune_settings(),
            "code": code_version(
                *_modules(type(method)),
                *(architectures, budget, counting, merge, plan, shape, stability, surgery, width_surgery),
            ),
        }

    @cached_property
    def repair(self) -> Key:
        """What was pruned, and the rows to repair it on."""
        calibration = self._pipeline.resolved_method.repair_calibration()
        assert calibration is not None
        return {
            "prune": content_hash(self.prune),
            "calibration": dataclasses.asdict(calibration),
            "rows": self._rows,
            "code": code_version(repair, hidden_states, encoding, surgery),
        }

    @property
    def _compressed(self) -> Key:
        """What pruning and repair gave."""
        return self.repair if self._pipeline.repairs else self.prune

    @cached_property
    def recover(self) -> Key:
        """What was pruned, and how to train it on which other rows."""
        pipeline, recovery = self._pipeline, self._pipeline.recovery
        assert recovery is not None
        return {
            "compressed": content_hash(self._compressed),
            "recovery": dataclasses.asdict(recovery),
            "rows": _hashed(pipeline.recovery_rows),
            "seed": pipeline.seed,
            "code": code_version(finetune, encoding, trainer, distill, hidden_states),
        }

    @property
    def untuned(self) -> Key:
        """The model that the fine-tune starts from."""
        return self._compressed if self._pipeline.recovery is None else self.recover

    @cached_property
    def finetune(self) -> Key:
        """What the fine-tune starts from, the training rows, and how to train."""
        return {
            "untuned": content_hash(self.untuned),
            "training": dataclasses.asdict(self._pipeline.training),
            "rows": self._rows,
            "seed": self._pipeline.seed,
            "code": code_version(finetune, encoding, trainer),
        }

    def predict(self, weights: Key) -> Key:
        """The weights (by the key of the stage that made them), the test examples, and how to answer."""
        pipeline, evaluation = self._pipeline, self._pipeline.resolved_evaluation
        return {
            "weights": content_hash(weights),
            "examples": fingerprint(pipeline.test_examples),
            "max_length": pipeline.tested_task.max_length,
            "chat_template": pipeline.model.chat_template,
            "evaluation": {"name": evaluation.name, **evaluation.prediction_settings()},
            "code": code_version(sys.modules[type(evaluation).__module__], base, likelihood, encoding),
        }

    def evaluate(self, weights: Key) -> Key:
        """What was answered, and how to measure it."""
        return {
            "predictions": content_hash(self.predict(weights)),
            "evaluation": self._pipeline.resolved_evaluation.measurement_settings(),
            "code": code_version(metrics, accuracy, rouge_l, bertscore_f1),
        }

    def speed(self, models: Mapping[str, speed.Model], workload: speed.Workload, roles: Sequence[str]) -> Key:
        """Shapes, what is timed, and the machine; no weights."""
        machine = environment()
        return {
            "models": {name: [config.to_dict(), shape.to_dict()] for name, (config, shape) in models.items()},
            "workload": dataclasses.asdict(workload),
            "roles": list(roles),
            "machine": {name: machine[name] for name in ("device", "platform", "num_threads", "packages")},
            "code": code_version(speed, shape),
        }

    @cached_property
    def _rows(self) -> str:
        return _hashed(self._pipeline.rows)


def _hashed(rows: Sequence[TrainingRow]) -> str:
    return content_hash([[row.input_ids, row.num_answer_tokens] for row in rows])


def _modules(method: type[Method]) -> list[ModuleType]:
    """The modules that define a method: its own, those of its bases, and those that it names."""
    names = dict.fromkeys(base.__module__ for base in method.__mro__ if issubclass(base, Method))
    names |= dict.fromkeys(method.sources)
    return [sys.modules[name] for name in names]
