"""Rows that are conversations: OpenAI's `messages`, ShareGPT's `conversations`, and Alpaca's three columns."""

from collections.abc import Mapping
from typing import Any

from gradpruner.tasks.columns import RowError, as_text, check_text, parse_list, take, take_text
from gradpruner.tasks.example import Turn

# Columns that hold a conversation, unless a setting names another.
TURN_COLUMNS = ("messages", "conversations", "conversation")
KEYS = (("role", "content"), ("from", "value"))  # of a turn
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}


def read_turns(columns: Mapping[str, Any], field: str | None = None) -> tuple[Turn, ...]:
    """Returns the conversation of a row, up to the last turn of the assistant, whose turns lose outer spaces.

    Args:
        columns: the row.
        field: column with the turns, `{role, content}` or `{from, value}` each. None: `messages` or `conversations`; in
            rows without them, `instruction`, `input` (may be missing or empty) and `output`. A column `system` with
            text comes first in the latter two.

    Raises:
        RowError: if the row holds no conversation with a turn of the assistant.
    """
    name = field or next((name for name in TURN_COLUMNS if name in columns), None)
    if name is not None:
        turns = _read_list(take(columns, name), f"column {name!r}")
    elif "instruction" in columns and "output" in columns:
        more = columns.get("input")
        parts = [take_text(columns, "instruction"), *([as_text(more, "column 'input'")] if more else [])]
        turns = [Turn("user", "\n\n".join(parts)), Turn("assistant", take_text(columns, "output").strip())]
    else:
        raise RowError(
            "there is no conversation (messages, conversations, or instruction and output), and dataset.prompt is not "
            f"set; columns found: {', '.join(map(str, columns)) or 'none'}"
        )
    system = columns.get("system")
    if name != "messages" and isinstance(system, str) and system.strip() and turns and turns[0].role != "system":
        turns.insert(0, Turn("system", check_text(system, "column 'system'")))
    last = max((index for index, turn in enumerate(turns) if turn.role == "assistant"), default=None)
    if not last:
        found = ", ".join(turn.role for turn in turns) or "no turns"
        raise RowError(f"a conversation must have a turn of the assistant that answers another, got {found}")
    return tuple(turns[: last + 1])


def _read_list(value: Any, what: str) -> list[Turn]:
    value = parse_list(value, what)
    if not isinstance(value, list | tuple):
        raise RowError(f"{what} must be a list of turns, got {type(value).__name__}")
    return [_read_turn(turn, f"{what}[{index}]") for index, turn in enumerate(value)]


def _read_turn(turn: Any, what: str) -> Turn:
    keys = next((keys for keys in KEYS if isinstance(turn, Mapping) and set(keys) <= set(turn)), None)
    if keys is None:
        found = ", ".join(map(str, turn)) if isinstance(turn, Mapping) else type(turn).__name__
        raise RowError(f"{what} must have role and content, or from and value, got {found or 'nothing'}")
    speaker, content = (turn[key] for key in keys)
    role = ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise RowError(f"{what} must be of system, user (human) or assistant (gpt), got {keys[0]}={speaker!r}")
    if role == "assistant" and turn.get("weight") == 0:
        raise RowError(f"{what} has weight 0; a turn of the assistant without loss is not supported")
    if isinstance(content, list | tuple):  # OpenAI's parts of a message
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise RowError(f"{what} must be text, got parts that are not")
        content = "".join(map(str, parts))
    if content is None and turn.get("tool_calls"):
        raise RowError(f"{what} must be text, got tool calls")
    text = check_text(content, f"{what}.{keys[1]}")
    return Turn(role, text.strip() if role == "assistant" else text)
