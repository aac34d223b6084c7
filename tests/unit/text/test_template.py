"""Chat templates: the same text as transformers, errors in one line."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from text.assets import byte_assets, load_assets, make_assets
from text.template import ChatTemplate, TemplateError
from text.tokenizer import Tokenizer

NOW = datetime(2025, 3, 4, 5, 6, tzinfo=UTC)
CHATML = """{%- for message in messages %}
    {%- if loop.first and messages[0]['role'] != 'system' %}
        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA3 = """{{- bos_token }}
{%- if custom_tools is defined %}{% set tools = custom_tools %}{% endif %}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{#- the system message is taken out #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}{{- tool_call.arguments | tojson }}{{- "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable and message.content is not string %}
            {{- message.content | tojson }}
        {%- else %}{{- message.content }}{%- endif %}{{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""  # noqa: E501
PARTS = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n"
    "{% if m['content'] is string %}{{ m['content'] }}"
    "{% elif m['content'] %}{% for p in m['content'] %}"
    "{{ p['text'] if p['type'] == 'text' else '' }}{% endfor %}{% endif %}"
    "<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
ODDITIES = """{% macro role(m, last=false) %}
[{{ m.role | upper }}{{ '!' if last }}]
{%- endmacro %}
{% set ns = namespace(n=0, seen=[]) %}
{% for m in messages if m.role != 'system' %}
  {% if loop.index > 3 %}{% break %}{% endif %}
{{ role(m, loop.last) }} {% generation %}{% set inner = 1 %}{{ m.content.split('e')[-1].strip() }}
{% endgeneration %}
{{ inner is defined }} {{ m.missing }} {{ m.missing is defined }}
  {% set ns.n = ns.n + m.content|length %}{% set ns.seen = ns.seen + [m.role] %}
{% else %}
nobody
{% endfor %}
{{ ns.n }} {{ ns.seen | unique | join(',') }} {{ "%s-%05d" % ('a', ns.n) }}
{{ '{:>6}'.format(ns.n) }}
{{ messages[0].items() | list | length }} {{ messages | map(attribute='role') | list }}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }} {{ {'a': 'é<&>'} | tojson }}
{{ none }} {{ 7 // 2 }} {{ 2 ** 5 }} {{ 'ab' * 3 }} {{ 'x' ~ 1 ~ none }} {{ [1, 2] + [3] }}
{% set text %}captured {{ ns.n }}{% endset %}{{ text | replace('captured', 'kept') | indent(2) }}
{% filter upper %}filtered{% endfilter %} {{ extra | default('no extra', true) }}
"""
ROLES = st.sampled_from(["user", "assistant", "tool"])
CONTENT = st.one_of(st.text(max_size=20), st.sampled_from(["hé <b> & {{x}} {% if %}", " 你好\n"]))
MESSAGES = st.lists(st.fixed_dictionaries({"role": ROLES, "content": CONTENT}), max_size=5).flatmap(
    lambda rest: st.sampled_from(
        [
            [{"role": "user", "content": "hi there"}, *rest],
            [{"role": "system", "content": " be brief "}, *rest],
        ]
    )
)
TOOLS = [{"type": "function", "function": {"name": "f", "description": "é", "parameters": {}}}]


def template(source: str) -> ChatTemplate:
    names = {"bos_token": "<|bos|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
    return ChatTemplate({"default": source}, names)


def render(source: str, messages: list[dict[str, Any]] | None = None, **kwargs: Any) -> str:
    messages = [{"role": "user", "content": "hi"}] if messages is None else messages
    return template(source).render(messages, now=NOW, **kwargs)


@pytest.mark.parametrize("source", [CHATML, LLAMA3, PARTS, ODDITIES])
@settings(max_examples=40, deadline=None)
@given(messages=MESSAGES, generation=st.booleans(), tools=st.sampled_from([None, TOOLS]))
def test_prompts_are_those_of_transformers(
    reference: Callable[..., str],
    source: str,
    messages: list[dict[str, Any]],
    generation: bool,
    tools: list[dict[str, Any]] | None,
) -> None:
    options: dict[str, Any] = {"add_generation_prompt": generation, "tools": tools}

    expected = reference(source, messages, **options)

    assert render(source, messages, **options) == expected


def test_tool_calls_and_part_lists_are_those_of_transformers(reference: Callable[..., str]) -> None:
    call = {"function": {"name": "f", "arguments": {"city": "Zürich", "n": [1]}}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3"},
    ]
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    listed = [{"role": "user", "content": parts}]

    assert render(LLAMA3, messages) == reference(LLAMA3, messages)
    assert render(PARTS, listed) == reference(PARTS, listed)
    with pytest.raises(TemplateError, match="single tool-calls at once"):
        render(LLAMA3, [{"role": "assistant", "content": "", "tool_calls": [call, call]}])


def test_parts_are_joined_for_templates_that_know_only_strings() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": parts}]
    only_parts = (
        "{% for m in messages %}{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endfor %}"
    )
    renamed = "{% for m in messages %}{% set c = m['content'] %}{% for p in c if p %}{{ p.text }}."

    assert "user\na\nb<|im_end|>" in render(CHATML, messages)
    assert render(only_parts, messages) == "[a][b]"
    assert render(only_parts) == "[hi]"
    assert template(renamed + "{% endfor %}{% endfor %}").takes_parts()
    assert template(PARTS).takes_parts()
    assert not template(CHATML).takes_parts()


def test_time_and_further_variables_are_arguments() -> None:
    assert render("{{ strftime_now('%d %b %Y') }}") == "04 Mar 2025"
    source = "{{ enable_thinking }}{{ bos_token }}{{ messages | length }}"
    kwargs = {"enable_thinking": False, "messages": []}
    assert render(source, template_kwargs=kwargs) == "False<|bos|>1"
    assert render("{{ documents is none }}") == "True"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% if %}", "the chat template is broken: Expected an expression"),
        ("{{ x|nofilter }}", "the chat template is broken: No filter named 'nofilter'"),
        ("{{ raise_exception('roles must\nalternate') }}", "chat template: roles must alternate"),
        ("{{ messages.x.y }}", "has no attribute 'x'"),
        ("{{ nothing.y }}", "'nothing' is undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ [] + 1 }}", "TypeError"),
        ("{% include 'etc' %}", "no loader"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ (1).__class__.mro() }}", "unsafe"),
        ("{{ '{0.__class__.__mro__}'.format(1) }}", "unsafe"),
        ("{{ ('{0.__class__.__mro__}'|attr('format'))(1) }}", "No filter named 'attr'"),
    ],
)
def test_failures_are_one_line(source: str, words: str) -> None:
    with pytest.raises(TemplateError) as error:
        render(source)

    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


def test_a_missing_or_broken_template_matters_only_when_rendered(byte_level_folder: Path) -> None:
    missing = ChatTemplate.from_assets(load_assets(byte_level_folder))

    assert missing.problem is not None
    assert not missing.takes_parts()
    with pytest.raises(TemplateError, match="no chat template"):
        missing.render([], now=NOW)
    assert template("x" * 1_000_001).problem is not None


def test_files_of_their_own_win_and_tools_choose_a_template() -> None:
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    config = json.dumps({"chat_template": named}).encode()
    only_config = make_assets({"tokenizer_config.json": config})
    with_file = make_assets({"tokenizer_config.json": config, "chat_template.jinja": b"F"})
    in_json = make_assets({"chat_template.json": b'{"chat_template": "J"}'})
    extra = make_assets({"additional_chat_templates/rag.jinja": b"R"})

    def texts(assets: Any) -> tuple[str, str]:
        ours = ChatTemplate.from_assets(assets)
        return ours.render([], now=NOW), ours.render([], now=NOW, tools=TOOLS)

    assert texts(only_config) == ("D", "T")
    assert texts(with_file) == ("F", "T")
    assert texts(in_json) == ("J", "J")
    assert texts(extra) == ("R", "R")


def test_the_byte_template_marks_roles_by_one_token() -> None:
    assets = byte_assets()
    messages = [{"role": "system", "content": "s"}, {"role": "weird", "content": "é"}]

    text = ChatTemplate.from_assets(assets).render(messages, now=NOW)

    ids = Tokenizer.from_assets(assets).encode(text, add_special_tokens=False)
    assert ids == [256, 258, 115, 257, 259, 0xC3, 0xA9, 257, 260]
