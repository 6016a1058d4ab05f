"""Claims about /v1/messages, through the anthropic SDK: bodies, events, stop reasons, usage, errors."""

import asyncio
from typing import Any

import anthropic
import pytest
from anthropic.types import Message, MessageTokensCount, RawMessageStreamEvent

from mini_vllm import LLM, SamplingParams
from mini_vllm.exceptions import RequestError
from tests.async_rig import checkpoint
from tests.entrypoints.openai.test_responses_stored import held, num_unfinished, until
from tests.entrypoints.sdk import CHATML, assert_fits, blocking_anthropic
from tests.entrypoints.server.rig import Call, anthropic_client, client, serving, sse_events

PROMPT = "The capital of France"
USER = [{"role": "user", "content": PROMPT}]
GREEDY: dict[str, Any] = {"model": "tiny", "max_tokens": 8, "temperature": 0, "messages": USER}
EOS = 2


async def create(app: Any, expected: int = 200, **fields: Any) -> dict[str, Any]:
    async with client(app) as http:
        answer = await http.post("/v1/messages", json={**GREEDY, **fields})
    assert answer.status_code == expected, answer.text
    body: dict[str, Any] = answer.json()
    return body


async def create_stream(app: Any, **fields: Any) -> list[dict[str, Any]]:
    async with client(app) as http:
        answer = await http.post("/v1/messages", json={**GREEDY, **fields, "stream": True})
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    return sse_events(answer.text)


async def count(app: Any, **fields: Any) -> int:
    body = {"model": "tiny", "messages": USER, **fields}
    async with client(app) as http:
        answer = await http.post("/v1/messages/count_tokens", json=body)
    assert answer.status_code == 200, answer.text
    return int(answer.json()["input_tokens"])


def without_id(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "id": ""}


# -- one message -----------------------------------------------------------------------------------------------


async def test_the_answer_has_anthropics_shape_key_by_key() -> None:
    async with serving(chat_template=CHATML) as app, client(app) as http:
        answer = await http.post("/v1/messages", json=GREEDY)
    body = answer.json()
    assert_fits(Message, body)
    assert list(body) == ["id", "type", "role", "model", "content", "stop_reason", "stop_sequence", "usage"]
    assert body["id"].startswith("msg_")
    assert (body["type"], body["role"], body["model"]) == ("message", "assistant", "tiny")
    (block,) = body["content"]
    assert block["type"] == "text" and block["text"]
    assert (body["stop_reason"], body["stop_sequence"]) == ("max_tokens", None)
    assert body["usage"]["output_tokens"] == 8
    assert answer.headers["request-id"] == answer.headers["x-request-id"]


async def test_events_come_in_anthropics_order() -> None:
    async with serving(chat_template=CHATML) as app:
        events = await create_stream(app)
    names = [event["event"] for event in events]
    deltas = [name for name in names if name == "content_block_delta"]
    assert names == [
        "message_start", "content_block_start", "ping", *deltas, "content_block_stop", "message_delta", "message_stop"
    ]  # fmt: skip
    for event in events:
        assert event["data"]["type"] == event["event"]
        if event["event"] != "ping":
            assert_fits(RawMessageStreamEvent, event["data"])
    start, delta = events[0]["data"]["message"], events[-2]["data"]
    assert (start["content"], start["stop_reason"], start["stop_sequence"]) == ([], None, None)
    assert delta["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}


async def test_streamed_or_not_text_and_usage_are_the_same_and_start_agrees_with_the_end() -> None:
    async with serving(chat_template=CHATML) as app:
        await create(app)  # so that both find the same prefix in the cache
        whole, events = await create(app), await create_stream(app)
    start, end = events[0]["data"]["message"]["usage"], events[-2]["data"]["usage"]
    inputs = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
    assert (
        [start[name] for name in inputs] == [end[name] for name in inputs] == [whole["usage"][name] for name in inputs]
    )
    assert end["output_tokens"] == whole["usage"]["output_tokens"] == 8
    text = "".join(event["data"]["delta"]["text"] for event in events if event["event"] == "content_block_delta")
    assert text == whole["content"][0]["text"]


async def test_cached_tokens_are_not_among_the_input_tokens() -> None:
    async with serving(chat_template=CHATML) as app:
        cold, warm = await create(app), await create(app)
        total = await count(app)
    assert (cold["usage"]["input_tokens"], cold["usage"]["cache_read_input_tokens"]) == (total, 0)
    assert warm["usage"]["cache_read_input_tokens"] > 0
    assert warm["usage"]["input_tokens"] + warm["usage"]["cache_read_input_tokens"] == total


async def test_the_text_is_that_of_the_offline_api() -> None:
    messages = [{"role": "system", "content": "Be brief."}, *USER]
    llm = LLM(str(checkpoint()), dtype="float32", num_gpu_blocks_override=80)
    with open(CHATML, encoding="utf-8") as file:
        params = SamplingParams(temperature=0, max_tokens=8)
        (offline,) = llm.chat(messages, params, chat_template=file.read(), use_tqdm=False)
    async with serving(chat_template=CHATML) as app:
        texts = [await create(app, system=system) for system in ("Be brief.", [{"type": "text", "text": "Be brief."}])]
    assert [body["content"][0]["text"] for body in texts] == [offline.outputs[0].text] * 2


async def test_both_kinds_of_client_stream_and_do_not() -> None:
    async with serving(chat_template=CHATML) as app:
        await create(app)
        asynchronous, blocking = anthropic_client(app), blocking_anthropic(app)
        fields = {name: value for name, value in GREEDY.items() if name != "temperature"}
        more = {"extra_body": {"temperature": 0}}
        whole = await asynchronous.messages.create(**fields, **more)
        async with asynchronous.messages.stream(**fields, **more) as stream:
            text = "".join([piece async for piece in stream.text_stream])
            final = await stream.get_final_message()

        def block() -> list[Any]:
            with blocking, blocking.messages.stream(**fields, **more) as streamed:
                return [streamed.get_final_message(), blocking.messages.create(**fields, **more)]

        messages = [final, *await asyncio.to_thread(block)]
        counted = await asynchronous.messages.count_tokens(model="tiny", messages=USER)
        await asynchronous.close()
    assert text == whole.content[0].text != ""
    for message in messages:
        assert message.content[0].text == text
        assert (message.stop_reason, message.usage.output_tokens) == (whole.stop_reason, 8)
        assert message.usage.input_tokens == whole.usage.input_tokens
    assert whole._request_id
    assert isinstance(counted, MessageTokensCount)
    assert counted.input_tokens == whole.usage.input_tokens + whole.usage.cache_read_input_tokens


# -- why it ended ----------------------------------------------------------------------------------------------


async def test_a_stop_sequence_is_told_and_left_out() -> None:
    async with serving(chat_template=CHATML) as app:
        whole = (await create(app))["content"][0]["text"]
        stop = whole[3:5]
        body = await create(app, stop_sequences=["never there", stop])
        events = await create_stream(app, stop_sequences=["never there", stop])
    assert (body["stop_reason"], body["stop_sequence"]) == ("stop_sequence", stop)
    assert body["content"][0]["text"] == whole[: whole.index(stop)]
    assert events[-2]["data"]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": stop}


async def test_a_context_that_is_full_is_told_apart_from_max_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(chat_template=CHATML) as app:
        going_on = SamplingParams(ignore_eos=True)
        monkeypatch.setattr(app.state.server.engine, "get_default_sampling_params", lambda: going_on)
        body = await create(app, max_tokens=100_000, system="x" * 150)
        total = await count(app, system="x" * 150)
    assert body["stop_reason"] == "model_context_window_exceeded"
    assert total + body["usage"]["output_tokens"] == 256


async def test_an_answer_of_nothing_has_no_content_and_no_block(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(chat_template=CHATML) as app:
        defaults = app.state.server.engine.get_default_sampling_params()
        only_eos = SamplingParams(temperature=defaults.temperature, allowed_token_ids=(EOS,))
        monkeypatch.setattr(app.state.server.engine, "get_default_sampling_params", lambda: only_eos)
        body, events = await create(app), await create_stream(app)
    assert (body["content"], body["stop_reason"], body["usage"]["output_tokens"]) == ([], "end_turn", 1)
    assert [event["event"] for event in events] == ["message_start", "message_delta", "message_stop"]


# -- conversations ---------------------------------------------------------------------------------------------


TOOLS = [
    {"role": "user", "content": [{"type": "text", "text": "U", "cache_control": {"type": "ephemeral"}}]},
    {"role": "assistant", "content": [
        {"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "text", "text": "A"},
        {"type": "tool_use", "id": "t1", "name": "f", "input": {"x": 1}},
        {"type": "tool_use", "id": "t2", "name": "g", "input": {}},
    ]},
    {"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": "t1", "content": "one"},
        {"type": "tool_result", "tool_use_id": "t2", "content": [{"type": "text", "text": "two"}], "is_error": True},
        {"type": "text", "text": "and?"},
    ]},
]  # fmt: skip


async def test_turns_of_blocks_and_tools_reach_the_template() -> None:
    rendered = (
        "<|im_start|>system\nS1\nS2<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n<think>hm</think>A"
        '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'
        '<tool_call>{"name": "g", "arguments": {}}</tool_call>'
        "<|im_end|>\n<|im_start|>tool\n<tool_response>one</tool_response><|im_end|>\n"
        "<|im_start|>tool\n<tool_response>Error: two</tool_response><|im_end|>\n<|im_start|>user\nand?<|im_end|>\n"
        "<|im_start|>assistant\n(dry) "
    )
    system = [{"type": "text", "text": "S1"}, {"type": "text", "text": "S2", "cache_control": {"type": "ephemeral"}}]
    async with serving(chat_template=CHATML) as app:
        tokenizer = app.state.server.engine.get_tokenizer()
        number = await count(app, system=system, messages=TOOLS, chat_template_kwargs={"tone": "dry"})
    assert number == len(tokenizer.encode(rendered, False))


async def test_neighbours_of_one_role_are_one_turn() -> None:
    apart = [{"role": "user", "content": "a"}, {"role": "user", "content": [{"type": "text", "text": "b"}]}]
    async with serving(chat_template=CHATML) as app:
        together = await create(app, messages=[{"role": "user", "content": "a\nb"}])
        assert without_id(await create(app, messages=apart))["content"] == together["content"]


async def test_a_last_message_of_the_assistant_is_continued() -> None:
    async with serving(chat_template=CHATML) as app:
        whole = (await create(app, max_tokens=24))["content"][0]["text"]
        begun = [*USER, {"role": "assistant", "content": "Paris"}]
        tokenizer = app.state.server.engine.get_tokenizer()
        expected = f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\nParis"
        assert await count(app, messages=begun) == len(tokenizer.encode(expected, False))
        nothing = await create(app, max_tokens=24, messages=[*USER, {"role": "assistant", "content": ""}])
    assert nothing["content"][0]["text"] == whole


async def test_tokens_are_counted_even_where_they_are_too_many() -> None:
    async with serving(chat_template=CHATML) as app:
        assert await count(app, system="x" * 1000) > 1000
        error = await create(app, 400, system="x" * 1000)
    assert "maximum context length" in error["error"]["message"]


# -- what is wrong with a request ------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": "8"}, "max_tokens"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": ""}]}, "messages"),
    ({"messages": [{"role": "assistant", "content": ""}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": ""}]}]}, "messages.0.content.0.text"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages.0.content.0.type"),
    ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "messages.0.content.0.type"),
    ({"messages": TOOLS[2:]}, "messages"),
    ({"messages": TOOLS[:2]}, "messages"),
    ({"messages": [*TOOLS[:2], {"role": "user", "content": [*reversed(TOOLS[2]["content"])]}]}, "messages"),
    ({"messages": [{"role": "user", "content": [TOOLS[1]["content"][2]]}]}, "messages"),
    ({"messages": [*USER, {"role": "assistant", "content": [TOOLS[2]["content"][0]]}]}, "messages"),
    ({"temperature": 1.5}, "temperature"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"stop_sequences": [""]}, "stop_sequences"),
    ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
    ({"tools": [{"name": "f", "input_schema": {}}]}, "tools"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"output_config": {"effort": "high"}}, "output_config"),
    ({"inference_geo": "eu"}, "inference_geo"),
    ({"n": 2}, "n"),
]


async def test_what_is_wrong_is_named() -> None:
    async with serving(chat_template=CHATML) as app:
        for fields, where in WRONG:
            body = await create(app, 400, **fields)
            assert body["type"] == "error" and body["request_id"]
            assert body["error"]["type"] == "invalid_request_error"
            words = body["error"]["message"]
            assert where in words, (fields, words)
        async with client(app) as http:
            answer = await http.post("/v1/messages", json={"model": "tiny", "messages": USER})
        assert answer.json()["error"]["message"] == "max_tokens: is required"
        assert num_unfinished(app) == 0


async def test_neutral_values_of_what_is_not_supported_change_nothing() -> None:
    neutral: dict[str, Any] = {
        "tools": [], "tool_choice": {"type": "auto"}, "thinking": {"type": "disabled"}, "speed": "standard",
        "output_config": {}, "service_tier": "auto", "metadata": {"user_id": "u"}, "container": None, "mcp_servers": [],
        "cache_control": {"type": "ephemeral"},
    }  # fmt: skip
    async with serving(chat_template=CHATML) as app:
        plain, same = await create(app), await create(app, **neutral)
    assert plain["content"] == same["content"]


async def test_errors_of_every_kind_have_anthropics_types(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(chat_template=CHATML, api_key="k", max_num_queued_reqs=1) as app:
        sdk, stranger = anthropic_client(app, "k"), anthropic_client(app, "wrong")
        create_one = {"model": "tiny", "max_tokens": 100, "messages": USER}
        with pytest.raises(anthropic.AuthenticationError) as error:
            await stranger.messages.create(**create_one)
        assert error.value.body["error"]["type"] == "authentication_error"
        assert error.value.request_id == error.value.body["request_id"]
        with pytest.raises(anthropic.NotFoundError) as error:
            await sdk.messages.create(**create_one | {"model": "nope"})
        assert error.value.body["error"]["type"] == "not_found_error"
        held(app, monkeypatch, num_outputs=1)
        body, headers = {**create_one, "stream": True}, {"x-api-key": "k"}
        async with Call(app, "POST", "/v1/messages", body, headers) as call:
            await call.chunk()
            for stream in (False, True):
                with pytest.raises(anthropic.APIStatusError) as error:
                    await sdk.messages.create(**create_one, stream=stream)
                assert error.value.status_code == 529
                assert error.value.body["error"]["type"] == "overloaded_error"
                assert "retry-after" in error.value.response.headers
        await sdk.close()
        await stranger.close()


async def test_an_error_in_the_middle_is_an_error_event(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(chat_template=CHATML) as app:
        held(app, monkeypatch, num_outputs=1, error=RequestError("a processor raised"))
        events = await create_stream(app, max_tokens=100)
        assert num_unfinished(app) == 0
        sdk = anthropic_client(app)
        with pytest.raises(anthropic.APIStatusError):
            async for _ in await sdk.messages.create(model="tiny", max_tokens=100, messages=USER, stream=True):
                pass
        await sdk.close()
    assert events[0]["event"] == "message_start"
    assert events[-1]["event"] == events[-1]["data"]["type"] == "error"
    assert events[-1]["data"]["error"]["type"] == "api_error" and events[-1]["data"]["request_id"]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_takes_its_request_along(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(chat_template=CHATML) as app:
        held(app, monkeypatch, num_outputs=1 if stream else 0)
        body = {**GREEDY, "max_tokens": 100, "stream": stream}
        async with Call(app, "POST", "/v1/messages", body) as call:
            if stream:
                await call.chunk()
            await until(lambda: num_unfinished(app) == 1)
        assert num_unfinished(app) == 0
        await app.state.server.engine.check_integrity()


async def test_version_and_beta_headers_are_welcome_and_not_needed() -> None:
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "prompt-caching-2024-07-31"}
    async with serving(chat_template=CHATML) as app, client(app) as http:
        for given in ({}, headers):
            assert (await http.post("/v1/messages", json=GREEDY, headers=given)).status_code == 200
            assert (await http.post("/v1/messages?beta=true", json=GREEDY, headers=given)).status_code == 200


async def test_a_users_requests_are_its_tenants(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"chat_template": CHATML, "api_key": "k", "scheduling_policy": "priority"}
    async with serving(**options) as app, client(app, "k") as http:
        engine, seen = app.state.server.engine, []
        add = engine.add_requests

        async def add_requests(requests: Any) -> Any:
            seen.extend(requests)
            return await add(requests)

        monkeypatch.setattr(engine, "add_requests", add_requests)
        body = {**GREEDY, "metadata": {"user_id": "u"}, "priority": 3, "cache_salt": "s"}
        message = (await http.post("/v1/messages", json=body)).json()
    (request,) = seen
    assert (request.tenant.name, request.tenant.user, request.priority) == ("key-1", "u", 3)
    assert request.request_id == message["id"] and request.cache_salt not in (None, "s")


async def test_a_priority_that_no_policy_looks_at_is_refused() -> None:
    async with serving(chat_template=CHATML) as app, client(app) as http:
        answer = await http.post("/v1/messages", json={**GREEDY, "priority": 3})
    assert answer.status_code == 400 and "needs --scheduling-policy priority" in answer.json()["error"]["message"]


def test_the_sdk_types_would_notice_a_missing_field() -> None:
    """Broken control of `assert_fits`."""
    with pytest.raises(ValueError, match="usage"):
        assert_fits(Message, {"id": "m", "type": "message", "role": "assistant", "model": "x", "content": []})
