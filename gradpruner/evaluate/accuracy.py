"""Accuracy of generated answers: the fraction that equals the reference, exactly (`raw`) or nearly (`lenient`).

An `evaluate` metric, loaded from this file: `evaluate.load("gradpruner/evaluate/accuracy.py")`.
"""

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

RAW, LENIENT = MATCHES = ("raw", "lenient")
# Marks that end a sentence, after anything but such a mark; 5! keeps its factorial.
_END = re.compile(r"(?<=[^\s.,;:!?…。])(?!(?<=\d)!)[.,;:!?…。]+$")
_QUOTES = ('""', "''", "“”", "‘’", "«»", "「」")  # noqa: RUF001
_CAPITAL = re.compile(r"[^\W\d_](?=[^\W\d_]|\s)")


def normalise(text: str) -> str:
    """Returns the text to compare: single spaces, no quotes around it, no full stop after it, no capital at its start.

    A model is not penalised for writing its answer as a sentence. Everything else is kept, because options of a
    question may differ in just that: signs and symbols (`-5`, `C#`, `90%`), case inside the text (`100% Rr`, `CO`),
    articles, inner punctuation. Characters are compared in Unicode's NFC; NFKC would make `10²` equal to `102`.
    """
    text = " ".join(unicodedata.normalize("NFC", text).split())
    while (shorter := _strip_once(text)) != text:
        text = shorter
    starts_sentence = _CAPITAL.match(text) and not text[1].isupper()
    return text[0].lower() + text[1:] if starts_sentence else text


def _strip_once(text: str) -> str:
    text = _END.sub("", text)
    is_quoted = len(text) > 2 and text[0] + text[-1] in _QUOTES
    return text[1:-1].strip() if is_quoted else text


def is_match(answer: str, reference: str, choices: Sequence[str] = ()) -> bool:
    """Returns whether an answer equals the reference once both are normalised, and no other choice does.

    Args:
        answer: generated text.
        reference: the right answer.
        choices: options of the question, if it has any. Where another one equals the reference once normalised, as rr
            does Rr, only the reference itself is right.
    """
    wanted = normalise(reference)
    if any(normalise(choice) == wanted for choice in choices if choice.strip() != reference.strip()):
        return answer.strip() == reference.strip()
    return normalise(answer) == wanted


class Accuracy(evaluate.Metric):
    """Fraction of answers that equal their reference."""

    def __init__(self, match: str = LENIENT, choices: Sequence[Sequence[str]] | None = None, **kwargs: Any) -> None:
        """Keeps the arguments.

        Args:
            match: which of `MATCHES` is called `accuracy`.
            choices: options of each question, in the order of the references; None: the questions have none.
            kwargs: arguments of `evaluate.Metric`.
        """
        super().__init__(**kwargs)
        self._match, self._choices = match, choices

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of generated answers that equal their reference: exactly, and once normalised.",
            citation="",
            inputs_description="predictions and references: lists of strings, of equal length.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        """Returns `accuracy_raw`, `accuracy_lenient`, and the one of the two that `accuracy_match` names as `accuracy`.

        Keys that end in `_rows` hold 0.0 or 1.0 per pair.
        """
        choices = self._choices or [()] * len(references)
        triples = list(zip(predictions, references, choices, strict=True))
        rows = {
            RAW: [float(answer == reference) for answer, reference, _ in triples],
            LENIENT: [float(is_match(*triple)) for triple in triples],
        }
        named = {"accuracy": rows[self._match], **{f"accuracy_{match}": rows[match] for match in MATCHES}}
        means = {name: sum(values) / len(values) for name, values in named.items()}
        return {**means, **{f"{name}_rows": values for name, values in named.items()}, "accuracy_match": self._match}
