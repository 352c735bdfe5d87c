"""Prompts in chat templates that print the date, on two days."""

from datetime import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils import chat_template_utils

from gradpruner.encoding import Encoder
from gradpruner.models.chat_template import CHAT_TEMPLATE_DATE, DIRECTIVES, NUMBERS, PINNED_TIME, render_prompt
from gradpruner.models.spec import ModelSpec
from gradpruner.tasks import Example

MESSAGES = (
    "{% for m in messages %}\n  {%- if true %}[{{ m.role }}] {{ m.content }}\n  {% endif %}\n{% endfor %}"
    "{{ '[assistant]\n' }}"
)
# Shortened from the templates of the models.
TEMPLATES = {
    "llama 3.2": (
        "{{- bos_token }}\n{%- if not date_string is defined %}\n    {%- if strftime_now is defined %}\n"
        '        {%- set date_string = strftime_now("%d %b %Y") %}\n    {%- else %}\n'
        '        {%- set date_string = "26 Jul 2024" %}\n    {%- endif %}\n{%- endif %}\n'
        '{{- "Today Date: " + date_string + "\\n\\n" }}' + MESSAGES
    ),
    "smollm3": '{%- set today = strftime_now("%d %B %Y") -%}\n{{ "Today Date: " ~ today }}\n' + MESSAGES,
    "a date with a default": "{{ date_string | default('1 Jan 2020') }}\n" + MESSAGES,
    "in a macro": (
        "{% macro day(form) %}{{ strftime_now(format=form) }}{% endmacro %}\n{{ day('%A, %-d.%-m. 100%%d') }}\n"
        + MESSAGES
    ),
    "spaces before its first tag": "\n   {% if true %}\n x{{ strftime_now('%c') }}\n   {% endif %}\n" + MESSAGES,
    "no date": "{{ bos_token }}" + MESSAGES,
}
EXPECTED = {
    "llama 3.2": "<s>Today Date: 26 Jul 2024\n\n",
    "smollm3": "Today Date: 26 July 2024\n",
    "a date with a default": "26 Jul 2024\n",
    "in a macro": "Friday, 26.7. 100%d\n",
    "spaces before its first tag": "\n x" + datetime(2024, 7, 26).strftime("%c") + "\n",
    "no date": "<s>",
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    config = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    return ModelSpec("random:llama", config=config).load_tokenizer(tmp_path_factory.mktemp("assets"))


@pytest.fixture
def with_template(tokenizer, monkeypatch):
    """Returns a function that gives the tokenizer a chat template until the test ends."""

    def give(template):
        monkeypatch.setattr(tokenizer, "chat_template", template)
        return tokenizer

    return give


@pytest.fixture
def on_day(monkeypatch):
    """Returns a function that sets the day on which transformers renders templates."""

    def move(today):
        class Clock(datetime):
            @classmethod
            def now(cls, tz=None):
                return today

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)

    return move


def as_rendered_by_transformers(tokenizer, prompt):
    message = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_the_same_on_every_day(name, with_template, on_day):
    tokenizer = with_template(TEMPLATES[name])
    encoder = Encoder(tokenizer, 512, chat_template=True)
    seen, unpinned = [], []
    for day in (datetime(2026, 11, 26, 23, 59, 59), datetime(2031, 2, 3)):
        on_day(day)
        [row] = encoder.encode([Example("a", "Why?", " yes")], [(" yes",)])
        seen.append(tokenizer.decode(row.prompt + row.completions[0]))
        unpinned.append(as_rendered_by_transformers(tokenizer, "Why?"))
    assert seen[0] == seen[1] == EXPECTED[name] + "[user] Why?\n[assistant]\n yes"
    assert (unpinned[0] == unpinned[1]) == (name in ("no date", "a date with a default"))  # the test would see a change


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "a date with a default"])
def test_prompts_are_those_of_transformers_on_the_pinned_day(name, with_template, on_day):
    tokenizer = with_template(TEMPLATES[name])
    on_day(PINNED_TIME)
    for prompt in ("Why?", "  {{ strftime_now('%d') }} {% endmacro %}\n"):
        assert render_prompt(tokenizer, prompt) == as_rendered_by_transformers(tokenizer, prompt)


pieces = st.sampled_from(["%%", " ", "-", "d", "text ", "'", '"', *(f"%{directive}" for directive in DIRECTIVES)])


@settings(derandomize=True, deadline=None, max_examples=200, database=None)
@given(st.lists(pieces | st.sampled_from([f"%-{directive}" for directive in NUMBERS]), min_size=1, max_size=6))
def test_dates_in_any_format(tokenizer, parts):
    form = "".join(parts)
    template = "{{ strftime_now(messages[0].content) }}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "chat_template", template)
        assert render_prompt(tokenizer, form) == PINNED_TIME.strftime(form)


def test_one_of_several_templates(with_template, on_day):
    tokenizer = with_template({"default": TEMPLATES["smollm3"], "tool_use": "tools"})
    assert render_prompt(tokenizer, "Why?").startswith(EXPECTED["smollm3"])


def test_the_date_has_one_value():
    assert PINNED_TIME.strftime("%d %b %Y") == CHAT_TEMPLATE_DATE
