"""Generate answers greedily and measure the text: the paper's setting (Section 4.1).

Prompts are padded on the left and masked, so that an answer does not depend on the rest of the batch. Generation stops
at the end of sequence or after a maximum number of tokens. The likelihood of the reference answer is scored as well,
because it shows differences before the text does. `conf/evaluation/paper.yaml` measures as the paper's public
evaluation does.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel

from gradpruner.checks import guess
from gradpruner.encoding import Encoder
from gradpruner.evaluate.accuracy import LENIENT, MATCHES
from gradpruner.evaluate.base import Evaluation, Question, encode_questions, pad
from gradpruner.evaluate.encoders import TextEncoder, choose_encoder
from gradpruner.evaluate.likelihood import score_completions
from gradpruner.evaluate.metrics import answer_nll, baselines, text_metrics
from gradpruner.runtime import default_device
from gradpruner.tasks import Example, Task


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

    def resolve(self, task: Task, examples: Sequence[Example]) -> Self:
        """Returns a copy with the task's answer length and metrics, and with an encoder chosen if one is needed.

        Raises:
            ValueError: if the encoder's layer is unknown.
        """
        has_choices = all(example.choices for example in examples)
        metrics = task.metrics or (("accuracy",) if has_choices else ("rouge_l", "bertscore_f1"))
        resolved = dataclasses.replace(
            self,
            max_new_tokens=self.max_new_tokens or task.max_new_tokens,
            answer_room=task.max_new_tokens,
            metrics=metrics,
        )
        if "bertscore_f1" not in metrics:
            return resolved
        encoder = choose_encoder(self.bertscore_model, self.bertscore_layer)
        return dataclasses.replace(resolved, bertscore_model=encoder.name, bertscore_layer=encoder.layer)

    def questions(self, examples: Sequence[Example], encoder: Encoder) -> list[Question]:
        """Returns prompts, with room for an answer, and reference answers."""
        assert self.answer_room is not None
        answers = [(example.answer,) for example in examples]
        # The room must not depend on the reference answer, whose length the model cannot know.
        return encode_questions(examples, answers, encoder, reserve=self.answer_room)

    def predict(self, model: PreTrainedModel, encoder: Encoder, batch: Sequence[Question]) -> list[dict[str, Any]]:
        """Generates answers to a batch, and scores the reference answers."""
        references = [
            dataclasses.replace(question, completions=[question.completions[0][: self.answer_room]])
            for question in batch
        ]
        scores = score_completions(model, references)
        answers = self._generate(model, encoder, batch)
        tokenizer = encoder.tokenizer
        ends = _ends(model, encoder)
        rows = []
        for question, [score], tokens in zip(references, scores, answers, strict=True):
            end = next((index for index, token in enumerate(tokens) if token in ends), None)
            own = tokens[:end]
            rows.append(
                {
                    "id": question.example.id,
                    "label": question.example.label,
                    "generated": tokenizer.decode(own, skip_special_tokens=True).strip(),
                    "reference": question.example.reference.strip(),
                    "generated_tokens": len(own),
                    "is_finished": end is not None,
                    "answer_nll": -score,
                    "answer_tokens": len(question.completions[0]),
                }
            )
        return rows

    def _generate(self, model: PreTrainedModel, encoder: Encoder, batch: Sequence[Question]) -> list[list[int]]:
        """Returns the new tokens of every question; padding follows an end of sequence."""
        pad_token_id = encoder.tokenizer.pad_token_id
        ids, mask = pad([question.prompt for question in batch], model.device, left=True, pad_token_id=pad_token_id)
        config = GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(_ends(model, encoder)),
            pad_token_id=pad_token_id,
        )
        with _own_generation_config(model, config):
            generated = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        new: list[list[int]] = generated[:, ids.shape[1] :].tolist()
        return new

    def prediction_settings(self) -> dict[str, Any]:
        """Returns all settings except those of `measure`."""
        lengths = {"max_new_tokens": self.max_new_tokens, "answer_room": self.answer_room}
        return {"batch_size": self.batch_size, **lengths}

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
        if encoder is not None:
            metrics |= {"bertscore_encoder": encoder.name, "bertscore_layer": encoder.layer}
        if "accuracy" in self.metrics and all(example.label is not None for example in examples):
            labels = [example.label for example in examples if example.label is not None]
            metrics |= baselines(labels, [len(example.choices) for example in examples])
        rows = [
            {**row, **{name: values[index] for name, values in scores.items()}} for index, row in enumerate(predictions)
        ]
        return metrics, rows

    @property
    def _encoder(self) -> TextEncoder | None:
        if self.metrics is None or self.bertscore_layer is None or "bertscore_f1" not in self.metrics:
            return None
        return TextEncoder(self.bertscore_model, self.bertscore_layer)


def _ends(model: PreTrainedModel, encoder: Encoder) -> set[int]:
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
