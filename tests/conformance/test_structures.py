"""Bodies, events and errors field by field against what vLLM 0.32 sends.

Wherever ours differ, `docs/vllm-differences.md` says so and why; a row there that is no longer true fails as well.
"""

import json
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.conformance.rig import assert_error, is_anthropic
from tests.conformance.vllm_shapes import SHAPES
from tests.entrypoints.server.rig import client, serving, sse_events

pytestmark = pytest.mark.asyncio(loop_scope="module")

PAGE = Path(__file__).parents[2] / "docs" / "vllm-differences.md"
HI = [{"role": "user", "content": "hi"}]
GREEDY = {"model": "tiny", "temperature": 0}
USAGE = {"include_usage": True}

EXCHANGES: dict[str, tuple[str, str, dict[str, Any] | None]] = {
    "models": ("GET", "/v1/models", None),
    "version": ("GET", "/version", None),
    "load": ("GET", "/load", None),
    "tokenize": ("POST", "/tokenize", {"prompt": "def foo(x):", "return_token_strs": True}),
    "tokenize a chat": ("POST", "/tokenize", {"messages": HI}),
    "detokenize": ("POST", "/detokenize", {"tokens": [10, 20, 30]}),
    "completion": (
        "POST", "/v1/completions",
        GREEDY | {"prompt": "def foo", "max_tokens": 4, "logprobs": 2, "echo": True, "return_token_ids": True},
    ),
    "chat": (
        "POST", "/v1/chat/completions",
        GREEDY | {"messages": HI, "max_tokens": 1, "prompt_logprobs": 1, "return_token_ids": True},
    ),
    "chat logprobs": (
        "POST", "/v1/chat/completions",
        GREEDY | {"messages": HI, "max_tokens": 4, "logprobs": True, "top_logprobs": 2},
    ),
    "message": ("POST", "/v1/messages", {"model": "tiny", "max_tokens": 5, "messages": HI}),
    "count_tokens": ("POST", "/v1/messages/count_tokens", {"model": "tiny", "messages": HI}),
    "response": ("POST", "/v1/responses", GREEDY | {"input": "hi", "max_output_tokens": 4}),
}  # fmt: skip

STREAMS: dict[str, tuple[str, dict[str, Any]]] = {
    "completion": (
        "/v1/completions",
        GREEDY | {"prompt": "def foo", "max_tokens": 3, "stream_options": USAGE | {"continuous_usage_stats": True}},
    ),
    "chat": (
        "/v1/chat/completions",
        {"messages": HI, "n": 2, "max_tokens": 2, "logprobs": True, "top_logprobs": 1, "ignore_eos": True},
    ),
    "chat with usage": (
        "/v1/chat/completions",
        GREEDY | {"messages": HI, "max_tokens": 4, "stream_options": USAGE},
    ),
    "message": ("/v1/messages", {"model": "tiny", "max_tokens": 5, "messages": HI, "top_k": 1}),
    "response": ("/v1/responses", {"model": "tiny", "input": "hi", "max_output_tokens": 3, "temperature": 0}),
}  # fmt: skip


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def found(app: Any) -> AsyncIterator[dict[str, Any]]:
    """Our answer or event for each entry of `SHAPES`."""
    async with client(app) as http:
        ours: dict[str, Any] = {}
        for name, (method, path, body) in EXCHANGES.items():
            answer = await http.request(method, path, json=body)
            assert answer.status_code == 200, answer.text
            ours[name] = answer.json()
        ours["chat logprobs"] = {"logprobs": ours["chat logprobs"]["choices"][0]["logprobs"]}
        ours["response"]["output"] = []
        for name, (path, body) in STREAMS.items():
            ours |= _named(name, sse_events((await http.post(path, json=body | {"stream": True})).content))
        yield ours


def _named(name: str, events: list[dict[str, Any]]) -> dict[str, Any]:
    """The events of a stream by the names they have in `SHAPES`."""
    data = [event["data"] for event in events if event["data"] != "[DONE]"]
    if name in ("message", "response"):
        named = {f"{name} event {event['type']}": event for event in data}
        for event in [event for event in data if "response" in event]:  # compared on its own
            named[f"response object {event['type'].removeprefix('response.')}"] = event["response"]
            named[f"{name} event {event['type']}"] = event | {"response": {}}
        return named
    if name == "completion":
        return dict(
            zip(("completion chunk", "completion last chunk", "completion usage chunk"), data[-3:], strict=True)
        )
    if name == "chat with usage":
        return {"chat usage chunk": data[-1]}
    ends = [chunk for chunk in data if chunk["choices"][0]["finish_reason"]]
    middle = [c for c in data if "role" not in c["choices"][0]["delta"] and c not in ends]
    return {"chat role chunk": data[0], "chat chunk": middle[0], "chat last chunk": ends[-1]}


# -- two shapes, side by side ----------------------------------------------------------------------------------


def of_facts(shape: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(field, kind) of everything in an entry of `SHAPES`."""
    for one in shape if isinstance(shape, tuple) else (shape,):
        if isinstance(one, dict):
            yield path, "object"
            for name, value in one.items():
                yield from of_facts(value, f"{path}.{name}")
        elif isinstance(one, list):
            yield path, "list"
            for item in one:
                yield from of_facts(item, f"{path}[]")
        else:
            yield from ((path, kind) for kind in one.split("|"))


_OPEN = re.compile(
    r"(?<!content)\[\]\.top_logprobs\[\]$|(?<!content)\.logprobs\.top_logprobs\[\]$|prompt_logprobs\[\]$"
)
"""Objects whose names are tokens."""


def of_value(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """The same of an answer."""
    yield path, KINDS[type(value)]
    if isinstance(value, dict):
        for name, item in value.items():
            yield from of_value(item, f"{path}.{'*' if _OPEN.search(path) else name}")
    elif isinstance(value, list):
        for item in value:
            yield from of_value(item, f"{path}[]")


KINDS = {dict: "object", list: "list", str: "str", int: "int", float: "float", bool: "bool", type(None): "null"}


def differences(name: str, ours: Any) -> set[tuple[str, str, str]]:
    """(exchange, field, how it differs). Of what is inside a field that is not there, nothing is said."""
    theirs_by_field, ours_by_field = _by_field(of_facts(SHAPES[name])), _by_field(of_value(ours))
    found = set()
    for field in theirs_by_field.keys() | ours_by_field.keys():
        theirs, own = theirs_by_field.get(field), ours_by_field.get(field)
        parent = re.sub(r"(\.[^.\[]+|\[\])$", "", field)
        if field and theirs_by_field.get(parent, set()).isdisjoint(ours_by_field.get(parent, set()) - {"null"}):
            continue
        if field.endswith("[]") and (theirs is None or own is None):
            continue  # one of the lists is empty
        if own is None:
            found.add((name, field[1:], "missing"))
        elif theirs is None:
            found.add((name, field[1:], "added"))
        elif not own <= theirs and not (own <= {"int", "float"} and "float" in theirs):
            found.add((name, field[1:], f"{'|'.join(sorted(theirs))} -> {'|'.join(sorted(own))}"))
    return found


def _by_field(pairs: Iterator[tuple[str, str]]) -> dict[str, set[str]]:
    kinds: dict[str, set[str]] = {}
    for field, kind in pairs:
        kinds.setdefault(field, set()).add(kind)
    return kinds


def documented() -> set[tuple[str, str, str]]:
    """The rows of the page's tables about fields: exchange, field, difference."""
    rows = re.findall(
        r"^\| ([^|`]+) \| `([^`]+)` \| ([^|]+(?:\\\|[^|]+)*) \| [^|]+ \|$", PAGE.read_text(), re.MULTILINE
    )
    return {
        (exchange.strip(), field, how.strip().replace("\\|", "|"))
        for exchanges, fields, how in rows
        for exchange in exchanges.split(", ")
        for field in fields.split(" ")
    }


async def test_every_field_is_vllms_or_its_difference_is_documented(found: dict[str, Any]) -> None:
    differing = set().union(*(differences(name, found[name]) for name in SHAPES))
    assert differing == documented()


async def test_the_comparison_would_notice_a_field_that_is_missing_added_or_of_another_kind() -> None:
    assert differences("version", {"version": "1"}) == set()
    assert differences("version", {}) == {("version", "version", "missing")}
    assert differences("version", {"version": 1, "more": None}) == {
        ("version", "version", "str -> int"), ("version", "more", "added"),
    }  # fmt: skip


async def test_a_response_is_the_same_object_in_each_of_its_events(found: dict[str, Any]) -> None:
    for name in ("created", "in_progress", "incomplete"):
        assert found[f"response object {name}"].keys() == found["response"].keys()


# -- the order of events ---------------------------------------------------------------------------------------


async def _events(app: Any, name: str) -> list[Any]:
    path, body = STREAMS[name]
    async with client(app) as http:
        answer = await http.post(path, json=body | {"stream": True})
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    return [event["data"] for event in sse_events(answer.content)]


async def test_choices_of_a_chat_open_before_any_has_text_and_end_before_done(app: Any) -> None:
    *chunks, done = await _events(app, "chat")
    assert done == "[DONE]"
    opening, rest = chunks[:2], chunks[2:]
    assert [chunk["choices"][0]["index"] for chunk in opening] == [0, 1]
    assert all(chunk["choices"][0]["delta"] == {"role": "assistant", "content": ""} for chunk in opening)
    assert all("role" not in chunk["choices"][0]["delta"] for chunk in rest)
    for index in (0, 1):
        ends = [chunk["choices"][0]["finish_reason"] for chunk in rest if chunk["choices"][0]["index"] == index]
        assert ends[-1] == "length" and set(ends[:-1]) <= {None}


async def test_usage_comes_after_the_end_and_before_done(app: Any) -> None:
    for name in ("completion", "chat with usage"):
        *chunks, usage, done = await _events(app, name)
        assert done == "[DONE]" and usage["choices"] == []
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        assert usage["usage"]["total_tokens"] == usage["usage"]["prompt_tokens"] + usage["usage"]["completion_tokens"]


# -- errors ----------------------------------------------------------------------------------------------------

CHAT = {"model": "tiny", "messages": HI}
ERRORS: dict[str, tuple[str, str, Any, int, str | None]] = {
    "an unknown model": ("POST", "/v1/chat/completions", CHAT | {"model": "nope"}, 404, "model"),
    "no messages": ("POST", "/v1/chat/completions", {"model": "tiny"}, 400, "messages"),
    "an empty conversation": ("POST", "/v1/chat/completions", {"model": "tiny", "messages": []}, 400, "messages"),
    "no JSON": ("POST", "/v1/chat/completions", b"{bad", 400, None),
    "temperature": ("POST", "/v1/chat/completions", CHAT | {"temperature": -1}, 400, "temperature"),
    "top_p": ("POST", "/v1/completions", {"prompt": "hi", "top_p": 2}, 400, "top_p"),
    "max_tokens": ("POST", "/v1/completions", {"prompt": "hi", "max_tokens": 100000}, 400, "max_tokens"),
    "a long prompt": ("POST", "/v1/completions", {"prompt": "x " * 600}, 400, "prompt"),
    "n": ("POST", "/v1/completions", {"prompt": "hi", "n": 0}, 400, "n"),
    "top_logprobs": ("POST", "/v1/chat/completions", CHAT | {"top_logprobs": 3}, 400, "top_logprobs"),
    "tool_choice": ("POST", "/v1/chat/completions", CHAT | {"tool_choice": "auto"}, 400, "tool_choice"),
    "stream_options": ("POST", "/v1/chat/completions", CHAT | {"stream_options": {}}, 400, "stream_options"),
    "an unknown path": ("GET", "/v1/nope", None, 404, None),
    "a wrong method": ("GET", "/v1/chat/completions", None, 405, None),
    "an unknown response": ("GET", "/v1/responses/resp_nope", None, 404, "response_id"),
    "an unknown model of a message": ("POST", "/v1/messages", CHAT | {"model": "nope", "max_tokens": 4}, 404, None),
    "no max_tokens of a message": ("POST", "/v1/messages", CHAT, 400, None),
}
SAID = {
    "an unknown model": "The model `nope` does not exist. Valid aliases: tiny.",
    "an unknown model of a message": "The model `nope` does not exist. Valid aliases: tiny.",
    "an empty conversation": "Cannot apply chat template to an empty conversation. Provide at least one message.",
    "max_tokens": "max_tokens=100000 cannot be greater than max_model_len=256. Please request fewer output tokens.",
    "a long prompt": "This model's maximum context length is 256 tokens. However, ",
    "top_logprobs": "when using `top_logprobs`, `logprobs` must be set to true.",
    "stream_options": "Stream options can only be defined when `stream=True`.",
    "an unknown response": "Response with id 'resp_nope' not found.",
}
"""Words of vLLM's that clients look for."""


@pytest.mark.parametrize("case", ERRORS)
async def test_errors_have_vllms_status_and_name_the_field(case: str, app: Any) -> None:
    method, path, body, status, param = ERRORS[case]
    content = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
    async with client(app) as http:
        answer = await http.request(method, path, content=content, headers={"content-type": "application/json"})
    assert_error(answer, path, (status,))
    assert SAID.get(case, "") in answer.json()["error"]["message"]
    if not is_anthropic(path):
        assert answer.json()["error"]["param"] == param


async def test_a_wrong_key_is_told_in_the_envelope_on_every_path() -> None:
    async with serving(api_key="k") as app, client(app, "wrong") as http:
        for path in ("/v1/models", "/tokenize", "/metrics", "/openapi.json", "/v1/nope", "/v1/messages"):
            answer = await http.get(path)
            assert_error(answer, path, (401,))
            assert answer.headers["www-authenticate"] == "Bearer"
        assert (await http.get("/health")).status_code == (await http.get("/ping")).status_code == 200


async def test_health_and_ping_are_empty(app: Any) -> None:
    async with client(app) as http:
        for path in ("/health", "/ping"):
            answer = await http.get(path)
            assert (answer.status_code, answer.content) == (200, b"")
