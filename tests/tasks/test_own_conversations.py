"""Rows of own data that are conversations, before any chat template: which turns they have."""

import json
from pathlib import Path
from typing import Any

import pytest

from gradpruner.tasks import ChatExample, DataError, Example, JsonLines, fingerprint
from gradpruner.tasks.example import Turn

TURNS = (Turn("user", "Why?"), Turn("assistant", "So."))


def load(folder: Path, row: dict[str, Any], **settings: Any) -> Example:
    (folder / "a.jsonl").write_text(json.dumps(row))
    data = JsonLines(train_file=str(folder / "a.jsonl"), test_file="b.jsonl", **settings)
    assert data.holds_conversations
    [example] = data.load("train", seed=0)
    return example


def said(*turns: tuple[Any, Any], keys: tuple[str, str] = ("role", "content")) -> list[dict[str, Any]]:
    return [dict(zip(keys, turn, strict=True)) for turn in turns]


SHAREGPT = said(("human", "Why?"), ("gpt", "So."), keys=("from", "value"))
OPENAI = said(("user", "Why?"), ("assistant", "So."))


@pytest.mark.bad_input("Own data", "{what}", "a conversation in the model's chat template")
@pytest.mark.parametrize(
    ("what", "row", "turns"),
    [
        ("OpenAI's `messages`", {"messages": OPENAI}, TURNS),
        ("ShareGPT's `conversations`", {"conversations": SHAREGPT}, TURNS),
        ("`conversations` with role and content", {"conversations": OPENAI}, TURNS),
        ("`messages` as JSON text, as in a CSV file", {"messages": json.dumps(OPENAI)}, TURNS),
        ("Alpaca's columns", {"instruction": "Why?", "input": "", "output": "So."}, TURNS),
        ("Alpaca's columns without input", {"instruction": "Why?", "output": "So."}, TURNS),
        (
            "Alpaca's columns with input and system",
            {"instruction": "Why?", "input": "x", "output": "So.", "system": "Be brief."},
            (Turn("system", "Be brief."), Turn("user", "Why?\n\nx"), TURNS[1]),
        ),
        (
            "ShareGPT's with a column `system`",
            {"conversations": SHAREGPT, "system": "Be brief."},
            (Turn("system", "Be brief."), *TURNS),
        ),
        ("a question after the last answer, left out", {"messages": [*OPENAI, *OPENAI[:1]]}, TURNS),
        (
            "text in parts",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}, OPENAI[1]]},
            TURNS,
        ),
    ],
)
def test_conversations(what: str, row: dict[str, Any], turns: tuple[Turn, ...], tmp_path: Path) -> None:
    example = load(tmp_path, row)
    assert isinstance(example, ChatExample) and example.turns == turns
    assert (example.answer, example.choices, example.label, example.id) == ("So.", (), None, "train-0")


def test_the_column_and_the_ids_may_have_other_names(tmp_path: Path) -> None:
    example = load(tmp_path, {"对话": {"轮": SHAREGPT}, "n": 7}, messages_field="对话.轮", id_field="n")
    assert isinstance(example, ChatExample) and (example.turns, example.id) == (TURNS, "7")


def test_every_turn_is_in_the_fingerprint(tmp_path: Path) -> None:
    rows = [said(("user", "a"), ("assistant", said_before), ("user", "b"), ("assistant", "c")) for said_before in "xy"]
    first, second = (load(tmp_path, {"messages": row}) for row in rows)
    assert fingerprint([first]) != fingerprint([second])


@pytest.mark.bad_input("Own data", "the conversation {row}")
@pytest.mark.parametrize(
    ("row", "match"),
    [
        (
            {"question": "?", "answer": "a"},
            r"there is no conversation \(messages, conversations, or instruction and output\), and dataset.prompt is "
            r"not set; columns found: question, answer",
        ),
        ({"messages": []}, r"a conversation must have a turn of the assistant that answers another, got no turns"),
        ({"messages": OPENAI[:1]}, r"a conversation must have a turn of the assistant that answers another, got user"),
        ({"messages": OPENAI[1:]}, r"a conversation must have a turn of the assistant that .*, got assistant"),
        ({"messages": "hello"}, r"column 'messages' must be a list, got the text 'hello', which is no list"),
        ({"messages": {"a": 1}}, r"column 'messages' must be a list of turns, got dict"),
        ({"messages": None}, r"column 'messages' is null"),
        ({"messages": ["Why?"]}, r"column 'messages'\[0\] must have role and content, or from and value, got str"),
        (
            {"messages": [{"role": "user", "text": "a"}]},
            r"column 'messages'\[0\] must have role and content, .*got role, text",
        ),
        (
            {"messages": said(("tool", "a"))},
            r"column 'messages'\[0\] must be of system, user .* or assistant .*, got role='tool'",
        ),
        ({"conversations": said((None, "a"))}, r"column 'conversations'\[0\] must be of system, .*, got role=None"),
        ({"messages": said(("user", " "))}, r"column 'messages'\[0\].content is empty"),
        ({"messages": said(("user", None))}, r"column 'messages'\[0\].content must be text, got null"),
        ({"messages": said(("user", 3))}, r"column 'messages'\[0\].content must be text, got int"),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]},
            r"column 'messages'\[0\] must be text, got tool calls",
        ),
        (
            {"messages": [{"role": "assistant", "content": "a", "weight": 0}]},
            r"column 'messages'\[0\] has weight 0; a turn of the assistant without loss is not supported",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            r"column 'messages'\[0\] must be text, got parts that are not",
        ),
        ({"instruction": "Why?", "output": ""}, r"column 'output' is empty"),
        ({"instruction": "Why?", "output": None}, r"column 'output' is null"),
        ({"instruction": "Why?", "input": ["x"], "output": "a"}, r"column 'input' must be text or a number, got list"),
    ],
)
def test_rows_that_are_no_conversation(row: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"a.jsonl:1: {match}"):
        load(tmp_path, row)
