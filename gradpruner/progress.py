"""How far work is: loops and stages say it here, and whoever shows it listens.

Without a listener a loop has a tqdm bar where the output is a terminal, and shows nothing in logs and pipes. A run of
`experiments` listens and shows one line for all of it.
"""

from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, Protocol, Self, TypeVar

from tqdm.auto import tqdm

from gradpruner import processes

T = TypeVar("T")


class Steps:
    """Counts the steps of a loop; a context manager.

    Args:
        description: what the loop does.
        unit: what it counts.
        total: number of steps; None where only the end shows it.
        done: steps that an earlier process did.
    """

    def __init__(self, description: str, unit: str, total: int | None = None, done: int = 0) -> None:
        self.description, self.unit, self.total, self.done, self.note = description, unit, total, done, ""
        self.first = done
        self._bar: tqdm[Any] | None = None

    def __enter__(self) -> Self:
        if _listeners:
            _listeners[-1].steps_change(self)
        elif processes.is_main():
            is_bytes = self.unit == "B"
            self._bar = tqdm(
                total=self.total,
                initial=self.done,
                desc=self.description,
                unit=self.unit,
                unit_scale=is_bytes,
                disable=None,  # where the output is no terminal
            )
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, count: int = 1, note: str = "") -> None:
        """Counts steps that are done; `note` is shown beside them until there is another one."""
        self.done, self.note = self.done + count, note or self.note
        if self._bar is not None:
            self._bar.set_postfix_str(self.note, refresh=False)
            self._bar.update(count)
        elif _listeners:
            _listeners[-1].steps_change(self)


class Listener(Protocol):
    """Shows how far a run is."""

    def stage_begins(self, name: str, stage_id: str) -> None:
        """Called when a stage starts to compute, after the stages that it needs."""

    def stage_ends(self, name: str, stage_id: str, seconds: float | None) -> None:
        """Called when a stage is done; `seconds` is None if it was in the cache."""

    def steps_change(self, steps: Steps) -> None:
        """Called when a loop begins and after each of its steps."""


_listeners: list[Listener] = []


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tells `listener` of all stages and loops of this process in this context, in place of bars."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def track(items: Iterable[T], description: str, unit: str) -> Iterator[T]:
    """Yields `items` and counts them."""
    with Steps(description, unit, len(items) if isinstance(items, Sized) else None) as steps:
        for item in items:
            yield item
            steps.advance()


def stage_begins(name: str, stage_id: str) -> None:
    """Tells the listener, if there is one, that a stage starts to compute."""
    if _listeners:
        _listeners[-1].stage_begins(name, stage_id)


def stage_ends(name: str, stage_id: str, seconds: float | None) -> None:
    """Tells the listener, if there is one, that a stage is done; `seconds` is None if it was in the cache."""
    if _listeners:
        _listeners[-1].stage_ends(name, stage_id, seconds)
