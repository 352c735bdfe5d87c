"""Checks of settings for the whole package, with messages that say what to do."""

import difflib
from collections.abc import Iterable, Sequence

AUTO = "auto"  # value of settings that the run itself decides, such as `sparsity` and `steps`


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises ValueError if `value` is not one of `choices`; the message names setting, value and choices."""
    if value not in choices:
        raise ValueError(
            f"{name} must be one of {', '.join(choices)}, got {value!r}{guess(value, choices)}. Change {name}."
        )


def check_positive(method: object, *names: str) -> None:
    """Raises ValueError if one of these settings of a method is below 1."""
    for name in names:
        if getattr(method, name) < 1:
            raise ValueError(f"{name} must be 1 or more, got {getattr(method, name)}. Raise method.{name}.")


def check_above_zero(method: object, *names: str) -> None:
    """Raises ValueError if one of these settings of a method is 0 or below."""
    for name in names:
        if not getattr(method, name) > 0:
            raise ValueError(f"{name} must be above 0, got {getattr(method, name)}. Raise method.{name}.")


def guess(name: str, known: Iterable[str]) -> str:
    """Returns `" (did you mean 'x'?)"` for the nearest known name, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
