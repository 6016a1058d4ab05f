"""Claims about how a conversation becomes a prompt: parts, roles, earlier tool calls, and templates of every origin."""

from typing import Any

import pytest

from tests.entrypoints.openai.rig import CHAT, MESSAGES, error_of, post
from tests.entrypoints.sdk import CHATML
from tests.entrypoints.server.rig import serving

pytestmark = pytest.mark.asyncio(loop_scope="module")

LOOPS = "{% for m in messages %}{{ m.role }}:{% for part in m.content %}[{{ part.text }}]{% endfor %};{% endfor %}"
KNOWS_DEVELOPER = "{% for m in messages %}{% if m.role == 'developer' %}D{% endif %}{{ m.role }};{% endfor %}"
PARTS = [{"type": "text", "text": "one"}, {"type": "input_text", "text": "two"}]
CALL = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": [2]}'}}


async def prompt_of(messages: list[Any], template: str | None = CHATML, **fields: Any) -> str:
    """What the template makes of them, on a server of its own."""
    serve = {"chat_template": template} if template else {}
    async with serving(**serve) as app:
        body = await post(app, CHAT, messages=messages, max_tokens=1, return_prompt_text=True, **fields)
    text: str = body["prompt_text"]
    return text


async def test_parts_are_joined_for_a_template_that_wants_text() -> None:
    assert await prompt_of([{"role": "user", "content": PARTS}]) == (
        "<|im_start|>user\none\ntwo<|im_end|>\n<|im_start|>assistant\n"
    )


async def test_parts_stay_parts_for_a_template_that_loops_over_them() -> None:
    messages = [{"role": "system", "content": "text"}, {"role": "user", "content": PARTS}]
    assert await prompt_of(messages, LOOPS) == "system:[text];user:[one][two];"


async def test_the_server_may_say_which_of_the_two_a_template_gets() -> None:
    template = "{% for m in messages %}{{ m.content is string }}{% endfor %}"
    for content_format, expected in (("auto", "True"), ("string", "True"), ("openai", "False")):
        async with serving(chat_template=template, chat_template_content_format=content_format) as app:
            body = await post(app, CHAT, max_tokens=1, return_prompt_text=True)
            assert body["prompt_text"] == expected, content_format


async def test_developer_is_system_to_a_template_that_does_not_know_it() -> None:
    messages = [{"role": "developer", "content": "x"}]
    assert (await prompt_of(messages)).startswith("<|im_start|>system\n")
    assert await prompt_of(messages, KNOWS_DEVELOPER) == "Ddeveloper;"


async def test_earlier_tool_calls_reach_the_template_as_objects() -> None:
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "3"},
    ]
    assert await prompt_of(messages) == (
        "<|im_start|>user\nhello<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>{"name": "add", "arguments": {"a": 1, "b": [2]}}</tool_call><|im_end|>\n'
        "<|im_start|>tool\n<tool_response>3</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


async def test_the_older_form_of_a_call_is_the_same() -> None:
    new = [*MESSAGES, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "3"}]
    old = [
        *MESSAGES,
        {"role": "assistant", "function_call": CALL["function"]},
        {"role": "function", "name": "add", "content": "3"},
    ]
    assert await prompt_of(old) == await prompt_of(new)


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
async def test_earlier_reasoning_reaches_the_template_under_either_name(field: str) -> None:
    messages = [{"role": "assistant", "content": "yes", field: "hm"}]
    assert "<think>hm</think>yes" in await prompt_of(messages)


async def test_a_refusal_stands_for_the_content() -> None:
    for message in ({"refusal": "no"}, {"content": [{"type": "refusal", "refusal": "no"}]}):
        assert "assistant\nno<|im_end|>" in await prompt_of([{"role": "assistant", **message}])


async def test_names_and_documents_and_variables_reach_the_template() -> None:
    template = "{{ messages[0].name }}|{{ documents[0].title }}|{{ mood }}|{{ reasoning_effort }}|{{ bos_token }}"
    fields: dict[str, Any] = {
        "documents": [{"title": "T"}], "chat_template_kwargs": {"mood": "good"}, "reasoning_effort": "low"
    }  # fmt: skip
    messages = [{"role": "user", "content": "x", "name": "Ann"}]
    assert await prompt_of(messages, template, **fields) == "Ann|T|good|low|<s>"


async def test_the_servers_variables_are_there_unless_the_request_has_its_own() -> None:
    async with serving(
        chat_template="{{ mood }} {{ tone }}", default_chat_template_kwargs={"mood": 1, "tone": 2}
    ) as app:
        body = await post(app, CHAT, max_tokens=1, return_prompt_text=True, chat_template_kwargs={"mood": 3})
        assert body["prompt_text"] == "3 2"


async def test_a_template_of_the_request_acts_on_a_server_that_trusts_requests() -> None:
    async with serving(trust_request_chat_template=True, max_chat_template_chars=100) as app:
        body = await post(app, CHAT, max_tokens=1, return_prompt_text=True, chat_template="{{ messages | length }}")
        assert body["prompt_text"] == "1"
        error = await error_of(app, CHAT, chat_template="x" * 101)
        assert error["param"] == "chat_template" and "100" in error["message"]
        error = await error_of(app, CHAT, chat_template="{% for %}")
        assert error["param"] == "chat_template" and "syntax error" in error["message"]
        error = await error_of(app, CHAT, chat_template="{{ ''.__class__.__mro__ }}")
        assert error["param"] == "chat_template"


async def test_what_the_template_refuses_is_the_requests_fault() -> None:
    template = "{% if messages[0].role != 'user' %}{{ raise_exception('users begin') }}{% endif %}x"
    async with serving(chat_template=template) as app:
        error = await error_of(app, CHAT, messages=[{"role": "system", "content": "x"}])
        assert error["param"] == "messages" and "users begin" in error["message"]


async def test_a_template_that_does_not_end_is_stopped_and_others_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mini_vllm.text.sandbox.MAX_SECONDS", 0.2)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    async with serving(trust_request_chat_template=True) as app:
        error = await error_of(app, CHAT, chat_template=endless)
        assert error["param"] == "chat_template"
        assert await post(app, CHAT)


async def test_no_special_tokens_are_added_to_what_the_template_wrote(app: Any) -> None:
    body = await post(app, CHAT, return_token_ids=True)
    assert body["prompt_token_ids"].count(1) == 1
    twice = await post(app, CHAT, return_token_ids=True, add_special_tokens=True)
    assert twice["prompt_token_ids"].count(1) == 2


async def test_more_messages_than_allowed_are_refused_with_the_limit() -> None:
    async with serving(max_messages=3) as app:
        error = await error_of(app, CHAT, messages=MESSAGES * 4)
        assert error["param"] == "messages" and "at most 3" in error["message"]
