"""The real `openai` SDK, blocking and asynchronous, against the application in this process."""

import asyncio
from typing import Any

import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.entrypoints.openai.rig import CHAT, COMPLETIONS, MESSAGES, PROMPT, assert_idle, body_for, post, stream
from tests.entrypoints.sdk import blocking_openai
from tests.entrypoints.server.rig import openai_client, serving

pytestmark = pytest.mark.asyncio(loop_scope="module")

COMPLETE: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 8}
ANSWER: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_completion_tokens": 8}
USAGE: Any = {"include_usage": True}


async def test_completions_whole_and_streamed_are_the_same(app: Any) -> None:
    async with openai_client(app) as sdk:
        whole = await sdk.completions.create(**COMPLETE, logprobs=2)
        events = [event async for event in await sdk.completions.create(**COMPLETE, stream=True, stream_options=USAGE)]
    assert isinstance(whole, Completion) and whole.usage is not None and whole.choices[0].logprobs is not None
    assert "".join(choice.text for event in events for choice in event.choices) == whole.choices[0].text
    assert events[-1].usage is not None
    assert events[-1].usage.completion_tokens == whole.usage.completion_tokens == 8


async def test_chats_whole_and_streamed_are_the_same(app: Any) -> None:
    async with openai_client(app) as sdk:
        whole = await sdk.chat.completions.create(**ANSWER, logprobs=True, top_logprobs=1)
        events = [e async for e in await sdk.chat.completions.create(**ANSWER, stream=True, stream_options=USAGE)]
    assert isinstance(whole, ChatCompletion) and isinstance(events[0], ChatCompletionChunk)
    message = whole.choices[0].message
    assert "".join(choice.delta.content or "" for event in events for choice in event.choices) == message.content
    assert (events[0].choices[0].delta.role, message.role) == ("assistant", "assistant")
    assert whole.choices[0].logprobs is not None and len(whole.choices[0].logprobs.content or []) == 8


async def test_the_sdks_own_accumulator_understands_the_stream(app: Any) -> None:
    """It takes no answer that ran into its limit, so this one meets a stop string."""
    async with openai_client(app) as sdk:
        text = (await sdk.chat.completions.create(**ANSWER)).choices[0].message.content
        ask: dict[str, Any] = {**ANSWER, "logprobs": True, "stop": text[3:5]}
        whole = await sdk.chat.completions.create(**ask)
        async with sdk.chat.completions.stream(**ask) as events:
            kinds = {event.type async for event in events}
            final = await events.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.choices[0].logprobs.content == whole.choices[0].logprobs.content


async def test_the_blocking_client_works_alike() -> None:
    async with serving() as sdk_app:
        blocking = blocking_openai(sdk_app)  # made here, so that it knows this loop
        completion = await asyncio.to_thread(blocking.completions.create, **COMPLETE)
        events = await asyncio.to_thread(lambda: list(blocking.completions.create(**COMPLETE, stream=True)))
        chat = await asyncio.to_thread(blocking.chat.completions.create, **ANSWER)
        blocking.close()
    assert "".join(choice.text for event in events for choice in event.choices) == completion.choices[0].text
    assert chat.choices[0].message.content


async def test_vllms_fields_go_into_extra_body(app: Any) -> None:
    async with openai_client(app) as sdk:
        answer = await sdk.completions.create(**COMPLETE, extra_body={"top_k": 1, "return_token_ids": True})
    assert len(answer.choices[0].token_ids) == 8


async def test_errors_are_the_sdks_own_types(app: Any) -> None:
    async with openai_client(app) as sdk:
        with pytest.raises(openai.BadRequestError) as bad:
            await sdk.chat.completions.create(**ANSWER | {"temperature": -1})
        with pytest.raises(openai.NotFoundError) as missing:
            await sdk.completions.create(**COMPLETE | {"model": "nope"})
        with pytest.raises(openai.BadRequestError) as long:
            await sdk.completions.create(**COMPLETE | {"prompt": "x " * 300}, stream=True)
    assert (bad.value.param, missing.value.code, long.value.code) == (
        "temperature", "model_not_found", "context_length_exceeded"
    )  # fmt: skip


async def test_a_stream_that_is_closed_early_ends_its_request(app: Any) -> None:
    async with openai_client(app) as sdk:
        events = await sdk.chat.completions.create(**ANSWER | {"max_completion_tokens": None}, stream=True)
        await anext(events)
        await events.close()
    await assert_idle(app)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_a_full_queue_is_a_503_and_says_when_to_come_back(path: str) -> None:
    async with serving(max_num_queued_reqs=1) as app, openai_client(app) as sdk:
        engine = app.state.server.engine
        busy = asyncio.create_task(post(app, path, max_tokens=200, ignore_eos=True))
        while not engine.num_unfinished_requests:
            await asyncio.sleep(0)
        with pytest.raises(openai.InternalServerError) as full:
            await sdk.post(path.removeprefix("/v1"), body=body_for(path, stream=True), cast_to=object)
        assert full.value.status_code == 503 and int(full.value.response.headers["retry-after"]) >= 1
        assert (await busy)["usage"]["completion_tokens"] == 200
        assert await stream(app, path)
