"""Whatever arrives is answered or refused, in few words and in the client's shape, and nothing of it is left behind."""

import asyncio
import random
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from tests.conformance.rig import BODIES, MODELS, assert_answered, assert_error
from tests.entrypoints.openai.rig import assert_idle
from tests.entrypoints.server.rig import client, serving

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module")
async def http(app: Any) -> AsyncIterator[Any]:
    """A client; after the test nothing of what it asked is unfinished, and the next request is served."""
    async with client(app) as http:
        yield http
        await assert_idle(app)
        assert (await http.post("/v1/completions", json=BODIES["/v1/completions"])).status_code == 200


# -- any value in any field ------------------------------------------------------------------------------------


def _nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


VALUES: list[Any] = [
    None, True, 0, -1, 1, 2**31, 2**63, -(2**64), 10**100, 0.5, 1e308, "", "x", "\x00", "x" * 100_000, "\ufeff\u200d😀",
    [], [[]], {}, [None], [""], ["\x00"], [1], [-1], [2**64], [1.5], [True], [{}], {"": ""}, {"0": 0}, {"-1": 1e308},
    {"9" * 30: 1}, _nested(900), {"a": _nested(480)}, ["x" * 10_000] * 10, [0] * 5000,
    dict.fromkeys(map(str, range(9000)), 1),
    {"type": "text"}, [{"role": "user"}], [{"role": "user", "content": None}], [{"role": "user", "content": [[]]}],
    [{"role": "", "content": ""}], [{"type": "item_reference", "id": "x"}], [{"type": "reasoning"}],
    [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "[" * 20_000}}]}],
    [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "[" * 20_000}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}],
]  # fmt: skip
STREAMING = ("/v1/completions", "/v1/chat/completions")


async def _try_values(http: Any, path: str, stride: int) -> None:
    for i, field in enumerate(MODELS[path].model_fields):
        for j, value in enumerate(VALUES):
            if (i + j) % stride == 0:
                stream = {"stream": True} if path in STREAMING and j % 2 else {}
                body = BODIES[path] | stream | {field: value}
                if field in ("max_tokens", "max_completion_tokens", "max_output_tokens") and value is None:
                    continue  # as long as the context
                assert_answered(await http.post(path, content=msgspec.json.encode(body), headers=JSON), path)


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize("path", BODIES)
async def test_any_value_in_any_field_is_taken_or_refused(path: str, http: Any) -> None:
    await _try_values(http, path, stride=4)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("path", BODIES)
async def test_every_value_in_every_field_is_taken_or_refused(path: str, http: Any) -> None:
    await _try_values(http, path, stride=1)


# -- bodies that were valid until somebody changed them --------------------------------------------------------

_ATOMS = [*VALUES[:16], "user", "assistant", "text", "tiny", "a" * 300, 3, 17, -0.0, 1e-300, ["a", 1], {"b": None}]
_NAMES = sorted(
    {name for model in MODELS.values() for name in model.model_fields} | {"", "\x00", "nonsense", "__class__"}
)


def _mutated(value: Any, rng: random.Random, depth: int = 0) -> Any:
    """A copy in which some part is another."""
    dice = rng.random()
    if dice < 0.15 or depth > 6:
        return rng.choice(_ATOMS)
    if dice < 0.2:
        return [value] * rng.randint(0, 3)
    if isinstance(value, dict):
        changed = {name: _mutated(item, rng, depth + 1) if rng.random() < 0.4 else item for name, item in value.items()}
        if dice < 0.6:
            changed[rng.choice(_NAMES)] = _mutated(rng.choice(_ATOMS), rng, depth + 1)
        elif changed and dice < 0.7:
            del changed[rng.choice(list(changed))]
        return changed
    if isinstance(value, list):
        return [_mutated(item, rng, depth + 1) if rng.random() < 0.5 else item for item in value]
    return rng.choice(_ATOMS)


async def _try_mutations(http: Any, path: str, number: int) -> None:
    rng = random.Random(path)
    statuses = []
    for _ in range(number):
        body = _mutated(BODIES[path], rng)
        if isinstance(body, dict):
            body.pop("background", None)  # goes on after its answer
        answer = await http.post(path, content=msgspec.json.encode(body), headers=JSON)
        assert_answered(answer, path)
        statuses.append(answer.status_code)
    assert 400 in statuses and 200 in statuses  # neither is the test blind


@pytest.mark.parametrize("path", BODIES)
async def test_a_body_with_anything_changed_is_taken_or_refused(path: str, http: Any) -> None:
    await _try_mutations(http, path, 200)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", BODIES)
async def test_five_thousand_changed_bodies_are_taken_or_refused(path: str, http: Any) -> None:
    await _try_mutations(http, path, 5000)


# -- what is no JSON -------------------------------------------------------------------------------------------

_DEPTH = 10_000
BROKEN: dict[str, bytes] = {
    "nothing": b"",
    "blanks": b" \r\n\t",
    "null": b"null",
    "a number": b"1e999",
    "an endless number": b"9" * 100_000,
    "text": b'"hi"',
    "a list": b"[]",
    "no quotes": b"{model: tiny}",
    "one quote": b'{"model":"',
    "a trailing comma": b'{"model":"tiny",}',
    "a comment": b'{"model":"tiny"} // hi',
    "two bodies": b'{"model":"tiny"}{"model":"tiny"}',
    "NaN": b'{"model":"tiny","temperature":NaN}',
    "infinity": b'{"model":"tiny","temperature":-Infinity}',
    "a float that is none": b'{"model":"tiny","temperature":1e400}',
    "no UTF-8": b'{"model":"ti\xff\xfeny"}',
    "UTF-8 cut short": b'{"model":"\xe2\x82"}',
    "UTF-8 surrogates": b'{"model":"\xed\xa0\x80"}',
    "overlong UTF-8": b'{"model":"\xc0\xaf"}',
    "lone surrogates": b'{"model":"\\ud800"}',
    "surrogates in a name": b'{"\\udfff":1}',
    "UTF-16": '{"model":"tiny"}'.encode("utf-16"),
    "a byte order mark": b'\xef\xbb\xbf{"model":"tiny"}',
    "control characters": b'{"model":"ti\x00ny"}',
    "deep lists": b"[" * _DEPTH + b"]" * _DEPTH,
    "deep objects": b'{"a":' * _DEPTH + b"1" + b"}" * _DEPTH,
    "deep and open": b'{"messages":' + b"[" * _DEPTH,
    "brackets in an endless text": b'"' + b'{[\\"' * _DEPTH,
    "gzip": b"\x1f\x8b\x08\x00\x00\x00\x00\x00",
}


@pytest.mark.parametrize("kind", BROKEN)
async def test_what_is_no_json_object_is_a_400_on_every_route(kind: str, http: Any) -> None:
    for path in BODIES:
        assert_error(await http.post(path, content=BROKEN[kind], headers=JSON), path, (400,))


async def test_of_a_name_given_twice_the_last_counts(http: Any) -> None:
    twice = b'{"model":"nope","model":"tiny","prompt":"hi","max_tokens":2000,"max_tokens":1}'
    answer = await http.post("/v1/completions", content=twice, headers=JSON)
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize(
    "kind",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", "json", "\u00ff/json"],
)
async def test_other_content_types_are_refused_on_every_route(kind: str, http: Any) -> None:
    for path, body in BODIES.items():
        headers = {"content-type": kind.encode("latin-1")}
        assert_error(await http.post(path, content=msgspec.json.encode(body), headers=headers), path, (400,))


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE", "HEAD", "TRACE", "BREW"])
async def test_another_method_is_a_405_that_names_the_right_one(method: str, http: Any) -> None:
    for path in BODIES:
        answer = await http.request(method, path)
        if path == "/v1/responses/input_tokens" and method in ("GET", "DELETE"):
            assert_error(answer, path, (404,))  # there could be a response of this name
            continue
        assert answer.status_code == 405 and "POST" in answer.headers["allow"]
        assert method == "HEAD" or answer.json()["error"]["message"]


# -- too much of it --------------------------------------------------------------------------------------------

_MILLION = 1_000_000
GIANTS: dict[str, tuple[str, bytes]] = {
    "messages": ("/v1/chat/completions", b'{"messages":[' + b'{"role":"user"},' * _MILLION + b"{}]}"),
    "messages to count": ("/tokenize", b'{"messages":[' + b'{"role":"user"},' * _MILLION + b"{}]}"),
    "turns": ("/v1/messages", b'{"messages":[' + b'{"role":"user"},' * _MILLION + b"{}]}"),
    "items": ("/v1/responses", b'{"input":[' + b'{"role":"user"},' * _MILLION + b"{}]}"),
    "prompts": ("/v1/completions", b'{"prompt":[' + b"[1]," * _MILLION + b"[1]]}"),
    "texts": ("/v1/completions", b'{"prompt":[' + b'"a",' * _MILLION + b'"a"]}'),
    "ids": ("/v1/completions", b'{"prompt":[' + b"1," * _MILLION + b"1]}"),
    "stops": ("/v1/completions", b'{"prompt":"a","stop":[' + b'"a",' * _MILLION + b'"a"]}'),
    "harmless lists": ("/v1/completions", b'{"prompt":"a","metadata":[' + b"[]," * _MILLION + b"[]]}"),
    "tools": ("/tokenize", b'{"messages":[{"role":"user"}],"tools":[' + b"{}," * _MILLION + b"{}]}"),
    "names": ("/v1/completions", b"{" + b",".join(b'"k%d":1' % i for i in range(_MILLION // 4)) + b"}"),
    "one long name": ("/v1/chat/completions", b'{"' + b"k" * 8 * _MILLION + b'":1}'),
    "a long wrong value": ("/v1/chat/completions", b'{"messages":"' + b"m" * 8 * _MILLION + b'"}'),
}  # fmt: skip


@pytest.mark.parametrize("kind", GIANTS)
async def test_a_body_of_a_million_things_is_refused_before_others_have_to_wait(kind: str, http: Any) -> None:
    path, content = GIANTS[kind]
    longest = asyncio.create_task(_longest_pause())
    await asyncio.sleep(0)
    assert_error(await http.post(path, content=content, headers=JSON), path, (400,))
    await asyncio.sleep(0.02)
    longest.cancel()
    assert await longest < 4.0  # seconds; validating all of it takes half a minute


async def _longest_pause() -> float:
    """Of the event loop, until cancelled, in seconds of this process: others on the machine do not count."""
    longest, last = 0.0, time.process_time()
    try:
        while True:
            await asyncio.sleep(0.005)
            longest, last = max(longest, time.process_time() - last), time.process_time()
    except asyncio.CancelledError:
        return max(longest, time.process_time() - last)


async def test_brackets_in_a_text_are_no_containers(http: Any) -> None:
    content = msgspec.json.encode({"prompt": '{"a": [[' * 50_000, "model": "tiny"})
    assert (await http.post("/tokenize", content=content, headers=JSON)).status_code == 200


async def test_a_body_over_the_limit_is_a_413_on_every_route() -> None:
    async with serving(max_request_body_bytes=100_000) as app, client(app) as http:
        for path, body in BODIES.items():
            content = msgspec.json.encode(body) + b" " * 100_000
            answer = await http.post(path, content=content, headers=JSON)
            assert_error(answer, path, (413,))
