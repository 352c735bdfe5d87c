"""Prompts in a tokenizer's chat template, with a date that does not change from day to day.

Templates such as those of Llama 3.2 Instruct and SmolLM3 print today's date. Prompts, cache keys and results would then
change at midnight.
"""

from datetime import datetime

from transformers import PreTrainedTokenizerBase

PINNED_TIME = datetime(2024, 7, 26)
CHAT_TEMPLATE_DATE = "26 Jul 2024"  # the default in Llama's own templates, where nothing gives a date
DIRECTIVES = "aAbBcdDeFGHIjmMpSTuUVwWxXyYzZ"  # of strftime, without %%
NUMBERS = "dHIjmMSUWy"  # directives that `-` strips of leading zeros


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """Returns a prompt as a user message in the chat template, with the opening of the answer.

    A template reads `CHAT_TEMPLATE_DATE` as `date_string`, and `PINNED_TIME` from `strftime_now`.
    """
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        template = _pinned_strftime() + template
    text: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        chat_template=template,
        tokenize=False,
        add_generation_prompt=True,
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
