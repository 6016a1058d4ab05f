"""Claims about chat templates: the text is transformers' text, and a hostile template cannot hurt."""
# ruff: noqa: E501  (templates are written as published ones are)

import re
import time
from typing import Any

import pytest

from mini_vllm.exceptions import InvalidParameterError
from mini_vllm.text.chat_template import compile_template, render_chat

CHATML = (
    "{%- if tools %}{{ '<|im_start|>system\\n' }}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{%- endif %}"
    "{% for message in messages %}{{'<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = """\
{{- bos_token }}
{%- set system = namespace(text="none", n=0) %}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {%- set system.text = message['content'] | trim %}
        {%- set system.n = system.n + 1 %}
        {%- continue %}
    {%- endif %}
    {%- if loop.index0 > 6 %}{% break %}{% endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{{- "[" ~ system.text ~ ":" ~ system.n ~ ":" ~ date_string ~ "]" }}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
TOOLS = """\
{% macro show(value, depth=0) %}
{% if value is mapping %}{% for key, item in value | dictsort %}{{ key }}={{ show(item, depth + 1) }};{% endfor %}
{% elif value is iterable and value is not string %}[{{ value | join(', ') }}]{% else %}{{ value | string | upper }}{% endif %}
{% endmacro %}
{% for tool in tools %}
{{ tool.function.name }}({{ show(tool.function.parameters) | trim }}) {{ tool | tojson(indent=2) }}
{% endfor %}
{% for message in messages %}
{% if message.tool_calls is defined %}
{% for call in message.tool_calls %}<call {{ loop.index }}/{{ loop.length }}{{ ' last' if loop.last }}>{{ call.function.arguments | tojson }}</call>
{% endfor %}
{% elif message.content is string %}{{ message.role }}: {% generation %}{{ message.content }}{% endgeneration %}

{% else %}{% for part in message.content | selectattr('type', 'equalto', 'text') %}{{ part.text }}|{% endfor %}
{% endif %}
{% endfor %}
{{ messages[::-1] | map(attribute='role') | join('<') }} {{ "%05.1f" | format(3.14159) }} {{ "{:>6}".format("x") }} {{ [1, 2] * 2 }}
{% set x %}{{ messages | length }} messages{% endset %}{{ x }}{% if documents %} {{ documents[0].title }}{% endif %}
"""
REASONING = (
    "{% for m in messages %}{{ m.role }}:{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ (m.content or '').split('</think>')[-1].lstrip('\\n') }}\n{% endfor %}"
    "{{ '<think>' if enable_thinking is defined and enable_thinking else '' }}{{ dict(a=1).items() | list }}"
)
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Wetter für 'hier' <&> \"dort\"",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
PLAIN = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "Was kostet 東京? <b>&amp;</b> 🙂"},
    {"role": "assistant", "content": " Viel. "},
    {"role": "user", "content": "Danke"},
]
CALLS = [
    *PLAIN,
    {"role": "assistant", "content": None, "tool_calls": [
        {"function": {"name": "weather", "arguments": {"city": "Köln", "n": 1.5}}},
        {"function": {"name": "weather", "arguments": {"city": "Ulm", "deep": [1, None, True]}}},
    ]},
    {"role": "tool", "content": [{"type": "text", "text": "sunny"}, {"type": "image", "url": "x"}]},
]  # fmt: skip
THINKING = [{"role": "user", "content": "1+1"}, {"role": "assistant", "reasoning": "easy", "content": "\n2"}]


def theirs(template: str, messages: list[dict[str, Any]], **kwargs: Any) -> str:
    """What transformers' tokenizer would render."""
    from transformers.utils.chat_template_utils import render_jinja_template

    clean = [{key: value for key, value in message.items() if value is not None} for message in messages]
    variables = kwargs.pop("variables", {})
    return render_jinja_template([clean], chat_template=template, **kwargs, **variables)[0][0]


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize(
    ("template", "messages", "extra"),
    [
        (CHATML, PLAIN, {}),
        (CHATML, PLAIN, {"tools": [TOOL, TOOL]}),
        (LLAMA3, PLAIN * 3, {"variables": {"bos_token": "<s>", "date_string": "26 Jul 2024"}}),
        (TOOLS, CALLS, {"tools": [TOOL], "documents": [{"title": "T", "text": "x"}]}),
        (TOOLS, CALLS, {"tools": []}),
        (REASONING, THINKING, {"variables": {"enable_thinking": True}}),
    ],
    ids=["chatml", "chatml-tools", "llama3", "tools", "no-tools", "reasoning"],
)
def test_rendering_equals_transformers(template: str, messages: Any, extra: Any, add_generation_prompt: bool) -> None:
    ours = render_chat(template, messages, add_generation_prompt=add_generation_prompt, **extra)
    assert ours == theirs(template, messages, add_generation_prompt=add_generation_prompt, **extra)
    assert ours.strip()


def test_a_different_whitespace_rule_would_be_noticed() -> None:
    """Broken control: plain Jinja, without trim_blocks and lstrip_blocks, renders something else."""
    import jinja2

    plain = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).from_string(LLAMA3.replace("{%-", "{%"))
    expected = theirs(LLAMA3.replace("{%-", "{%"), PLAIN, variables={"bos_token": "", "date_string": ""})
    assert plain.render(messages=PLAIN, bos_token="", date_string="") != expected


@pytest.mark.parametrize(
    ("template", "content"),
    [
        (CHATML, "The answer"),
        (CHATML, "ends in space "),
        (LLAMA3, " trimmed by the template  "),
        ("{% for m in messages %}{{ m.content if m.content is string else m.content[-1].text }}.{% endfor %}", [
            {"type": "text", "text": "first"}, {"type": "text", "text": "second "}]),
    ],
)  # fmt: skip
def test_continuing_the_final_message_equals_transformers(template: str, content: Any) -> None:
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": content}]
    extra = {"variables": {"bos_token": "<s>", "date_string": "d"}} if template is LLAMA3 else {}
    ours = render_chat(template, messages, continue_final_message=True, **extra)
    assert ours == theirs(template, messages, continue_final_message=True, **extra)
    assert "CONTINUE" not in ours and messages[-1]["content"] == content, "the caller's message is left alone"
    assert render_chat(template, messages, **extra) != ours, "broken control: closed, the text goes on"


def test_continue_and_generation_prompt_exclude_each_other() -> None:
    with pytest.raises(InvalidParameterError, match="continue_final_message: cannot be combined"):
        render_chat(CHATML, PLAIN, continue_final_message=True, add_generation_prompt=True)


def test_strftime_now_and_raise_exception_work() -> None:
    text = render_chat("{{ strftime_now('%Y-%m') }}", PLAIN)
    assert re.fullmatch(r"\d{4}-\d{2}", text)
    with pytest.raises(InvalidParameterError, match=r"messages: .*roles must alternate"):
        render_chat("{{ raise_exception('roles must alternate') }}", PLAIN)


def test_values_with_methods_reach_the_template_as_plain_data() -> None:
    class Image:
        def save(self) -> str:
            return "written"

    messages = [{"role": "user", "content": [{"type": "image", "image": Image()}]}]
    assert render_chat("{{ messages[0].content[0].image }}", messages) == "<Image>"
    with pytest.raises(InvalidParameterError, match="messages"):
        render_chat("{{ messages[0].content[0].image.save() }}", messages)


def test_a_template_is_compiled_once() -> None:
    assert compile_template(CHATML) is compile_template(CHATML)


# -- what is refused ------------------------------------------------------------------------------------------------

GROW = "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = BODY %}{% endfor %}{{ ns.x }}"
HOSTILE = {
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "class by attr filter": "{{ ''|attr('__class__') }}{{ x.y }}",
    "class by format": "{{ '{0.__class__.__mro__}'.format(messages) }}{{ x.y }}",
    "class by map": "{{ messages | map(attribute='__class__') | list }}{{ x.y }}",
    "globals": "{{ raise_exception.__globals__['os'] }}",
    "macro globals": "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__['os'] }}",
    "namespace dunder": "{% set ns = namespace(__class__=1) %}",
    "mutation": "{{ messages.append(1) }}",
    "import": "{% import 'os' as os %}",
    "include": "{% include '/etc/passwd' %}",
    "extends": "{% extends '/etc/passwd' %}",
    "long range": "{% for i in range(10**9) %}x{% endfor %}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "recursive macro": "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "recursive loop": "{% for x in [messages] recursive %}{{ loop([messages]) }}{% endfor %}",
    "repetition": "{{ 'x' * 10**10 }}",
    "list repetition": "{{ [0] * 10**10 }}",
    "power": "{{ 10 ** (10 ** 9) }}",
    "squaring": "{% set ns = namespace(x=10) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "percent width": "{{ '%01000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (1000000000, 1) }}",
    "format width": "{{ '{:>1000000000}'.format(1) }}",
    "format nested width": "{{ '{:>{}}'.format(1, 1000000000) }}",
    "format filter": "{{ '%01000000000d' | format(1) }}",
    "center": "{{ 'x' | center(1000000000) }}",
    "ljust": "{{ 'x'.ljust(1000000000) }}",
    "zfill": "{{ 'x'.zfill(1000000000) }}",
    "expandtabs": "{{ '\\t'.expandtabs(1000000000) }}",
    "slice": "{{ [1] | slice(1000000000) | list }}",
    "batch": "{{ [1] | batch(1000000000, 'x') | list }}",
    "to_bytes": "{{ (1).to_bytes(1000000000) }}",
    "indent": "{{ messages | tojson(indent=1000000000) }}",
    "replace": "{% set a = 'a' * 3000000 %}{{ a.replace('a', a) }}",
    "replace filter": "{% set a = 'a' * 3000000 %}{{ a | replace('a', a) }}",
    "join": "{% set a = 'a' * 3000000 %}{{ a.join(range(99999) | map('string') | list) }}",
    "join filter": "{% set a = 'a' * 3000000 %}{{ [a] * 1000 | join(a) }}{{ ([a] * 1000) | join(a) }}",
    "strftime": "{{ strftime_now('%1000000000d') }}",
    "output": "{% for i in range(99999) %}{{ messages[0].content * 100 }}{% endfor %}",
    "growth by tilde": GROW.replace("BODY", "ns.x ~ ns.x"),
    "growth by plus": GROW.replace("BODY", "ns.x + ns.x"),
    "growth by list": GROW.replace("BODY", "[ns.x, ns.x]"),
    "growth by list, tojson": GROW.replace("BODY", "[ns.x, ns.x]").replace("{{ ns.x }}", "{{ ns.x | tojson }}"),
    "growth by list, string": GROW.replace("BODY", "[ns.x, ns.x]").replace("{{ ns.x }}", "{{ ns.x | string }}"),
    "growth by list, tilde": GROW.replace("BODY", "[ns.x, ns.x]").replace("{{ ns.x }}", "{{ ns.x ~ '' }}"),
    "growth by list, percent": GROW.replace("BODY", "[ns.x, ns.x]").replace("{{ ns.x }}", "{{ '%s' % [ns.x] }}"),
    "growth by block": "{% set ns = namespace(x='ab') %}{% for i in range(60) %}"
    "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_are_refused_quickly(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mini_vllm.text.sandbox.MAX_SECONDS", 0.5)
    start = time.monotonic()
    with pytest.raises(InvalidParameterError) as caught:
        render_chat(HOSTILE[name], [{"role": "user", "content": "hello " * 20}])
    assert time.monotonic() - start < 3
    assert caught.value.field in ("chat_template", "messages") and len(str(caught.value)) < 500


def test_long_but_honest_conversations_are_rendered() -> None:
    messages = [{"role": "user", "content": "word " * 1000}, {"role": "assistant", "content": "ok"}] * 300
    start = time.monotonic()
    assert len(render_chat(CHATML, messages)) > 1_500_000
    assert time.monotonic() - start < 3


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "at least one message"),
        ("hello", "must be a list of dicts, got str"),
        ({"role": "user"}, "must be a list of dicts, got dict"),
        ([{"role": "user", "content": "x"}, "hello"], r"\[1\] must be a dict, got str"),
        ([{"content": "x"}], r"\[0\] needs a 'role'"),
        ([{"role": "user"}], "fails on the conversation|refuses the conversation"),
    ],
)
def test_malformed_conversations_are_refused_by_position(messages: Any, says: str) -> None:
    with pytest.raises(InvalidParameterError, match=says) as caught:
        render_chat(CHATML, messages)
    assert caught.value.field == "messages"


def test_bad_tools_and_templates_are_refused_by_name() -> None:
    with pytest.raises(InvalidParameterError, match=r"tools: \[0\] must be a dict"):
        render_chat(CHATML, PLAIN, tools=[print])  # type: ignore[list-item]
    with pytest.raises(InvalidParameterError, match="chat_template: syntax error in line 2"):
        render_chat("a\n{% for %}", PLAIN)
    with pytest.raises(InvalidParameterError, match=r"chat_template: .*nowhere"):
        render_chat("{{ 1 | nowhere }}", PLAIN)
