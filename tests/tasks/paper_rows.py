"""Handwritten rows of the paper's datasets in the Hub's columns, and repositories and files with these rows."""

import json
from pathlib import Path
from typing import Any

import datasets
import yaml
from configured import CLASSES, build
from datasets import ClassLabel, Features, List, Value

from gradpruner.tasks import Example

TEXT = Value("string")
# The Hub's schemas.
FEATURES: dict[str, Features] = {
    "pubmedqa": Features(
        pubid=Value("int32"),
        question=TEXT,
        context={
            name: List(TEXT)
            for name in ("contexts", "labels", "meshes", "reasoning_required_pred", "reasoning_free_pred")
        },
        long_answer=TEXT,
        final_decision=TEXT,
    ),
    "medmcqa": Features(
        {name: TEXT for name in ("id", "question", "opa", "opb", "opc", "opd")}
        | {"cop": ClassLabel(names=["a", "b", "c", "d"])}
        | {name: TEXT for name in ("choice_type", "exp", "subject_name", "topic_name")}
    ),
    "billsum": Features(text=TEXT, summary=TEXT, title=TEXT),
    "fingpt": Features(input=TEXT, output=TEXT, instruction=TEXT),
    "mmlu_clinical_knowledge": Features(
        question=TEXT, subject=TEXT, choices=List(TEXT), answer=ClassLabel(names=["A", "B", "C", "D"])
    ),
    "alpaca": Features(instruction=TEXT, input=TEXT, output=TEXT, text=TEXT),
}
NAMES = tuple(FEATURES)
SPLITS = [(name, split) for name in NAMES for split in CLASSES[name].hub_splits]

NEWS = "What is the sentiment of this news? Please choose an answer from {negative/neutral/positive}."
SEVEN = (
    "What is the sentiment of this news? Please choose an answer from {strong negative/moderately negative/mildly "
    "negative/neutral/mildly positive/moderately positive/strong positive}."
)


def abstract(pubid: int, **changes: Any) -> dict[str, Any]:
    lists = {"labels": ["AIM", "RESULT"], "meshes": ["Humans"], "reasoning_required_pred": ["y", "e", "s"]}
    context = {"contexts": ["First part.", "Second part."], **lists, "reasoning_free_pred": ["n", "o"]}
    row = {"pubid": pubid, "question": "Does it work?", "context": context}
    return row | {"long_answer": "It does.", "final_decision": "yes"} | changes


def examination(number: int, **changes: Any) -> dict[str, Any]:
    options = {"opa": "Vagus", "opb": "Hypoglossal", "opc": "Facial", "opd": "Optic"}
    row = {"id": f"m{number}", "question": "Which nerve moves the tongue?", **options, "cop": 1}
    return row | {"choice_type": "single", "exp": None, "subject_name": "Anatomy", "topic_name": None} | changes


def news(text: str, output: str, instruction: str = NEWS) -> dict[str, Any]:
    return {"input": text, "output": output, "instruction": instruction}


def clinical(**changes: Any) -> dict[str, Any]:
    choices = ["18 gauge.", "20 gauge.", "22 gauge.", "24 gauge."]
    return {"question": "Which cannula?", "subject": "clinical_knowledge", "choices": choices, "answer": 0} | changes


def bill(text: str, summary: str) -> dict[str, Any]:
    return {"text": text, "summary": summary, "title": "A title"}


def instruction(text: str, more: str, output: str) -> dict[str, Any]:
    return {"instruction": text, "input": more, "output": output, "text": "not read"}


# Train and test rows, in the Hub's columns. 1571683 and 8017535 are official training rows of PubMedQA; 21645374 and
# 25521278 are not. FinGPT's test texts have a sha256sum of 0 modulo 10; its training texts do not.
ROWS: dict[str, dict[str, list[dict[str, Any]]]] = {
    "pubmedqa": {
        "train": [abstract(1571683), abstract(8017535, final_decision="maybe")],
        "test": [abstract(21645374, long_answer="No."), abstract(25521278)],
    },
    "medmcqa": {"train": [examination(1), examination(2, cop=3)], "test": [examination(3, cop=0)]},
    "billsum": {
        "train": [bill("SECTION 1. TITLE.\n\n    This Act is short.\n", "Shortens acts.")],
        "test": [bill("SEC. 2.", "Amends {nothing}."), bill("SEC. 3.", "Repeals it.")],
    },
    "fingpt": {
        "train": [news("Profit rose.", "positive"), news("The CEO left.", "moderately negative", SEVEN)],
        "test": [
            news("Sales rose.", "neutral"),
            news("Costs fell.", "positive"),
            news("The rating was cut.", "negative"),
        ],
    },
    "mmlu_clinical_knowledge": {"test": [clinical(), clinical(answer=3)]},
    "alpaca": {"train": [instruction("Add {input} up.", "2, {3}", "5"), instruction("Name a planet.", "", "Mars")]},
}
# The Hub's splits and rows.
UNLABELLED = [examination(9, cop=-1)] * 3
HUB: dict[str, dict[str, list[dict[str, Any]]]] = {
    "pubmedqa": {"train": [row for pair in zip(*ROWS["pubmedqa"].values(), strict=True) for row in pair]},
    "medmcqa": {"train": ROWS["medmcqa"]["train"], "validation": ROWS["medmcqa"]["test"], "test": UNLABELLED},
    "billsum": {**ROWS["billsum"], "ca_test": [bill("A Californian bill.", "Is not read.")]},
    "fingpt": {"train": [ROWS["fingpt"]["test"][0], *ROWS["fingpt"]["train"], *ROWS["fingpt"]["test"][1:]]},
    "mmlu_clinical_knowledge": {
        "validation": [clinical(answer=1)],
        "dev": [clinical()],
        **ROWS["mmlu_clinical_knowledge"],
    },
    "alpaca": ROWS["alpaca"],
}


def publish(name: str, folder: Path, splits: dict[str, list[dict[str, Any]]]) -> Path:
    """Writes a repository as `datasets` and the Hub store it: Parquet files, and a card that lists them."""
    repository, config = folder / "repository", CLASSES[name].hub_config or "default"
    for split, rows in splits.items():
        dataset = datasets.Dataset.from_list(rows, features=FEATURES[name])
        dataset.to_parquet(repository / config / f"{split}-00000-of-00001.parquet")
    files = [{"split": split, "path": f"{config}/{split}-*"} for split in splits]
    card = yaml.safe_dump({"configs": [{"config_name": config, "data_files": files}]})
    (repository / "README.md").write_text(f"---\n{card}---\n")
    return repository


def write(folder: Path, split: str, rows: list[dict[str, Any]]) -> None:
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def load_local(name: str, folder: Path, *rows: dict[str, Any], **changes: Any) -> list[Example]:
    split = "test" if name == "mmlu_clinical_knowledge" else "train"
    write(folder, split, list(rows))
    return build(name, source="local", path=str(folder), **changes).load(split, seed=0)
