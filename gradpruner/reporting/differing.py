"""In what settings differ: as `key=value`, and in plain words for pages."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gradpruner.files import content_hash
from gradpruner.reporting.plain_names import UNSHOWN, plain_setting

LONGEST_TEXT = 40  # characters of a setting in a title


def differences(own: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns, as `key=value`, the settings of `own` that any of `others` does not share."""
    flat, *rest = (dict(_leaves(each)) for each in [own, *others])
    return [
        f"{key.rsplit('.', 1)[-1]}={_short(value)}"
        for key, value in flat.items()
        if any(other.get(key) != value for other in rest)
    ]


def plain_differences(own: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns what `differences` does in plain words, without settings that are null.

    Settings that are not shown, such as prompts and paths, are numbered among the `others`.
    """
    found: dict[str, None] = {}
    flat = [dict(_leaves(each)) for each in others]
    for key, value in _leaves(own):
        values = list(dict.fromkeys(json.dumps(other.get(key)) for other in flat))
        if len(values) < 2 or value is None:
            continue
        name = key.rsplit(".", 1)[-1]
        number = f" {values.index(json.dumps(value)) + 1}" if name in UNSHOWN else ""
        found[plain_setting(name, value) + number] = None
    return list(found)


def _short(value: Any) -> Any:
    """Returns a hash in place of texts such as prompts, which are long or have line breaks."""
    is_text = isinstance(value, str) and (len(value) > LONGEST_TEXT or "\n" in value)
    return f"#{content_hash(value)[:6]}" if is_text else value


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
