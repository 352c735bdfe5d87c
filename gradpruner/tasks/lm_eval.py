r"""A dataset as a task of lm-evaluation-harness: the settings of its YAML, and the rows that this names.

Templates become Jinja, `"Question: {question}\nAnswer:"` becomes `"Question: {{question}}\nAnswer:"`, over rows with
one text per field. With choices the harness scores each of them, else the reference answer.
"""

import json
import keyword
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gradpruner.tasks.base import DataError, Rendered, Task
from gradpruner.tasks.template import Template

ID, CHOICES, LABEL, ANSWER = OWN_COLUMNS = ("id", "choices", "label", "answer")
NAMES_OF_JINJA = ("true", "false", "none", "loop", "self", "super", "caller", "varargs", "kwargs")


@dataclass(frozen=True)
class HarnessTask:
    """A task of lm-evaluation-harness.

    Attributes:
        settings: content of its YAML, but for where the rows are.
        rows: one dict per example, with the columns that the settings name.
    """

    settings: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """Name of the task."""
        return str(self.settings["task"])


def harness_task(task: Task, seed: int) -> HarnessTask:
    """Returns the test rows of a dataset, and the templates that make the same prompts and completions of them as ours.

    Args:
        task: the dataset.
        seed: of the draw, where `max_test_samples` asks for fewer rows than there are.

    Raises:
        DataError: if rows are conversations, or if some have choices and others not.
    """
    rendered = task.load_rendered("test", seed)
    examples = [each.example for each in rendered]
    templates = {each.template for each in rendered}
    kinds = {bool(example.choices) for example in examples}
    if None in templates:
        raise DataError(
            f"A task of lm-evaluation-harness needs dataset.prompt, got rows of {task.name} that are conversations. "
            "Set dataset.prompt and dataset.answer_field."
        )
    if len(templates) > 1 or len(kinds) > 1:
        raise DataError(
            "A task of lm-evaluation-harness has one template, and choices in all rows or in none, got rows of both "
            f"kinds in {task.name}. Give rows with choices and rows without as two datasets."
        )
    [template] = (Template(str(text)) for text in templates)
    columns = _columns(template.fields)
    delimiter = examples[0].delimiter
    settings: dict[str, Any] = {"task": f"gradpruner_{task.name}", "test_split": "test", "num_fewshot": 0}
    settings["doc_to_text"] = _doc_to_text(template, columns)
    if kinds == {True}:
        settings |= {"output_type": "multiple_choice", "target_delimiter": delimiter}
        settings |= {"doc_to_choice": CHOICES, "doc_to_target": LABEL}
        settings["metric_list"] = [{"metric": "acc"}, {"metric": "acc_norm"}]
    else:
        settings |= {"output_type": "loglikelihood", "doc_to_target": ANSWER}
        settings["metric_list"] = [{"metric": "perplexity"}, {"metric": "acc"}]
    settings["metadata"] = {"version": 1.0}
    return HarnessTask(settings, [_row(each, columns) for each in rendered])


def _row(rendered: Rendered, columns: Mapping[str, str]) -> dict[str, Any]:
    example = rendered.example
    row: dict[str, Any] = {ID: example.id}
    row |= {column: Template(f"{{{name}}}").render(rendered.fields) for name, column in columns.items()}
    if example.choices:
        return row | {CHOICES: [text.removeprefix(example.delimiter) for text in example.choices], LABEL: example.label}
    return row | {ANSWER: example.answer}  # with its delimiter, which the harness adds to choices only


def _columns(fields: Sequence[str]) -> dict[str, str]:
    """Returns a column for each field of a template: a name that Jinja can read, and that no other column has."""
    columns: dict[str, str] = {}
    for field in fields:
        name = re.sub(r"\W", "_", field)
        if not name.isidentifier():
            name = f"_{name}"
        while name in (*OWN_COLUMNS, *columns.values()) or keyword.iskeyword(name) or name.lower() in NAMES_OF_JINJA:
            name += "_"
        columns[field] = name
    return columns


def _doc_to_text(template: Template, columns: Mapping[str, str]) -> str:
    parts = [part for part in template.parts if part[0]]
    if [is_field for _, is_field in parts] == [True]:
        return columns[parts[0][0]]  # a column: the harness takes a rendered text of digits for the index of a choice
    return "".join(f"{{{{{columns[text]}}}}}" if is_field else _literal(text) for text, is_field in parts)


def _literal(text: str) -> str:
    """Returns text as Jinja has it: as it is, or as a string where Jinja would read a brace or change a line end."""
    return f"{{{{{json.dumps(text, ensure_ascii=False)}}}}}" if "{" in text or "\r" in text else text
