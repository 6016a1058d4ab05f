"""Requests to /v1/completions and /v1/chat/completions in tests: JSON in, JSON or the events of a stream out."""

from collections.abc import Mapping
from typing import Any

from tests.entrypoints.server.rig import client, sse_events, state

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hello"}]
PROMPT = "The capital of France"


def body_for(path: str, **fields: Any) -> dict[str, Any]:
    """A greedy request for 8 tokens, unless `fields` say otherwise."""
    source: dict[str, Any] = {"messages": MESSAGES} if path == CHAT else {"prompt": PROMPT}
    return {"model": "tiny", "temperature": 0, "max_tokens": 8, **source, **fields}


async def post(app: Any, path: str, expected: int = 200, **fields: Any) -> dict[str, Any]:
    """The answer to `body_for(path, **fields)`."""
    async with client(app) as http:
        answer = await http.post(path, json=body_for(path, **fields))
    assert answer.status_code == expected, answer.text
    body: dict[str, Any] = answer.json()
    return body


async def error_of(app: Any, path: str, expected: int = 400, **fields: Any) -> dict[str, Any]:
    """The error that it gets; whether streamed or not, it comes before any event."""
    body = await post(app, path, expected, **fields)
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


async def stream(app: Any, path: str, **fields: Any) -> list[dict[str, Any]]:
    """The chunks of a streamed answer; the stream must end with [DONE]."""
    async with client(app) as http:
        answer = await http.post(path, json=body_for(path, stream=True, **fields))
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = sse_events(answer.text)
    assert events[-1]["data"] == "[DONE]"
    return [event["data"] for event in events[:-1]]


def text_in(choice: Mapping[str, Any]) -> str:
    """Of a choice of either API, whole or in a chunk."""
    source = choice if "text" in choice else choice.get("message") or choice["delta"]
    return source.get("text", source.get("content")) or ""


def joined(chunks: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """What the chunks of each choice come to: text, token ids, logprobs, and how it ended."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            so_far = choices.setdefault(choice["index"], {"text": "", "token_ids": [], "logprobs": None, "end": None})
            assert so_far["end"] is None, "nothing comes after the end"
            so_far["text"] += text_in(choice)
            so_far["token_ids"] += choice.get("token_ids") or []
            so_far["logprobs"] = _extended(so_far["logprobs"], choice["logprobs"])
            if choice["finish_reason"] is not None:
                so_far["end"] = (choice["finish_reason"], choice["stop_reason"])
    return choices


def whole(body: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The same of an answer that was not streamed."""
    return {
        choice["index"]: {
            "text": text_in(choice),
            "token_ids": choice["token_ids"] or [],
            "logprobs": choice["logprobs"],
            "end": (choice["finish_reason"], choice["stop_reason"]),
        }
        for choice in body["choices"]
    }


def _extended(so_far: dict[str, list[Any]] | None, more: dict[str, list[Any]] | None) -> dict[str, list[Any]] | None:
    if so_far is None or more is None:
        return so_far or more
    return {name: so_far[name] + more[name] for name in so_far}


def assert_same(found: Any, expected: Any, place: str = "") -> None:
    """Equal, floats within what another height of the batch makes of them."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for key in expected:
            assert_same(found[key], expected[key], f"{place}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), place
        for position, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{place}[{position}]")
    elif isinstance(expected, float):
        assert found is not None and abs(found - expected) < 1e-4, place
    else:
        assert found == expected, place


async def assert_idle(app: Any) -> None:
    """Nothing is left of any request."""
    engine = state(app).engine
    assert engine.num_unfinished_requests == 0
    await engine.check_integrity()
