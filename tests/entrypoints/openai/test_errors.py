"""Claims about requests that are refused: status, type, code, the field at fault, and words that clients know."""

from typing import Any

import pytest

from tests.entrypoints.openai.rig import CHAT, COMPLETIONS, MESSAGES, assert_idle, error_of, post
from tests.entrypoints.server.rig import client

pytestmark = pytest.mark.asyncio(loop_scope="module")

IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,x"}}]}]
BAD_CALL = [
    *MESSAGES,
    {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}]},
]

BOTH: list[tuple[dict[str, Any], str, str]] = [
    ({"temperature": -1}, "temperature", "-1"),
    ({"temperature": 1e300}, "temperature", "1e"),
    ({"temperature": "hot"}, "temperature", "hot"),
    ({"top_p": 2}, "top_p", "(0, 1]"),
    ({"top_k": -2}, "top_k", "-2"),
    ({"top_k": 2**63}, "top_k", "31 bits"),
    ({"min_p": 1.5}, "min_p", "[0, 1]"),
    ({"repetition_penalty": 0}, "repetition_penalty", "got 0"),
    ({"presence_penalty": 3}, "presence_penalty", "[-2, 2]"),
    ({"seed": 2**64 - 1}, "seed", "64"),
    ({"n": 0}, "n", "at least 1, got 0"),
    ({"n": 129}, "n", "128"),
    ({"n": 1.5}, "n", "integer"),
    ({"n": True}, "n", "integer"),
    ({"stream": "yes"}, "stream", "boolean"),
    ({"stop": ""}, "stop", "empty"),
    ({"stop": ["x"] * 65}, "stop", "64"),
    ({"stop": "x" * 1001}, "stop", "1000"),
    ({"stop_token_ids": [99999]}, "stop_token_ids", "383"),
    ({"bad_words": ["x" * 1001]}, "bad_words", "1000"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "token ids"),
    ({"logit_bias": {"1": 101}}, "logit_bias", "[-100, 100]"),
    ({"logit_bias": {"384": 1}}, "logit_bias", "383"),
    ({"logit_bias": {str(i): 0 for i in range(1025)}}, "logit_bias", "1024"),
    ({"allowed_token_ids": []}, "allowed_token_ids", "at least one"),
    ({"min_tokens": 9}, "min_tokens", "max_tokens=8"),
    ({"max_tokens": -1}, "max_tokens", "-1"),
    ({"max_tokens": 100_000}, "max_tokens", "max_tokens=100000 cannot be greater than max_model_len=256"),
    ({"max_tokens": 255}, "max_tokens", "This model's maximum context length is 256 tokens. However,"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "only be defined when `stream=True`"),
    ({"stream_interval": 2}, "stream_interval", "`stream`"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "not available when `stream=True`"),
    ({"length_penalty": 2.0}, "length_penalty", "use_beam_search"),
    ({"use_beam_search": True, "temperature": 1}, "temperature", "use_beam_search"),
    ({"use_beam_search": True, "temperature": None, "n": 60}, "beam_width", "logprobs"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "at least 1"),
    ({"truncate_prompt_tokens": 257}, "truncate_prompt_tokens", "max_model_len (256)"),
    ({"truncation_side": "left"}, "truncation_side", "truncate_prompt_tokens"),
    ({"request_id": "a b"}, "request_id", "pattern"),
    ({"cache_salt": ""}, "cache_salt", "at least 1"),
    ({"priority": 2**63}, "priority", "less than"),
    ({"priority": 1}, "priority", "needs --scheduling-policy priority"),
    ({"priority": 1, "use_beam_search": True, "temperature": None}, "priority", "needs --scheduling-policy priority"),
    ({"vllm_xargs": {"a": [7] * 40_000}}, "vllm_xargs", "at most 65536 bytes of JSON, got 80"),
    ({"response_format": {"type": "json_object"}}, "response_format", "not available"),
    ({"structured_outputs": {"regex": "a"}}, "structured_outputs", "not available"),
    ({"temprature": 1}, "temprature", "did you mean 'temperature'?"),
    ({"x" * 5000: 1}, "x" * 64, "Unrecognized request argument"),
]
OF_COMPLETIONS: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": None}, "prompt", "must be text"),
    ({"prompt": []}, "prompt", "at least one prompt"),
    ({"prompt": [1, "a"]}, "prompt", "must be text"),
    ({"prompt": [True]}, "prompt", "must be text"),
    ({"prompt": [[]]}, "prompt", "at least one token"),
    ({"prompt": [1, 384]}, "prompt", "0 to 383"),
    ({"prompt": [1, -1]}, "prompt", "0 to 383"),
    ({"prompt": ["a"] * 1025}, "prompt", "1024"),
    ({"prompt": "x " * 1_000_000}, "prompt", "However, your prompt has 2000000 bytes"),
    ({"prompt": "x " * 300}, "prompt", "This model's maximum context length is 256 tokens. However,"),
    ({"best_of": 3}, "best_of", "n=1"),
    ({"suffix": "end"}, "suffix", "middle"),
    ({"logprobs": 21}, "logprobs", "at most 20"),
    ({"logprobs": True}, "logprobs", "integer"),
    ({"prompt_embeds": "AAAA"}, "prompt_embeds", "text"),
    ({"messages": MESSAGES}, "messages", "Unrecognized"),
]
OF_CHATS: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": None}, "messages", "list"),
    ({"messages": []}, "messages", "empty conversation"),
    ({"messages": [{"content": "x"}]}, "messages.0.role", "required"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "string"),
    ({"messages": [{"role": "user", "content": "x", "colour": 1}]}, "messages.0.colour", "Unrecognized"),
    ({"messages": IMAGE}, "messages.0.content.0.type", "'image_url' is not supported"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text", "string"),
    ({"messages": BAD_CALL}, "messages", "JSON object"),
    ({"messages": [{"role": "user", "content": "x " * 300}]}, "messages", "This model's maximum context length is 256"),
    ({"messages": [{"role": "user", "content": "x" * 10**6}]}, "messages", "However, your prompt has 1000"),
    ({"top_logprobs": 3}, "top_logprobs", "`logprobs` must be set to true"),
    ({"logprobs": 3}, "logprobs", "boolean"),
    ({"logprob_token_ids": [3]}, "logprob_token_ids", "`logprobs`"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", "at least 1"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "not available"),
    ({"tool_choice": "auto"}, "tool_choice", "not available"),
    ({"functions": [{"name": "f"}]}, "functions", "not available"),
    ({"modalities": ["audio"]}, "modalities", "text only"),
    ({"chat_template": "{{ 1 }}"}, "chat_template", "--trust-request-chat-template"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "messages"),
    (
        {"continue_final_message": True, "add_generation_prompt": True},
        "continue_final_message",
        "add_generation_prompt",
    ),
]


def _id(case: Any) -> str:
    return next(iter(case))[:24] if isinstance(case, dict) else ""


@pytest.mark.parametrize(
    ("path", "fields", "param", "words"),
    [
        *((path, *case) for path in (COMPLETIONS, CHAT) for case in BOTH),
        *((COMPLETIONS, *case) for case in OF_COMPLETIONS),
        *((CHAT, *case) for case in OF_CHATS),
    ],
    ids=_id,
)
async def test_a_bad_field_is_a_400_that_names_it(
    app: Any, path: str, fields: dict[str, Any], param: str, words: str
) -> None:
    error = await error_of(app, path, **fields)
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert words in error["message"] and len(error["message"]) < 1100
    assert error["code"] in (400, "context_length_exceeded")


async def test_no_refused_request_leaves_anything_behind(app: Any) -> None:
    for fields, *_ in OF_COMPLETIONS:
        await error_of(app, COMPLETIONS, stream=True, **fields)
    await assert_idle(app)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize", "/detokenize"])
async def test_an_unknown_model_is_a_404_with_the_known_names(app: Any, path: str) -> None:
    body = {"/tokenize": {"prompt": "x"}, "/detokenize": {"tokens": [1]}, CHAT: {"messages": MESSAGES}}
    async with client(app) as http:
        answer = await http.post(path, json=body.get(path, {"prompt": "x"}) | {"model": "nope"})
    assert answer.status_code == 404
    assert answer.json()["error"] == {
        "message": "The model `nope` does not exist. Valid aliases: tiny.", "type": "not_found_error",
        "param": "model", "code": "model_not_found",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"{bad", "application/json"),
        (b'{"prompt": "\xff"}', "application/json"),
        (b'{"prompt": "\\ud800"}', "application/json"),
        (b'{"prompt": "x", "temperature": NaN}', "application/json"),
        (b"[" * 100_000, "application/json"),
        (b"[]", "application/json"),
        (b"", "application/json"),
        (b'{"prompt": "x"}', "text/plain"),
    ],
    ids=["malformed", "no UTF-8", "half a surrogate pair", "NaN", "deep", "no object", "empty", "type"],
)
async def test_what_is_no_json_object_is_a_400(app: Any, content: bytes, kind: str) -> None:
    async with client(app) as http:
        answer = await http.post(COMPLETIONS, content=content, headers={"content-type": kind})
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"


async def test_values_that_ask_for_nothing_may_be_sent(app: Any) -> None:
    nothing: dict[str, Any] = {
        "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"],
        "functions": [], "function_call": "none", "audio": None, "verbosity": "medium", "logit_bias": {},
        "stop": [], "watermarking": False, "routed_experts_prompt_start": 0, "metadata": {"a": "b"}, "store": True,
        "service_tier": "auto", "prompt_cache_key": "k", "safety_identifier": "s", "parallel_tool_calls": True,
    }  # fmt: skip
    assert (await post(app, CHAT, **nothing))["usage"]["completion_tokens"] == 8
