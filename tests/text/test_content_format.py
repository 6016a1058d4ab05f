"""Claims about which templates want parts, read off the ways in which published ones are written."""

import pytest

from mini_vllm.exceptions import InvalidParameterError
from mini_vllm.text.content_format import content_format_of

LOOP = "{% for m in messages %}%s{% endfor %}"
WANT_TEXT = {
    "printed": "{{ m.content }}",
    "filtered": "{{ m['content'] | trim }}",
    "another field is looped over": "{% for call in m.tool_calls %}{{ call.name }}{% endfor %}{{ m.content }}",
    "split": "{% set content = m.content.split('</think>')[-1] %}{{ content }}",
    "a variable that never held one": "{% set parts = [] %}{% for p in parts %}{% endfor %}{{ m.content }}",
}
WANT_PARTS = {
    "attribute": "{% for p in m.content %}{{ p.text }}{% endfor %}",
    "item": "{% for p in m['content'] %}{{ p['text'] }}{% endfor %}",
    "either": "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{% endfor %}{% endif %}",
    "filtered": "{% for p in m.content | selectattr('type', 'equalto', 'text') %}{% endfor %}",
    "another name": "{% set content = m.content %}{% for p in content %}{% endfor %}",
    "a name of a name": "{% set a = m.content %}{% set b = a %}{% for p in b %}{% endfor %}",
    "a part of it": "{% for p in m.content[1:] %}{% endfor %}",
}


@pytest.mark.parametrize("name", WANT_TEXT)
def test_templates_that_print_a_content_get_text(name: str) -> None:
    assert content_format_of(LOOP.replace("%s", WANT_TEXT[name])) == "string"


@pytest.mark.parametrize("name", WANT_PARTS)
def test_templates_that_loop_over_a_content_get_parts(name: str) -> None:
    assert content_format_of(LOOP.replace("%s", WANT_PARTS[name])) == "openai"


def test_a_macro_that_loops_over_its_argument_counts() -> None:
    macro = "{% macro show(content) %}{% for p in content %}{{ p.text }}{% endfor %}{% endmacro %}"
    assert content_format_of(macro + LOOP.replace("%s", "{{ show(m.content) }}")) == "openai"
    assert content_format_of(macro + LOOP.replace("%s", "{{ show(content=m.content) }}")) == "openai"
    assert content_format_of(macro + LOOP.replace("%s", "{{ show([]) }}{{ m.content }}")) == "string"


def test_a_broken_template_is_refused_as_in_rendering() -> None:
    with pytest.raises(InvalidParameterError, match="chat_template: syntax error"):
        content_format_of("{% for %}")
