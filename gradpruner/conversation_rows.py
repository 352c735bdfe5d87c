"""Training rows out of conversations: one row per conversation, with loss on every turn of the assistant.

Each answer is tokenized as a completion of all that comes before it. It joins the row so far if its prompt begins with
that row, token by token, and starts a row of its own otherwise: a template may render earlier turns in another way than
the last (Qwen3 drops their thoughts), or a tokenizer may join characters across turns. So every answer is trained once,
after exactly what the model reads before it when it is asked.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from gradpruner.encoding import Encoder, TrainingRow, encode_training_rows, split_tokens, without_too_long
from gradpruner.models.chat_template import render_exchanges
from gradpruner.tasks import ChatExample, Example

logger = logging.getLogger(__name__)


@dataclass
class _Draft:
    """A row in the making: its ids, and where the answers are in it."""

    ids: list[int] = field(default_factory=list)
    answers: list[tuple[int, int]] = field(default_factory=list)

    def finish(self, eos_token_id: int) -> TrainingRow:
        """Returns the row, which ends in EOS, with the stretches between answers as gaps."""
        starts, ends = zip(*self.answers, strict=True)
        closing = [] if self.ids[-1] == eos_token_id else [eos_token_id]
        ids = (*self.ids, *closing)
        return TrainingRow(ids, len(ids) - starts[0], tuple(zip(ends[:-1], starts[1:], strict=True)))


def encode_rows(examples: Sequence[Example], encoder: Encoder) -> list[TrainingRow]:
    """Tokenizes examples for training with loss on answers alone; see `encode_training_rows` for all but conversations.

    Conversations that do not fit are left out; the log says how many.

    Raises:
        DataError: if no row fits.
        ValueError: if the chat template cannot render a conversation.
    """
    chats = [example for example in examples if isinstance(example, ChatExample)]
    if not chats:
        return encode_training_rows(examples, encoder)
    drafts = [draft for chat in chats for draft in _drafts(chat, encoder)]
    rows = [draft.finish(encoder.tokenizer.eos_token_id) for draft in drafts]
    fitting = without_too_long(rows, encoder.max_length)
    if len(rows) > len(chats):
        logger.info(
            "%d conversations make %d training rows: in some, earlier turns are rendered in another way than the last",
            *(len(chats), len(rows)),
        )
    return fitting


def _drafts(chat: ChatExample, encoder: Encoder) -> list[_Draft]:
    exchanges = render_exchanges(encoder.tokenizer, chat.turns, chat.id)
    prompts, answers = [each.prompt for each in exchanges], [each.answer + each.end for each in exchanges]
    drafts: list[_Draft] = []
    for prompt, answer in split_tokens(encoder.tokenizer, prompts, answers, add_special_tokens=False):
        if not drafts or prompt[: len(drafts[-1].ids)] != drafts[-1].ids:
            drafts.append(_Draft())
        draft = drafts[-1]
        draft.ids = prompt + answer
        draft.answers.append((len(prompt), len(draft.ids)))
    return drafts
