"""Warnings that only all rows of a run together allow: test rows that are trained on, and prompts with a second BOS."""

import logging
from collections.abc import Sequence

from gradpruner.encoding import Encoder, TrainingRow
from gradpruner.tasks import ChatExample, Example

logger = logging.getLogger(__name__)


def warn_of_leaked_rows(train: Sequence[Example], test: Sequence[Example]) -> None:
    """Warns if test rows are among the training rows: the same prompt and answer, up to case and spaces."""
    known = {_normalized(example) for example in train}
    leaked = [example.id for example in test if _normalized(example) in known]
    if leaked:
        listed = ", ".join(leaked[:5]) + (", ..." if len(leaked) > 5 else "")
        logger.warning(
            "%d of %d test rows are also training rows (the same prompt and answer): %s. Scores will be too good. "
            "Remove these rows from one of the two.",
            *(len(leaked), len(test), listed),
        )


def _normalized(example: Example) -> tuple[str, str]:
    prompt, answer = (" ".join(text.split()).casefold() for text in (example.prompt, example.answer))
    return prompt, answer


def warn_of_second_bos(examples: Sequence[Example], rows: Sequence[TrainingRow], encoder: Encoder) -> None:
    """Warns if prompts begin with a BOS of their own after the one of the tokenizer or of the chat template."""
    tokenizer = encoder.tokenizer
    bos, bos_id = tokenizer.bos_token, tokenizer.bos_token_id
    if bos is None:
        return
    if encoder.chat_template:
        count = sum(any(text.lstrip().startswith(bos) for text in _own_texts(example)) for example in examples)
    else:
        count = sum(row.input_ids[:2] == (bos_id, bos_id) for row in rows)
    if count:
        logger.warning(
            "%d of %d prompts begin with a second %s: %s adds one already. Remove it from dataset.prompt or your rows.",
            *(count, len(examples), bos, "the chat template" if encoder.chat_template else "the tokenizer"),
        )


def _own_texts(example: Example) -> list[str]:
    return [turn.content for turn in example.turns] if isinstance(example, ChatExample) else [example.prompt]
