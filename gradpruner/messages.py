"""Pieces of messages: a few of many names, an error on one line, a warning that is given once."""

import logging
from collections.abc import Sequence
from functools import cache


def parameters(count: float) -> str:
    """Returns a number of parameters in millions, or in thousands where that would round to nothing."""
    return f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count / 1e3:.1f} k"


def duration(seconds: float) -> str:
    """Returns a time in the two units that say most, from hours down to seconds."""
    if seconds < 1:
        return "less than a second"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def first_few(names: Sequence[str], limit: int = 3) -> str:
    """Returns the first names, separated by commas, and how many more there are."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its class where it has no message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def one_line(error: BaseException) -> str:
    """Returns the class and the message of an error on one line, without a full stop at the end."""
    return " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")


@cache
def warn_once(logger: logging.Logger, message: str) -> None:
    """Logs a warning the first time in this process: a run reads its model several times."""
    logger.warning(message)
