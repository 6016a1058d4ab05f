"""What the tests of conformance have in common: a small valid body for each route, and what an error must look like."""

from collections.abc import Mapping
from typing import Any

from mini_vllm.entrypoints.anthropic.protocol import CountTokensRequest, MessagesRequest
from mini_vllm.entrypoints.openai.chat_request import ChatCompletionRequest
from mini_vllm.entrypoints.openai.completion_request import CompletionRequest
from mini_vllm.entrypoints.openai.responses.request import ResponsesInput, ResponsesRequest
from mini_vllm.entrypoints.openai.tokenize_request import DetokenizeRequest, TokenizeRequest
from mini_vllm.entrypoints.server.fields import ApiModel

_MESSAGES = [{"role": "user", "content": "hi"}]

BODIES: Mapping[str, dict[str, Any]] = {
    "/v1/completions": {"model": "tiny", "prompt": "hi", "max_tokens": 2},
    "/v1/chat/completions": {"model": "tiny", "messages": _MESSAGES, "max_tokens": 2},
    "/v1/responses": {"model": "tiny", "input": "hi", "max_output_tokens": 2, "store": False},
    "/v1/messages": {"model": "tiny", "messages": _MESSAGES, "max_tokens": 2},
    "/v1/messages/count_tokens": {"model": "tiny", "messages": _MESSAGES},
    "/v1/responses/input_tokens": {"model": "tiny", "input": "hi"},
    "/tokenize": {"model": "tiny", "prompt": "hi"},
    "/detokenize": {"model": "tiny", "tokens": [1, 2]},
}
"""A valid body for each route that takes one."""

MODELS: Mapping[str, type[ApiModel]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/messages": MessagesRequest,
    "/v1/messages/count_tokens": CountTokensRequest,
    "/v1/responses/input_tokens": ResponsesInput,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}

GENERATING = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")
MAX_ERROR_BYTES = 4096


def is_anthropic(path: str) -> bool:
    return path.startswith("/v1/messages")


def assert_error(answer: Any, path: str, statuses: tuple[int, ...] = ()) -> None:
    """`answer` is an error of the client's, told small and in the shape that its SDK reads."""
    assert answer.status_code in statuses if statuses else 400 <= answer.status_code < 500, answer.text[:500]
    assert len(answer.content) <= MAX_ERROR_BYTES
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    body = answer.json()
    if is_anthropic(path):
        assert set(body) == {"type", "error", "request_id"} and body["type"] == "error"
        assert set(body["error"]) == {"type", "message"}
    else:
        assert set(body) == {"error"}
        assert set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str) and body["error"]["message"]
    assert body["error"]["type"].endswith(("_error", "request_too_large"))
    assert "Traceback" not in answer.text and ".py" not in body["error"]["message"]


def assert_answered(answer: Any, path: str) -> None:
    """Whatever was sent, it was understood or refused; it is never the server that failed."""
    if answer.status_code != 200:
        assert_error(answer, path)
