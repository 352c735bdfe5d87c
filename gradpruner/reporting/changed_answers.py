"""Examples of test rows that the dense model and a pruned one answer differently."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradpruner.evaluate.base import PREDICTIONS_FILE
from gradpruner.files import read_jsonl
from gradpruner.record import RECORD_FILE, RunRecord

QUESTIONS_FILE = "questions.jsonl"  # prompts and options of the first test rows, beside the predictions
NUM_QUESTIONS = 200
LONGEST_PROMPT = 600  # characters; of longer prompts the end is kept, which asks the question
LONGEST_ANSWER = 200
NUM_EXAMPLES = 6


@dataclass(frozen=True)
class ChangedAnswer:
    """A test row with both answers.

    Attributes:
        id: id of the row.
        prompt: end of the prompt; empty where the run folder has none.
        reference: the right answer.
        dense: the dense model's answer.
        pruned: the pruned model's answer.
        dense_is_right: whether the dense model's answer is the right one; None for free text.
        pruned_is_right: whether the pruned model's is.
    """

    id: str
    prompt: str
    reference: str
    dense: str
    pruned: str
    dense_is_right: bool | None
    pruned_is_right: bool | None


@dataclass(frozen=True)
class ChangedAnswers:
    """How many answers differ, and some of them.

    Attributes:
        num_rows: test rows that both models answered.
        num_lost: rows that only the dense model got right; None for free text.
        num_won: rows that only the pruned model got right.
        num_other: rows with different answers, both wrong, or of free text.
        examples: some rows, lost ones first.
    """

    num_rows: int
    num_lost: int | None
    num_won: int | None
    num_other: int
    examples: list[ChangedAnswer]


def question_rows(examples: Sequence[Any]) -> list[dict[str, Any]]:
    """Returns what `QUESTIONS_FILE` holds of the first test examples (`tasks.Example`)."""
    return [
        {
            "id": example.id,
            "prompt": example.prompt[-LONGEST_PROMPT:],
            "options": [option.removeprefix(example.delimiter)[:LONGEST_ANSWER] for option in example.choices],
        }
        for example in examples[:NUM_QUESTIONS]
    ]


def changed_answers(record: RunRecord, dense: RunRecord) -> ChangedAnswers | None:
    """Compares the predictions beside two records; None where either has none, or the test rows differ."""
    own, base = (_read(run, PREDICTIONS_FILE) for run in (record, dense))
    if not own or not base or record.content.get("test_rows") != dense.content.get("test_rows"):
        return None
    if [row["id"] for row in own] != [row["id"] for row in base]:
        return None
    questions = {row["id"]: row for row in _read(record, QUESTIONS_FILE) or _read(dense, QUESTIONS_FILE)}
    pairs = [_pair(mine, other, questions.get(mine["id"], {})) for mine, other in zip(own, base, strict=True)]
    changed = [pair for pair in pairs if pair.dense != pair.pruned]
    lost = [pair for pair in changed if pair.dense_is_right and not pair.pruned_is_right]
    won = [pair for pair in changed if pair.pruned_is_right and not pair.dense_is_right]
    rest = [pair for pair in changed if pair not in lost and pair not in won]
    is_judged = all(pair.dense_is_right is not None for pair in pairs)
    ordered = [*_first_shown(lost, 3), *_first_shown(won, 2), *_first_shown(rest, NUM_EXAMPLES)]
    return ChangedAnswers(
        len(pairs), len(lost) if is_judged else None, len(won) if is_judged else None, len(rest), ordered[:NUM_EXAMPLES]
    )


def _first_shown(changed: Sequence[ChangedAnswer], most: int) -> list[ChangedAnswer]:
    """Returns the first rows, those with a prompt before others."""
    return sorted(changed, key=lambda each: not each.prompt)[:most]


def _read(record: RunRecord, name: str) -> list[dict[str, Any]]:
    if record.path is None or record.path.name != RECORD_FILE:
        return []  # a record by itself: the folder beside it belongs to others
    file: Path = record.path.with_name(name)
    return read_jsonl(file) if file.is_file() else []


def _pair(own: dict[str, Any], base: dict[str, Any], question: dict[str, Any]) -> ChangedAnswer:
    if "generated" in own:
        is_right = (None, None) if own.get("accuracy") is None else (bool(base["accuracy"]), bool(own["accuracy"]))
        reference, texts = own["reference"], (base["generated"], own["generated"])
    elif own.get("prediction") is None:  # a free answer that was scored, and not generated: nothing to show
        is_right, reference, texts = (None, None), "", ("", "")
    else:
        options = question.get("options") or []

        def text(index: int) -> str:
            return options[index] if index < len(options) else f"option {index + 1}"

        is_right = (base["prediction"] == base["label"], own["prediction"] == own["label"])
        reference, texts = text(own["label"]), (text(base["prediction"]), text(own["prediction"]))
    dense, pruned = (each[:LONGEST_ANSWER] for each in texts)
    return ChangedAnswer(
        str(own["id"]), question.get("prompt", ""), reference[:LONGEST_ANSWER], dense, pruned, *is_right
    )
