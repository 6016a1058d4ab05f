"""Claims about POST /v1/responses, through the openai SDK: bodies, events, states and chains."""

import asyncio
import json
from typing import Any

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent

from mini_vllm import LLM, SamplingParams
from tests.async_rig import checkpoint
from tests.entrypoints.sdk import CHATML, assert_fits, blocking_openai
from tests.entrypoints.server.rig import client, openai_client, serving, sse_events

GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_output_tokens": 8}
EOS = 2
PROMPT = "The capital of France"


def text_of(response: dict[str, Any]) -> str:
    return "".join(part["text"] for item in response["output"] for part in item["content"])


def without_ids(response: dict[str, Any]) -> dict[str, Any]:
    """What must not depend on whether it was streamed. Cached tokens do, on what ran before."""
    output = [{**item, "id": ""} for item in response["output"]]
    return {**response, "id": "", "output": output, "created_at": 0, "completed_at": 0}


async def create(app: Any, expected: int = 200, **fields: Any) -> dict[str, Any]:
    async with client(app) as http:
        answer = await http.post("/v1/responses", json={**GREEDY, **fields})
    assert answer.status_code == expected, answer.text
    body: dict[str, Any] = answer.json()
    return body


async def create_stream(app: Any, **fields: Any) -> list[dict[str, Any]]:
    async with client(app) as http:
        answer = await http.post("/v1/responses", json={**GREEDY, **fields, "stream": True})
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    return sse_events(answer.text)


# -- one response ----------------------------------------------------------------------------------------------


async def test_the_answer_has_every_field_that_the_sdk_requires_and_more() -> None:
    async with serving(chat_template=CHATML) as app:
        body = await create(app, input=PROMPT, metadata={"a": "b"}, user="me", instructions="Be brief.")
    parsed = assert_fits(Response, body)
    assert body["id"].startswith("resp_") and body["output"][0]["id"].startswith("msg_")
    assert (body["object"], body["model"], body["status"]) == ("response", "tiny", "incomplete")
    assert body["incomplete_details"] == {"reason": "max_output_tokens"}
    assert (body["metadata"], body["user"], body["instructions"]) == ({"a": "b"}, "me", "Be brief.")
    assert (body["temperature"], body["store"], body["service_tier"]) == (0, True, "default")
    assert body["usage"]["output_tokens"] == 8
    assert body["usage"]["total_tokens"] == body["usage"]["input_tokens"] + 8
    assert parsed.output_text == text_of(body) != ""


async def test_events_come_in_openais_order_and_numbered_without_gaps() -> None:
    async with serving(chat_template=CHATML) as app:
        events = await create_stream(app, input=PROMPT)
    assert all(event["event"] == event["data"]["type"] for event in events)
    for event in events:
        assert_fits(ResponseStreamEvent, event["data"])
    assert [event["data"]["sequence_number"] for event in events] == list(range(len(events)))
    names = [event["event"].removeprefix("response.") for event in events]
    deltas = [name for name in names if name == "output_text.delta"]
    assert names == [
        "created", "in_progress", "output_item.added", "content_part.added", *deltas, "output_text.done",
        "content_part.done", "output_item.done", "incomplete",
    ]  # fmt: skip
    assert events[0]["data"]["response"]["status"] == events[1]["data"]["response"]["status"] == "in_progress"
    ids = {event["data"]["item_id"] for event in events if "item_id" in event["data"]}
    assert ids == {events[-1]["data"]["response"]["output"][0]["id"]}


@pytest.mark.parametrize("more", [{}, {"include": ["message.output_text.logprobs"]}, {"top_logprobs": 3}])
async def test_streamed_or_not_the_response_is_the_same(more: dict[str, Any]) -> None:
    async with serving(chat_template=CHATML, enable_prefix_caching=False) as app:
        whole = await create(app, input=PROMPT, **more)
        events = await create_stream(app, input=PROMPT, **more)
    data = [event["data"] for event in events]
    final = data[-1]["response"]
    assert without_ids(final) == without_ids(whole)
    deltas = [item for item in data if item["type"] == "response.output_text.delta"]
    done = next(item for item in data if item["type"] == "response.output_text.done")
    assert "".join(item["delta"] for item in deltas) == done["text"] == text_of(whole)
    logprobs = [entry for item in deltas for entry in item["logprobs"]]
    assert logprobs == done["logprobs"] == whole["output"][0]["content"][0]["logprobs"]
    assert len(logprobs) == (8 if more else 0)
    assert all(len(entry["top_logprobs"]) == more.get("top_logprobs", 0) for entry in logprobs)


async def test_the_text_is_that_of_the_offline_api() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
    params = SamplingParams(temperature=0, max_tokens=8)
    llm = LLM(str(checkpoint()), dtype="float32", num_gpu_blocks_override=80)
    with open(CHATML, encoding="utf-8") as file:
        (offline,) = llm.chat(messages, params, chat_template=file.read(), use_tqdm=False)
    async with serving(chat_template=CHATML) as app:
        body = await create(app, input=PROMPT, instructions="Be brief.")
    assert text_of(body) == offline.outputs[0].text
    assert body["usage"]["input_tokens"] == len(offline.prompt_token_ids)


async def test_a_response_that_ends_by_itself_is_completed() -> None:
    async with serving(chat_template=CHATML) as app:
        body = await create(app, input=PROMPT, allowed_token_ids=[EOS])
        events = await create_stream(app, input=PROMPT, allowed_token_ids=[EOS])
    assert (body["status"], body["incomplete_details"], text_of(body)) == ("completed", None, "")
    assert body["completed_at"] >= body["created_at"]
    assert body["output"][0]["status"] == "completed"
    assert events[-1]["event"] == "response.completed"
    assert_fits(Response, events[-1]["data"]["response"])


async def test_a_stop_string_completes_and_is_left_out() -> None:
    async with serving(chat_template=CHATML) as app:
        whole = text_of(await create(app, input=PROMPT))
        stop = whole[3:5]
        body = await create(app, input=PROMPT, stop=[stop])
    assert (body["status"], text_of(body)) == ("completed", whole[: whole.index(stop)])


async def test_both_kinds_of_client_stream_and_do_not() -> None:
    async with serving(chat_template=CHATML) as app:
        stop = text_of(await create(app, input=PROMPT))[-2:]
        fields = {"input": PROMPT, "extra_body": {"stop": stop}, **GREEDY}
        asynchronous = openai_client(app)
        whole = await asynchronous.responses.create(**fields)
        async with asynchronous.responses.stream(**fields) as stream:
            kinds = {event.type async for event in stream}
            final = await stream.get_final_response()

        blocking = blocking_openai(app)

        def block() -> tuple[str, str]:
            with blocking, blocking.responses.stream(**fields) as streamed:
                return streamed.get_final_response().output_text, blocking.responses.create(**fields).output_text

        texts = await asyncio.to_thread(block)
        await asynchronous.close()
    assert "response.output_text.delta" in kinds
    assert whole.output_text and {final.output_text, *texts} == {whole.output_text}
    assert final.status == whole.status == "completed"
    assert final.usage.output_tokens == whole.usage.output_tokens


# -- input -----------------------------------------------------------------------------------------------------


async def test_items_of_every_kind_reach_the_template() -> None:
    items = [
        {"role": "developer", "content": "D"},
        {"role": "user", "content": [{"type": "input_text", "text": "U1"}, {"type": "input_text", "text": "U2"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "A", "annotations": []}]},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"x": 1}'},
        {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "one"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "two"}]},
    ]  # fmt: skip
    rendered = (
        "<|im_start|>system\nI<|im_end|>\n<|im_start|>system\nD<|im_end|>\n<|im_start|>user\nU1\nU2<|im_end|>\n"
        '<|im_start|>assistant\nA<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'
        '<tool_call>{"name": "g", "arguments": {}}</tool_call><|im_end|>\n'
        "<|im_start|>tool\n<tool_response>one</tool_response><|im_end|>\n"
        "<|im_start|>tool\n<tool_response>two</tool_response><|im_end|>\n<|im_start|>assistant\n(dry) "
    )
    body = {"input": items, "instructions": "I", "chat_template_kwargs": {"tone": "dry"}}
    async with serving(chat_template=CHATML) as app, client(app) as http:
        tokenizer = app.state.server.engine.get_tokenizer()
        counted = await http.post("/v1/responses/input_tokens", json=body)
    assert counted.json() == {"object": "response.input_tokens", "input_tokens": len(tokenizer.encode(rendered, False))}


async def test_input_is_counted_even_where_it_is_too_long() -> None:
    async with serving(chat_template=CHATML) as app:
        sdk = openai_client(app)
        counted = await sdk.responses.input_tokens.count(input="x" * 1000, model="tiny")
        with pytest.raises(openai.BadRequestError) as error:
            await sdk.responses.create(input="x" * 1000, model="tiny")
        await sdk.close()
    assert counted.input_tokens > 1000
    assert error.value.param == "input" and "maximum context length" in error.value.message


async def test_truncation_leaves_out_as_few_of_the_oldest_items_as_will_do() -> None:
    items = [{"role": "user", "content": f"{i}" + "y" * 40} for i in range(8)]
    async with serving(chat_template=CHATML) as app, client(app) as http:
        refused = await create(app, 400, input=items, instructions="Stay.")
        kept = await create(app, input=items, instructions="Stay.", truncation="auto", max_output_tokens=4)

        async def count(number: int) -> int:
            body = {"input": items[-number:], "instructions": "Stay."}
            return int((await http.post("/v1/responses/input_tokens", json=body)).json()["input_tokens"])

        sizes = [await count(number) for number in range(1, 9)]
        whole = {"input": items, "instructions": "Stay.", "truncation": "auto"}
        counted = (await http.post("/v1/responses/input_tokens", json=whole)).json()["input_tokens"]
    assert refused["error"]["code"] == "context_length_exceeded"
    assert kept["usage"]["input_tokens"] == max(size for size in sizes if size + 4 <= 256)
    assert kept["truncation"] == "auto"
    assert counted == max(size for size in sizes if size < 256)


async def test_truncation_drops_the_outputs_of_calls_it_drops() -> None:
    items = [
        {"type": "function_call", "call_id": "c", "name": "f" * 200, "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "x"},
        {"role": "user", "content": "y" * 60},
    ]
    async with serving(chat_template=CHATML) as app:
        kept = await create(app, input=items, truncation="auto")
        alone = await create(app, input=items[-1:])
    assert kept["usage"]["input_tokens"] == alone["usage"]["input_tokens"]


# -- chains ----------------------------------------------------------------------------------------------------


async def test_a_chain_gives_the_model_the_whole_conversation_but_not_the_old_instructions() -> None:
    async with serving(chat_template=CHATML) as app, client(app) as http:
        first = await create(app, input="one", instructions="Old.", max_output_tokens=2)
        second = await create(app, input="two", previous_response_id=first["id"], max_output_tokens=2)
        third = await create(app, input="three", previous_response_id=second["id"], instructions="New.")
        turns = [
            {"role": "user", "content": "one"}, {"role": "assistant", "content": text_of(first)},
            {"role": "user", "content": "two"}, {"role": "assistant", "content": text_of(second)},
            {"role": "user", "content": "three"},
        ]  # fmt: skip
        spelt_out = await create(app, input=turns, instructions="New.")
        items = (await http.get(f"/v1/responses/{third['id']}/input_items?order=asc")).json()
    assert text_of(third) == text_of(spelt_out)
    assert third["usage"]["input_tokens"] == spelt_out["usage"]["input_tokens"]
    assert third["previous_response_id"] == second["id"]
    assert [item["content"][0]["text"] for item in items["data"]] == [turn["content"] for turn in turns]


async def test_an_item_reference_is_the_item() -> None:
    async with serving(chat_template=CHATML) as app:
        first = await create(app, input="one", max_output_tokens=2)
        reference = {"type": "item_reference", "id": first["output"][0]["id"]}
        again = await create(
            app, input=[{"role": "user", "content": "one"}, reference, {"role": "user", "content": "x"}]
        )
        spelt_out = await create(
            app,
            input=[
                {"role": "user", "content": "one"}, {"role": "assistant", "content": text_of(first)},
                {"role": "user", "content": "x"},
            ],
        )  # fmt: skip
        unknown = await create(app, 404, input=[{"id": "msg_unknown"}])
    assert text_of(again) == text_of(spelt_out)
    assert unknown["error"]["param"] == "input.0.id"


async def test_an_unknown_previous_response_is_a_400_as_at_openai() -> None:
    async with serving(chat_template=CHATML) as app:
        error = (await create(app, 400, input="x", previous_response_id="resp_unknown"))["error"]
    assert (error["code"], error["param"]) == ("previous_response_not_found", "previous_response_id")
    assert error["message"] == "Previous response with id 'resp_unknown' not found."


# -- what is wrong with a request ------------------------------------------------------------------------------

WRONG: list[tuple[str, Any, str]] = [
    ("input", 5, "input"),
    ("input", [], "input"),
    ("input", [{"role": "tool", "content": "x"}], "input.0.role"),
    ("input", [{"type": "reasoning", "summary": []}], "input.0.type"),
    ("input", [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}], "input.0.content.0.type"),
    ("input", [{"type": "function_call_output", "call_id": "c", "output": "x"}], "input"),
    ("input", [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "no"}], "input"),
    ("temperature", -1, "temperature"),
    ("temperature", "0", "temperature"),
    ("top_p", 0, "top_p"),
    ("top_logprobs", 21, "top_logprobs"),
    ("max_output_tokens", 0, "max_output_tokens"),
    ("max_output_tokens", 100_000, "max_output_tokens"),
    ("include", ["everything"], "include.0"),
    ("truncation", "middle", "truncation"),
    ("metadata", {"a": "x" * 513}, "metadata.a"),
    ("metadata", {str(i): "" for i in range(17)}, "metadata"),
    ("text", {"format": {"type": "json_object"}}, "text"),
    ("reasoning", {"effort": "high"}, "reasoning"),
    ("tools", [{"type": "web_search"}], "tools"),
    ("tool_choice", "required", "tool_choice"),
    ("conversation", "conv_1", "conversation"),
    ("stream_options", {}, "stream_options"),
    ("logit_bias", {"x": 1}, "logit_bias"),
    ("stop", [""], "stop"),
    ("request_id", "no spaces", "request_id"),
    ("max_tokens", 5, "max_tokens"),
    ("chat_template_kwargs", {"messages": []}, "chat_template_kwargs"),
]


async def test_what_is_wrong_is_named() -> None:
    async with serving(chat_template=CHATML) as app:
        for name, value, param in WRONG:
            error = (await create(app, 400, **{"input": "x", name: value}))["error"]
            assert (error["type"], error["param"]) == ("invalid_request_error", param), (name, value, error)
        assert app.state.server.engine.num_unfinished_requests == 0
        assert len(app.state.server.response_store) == 0


async def test_neutral_values_of_what_is_not_supported_change_nothing() -> None:
    neutral: dict[str, Any] = {
        "tools": [], "tool_choice": "none", "text": {"format": {"type": "text"}}, "reasoning": {"effort": None},
        "conversation": None, "background": False, "include": ["reasoning.encrypted_content"], "max_tool_calls": 3,
        "parallel_tool_calls": False, "service_tier": "auto", "prompt_cache_key": "k", "safety_identifier": "s",
    }  # fmt: skip
    async with serving(chat_template=CHATML) as app:
        plain = await create(app, input=PROMPT)
        same = await create(app, input=PROMPT, **neutral)
    assert text_of(plain) == text_of(same)
    echoed = ("tool_choice", "max_tool_calls", "parallel_tool_calls", "prompt_cache_key", "safety_identifier")
    assert {name: same[name] for name in echoed} == {name: neutral[name] for name in echoed}


async def test_an_unknown_model_is_a_404() -> None:
    async with serving(chat_template=CHATML) as app:
        for path in ("/v1/responses", "/v1/responses/input_tokens"):
            async with client(app) as http:
                answer = await http.post(path, content=json.dumps({"model": "nope", "input": "x"}), headers={
                    "content-type": "application/json"
                })  # fmt: skip
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
