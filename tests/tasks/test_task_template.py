import unicodedata

import pytest

from gradpruner.tasks.columns import DataError, RowError
from gradpruner.tasks.template import Template


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Question: {question}\nAnswer:", "Question: Why {not}?\nAnswer:"),
        ("{doc.title} ({doc.year})", "A title (1999)"),
        ("{{question}}", "{question}"),
        ("{{{question}}}", "{Why {not}?}"),
        ("{question}{question}", "Why {not}?Why {not}?"),
        ("100 % $x", "100 % $x"),
    ],
)
def test_render(text: str, expected: str) -> None:
    values = {"question": "Why {not}?", "doc": {"title": "A title", "year": 1999}}
    assert Template(text).render(values) == expected


def test_fields_are_listed_once_in_order() -> None:
    assert Template("{b} {a.c} {b} {{d}}").fields == ("b", "a.c")


@pytest.mark.parametrize("text", ["{", "}", "{question", "a } b", "{a{b}c}"])
def test_lone_brace(text: str) -> None:
    with pytest.raises(DataError, match=r"lone '[{}]' at character \d+, got .* Write \{\{ or \}\}"):
        Template(text)


@pytest.mark.parametrize("field", ["", " "])
def test_a_field_has_a_name(field: str) -> None:
    with pytest.raises(DataError, match=r"A template field must be the name of a column, got '\{ ?\}' in"):
        Template("{" + field + "}")


COLUMNS = {
    **{"问题": 1, "réponse n° 1": 2, "a.b": 3, "a-b": 4, "Ответ (да/нет)?": 5, "0": 6, "x[0]": 7, "naïve": 8},
    "a": {"b": 30, "c": [{"d": 31}, {"d": 32}], "e.f": {"g": 33}},
    "none": [],
}


@pytest.mark.bad_input(
    "Own data",
    "the field `{{{field}}}` in a prompt, of the columns 问题, `a.b`, a: {{b, c: [...]}}, ...",
    "the value of that column",
)
@pytest.mark.parametrize(
    ("field", "expected"),
    [
        *[("问题", 1), ("réponse n° 1", 2), ("a.b", 3), ("a-b", 4), ("Ответ (да/нет)?", 5), ("0", 6), ("x[0]", 7)],
        *[("a.c[0].d", 31), ("a.c[-1].d", 32), ("a.e.f.g", 33), (unicodedata.normalize("NFD", "naïve"), 8)],
    ],
)
def test_names_in_any_script_and_nested_values(field: str, expected: int) -> None:
    assert Template("{" + field + "}").render(COLUMNS) == str(expected)


@pytest.mark.bad_input("Own data", "the field `{{{field}}}` in a prompt, which no column has")
@pytest.mark.parametrize(
    ("field", "match"),
    [
        ("问", r"template field \{问\} is unknown; known: 问题, réponse n° 1, .*none \(an empty list\)"),
        ("none[0]", r"template field \{none\[0\]\} is unknown; known: .*none \(an empty list\)"),
        *[
            (field, r"is unknown; known: ")
            for field in ("a..b", "a.", ".a", "a.c[2].d", "a!r", "a:>3", "a.c.d", "a[0]")
        ],
    ],
)
def test_names_that_no_column_has(field: str, match: str) -> None:
    with pytest.raises(RowError, match=match):
        Template("{" + field + "}").render(COLUMNS)


def test_attributes_are_out_of_reach() -> None:
    with pytest.raises(RowError, match=r"\{question.__class__\} is unknown; known: question"):
        Template("{question.__class__}").render({"question": "x"})


def test_not_text() -> None:
    with pytest.raises(DataError, match=r"must be text, got 3\. Write it as a quoted string"):
        Template(3)  # type: ignore[arg-type]


def test_check_fields() -> None:
    Template("{question}").check_fields(["question", "x"], "dataset.prompt")
    with pytest.raises(
        DataError, match=r"dataset.prompt has the unknown field \{queston\}.*Known: \{question\}, \{goal\}"
    ):
        Template("{queston}").check_fields(["question", "goal"], "dataset.prompt")
    with pytest.raises(DataError, match="did you mean 'question'"):
        Template("{queston}").check_fields(["question", "goal"], "dataset.prompt")
    with pytest.raises(DataError, match=r"dataset.prompt has no field.*got 'Answer:'. Use \{question\}"):
        Template("Answer:").check_fields(["question"], "dataset.prompt")


def test_render_errors() -> None:
    values = {"question": "x", "doc": {"title": "t"}, "tags": ["a"], "none": None}
    with pytest.raises(
        RowError, match=r"\{doc.titel\} is unknown; known: question, doc.title, .*did you mean 'doc.title'"
    ):
        Template("{doc.titel}").render(values)
    values |= {"nan": float("nan"), "infinite": float("-inf")}
    refused = [
        ("tags", "list"),
        ("none", "null"),
        ("doc", "dict"),
        ("nan", "nan"),
        ("infinite", "-inf"),
    ]
    for name, found in refused:
        with pytest.raises(RowError, match=rf"\{{{name}\}} must be text or a number, got {found}"):
            Template("{" + name + "}").render(values)


@pytest.mark.bad_input("Own data", "numbers and booleans in a prompt", "their spelling in JSON")
def test_numbers_and_booleans_are_written_as_in_json() -> None:
    values = {"i": 7, "f": 0.5, "yes": True, "no": False}
    assert Template("{i} {f} {yes} {no}").render(values) == "7 0.5 true false"


def test_a_line_break_survives_the_command_line():
    assert Template(r"Question: {question}\nAnswer:").render({"question": r"C:\new?"}) == "Question: C:\\new?\nAnswer:"


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(
        RowError, match=r"template field \{doc.title\} holds half of a surrogate pair, which is not valid"
    ):
        Template("{doc.title}").render({"doc": {"title": "\ud83d"}})
    assert Template("{x}").render({"x": "\U0001f600"}) == "\U0001f600"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{choice}", ""),
        (" {choice}", " "),
        (r"\n{choice}", "\n"),
        ("{{ {choice} {choice}", "{ "),
        ("Answer: {a.b}.", "Answer: "),
        ("no field", "no field"),
    ],
)
def test_literal_prefix_is_the_text_before_the_first_field(text, expected):
    assert Template(text).literal_prefix == expected
