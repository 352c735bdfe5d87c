"""From rendered examples to token batches: chat template, truncation, the loss mask, and left padding."""

import logging
import random
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gradpruner.models.chat_template import render_exchanges, render_prompt
from gradpruner.tasks import ChatExample, DataError, Example

logger = logging.getLogger(__name__)

IGNORED = -100  # label without loss, as in torch's cross_entropy and in transformers
Batch = dict[str, Tensor]
# Put before a completion that is encoded on its own, and cut off again; see `_encode_apart`.
GUARDS = ("", "\n", ".", ":", "-", "a", "0", "\n\n", "x.")


@dataclass(frozen=True)
class TrainingRow:
    """One tokenized training example.

    Attributes:
        input_ids: prompt, answer and end-of-sequence.
        num_answer_tokens: number of tokens at the end that carry loss.
        gaps: (start, end), in tokens of the row, of what carries none among these: the user's turns between answers.
    """

    input_ids: tuple[int, ...]
    num_answer_tokens: int
    gaps: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Encoded:
    """One tokenized example.

    Attributes:
        prompt: ids of the prompt, shortened if it was too long.
        completions: ids of each completion.
        is_shortened: whether the prompt lost tokens of its context.
    """

    prompt: list[int]
    completions: list[list[int]]
    is_shortened: bool


@dataclass(frozen=True)
class Encoder:
    """Encoder of examples as tokens, the same in training and in evaluation.

    Attributes:
        tokenizer: any Hugging Face tokenizer; its own special tokens (such as a BOS) are added.
        max_length: tokens of prompt and completion together.
        chat_template: put prompts into the tokenizer's chat template, as a user message; completions then lose their
            delimiter. Conversations (`ChatExample`) need it. A template that prints today's date prints
            `models.chat_template.CHAT_TEMPLATE_DATE` instead.

    Raises:
        ValueError: if a chat template is asked for and the tokenizer has none.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    chat_template: bool = False

    def __post_init__(self) -> None:
        """Checks that there is a chat template if one is asked for."""
        if self.chat_template and not self.tokenizer.chat_template:
            raise ValueError(
                "model.chat_template=true needs a tokenizer with a chat template, as do rows that are conversations; "
                "this model's has none. Use the instruct version of the model, or put a chat_template.jinja into its "
                "folder. Without one, set model.chat_template=false, or dataset.prompt and dataset.answer_field."
            )

    def encode(
        self,
        examples: Sequence[Example],
        completions: Sequence[Sequence[str]],
        reserve: int | None = None,
        extra: int = 0,
    ) -> list[Encoded | None]:
        """Tokenizes examples; a prompt that is too long loses tokens from the end of its context.

        Args:
            examples: examples to encode.
            completions: the completions of each example, one or more.
            reserve: tokens to reserve for a completion; None: as many as the example's longest completion has.
            extra: further tokens to reserve, such as for the end of sequence.

        Returns:
            One `Encoded` per example; None where the prompt would not fit even with its context cut to one token.

        Raises:
            DataError: if a completion has no tokens: its log-likelihood would be 0.0, above that of any text.
        """
        framed = [self._frame(example) for example in examples]
        prompts = [text for (text, _), texts in zip(framed, completions, strict=True) for _ in texts]
        flat = [
            text.removeprefix(example.delimiter) if self.chat_template else text
            for example, texts in zip(examples, completions, strict=True)
            for text in texts
        ]
        pairs = iter(split_tokens(self.tokenizer, prompts, flat, add_special_tokens=not self.chat_template))
        encoded: list[Encoded | None] = []
        for example, (text, context), texts in zip(examples, framed, completions, strict=True):
            own = [next(pairs) for _ in texts]
            prompt, ids = own[0][0], [completion for _, completion in own]
            _check_tokens(example, texts, ids)
            room = self.max_length - extra - (max(map(len, ids)) if reserve is None else reserve)
            shortened = prompt if len(prompt) <= room else self._shorten(text, context, prompt, room)
            encoded.append(None if shortened is None else Encoded(shortened, ids, len(shortened) < len(prompt)))
        num_shortened = sum(row is not None and row.is_shortened for row in encoded)
        if num_shortened:
            logger.warning(
                "%d of %d prompts were shortened in their context to fit %d tokens",
                *(num_shortened, len(examples), self.max_length),
            )
        return encoded

    def _frame(self, example: Example) -> tuple[str, tuple[int, int] | None]:
        """Returns the prompt as the model reads it, and where its context is."""
        if not self.chat_template:
            return example.prompt, example.context
        if isinstance(example, ChatExample):
            return render_exchanges(self.tokenizer, example.turns, example.id)[-1].prompt, None
        text = render_prompt(self.tokenizer, example.prompt)
        core = example.prompt.strip()  # templates may strip a message
        start = text.rfind(core)
        if example.context is None or start < 0:
            return text, None
        shift = start - (len(example.prompt) - len(example.prompt.lstrip()))
        return text, (max(start, example.context[0] + shift), min(start + len(core), example.context[1] + shift))

    def _shorten(self, text: str, context: tuple[int, int] | None, prompt: list[int], room: int) -> list[int] | None:
        """Returns the prompt without the last tokens that lie wholly in its context, or None if these are too few."""
        if context is None or not self.tokenizer.is_fast:
            return None
        offsets = self.tokenizer(
            text.rstrip(" "), return_offsets_mapping=True, add_special_tokens=not self.chat_template
        ).offset_mapping
        inside = [index for index, (start, end) in enumerate(offsets) if context[0] <= start < end <= context[1]]
        excess = len(prompt) - room
        if excess >= len(inside):
            return None
        first = inside[-excess]
        while first > inside[0] and offsets[first][0] == offsets[first - 1][0]:
            first -= 1  # several tokens make one character: remove all of them
        return prompt[:first] + prompt[inside[-1] + 1 :]


def split_tokens(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    completions: Sequence[str],
    add_special_tokens: bool = True,
) -> list[tuple[list[int], list[int]]]:
    """Returns the token ids of every prompt and the ids of its completion.

    Prompt and completion are encoded as one text and split where the prompt alone ends: encoded separately, the
    completion would have other tokens than in running text. Where a token spans the join, the ids of the whole do not
    start with those of the prompt, and the completion is encoded on its own; both as lm-evaluation-harness does. The
    prompt always has the ids that it has alone. Spaces at the end of a prompt go to the completion, where BPE
    vocabularies keep them. Ids that the tokenizer appends to every text, such as an EOS, are removed.

    Args:
        tokenizer: any Hugging Face tokenizer.
        prompts: rendered prompts.
        completions: one completion for each prompt.
        add_special_tokens: add the tokenizer's own special tokens, such as a BOS.

    Returns:
        (prompt ids, completion ids) for each pair; neither is empty unless the tokenizer has no tokens for the text of
        the completion.
    """
    if not prompts:
        return []
    stripped = [prompt.rstrip(" ") for prompt in prompts]
    moved = [prompt[len(short) :] for prompt, short in zip(prompts, stripped, strict=True)]
    texts = [spaces + completion for spaces, completion in zip(moved, completions, strict=True)]
    appended = _appended_ids(tokenizer) if add_special_tokens else []

    def encode(whole_texts: list[str]) -> list[list[int]]:
        every: list[list[int]] = tokenizer(whole_texts, add_special_tokens=add_special_tokens).input_ids
        return [ids[: -len(appended)] if appended and ids[-len(appended) :] == appended else ids for ids in every]

    unique = list(dict.fromkeys(stripped))  # the options of a question share its prompt
    alone = dict(zip(unique, encode(unique), strict=True))
    wholes = encode([short + text for short, text in zip(stripped, texts, strict=True)])
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    pairs = []
    for short, text, whole in zip(stripped, texts, wholes, strict=True):
        prompt = alone[short]
        completion = whole[len(prompt) :]
        if text and (whole[: len(prompt)] != prompt or not completion):
            completion = _encode_apart(tokenizer, prompt, text, whole)
        # The model needs a token before the first answer token to predict it.
        pairs.append((prompt or [start], completion))
    return pairs


def _appended_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the ids that the tokenizer's template puts after a text, such as an EOS."""
    text, framed = (tokenizer("a", add_special_tokens=framed).input_ids for framed in (False, True))
    starts = range(len(framed) - len(text) + 1) if text else ()
    ends = [start + len(text) for start in starts if framed[start : start + len(text)] == text]
    appended: list[int] = framed[ends[0] :] if ends else []
    return appended


def _encode_apart(tokenizer: PreTrainedTokenizerBase, prompt: list[int], text: str, whole: list[int]) -> list[int]:
    """Returns the ids of a completion whose first characters share a token with the end of the prompt.

    SentencePiece-like tokenizers put a space before every text, which would come between prompt and completion. There
    the completion is encoded after a guard, whose ids are cut off.

    Args:
        tokenizer: the tokenizer of the prompt.
        prompt: ids of the prompt.
        text: text of the completion.
        whole: ids of prompt and completion as one text, to compare the result with.
    """

    def read(ids: list[int]) -> str:  # normalised, because tokenizers normalise across the join
        return unicodedata.normalize("NFKC", tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    for guard in GUARDS:
        front = tokenizer(guard, add_special_tokens=False).input_ids
        ids: list[int] = tokenizer(guard + text, add_special_tokens=False).input_ids
        own = ids[len(front) :]
        if own and ids[: len(front)] == front and read(prompt + own) == read(whole):
            return own
    plain: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return plain


def _check_tokens(example: Example, texts: Sequence[str], completions: Sequence[Sequence[int]]) -> None:
    """Raises DataError if a completion has no tokens."""
    for number, (text, ids) in enumerate(zip(texts, completions, strict=True), 1):
        if not ids:
            what = f"option {number} of {len(texts)}" if len(texts) > 1 else "the answer"
            raise DataError(
                f"Every option and answer must have at least one token, got none for {what}, {text!r}, of the row "
                f"{example.id!r}. Correct or remove this row, or check dataset.choice."
            )


def encode_training_rows(examples: Sequence[Example], encoder: Encoder) -> list[TrainingRow]:
    """Tokenizes examples for completion-only training.

    Rows that do not fit, even with their context shortened, are skipped; the log says how many.

    Raises:
        DataError: if no row fits.
    """
    encoded = encoder.encode(examples, [(example.answer,) for example in examples], extra=1)
    eos = encoder.tokenizer.eos_token_id
    rows = [
        None if row is None else TrainingRow((*row.prompt, *row.completions[0], eos), len(row.completions[0]) + 1)
        for row in encoded
    ]
    return without_too_long(rows, encoder.max_length)


def without_too_long(rows: Sequence[TrainingRow | None], max_length: int) -> list[TrainingRow]:
    """Returns the rows of at most `max_length` tokens, or raises DataError; the log says how many do not fit.

    A None among the rows stands for one that is known not to fit.
    """
    fitting = [row for row in rows if row is not None and len(row.input_ids) <= max_length]
    if not fitting:
        raise DataError(
            f"No training row fits into dataset.max_length={max_length} tokens, got {len(rows)} that are longer. Raise "
            "dataset.max_length."
        )
    if len(fitting) < len(rows):
        logger.warning(
            "%d of %d training rows left out: they have more than %d tokens outside of any context",
            *(len(rows) - len(fitting), len(rows), max_length),
        )
    return fitting


def collate(rows: Sequence[TrainingRow], pad_token_id: int) -> Batch:
    """Pads rows on the left, so that answers end together and only the last columns need logits.

    Returns:
        `input_ids`, `attention_mask` and `labels` (-100 = no loss), each (B, T) int64.
    """
    length = max(len(row.input_ids) for row in rows)
    input_ids = torch.full((len(rows), length), pad_token_id)
    attention_mask = torch.zeros((len(rows), length), dtype=torch.int64)
    labels = torch.full((len(rows), length), IGNORED)
    for index, row in enumerate(rows):
        ids = torch.tensor(row.input_ids)
        input_ids[index, -len(ids) :] = ids
        attention_mask[index, -len(ids) :] = 1
        labels[index, -row.num_answer_tokens :] = ids[-row.num_answer_tokens :]
        for start, end in row.gaps:
            labels[index, length - len(ids) + start : length - len(ids) + end] = IGNORED
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def position_ids(attention_mask: Tensor) -> Tensor:
    """Returns positions counted over real tokens only, (B, T), so that padding does not change the result of a row."""
    return (attention_mask.cumsum(dim=-1) - 1).clamp_min(0)


def trim_to_answers(batch: Batch) -> dict[str, Any]:
    """Returns model inputs with which logits are computed only where there is loss.

    With answers aligned at the end, the columns before the first answer token of the batch need no logits. With a
    vocabulary of 49k tokens, these logits would take most of the memory of a step.

    Args:
        batch: `input_ids`, `attention_mask`, `labels`, each (B, T).

    Returns:
        The batch with `position_ids`, `labels` cut to their last k columns, and `logits_to_keep` = k.
    """
    labels = batch["labels"]
    has_loss = (labels != IGNORED).any(dim=0)  # (T,)
    first = int(has_loss.int().argmax())
    keep = min(labels.shape[1], labels.shape[1] - first + 1)  # the token before an answer predicts its first token
    return {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "position_ids": position_ids(batch["attention_mask"]),
        "labels": labels[:, -keep:],
        "logits_to_keep": keep,
    }


def training_batches(
    rows: Sequence[TrainingRow], batch_size: int, num_rows: int, pad_token_id: int, seed: int
) -> Iterator[Batch]:
    """Yields `num_rows` rows in batches, in the seeded order of a training run; starts again when the rows run out."""
    order: list[int] = []
    shuffler = random.Random(seed)
    while len(order) < num_rows:
        order.extend(shuffler.sample(range(len(rows)), len(rows)))
    for start in range(0, num_rows, batch_size):
        yield collate([rows[index] for index in order[start : min(start + batch_size, num_rows)]], pad_token_id)
