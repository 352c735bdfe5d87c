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


@pytest.mark.parametrize("field", ["", "0", "a[0]", "a!r", "a:>3", "a b", "a..b", "a.", ".a", "a-b"])
def test_only_plain_names(field: str) -> None:
    with pytest.raises(DataError, match=r"must be a plain name or names joined by dots, got '\{"):
        Template("{" + field + "}")


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
    values = {"question": "x", "doc": {"title": "t"}, "tags": ["a"], "none": None, "flag": True}
    with pytest.raises(
        RowError, match=r"\{doc.titel\} is unknown; known: question, doc.title, .*did you mean 'doc.title'"
    ):
        Template("{doc.titel}").render(values)
    values |= {"nan": float("nan"), "infinite": float("-inf")}
    refused = [
        ("tags", "list"),
        ("none", "null"),
        ("flag", "bool"),
        ("doc", "dict"),
        ("nan", "nan"),
        ("infinite", "-inf"),
    ]
    for name, found in refused:
        with pytest.raises(RowError, match=rf"\{{{name}\}} must be text or a number, got {found}"):
            Template("{" + name + "}").render(values)


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
