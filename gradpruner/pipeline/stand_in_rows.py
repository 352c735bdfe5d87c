"""Rows of about the right number and lengths, for dry runs where a published dataset cannot be read or is large.

A dry run needs counts and lengths. Tokenizing tens of thousands of rows takes minutes, and a dataset of the Hub needs a
network; both are known well enough from `gradpruner.tasks.published_sizes`.
"""

import itertools
import logging
import math

from gradpruner.encoding import TrainingRow
from gradpruner.evaluate.base import Question
from gradpruner.messages import warn_once
from gradpruner.models.hub import use_cache_without_hub
from gradpruner.pipeline.setup import Setup
from gradpruner.tasks import DataError, Example, Task
from gradpruner.tasks.published_sizes import SIZES, TOKENIZER, PublishedSize

logger = logging.getLogger(__name__)

MOST_READ = 4_000  # rows of a split that a dry run reads and tokenizes
STAND_IN = "stand-ins"
TOKEN = 100  # an ordinary token of every tokenizer here


def use_stand_in_rows(setup: Setup) -> None:
    """Puts stand-ins in place of rows that a dry run of `setup` cannot or need not read, and warns of it.

    Raises:
        DataError: as `Task.load` does, if the rows are to be read.
    """
    known = vars(setup)  # where cached properties are looked for first
    count = _stand_in_count(setup.task, "train", setup.seed)
    if count is not None:
        known["train_examples"] = _examples(setup.task, count, "train")
        known["rows"] = _rows(setup.task, count)
        known["rows_hash"] = f"{STAND_IN} for {count} rows of {setup.task.name}, seed {setup.seed}"
    test_count = _stand_in_count(setup.tested_task, "test", setup.seed)
    if test_count is not None:
        known["test_examples"] = _examples(setup.tested_task, test_count, "test")
        known["questions"] = _questions(setup.tested_task, known["test_examples"])
    if setup.recovery_task is not None:
        recovery_count = _stand_in_count(setup.recovery_task, "train", setup.seed)
        if recovery_count is not None:
            known["recovery_rows"] = _rows(setup.recovery_task, recovery_count)


def has_stand_in_rows(setup: Setup) -> bool:
    """Returns whether the training rows are stand-ins."""
    return str(vars(setup).get("rows_hash", "")).startswith(STAND_IN)


def _stand_in_count(task: Task, split: str, seed: int) -> int | None:
    """Returns how many stand-ins a split needs, or None if its rows are to be read."""
    size = SIZES.get(task.name)
    if size is None or task.source not in ("hub", "packaged"):
        return None
    count = _num_drawn(task, size, split)
    if count == 0:  # there is no such split, as reading it will say
        return None
    if count > MOST_READ:
        reason = f"has more than {MOST_READ:,} rows"
    elif task.source == "packaged":
        return None
    else:
        try:
            task.load(split, seed)
        except DataError:
            if use_cache_without_hub() is None:
                raise
            reason = "cannot be read without the Hub"
        else:
            return None
    warn_once(
        logger,
        f"The {split} split of {task.name} {reason}: this dry run takes the published number of rows ({count:,} of "
        f"them), and lengths of a sample by {TOKENIZER}, so that counts of tokens are estimates.",
    )
    return count


def _num_drawn(task: Task, size: PublishedSize, split: str) -> int:
    """Returns how many rows of a split `Task.load` draws."""
    available = size.num_train if split == "train" else size.num_test
    if task.validation_fraction is not None:
        held_out = round(task.validation_fraction * size.num_train)
        available = held_out if split == "test" else size.num_train - held_out
    wanted = task.max_train_samples if split == "train" else task.max_test_samples
    count = available if wanted is None else min(wanted, available)
    if split == "train" and task.train_fraction is not None and count:
        count = max(1, round(task.train_fraction * count))
    return count


def _rows(task: Task, count: int) -> list[TrainingRow]:
    """Returns rows with the mean length of the dataset, one of them as long as the longest."""
    size = SIZES[task.name]
    longest = _row(min(size.longest, task.max_length), size.longest_answer)
    usual = min(size.tokens, task.max_length)
    short, long = _row(math.floor(usual), round(size.answer_tokens)), _row(math.ceil(usual), round(size.answer_tokens))
    num_long = round((usual - math.floor(usual)) * (count - 1))
    return [longest, *itertools.repeat(long, num_long), *itertools.repeat(short, count - 1 - num_long)]


def _row(length: int, num_answer_tokens: int) -> TrainingRow:
    return TrainingRow((TOKEN,) * length, min(num_answer_tokens, length - 1))


def _examples(task: Task, count: int, split: str) -> list[Example]:
    num_choices = SIZES[task.name].num_choices
    choices = tuple(f" {number}" for number in range(num_choices))
    label = 0 if choices else None
    answer = choices[0] if choices else " answer"
    return [Example(f"{split}-{index}", f"{split} row {index}", answer, choices, label) for index in range(count)]


def _questions(task: Task, examples: list[Example]) -> list[Question]:
    size = SIZES[task.name]
    answer = [TOKEN] * round(size.answer_tokens)
    prompt = [TOKEN] * max(1, round(min(size.tokens, task.max_length)) - len(answer))
    return [Question(example, prompt, [answer] * max(1, size.num_choices)) for example in examples]
