"""Prompts in a tokenizer's chat template, with a date that does not change from day to day.

Templates such as those of Llama 3.2 Instruct and SmolLM3 print today's date. Prompts, cache keys and results would then
change at midnight.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

PINNED_TIME = datetime(2024, 7, 26)
CHAT_TEMPLATE_DATE = "26 Jul 2024"  # the default in Llama's own templates, where nothing gives a date
DIRECTIVES = "aAbBcdDeFGHIjmMpSTuUVwWxXyYzZ"  # of strftime, without %%
NUMBERS = "dHIjmMSUWy"  # directives that `-` strips of leading zeros
STAND_IN = "\ue000answer\ue000"  # what no template treats specially: characters for private use


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """Returns a prompt as a user message in the chat template, with the opening of an answer; see `render_messages`.

    Raises:
        ValueError: if the template has an error, or refuses the message.
    """
    try:
        return render_messages(tokenizer, [("user", prompt)], opens_answer=True)
    except TemplateError as error:
        raise ValueError(
            f"The chat template must render a single message of the user, got {type(error).__name__}: "
            f"{str(error).rstrip('.')}. Correct the tokenizer's chat template, or set model.chat_template=false."
        ) from error


class Exchange(NamedTuple):
    """One answer of the assistant in a conversation, as text.

    Attributes:
        prompt: the conversation until then, with the opening of the answer.
        answer: the answer.
        end: what the template puts at the end of an answer, such as `<|im_end|>`; may be empty.
    """

    prompt: str
    answer: str
    end: str


def render_exchanges(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[str, str]], row_id: str
) -> list[Exchange]:
    """Returns each answer of a conversation with what a model reads before it.

    Every answer is rendered as the last turn of a conversation, as a model will give it. What the template puts between
    its opening and the answer (a space, an empty block of thoughts) belongs to the prompt.

    Args:
        tokenizer: a tokenizer with a chat template.
        turns: (role, content) of each turn.
        row_id: names the row in messages.

    Raises:
        ValueError: if the template refuses the conversation, or changes an answer, or does not begin it with the
            opening that it gives for generation.
    """
    try:
        return [
            _render_exchange(tokenizer, turns[: index + 1])
            for index, (role, _) in enumerate(turns)
            if role == "assistant"
        ]
    except (TemplateError, TypeError, ValueError) as error:
        raise ValueError(
            f"The model's chat template cannot render the conversation of the row {row_id!r}, got {error}. Correct or "
            "remove such rows, use another chat template, or set dataset.prompt and dataset.answer_field."
        ) from error


def _render_exchange(tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[str, str]]) -> Exchange:
    opening = render_messages(tokenizer, turns[:-1], opens_answer=True)
    shown = render_messages(tokenizer, turns)
    if not shown.startswith(opening):
        raise ValueError(f"a turn of the assistant that does not begin with its opening, {opening[-40:]!r}")
    answer = turns[-1][1]
    if not shown.startswith(answer, len(opening)):
        opening = render_messages(tokenizer, [*turns[:-1], ("assistant", STAND_IN)]).partition(STAND_IN)[0]
    if not shown.startswith(opening + answer):
        raise ValueError(f"another text for the answer {answer[:40]!r}")
    return Exchange(opening, answer, shown[len(opening) + len(answer) :].rstrip())


def render_messages(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[str, str]], opens_answer: bool = False
) -> str:
    """Returns a conversation, (role, content) per turn, in the chat template.

    A template reads `CHAT_TEMPLATE_DATE` as `date_string`, and `PINNED_TIME` from `strftime_now`.

    Args:
        tokenizer: a tokenizer with a chat template.
        turns: the conversation.
        opens_answer: end with the opening of an answer.
    """
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        template = _pinned_strftime() + template
    text: str = tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in turns],
        chat_template=template,
        tokenize=False,
        add_generation_prompt=opens_answer,
        date_string=CHAT_TEMPLATE_DATE,
    )
    return text


def _pinned_strftime() -> str:
    """Returns a Jinja macro `strftime_now`, which hides the function that transformers gives to templates.

    An argument of `apply_chat_template` cannot hide it: transformers lets no functions through. The newline at the end
    is part of the macro's tag (`trim_blocks`), so that the template starts at the start of a line, as it did.
    """
    values = {f"%{directive}": PINNED_TIME.strftime(f"%{directive}") for directive in DIRECTIVES}
    values |= {f"%-{directive}": values[f"%{directive}"].lstrip("0") or "0" for directive in NUMBERS}
    replaced = "".join(f"|replace({directive!r}, {value!r})" for directive, value in values.items())
    return (
        "{%- macro strftime_now(format) -%}"
        "{%- for piece in format.split('%%') -%}{{- '' if loop.first else '%' -}}{{- piece" + replaced + " -}}"
        "{%- endfor -%}{%- endmacro %}\n"
    )
