"""From a row to a prompt: listed options, the part that may be shortened, and the reference answer."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import Toy, row, toy, write

from gradpruner.tasks import Example
from gradpruner.tasks.base import list_options
from gradpruner.tasks.template import Template

every = settings(derandomize=True, deadline=None, max_examples=200, database=None)
WITH_OPTIONS = "Q: {question}\n{options}\nA:"


class LongToy(Toy):
    @property
    def context_field(self) -> str | None:
        return "question"


def load(folder: Path, cls: type[Toy] = Toy, columns: dict | None = None, **changes) -> Example:
    write(folder, row(**(columns or {})))
    return toy(folder, cls, **changes).load("train", seed=0)[0]


def test_options_are_listed_where_they_are_shown(tmp_path: Path) -> None:
    columns = {"choices": ["x", "y", "z"], "label": 2}
    shown = load(tmp_path, columns=columns, prompt_with_options=WITH_OPTIONS, show_options=True)
    assert shown == Example("train-0", "Q: Why?\nA. x\nB. y\nC. z\nA:", " z", (" x", " y", " z"), 2, " ")
    hidden = load(tmp_path, columns=columns, prompt_with_options=WITH_OPTIONS)
    assert hidden == Example("train-0", "Q: Why?\nA:", " z", (" x", " y", " z"), 2, " ")


def test_a_dataset_without_a_prompt_for_options_keeps_its_prompt(tmp_path: Path) -> None:
    assert load(tmp_path, prompt_with_options=None, show_options=True) == load(tmp_path)


def test_options_are_text_and_no_template(tmp_path: Path) -> None:
    columns = {"choices": ["{question}", " {{b}} "], "label": 0}
    example = load(tmp_path, columns=columns, prompt_with_options=WITH_OPTIONS, show_options=True)
    assert example.prompt == "Q: Why?\nA. {question}\nB. {{b}}\nA:"
    assert example.choices == (" {question}", "  {{b}} ")


def test_options_are_lettered_to_z_and_numbered_beyond() -> None:
    letters = list_options(tuple(f"c{index}" for index in range(26))).split("\n")
    assert (len(letters), letters[0], letters[25]) == (26, "A. c0", "Z. c25")
    numbers = list_options(tuple(f"c{index}" for index in range(27))).split("\n")
    assert (len(numbers), numbers[0], numbers[25], numbers[26]) == (27, "1. c0", "26. c25", "27. c26")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Q: {question}\nA:", (3, 7)),
        ("{question}", (0, 4)),
        (r"Q:\n{question}\nA:", (3, 7)),  # \n: two characters on the command line, one in the prompt
        ("{{}} {question}", (3, 7)),
        ("Why? {question} Why?", (5, 9)),
        ("{question} {question}", (5, 9)),  # the field occurs twice: the last one is the context
    ],
)
def test_the_context_is_where_its_field_is_in_the_prompt(
    prompt: str, expected: tuple[int, int], tmp_path: Path
) -> None:
    example = load(tmp_path, LongToy, prompt=prompt)
    assert example.context == expected
    assert example.prompt[slice(*expected)] == "Why?"


def test_options_before_the_context_move_it(tmp_path: Path) -> None:
    settings = {"prompt_with_options": "{options}\nQ: {question}\nA:", "show_options": True}
    example = load(tmp_path, LongToy, {"choices": ["{question}", "Why?"]}, **settings)
    assert example.prompt == "A. {question}\nB. Why?\nQ: Why?\nA:"
    assert example.context == (25, 29)


def test_without_a_field_that_may_be_shortened_there_is_no_context(tmp_path: Path) -> None:
    assert load(tmp_path).context is None


@every
@given(st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(exclude_categories=["Cs"])))
def test_a_span_holds_exactly_the_value_of_its_field(first: str, second: str) -> None:
    text, spans = Template("Q: {first}{{{second}}}\n{first}!").render_with_spans({"first": first, "second": second})
    assert text == f"Q: {first}{{{second}}}\n{first}!"
    assert {name: text[slice(*span)] for name, span in spans.items()} == {"first": first, "second": second}
    assert text[spans["first"][1] :] == "!"


@pytest.mark.parametrize(
    ("choice", "delimiter", "answer", "reference"),
    [
        (" {choice}", " ", " b", "b"),
        ("\n{choice}", "\n", "\nb", "b"),
        (r"\n{choice}", "\n", "\nb", "b"),
        ("{choice}", "", "b", "b"),
        (" Answer: {choice}.", " Answer: ", " Answer: b.", "b."),
        ("{{{choice}}}", "{", "{b}", "b}"),
    ],
)
def test_the_reference_is_the_answer_without_its_delimiter(
    choice: str, delimiter: str, answer: str, reference: str, tmp_path: Path
) -> None:
    example = load(tmp_path, choice=choice)
    assert (example.delimiter, example.answer, example.reference) == (delimiter, answer, reference)
    assert example.choices[1] == answer


def test_only_the_delimiter_is_taken_from_an_answer_that_begins_like_it() -> None:
    assert Example("1", "p", "  b", delimiter=" ").reference == " b"
    assert Example("1", "p", "b", delimiter=" ").reference == "b"
