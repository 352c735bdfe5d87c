"""Tasks for lm-evaluation-harness, read as it reads them; `make test-lm-eval` runs the harness itself."""

import json
from pathlib import Path

import jinja2
import pyarrow.parquet
import pytest
import yaml

from experiments import lm_eval_tasks
from gradpruner.tasks import DataError, JsonLines
from gradpruner.tasks.arc_easy import ArcEasy
from gradpruner.tasks.hellaswag import HellaSwag
from gradpruner.tasks.lm_eval import harness_task
from tests.commands import call

# As in lm_eval/utils.py.
JINJA = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)


def read(folder, name):
    """Returns prompt and completions of each row as the harness makes them, and the rows."""
    settings = yaml.safe_load((Path(folder) / f"{name}.yaml").read_text())
    rows = pyarrow.parquet.read_table(settings["dataset_kwargs"]["data_files"]["test"]).to_pylist()
    texts = []
    for row in rows:
        template = settings["doc_to_text"]
        prompt = row[template] if template in row else JINJA.from_string(template).render(**row)
        if settings["output_type"] == "multiple_choice":
            assert not prompt.isdigit() or template in row  # which the harness takes for the index of a choice
            choices = [settings["target_delimiter"] + choice for choice in row[settings["doc_to_choice"]]]
            texts.append((prompt, choices, row[settings["doc_to_target"]]))
        else:
            texts.append((prompt, [row[settings["doc_to_target"]]], None))
    return settings, texts, rows


def check(task, folder, seed=0):
    made = harness_task(task, seed)
    lm_eval_tasks.write_task(made, folder)
    settings, texts, rows = read(folder, made.name)
    examples = task.load("test", seed)
    assert [row["id"] for row in rows] == [example.id for example in examples]
    assert texts == [(example.prompt, list(example.choices) or [example.answer], example.label) for example in examples]
    return settings


ARC = {"prompt": "Question: {question}\nAnswer:", "choice": " {choice}", "max_test_samples": 50}


@pytest.mark.parametrize(
    "task",
    [
        ArcEasy(**ARC),
        ArcEasy(**ARC, show_options=True, prompt_with_options="{question}\n{options}\nAnswer:"),
        HellaSwag(prompt="{context}", choice=" {choice}.", max_test_samples=50),
    ],
    ids=["arc_easy", "options", "hellaswag"],
)
def test_prompts_and_choices_are_ours(task, tmp_path):
    settings = check(task, tmp_path, seed=3)
    assert settings["output_type"] == "multiple_choice" and settings["target_delimiter"] == " "


def own(folder, rows, **settings):
    file = folder / "own.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return JsonLines(**{"train_file": str(file), "test_file": str(file), "answer_field": "answer", **settings})


@pytest.mark.parametrize(
    "prompt",
    [
        "{the question}?\\n{label}{a.b[0]}",
        "{{{the question}}} {{% raw %}} {{# {label}",
        "{in}\r\n{none} {self} {_1} {1}",
        "{the question}",
        "😀 \"{the question}\" \\ '{label}'\n\n",
    ],
)
def test_any_template_over_any_columns(tmp_path, prompt):
    rows = [
        {"the question": "12", "label": "2024-01-31", "a": {"b": [1.5]}, "in": "x", "none": 3, "self": True, "_1": "{{",
         "1": "%}", "o": ["2020-01-01", "2021-01-01"], "answer": 1},
        {"the question": "é {{x}}", "label": "2024-02-01", "a": {"b": [2]}, "in": "y", "none": 4, "self": False,
         "_1": "}}", "1": "", "o": ["2022-01-01", "2023-01-01"], "answer": 0},
    ]  # fmt: skip
    check(own(tmp_path, rows, prompt=prompt, choices_field="o"), tmp_path / "tasks")


def test_open_answers_are_scored_as_they_are(tmp_path):
    settings = check(own(tmp_path, [{"q": "Why?", "answer": "[1, 2]"}], prompt="{q}"), tmp_path / "tasks")
    assert settings["output_type"] == "loglikelihood" and "target_delimiter" not in settings


def test_conversations_are_refused(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    task = own(tmp_path, [{"messages": turns}], answer_field=None)
    with pytest.raises(DataError, match=r"needs dataset\.prompt, got rows of .* that are conversations\. Set dataset"):
        harness_task(task, 0)


def test_the_command_writes_a_task_and_says_how_to_run_it(tmp_path):
    done = call(lm_eval_tasks.main, f"output={tmp_path}/tasks", "dataset.max_test_samples=8", "show_options=true")
    assert done.returncode == 0, done.stderr
    assert "with 8 rows" in done.stdout and "--tasks gradpruner_arc_easy" in done.stdout
    _, texts, _ = read(tmp_path / "tasks", "gradpruner_arc_easy")
    assert all("\nA. " in prompt for prompt, _, _ in texts)
    failed = call(lm_eval_tasks.main, f"output={tmp_path}/tasks", "dataset=arc_easi")
    assert failed.returncode == 1 and "did you mean 'arc_easy'" in failed.stderr
    failed = call(lm_eval_tasks.main, "output=", "dataset=arc_easy")
    assert failed.returncode == 1 and "output must be a path" in failed.stderr
