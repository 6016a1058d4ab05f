"""Claims about POST /v1/chat/completions: what comes back, in which shape, and that it is what the engine generates."""

import re
from typing import Any

import pytest

from mini_vllm import LLM, SamplingParams
from tests.async_rig import checkpoint
from tests.entrypoints.openai.rig import CHAT, MESSAGES, assert_idle, assert_same, joined, post, stream, text_in, whole
from tests.entrypoints.server.rig import Call, serving

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHUNK_KEYS = {"id", "object", "created", "model", "choices"}
TALK = [*MESSAGES, {"role": "assistant", "content": "Well, I"}]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(str(checkpoint()), dtype="float32", num_threads=1, num_gpu_blocks_override=80)


# -- shape ------------------------------------------------------------------------------------------------------


async def test_an_answer_has_exactly_the_fields_that_vllm_gives(app: Any) -> None:
    body = await post(app, CHAT)
    assert set(body) == {
        "id", "object", "created", "model", "choices", "service_tier", "system_fingerprint", "usage",
        "prompt_logprobs", "prompt_token_ids", "prompt_text", "kv_transfer_params", "ec_transfer_params", "metrics",
    }  # fmt: skip
    (choice,) = body["choices"]
    assert set(choice) == {
        "index", "message", "logprobs", "finish_reason", "stop_reason", "token_ids", "routed_experts"
    }  # fmt: skip
    message = choice["message"]
    assert set(message) == {
        "role", "content", "refusal", "annotations", "audio", "function_call", "reasoning"
    }  # fmt: skip
    assert re.fullmatch(r"chatcmpl-[0-9a-f]{32}", body["id"])
    assert (body["object"], message["role"]) == ("chat.completion", "assistant")
    assert isinstance(message["content"], str)
    assert set(body["usage"]["prompt_tokens_details"]) >= {"cached_tokens"}


async def test_events_come_in_vllms_order_and_shape(app: Any) -> None:
    """The role, then text, then the end, then usage."""
    role, *texts, usage = await stream(app, CHAT, stream_options={"include_usage": True})
    assert set(role) == CHUNK_KEYS | {"prompt_token_ids", "prompt_text"}
    assert role["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    ]
    for chunk in texts[:-1]:
        assert set(chunk) == CHUNK_KEYS
        assert set(chunk["choices"][0]) == {"index", "delta", "logprobs", "finish_reason", "token_ids"}
        assert set(chunk["choices"][0]["delta"]) == {"content"} and chunk["choices"][0]["finish_reason"] is None
    end = texts[-1]["choices"][0]
    assert set(end) == {"index", "delta", "logprobs", "finish_reason", "stop_reason", "token_ids"}
    assert set(usage) == CHUNK_KEYS | {"usage", "system_fingerprint"} and usage["choices"] == []
    assert usage["object"] == "chat.completion.chunk"


async def test_each_choice_of_a_stream_begins_with_its_role_and_ends_once(app: Any) -> None:
    chunks = await stream(app, CHAT, n=3, temperature=1.0, seed=1)
    assert [chunk["choices"][0]["delta"].get("role") for chunk in chunks[:3]] == ["assistant"] * 3
    assert sorted(joined(chunks)) == [0, 1, 2]
    ends = [chunk for chunk in chunks if chunk["choices"][0]["finish_reason"] is not None]
    assert len(ends) == 3 and all("system_fingerprint" in chunk for chunk in ends)


async def test_logprobs_have_exact_bytes_and_the_likeliest_in_order(app: Any) -> None:
    fields: dict[str, Any] = {"logprobs": True, "top_logprobs": 4, "temperature": 2.0, "seed": 5, "max_tokens": 60}
    body = await post(app, CHAT, **fields)
    choice = body["choices"][0]
    positions = choice["logprobs"]["content"]
    assert set(choice["logprobs"]) == {"content"}
    for position in positions:
        assert set(position) == {"token", "logprob", "bytes", "top_logprobs"}
        likely = [entry["logprob"] for entry in position["top_logprobs"]]
        assert len(likely) == 4 and likely == sorted(likely, reverse=True)
        assert all(set(entry) == {"token", "logprob", "bytes"} for entry in position["top_logprobs"])
    raw = b"".join(bytes(position["bytes"]) for position in positions)
    assert raw.decode(errors="replace") == choice["message"]["content"]
    broken = [position for position in positions if position["token"].startswith("\\x")]
    assert broken and all(bytes(p["bytes"]).hex(" ") == p["token"][2:].replace("\\x", " ") for p in broken)
    assert_same(joined(await stream(app, CHAT, **fields)), whole(body))


async def test_logprobs_without_top_logprobs_have_none_of_others(app: Any) -> None:
    positions = (await post(app, CHAT, logprobs=True))["choices"][0]["logprobs"]["content"]
    assert len(positions) == 8 and all(position["top_logprobs"] == [] for position in positions)


async def test_the_prompts_logprobs_and_ids_and_text_are_there_on_request(app: Any) -> None:
    body = await post(app, CHAT, prompt_logprobs=1, return_token_ids=True, return_prompt_text=True)
    assert body["prompt_text"] == "<s>user: hello\nassistant: "
    assert len(body["prompt_logprobs"]) == len(body["prompt_token_ids"]) == body["usage"]["prompt_tokens"]
    assert len(body["choices"][0]["token_ids"]) == 8
    first, *rest = await stream(app, CHAT, return_token_ids=True, return_prompt_text=True)
    assert (first["prompt_token_ids"], first["prompt_text"]) == (body["prompt_token_ids"], body["prompt_text"])
    assert [i for chunk in rest for i in chunk["choices"][0]["token_ids"]] == body["choices"][0]["token_ids"]


# -- content ----------------------------------------------------------------------------------------------------


async def test_a_chat_is_the_offline_chat(app: Any, llm: LLM) -> None:
    params = SamplingParams(temperature=0.9, seed=4, max_tokens=12, n=2, stop=["zz"])
    (expected,) = llm.chat(MESSAGES, params, use_tqdm=False)
    fields: dict[str, Any] = {"temperature": 0.9, "seed": 4, "max_tokens": 12, "n": 2, "stop": "zz"}
    body = await post(app, CHAT, **fields, return_token_ids=True)
    assert body["prompt_token_ids"] == expected.prompt_token_ids
    assert [c["token_ids"] for c in body["choices"]] == [c.token_ids for c in expected.outputs]
    assert [text_in(c) for c in body["choices"]] == [c.text for c in expected.outputs]


async def test_without_a_limit_a_chat_goes_on_to_the_end_of_the_context(app: Any) -> None:
    body = await post(app, CHAT, max_tokens=None, ignore_eos=True)
    assert body["usage"]["total_tokens"] == 256
    assert body["choices"][0]["finish_reason"] == "length"


async def test_max_completion_tokens_wins_over_its_older_name(app: Any) -> None:
    assert (await post(app, CHAT, max_completion_tokens=3))["usage"]["completion_tokens"] == 3


async def test_the_last_message_is_gone_on_with(app: Any) -> None:
    fields: dict[str, Any] = {"messages": TALK, "continue_final_message": True}
    body = await post(app, CHAT, **fields, return_prompt_text=True)
    assert body["prompt_text"] == "<s>user: hello\nassistant: Well, I"
    echoed = await post(app, CHAT, **fields, echo=True)
    assert text_in(echoed["choices"][0]) == "Well, I" + text_in(body["choices"][0])
    assert_same(joined(await stream(app, CHAT, **fields, echo=True)), whole(echoed))


async def test_echo_leaves_a_message_of_another_role_alone(app: Any) -> None:
    assert whole(await post(app, CHAT, echo=True)) == whole(await post(app, CHAT))


async def test_the_generation_prompt_is_left_out_on_request(app: Any) -> None:
    body = await post(app, CHAT, add_generation_prompt=False, return_prompt_text=True)
    assert body["prompt_text"] == "<s>user: hello\n"
    assert body["choices"][0]["message"]["role"] == "user", "no new turn was opened"


async def test_answers_bear_the_role_that_the_server_was_given() -> None:
    async with serving(response_role="bot") as app:
        assert (await post(app, CHAT))["choices"][0]["message"]["role"] == "bot"
        assert (await stream(app, CHAT))[0]["choices"][0]["delta"]["role"] == "bot"


async def test_beams_of_a_chat_come_best_first(app: Any) -> None:
    fields: dict[str, Any] = {"use_beam_search": True, "n": 2, "temperature": None, "max_tokens": 4}
    body = await post(app, CHAT, **fields)
    assert len(body["choices"]) == 2 and body["usage"]["completion_tokens"] <= 8
    assert_same(joined(await stream(app, CHAT, **fields)), whole(body))


async def test_the_bundled_model_chats_out_of_the_box() -> None:
    async with serving(model=None, max_model_len=128) as app:
        messages = [{"role": "system", "content": "import os"}, {"role": "user", "content": "def f(x):"}]
        body = await post(app, CHAT, messages=messages, return_prompt_text=True)
        assert body["prompt_text"] == "<|endoftext|>import os\ndef f(x):\n"
        assert body["usage"]["completion_tokens"] == 8


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_client_that_leaves_frees_its_request(app: Any, streamed: bool) -> None:
    body = {"messages": MESSAGES, "n": 4, "ignore_eos": True, "stream": streamed}
    async with Call(app, "POST", CHAT, body) as call:
        if streamed:
            assert await call.chunk()
    await assert_idle(app)
