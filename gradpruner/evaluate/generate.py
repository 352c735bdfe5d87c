"""Generate answers greedily and measure the text: the paper's setting (Section 4.1).

Prompts are padded on the left and masked, so that an answer does not depend on the rest of the batch. Generation stops
at the end of sequence or after a maximum number of tokens. The likelihood of the reference answer is scored as well,
because it shows differences before the text does. `conf/evaluation/paper.yaml` measures as the paper's public
evaluation does.
"""

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel

from gradpruner.checks import AUTO, check_choice, guess
from gradpruner.encoding import Encoder
from gradpruner.evaluate.accuracy import LENIENT, MATCHES
from gradpruner.evaluate.base import Evaluation, Question, encode_questions, pad
from gradpruner.evaluate.encoders import TextEncoder, choose_encoder
from gradpruner.evaluate.likelihood import score_completions
from gradpruner.evaluate.metrics import answer_nll, baselines, text_metrics
from gradpruner.evaluate.vllm_python import find_vllm
from gradpruner.runtime import default_device
from gradpruner.tasks import Example, Task

TRANSFORMERS, VLLM = ENGINES = ("transformers", "vllm")
VLLM_DTYPES = (AUTO, "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Generation(Evaluation):
    """Evaluation that generates an answer to every example.

    A prediction has `id`, `label`, `generated` and `reference` (text), `generated_tokens`, `is_finished` (the model
    ended its answer by itself), `answer_nll` (summed over the reference answer, or its first `answer_room` tokens) and
    `answer_tokens`; `measure` adds its scores.

    Attributes:
        bertscore_model: the encoder, see `encoders.choose_encoder`.
        bertscore_layer: layer of the encoder, see there.
        accuracy: which accuracy is called `accuracy`: `raw`, the answer equals the reference exactly, or `lenient`,
            once both are normalised (`accuracy.normalise`). Both are measured.
        rouge_stemming: whether ROUGE-L compares stems of words.
        max_new_tokens: maximum number of tokens of an answer; None: the task's.
        engine: one of `ENGINES`, which generates; see `vllm_engine`.
        vllm_python: Python of an environment that has vLLM; results do not depend on where it is.
        vllm_dtype: dtype that vLLM computes in, one of `VLLM_DTYPES`; `auto`: that of the checkpoint, which a run puts
            in its place.
        vllm_versions: of vLLM and what it computes with; set by `resolve`.
        answer_room: tokens that prompts leave free for an answer; set by `resolve` from the task. It does not grow with
            `max_new_tokens`, so that the latter changes no prompt.
        metrics: names of the metrics; set by `resolve` from the task.

    Raises:
        ValueError: on values that cannot work.
    """

    name: ClassVar[str] = "generate"

    bertscore_model: str = "auto"
    bertscore_layer: int | None = None
    accuracy: str = LENIENT
    rouge_stemming: bool = False
    max_new_tokens: int | None = None
    engine: str = TRANSFORMERS
    vllm_python: str | None = None
    vllm_dtype: str = AUTO
    vllm_versions: str | None = None
    answer_room: int | None = None
    metrics: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Checks the values."""
        super().__post_init__()
        if self.accuracy not in MATCHES:
            raise ValueError(
                f"accuracy must be {' or '.join(MATCHES)}, got {self.accuracy!r}{guess(self.accuracy, MATCHES)}. "
                "Change evaluation.accuracy."
            )
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(
                f"max_new_tokens must be 1 or more, got {self.max_new_tokens}. Raise evaluation.max_new_tokens, or set "
                "it to null for the dataset's."
            )
        check_choice("evaluation.engine", self.engine, ENGINES)
        check_choice("evaluation.vllm_dtype", self.vllm_dtype, VLLM_DTYPES)

    def resolve(self, task: Task, examples: Sequence[Example]) -> Self:
        """Returns a copy with the task's answer length and metrics, and with an encoder chosen if one is needed.

        Raises:
            ValueError: if the encoder's layer is unknown, or if vLLM is to generate and there is none.
        """
        has_choices = all(example.choices for example in examples)
        metrics = task.metrics or (("accuracy",) if has_choices else ("rouge_l", "bertscore_f1"))
        resolved = dataclasses.replace(
            self,
            max_new_tokens=self.max_new_tokens or task.max_new_tokens,
            answer_room=task.max_new_tokens,
            metrics=metrics,
            vllm_versions=find_vllm(self.vllm_python) if self.engine == VLLM else None,
        )
        if "bertscore_f1" not in metrics:
            return resolved
        encoder = choose_encoder(self.bertscore_model, self.bertscore_layer)
        return dataclasses.replace(resolved, bertscore_model=encoder.name, bertscore_layer=encoder.layer)

    def for_dtype(self, dtype: torch.dtype) -> Self:
        """Returns a copy in which `vllm_dtype` is definite."""
        if self.vllm_dtype != AUTO:
            return self
        return dataclasses.replace(self, vllm_dtype=str(dtype).removeprefix("torch."))

    def questions(self, examples: Sequence[Example], encoder: Encoder) -> list[Question]:
        """Returns prompts, with room for an answer, and reference answers."""
        assert self.answer_room is not None
        answers = [(example.answer,) for example in examples]
        # The room must not depend on the reference answer, whose length the model cannot know.
        return encode_questions(examples, answers, encoder, reserve=self.answer_room)

    def predict(self, model: PreTrainedModel, encoder: Encoder, batch: Sequence[Question]) -> list[dict[str, Any]]:
        """Generates answers to a batch, and scores the reference answers."""
        scores = self.score_references(model, batch)
        answers = self.generate(model, encoder, batch)
        return prediction_rows(encoder, batch, scores, answers, end_tokens(model, encoder))

    def score_references(self, model: PreTrainedModel, batch: Sequence[Question]) -> list[tuple[float, int]]:
        """Returns the log-likelihood and the number of tokens of each reference answer, of `answer_room` at most."""
        answers = [question.completions[0][: self.answer_room] for question in batch]
        references = [
            dataclasses.replace(question, completions=[answer]) for question, answer in zip(batch, answers, strict=True)
        ]
        scores = score_completions(model, references)
        return [(score, len(answer)) for [score], answer in zip(scores, answers, strict=True)]

    def generate(self, model: PreTrainedModel, encoder: Encoder, batch: Sequence[Question]) -> list[list[int]]:
        """Returns the new tokens of every question; padding follows an end of sequence."""
        pad_token_id = encoder.tokenizer.pad_token_id
        ids, mask = pad([question.prompt for question in batch], model.device, left=True, pad_token_id=pad_token_id)
        config = GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(end_tokens(model, encoder)),
            pad_token_id=pad_token_id,
        )
        with _own_generation_config(model, config):
            generated = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        new: list[list[int]] = generated[:, ids.shape[1] :].tolist()
        return new

    def prediction_settings(self) -> dict[str, Any]:
        """Returns all settings except those of `measure`."""
        lengths = {"max_new_tokens": self.max_new_tokens, "answer_room": self.answer_room}
        return {"batch_size": self.batch_size, **lengths, **self._engine_metrics()}

    def measurement_settings(self) -> dict[str, Any]:
        """Returns metrics, their variants, and the encoder, down to its weights."""
        settings = {"metrics": self.metrics, "encoder": self.bertscore_model, "layer": self.bertscore_layer}
        settings |= {"accuracy": self.accuracy, "rouge_stemming": self.rouge_stemming}
        return {**settings, "weights": None if self._encoder is None else self._encoder.fingerprint()}

    def prepare(self) -> None:
        """Fetches the encoder, if one is needed."""
        if self._encoder is not None:
            self._encoder.folder()

    def measure(
        self, predictions: Sequence[dict[str, Any]], examples: Sequence[Example]
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Computes `metrics.text_metrics`, and `finished`: the fraction of answers that the model ended by itself."""
        assert self.metrics is not None
        choices = [[choice.removeprefix(each.delimiter).strip() for choice in each.choices] for each in examples]
        arguments: dict[str, dict[str, Any]] = {
            "accuracy": {"match": self.accuracy, "choices": choices},
            "rouge_l": {"stemming": self.rouge_stemming},
        }
        if (encoder := self._encoder) is not None:
            device = str(default_device())
            arguments["bertscore_f1"] = {"encoder": encoder.folder(), "num_layers": encoder.layer, "device": device}
        generated = [row["generated"] for row in predictions]
        measured, scores = text_metrics(self.metrics, generated, [row["reference"] for row in predictions], arguments)
        metrics: dict[str, Any] = {"num_examples": len(predictions), **measured, **answer_nll(predictions)}
        metrics["finished"] = sum(row["is_finished"] for row in predictions) / len(predictions)
        metrics |= self._engine_metrics()
        if encoder is not None:
            metrics |= {"bertscore_encoder": encoder.name, "bertscore_layer": encoder.layer}
        if "accuracy" in self.metrics and all(example.label is not None for example in examples):
            labels = [example.label for example in examples if example.label is not None]
            metrics |= baselines(labels, [len(example.choices) for example in examples])
        rows = [
            {**row, **{name: values[index] for name, values in scores.items()}} for index, row in enumerate(predictions)
        ]
        return metrics, rows

    def _engine_metrics(self) -> dict[str, Any]:
        """Returns what a record says of another engine than transformers; older records have no such engine."""
        if self.engine == TRANSFORMERS:
            return {}
        return {"engine": self.engine, "engine_versions": self.vllm_versions, "engine_dtype": self.vllm_dtype}

    @property
    def _encoder(self) -> TextEncoder | None:
        if self.metrics is None or self.bertscore_layer is None or "bertscore_f1" not in self.metrics:
            return None
        return TextEncoder(self.bertscore_model, self.bertscore_layer)


def prediction_rows(
    encoder: Encoder,
    batch: Sequence[Question],
    scores: Sequence[tuple[float, int]],
    answers: Sequence[Sequence[int]],
    ends: Collection[int],
) -> list[dict[str, Any]]:
    """Returns the predictions of a batch; for their keys see `Generation`.

    Args:
        encoder: the encoder that made the questions.
        batch: the questions.
        scores: what `Generation.score_references` returns for them.
        answers: generated tokens; what follows the first of `ends` does not count.
        ends: ids that end an answer.
    """
    rows = []
    for question, (score, num_tokens), tokens in zip(batch, scores, answers, strict=True):
        end = next((index for index, token in enumerate(tokens) if token in ends), None)
        own = tokens[:end]
        rows.append(
            {
                "id": question.example.id,
                "label": question.example.label,
                "generated": encoder.tokenizer.decode(own, skip_special_tokens=True).strip(),
                "reference": question.example.reference.strip(),
                "generated_tokens": len(own),
                "is_finished": end is not None,
                "answer_nll": -score,
                "answer_tokens": num_tokens,
            }
        )
    return rows


def end_tokens(model: PreTrainedModel, encoder: Encoder) -> set[int]:
    """Returns the ids that end an answer: the one used in fine-tuning, and those of the original model."""
    own = model.generation_config.eos_token_id
    ids = [] if own is None else own if isinstance(own, list) else [own]
    return {encoder.tokenizer.eos_token_id, *ids}


@contextmanager
def _own_generation_config(model: PreTrainedModel | PeftModel, config: GenerationConfig) -> Iterator[None]:
    """Replaces a checkpoint's own settings until exit: transformers would fill gaps in `config`, such as penalties."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    own, base.generation_config = base.generation_config, config
    try:
        yield
    finally:
        base.generation_config = own
