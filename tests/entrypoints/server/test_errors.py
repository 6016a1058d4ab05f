"""Whatever is wrong with a request, its client is told where, in its own words, and nothing else happens."""

import json
import logging
from typing import Any

import pytest
from pydantic import ValidationError

from mini_vllm.entrypoints.server.errors import MAX_MESSAGE
from tests.entrypoints.server.rig import client, serving
from tests.entrypoints.server.stand_ins import FAILURES, Body, IdleEngine, messages_router, router

HELLO = {"role": "user", "content": "hello"}
JSON = {"content-type": "application/json"}


def app_of(routers: Any = (router, messages_router), **options: Any) -> Any:
    return serving(IdleEngine(), routers=routers, **options)


async def post(body: Any, **options: Any) -> Any:
    async with app_of() as app, client(app) as http:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await http.post("/v1/echo", content=content, headers=options.get("headers", JSON))


async def error(body: Any, **options: Any) -> dict[str, Any]:
    answer = await post(body, **options)
    assert answer.status_code == 400, answer.text
    found: dict[str, Any] = answer.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    assert found["type"] == "invalid_request_error"
    return found


# -- JSON ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'{"messages": ', "not valid JSON"),
        (b"not json", "not valid JSON"),
        (b'{"messages": []} trailing', "not valid JSON"),
        (b'{"temperature": NaN}', "not valid JSON"),
        (b'{"temperature": Infinity}', "not valid JSON"),
        (b'{"metadata": {"a": -Infinity}}', "not valid JSON"),
        (b'{"temperature": 1e400}', "not valid JSON"),
        (b'{"n": %s}' % (b"9" * 5000), "not valid JSON"),
        (b'{"metadata": "\\ud800"}', "not valid JSON"),
        (b'{"metadata": "\xed\xa0\x80"}', "not UTF-8"),
        (b'\xff\xfe{"a": 1}', "not valid JSON"),
        ('{"metadata": 1}'.encode("utf-16"), "not valid JSON"),
        (b'{"metadata":' + b"[" * 40_000 + b"]" * 40_000 + b"}", "nested too deeply"),
        (b'{"metadata":' + b'{"a":' * 40_000 + b"1" + b"}" * 40_001, "nested too deeply"),
        (b'{"metadata":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "more than 50000 objects and lists"),
        (b'{"metadata":[' + b"{}," * 50_000 + b"{}]}", "more than 50000 objects and lists"),
    ],
)
async def test_a_body_that_is_no_strict_json_is_said_to_be_none(body: bytes, says: str) -> None:
    assert says in (await error(body))["message"]


async def test_brackets_inside_of_text_are_text() -> None:
    answer = await post({"messages": [{"role": "user", "content": '[{"' * 50_000}]})
    assert answer.status_code == 200


@pytest.mark.parametrize("body", [b"[]", b"3", b'"text"', b"null", b"true", b"1e3", b""])
async def test_json_that_is_no_object_is_refused(body: bytes) -> None:
    assert (await error(body))["message"].startswith("body: ")


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "json"]
)
async def test_another_content_type_is_refused(kind: str | None) -> None:
    found = await error({"messages": [HELLO]}, headers={"content-type": kind} if kind else {})
    assert "application/json" in found["message"]


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON", "application/vnd.x+json"])
async def test_spellings_of_json_are_taken(kind: str) -> None:
    assert (await post({"messages": [HELLO]}, headers={"content-type": kind})).status_code == 200


# -- fields --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({}, "messages", "is required"),
        ({"messages": None}, "messages", "list"),
        ({"messages": "hello"}, "messages", "list"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "is required"),
        ({"messages": [HELLO, {"role": "user", "content": 5}]}, "messages.1.content", "string or Input should be a"),
        ({"messages": [{"role": "cook", "content": "a"}]}, "messages.0.role", "'user' or 'assistant', got 'cook'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text", "is required"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages.0.content", "must not be empty"),
        ({"messages": [HELLO], "n": 0}, "n", "greater than or equal to 1, got 0"),
        ({"messages": [HELLO], "n": "many"}, "n", "valid integer"),
        ({"messages": [HELLO], "n": 10**30}, "n", "less than or equal to 4"),
        ({"messages": [HELLO], "tools": [1]}, "tools", "there are no tools here"),
        ({"messages": [HELLO], "temprature": 1}, "temprature", "did you mean 'temperature'?"),
        ({"messages": [HELLO | {"nme": 1}]}, "messages.0.nme", "Unrecognized request argument"),
    ],
)
async def test_a_wrong_field_is_named_as_the_body_spells_it(body: Any, param: str, says: str) -> None:
    found = await error(body)
    assert found["param"] == param
    assert found["message"].startswith(f"{param}: ")
    assert says in found["message"]


async def test_what_asks_for_nothing_is_no_error() -> None:
    answer = await post({"messages": [HELLO], "tools": [], "metadata": {"any": ["thing"]}})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        {"messages": "x" * 1_000_000},
        {"messages": [{"role": "x" * 1_000_000, "content": "a"}]},
        {"messages": [{"role": "user", "content": [{"type": "x" * 1_000_000}]}]},
        {"messages": [HELLO | {"x" * 1_000_000: 1}]},
        {"x" * 1_000_000: 1},
        {"messages": [{}] * 10_000},
        {"n": ["x" * 1000] * 1000, "messages": [HELLO]},
    ],
)
async def test_an_error_does_not_send_the_body_back(body: Any) -> None:
    answer = await post(body)
    assert answer.status_code == 400
    assert len(answer.content) < 1000
    assert "x" * 101 not in answer.text


def test_a_body_of_a_million_wrong_things_is_refused_at_the_first() -> None:
    with pytest.raises(ValidationError) as failure:
        Body.model_validate({"messages": [{}] * 1000})
    assert failure.value.error_count() == 2  # role and content of the first message
    with pytest.raises(ValidationError) as failure:
        Body.model_validate({"messages": [HELLO | {"content": [{}] * 1000}]})
    assert failure.value.error_count() == 3  # no text, and of the first part neither type nor text


def test_an_object_of_ten_thousand_names_is_no_value_of_a_field() -> None:
    with pytest.raises(ValidationError, match="more than 10000"):
        Body.model_validate({"messages": {str(i): i for i in range(10_001)}})


# -- errors of handlers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "status", "kind", "param", "code"),
    [
        ("overloaded", 503, "service_unavailable_error", None, "max_num_queued_reqs"),
        ("dead", 500, "server_error", None, "engine_dead"),
        ("too_long", 400, "invalid_request_error", "prompt", "context_length_exceeded"),
        ("parameter", 400, "invalid_request_error", "top_p", 400),
        ("bug", 500, "server_error", None, "internal_error"),
    ],
)
async def test_what_handlers_raise_has_openais_shape(how: str, status: int, kind: str, param: Any, code: Any) -> None:
    async with app_of() as app, client(app) as http:
        answer = await http.post(f"/v1/fail/{how}")
        found = answer.json()["error"]
        assert (answer.status_code, found["type"], found["param"], found["code"]) == (status, kind, param, code)
        assert answer.headers.get("retry-after") == ("7" if how == "overloaded" else None)


@pytest.mark.parametrize(
    ("how", "status", "kind"),
    [
        ("overloaded", 529, "overloaded_error"),
        ("dead", 500, "api_error"),
        ("too_long", 400, "invalid_request_error"),
        ("bug", 500, "api_error"),
    ],
)
async def test_what_handlers_raise_has_anthropics_shape_on_its_routes(how: str, status: int, kind: str) -> None:
    async with app_of() as app, client(app) as http:
        answer = await http.post(f"/v1/messages/{how}")
        assert (answer.status_code, answer.json()["error"]["type"]) == (status, kind)
        assert answer.json()["type"] == "error"
        assert answer.json()["request_id"] == answer.headers["x-request-id"]
        assert answer.headers.get("retry-after") == ("7" if how == "overloaded" else None)


async def test_a_wrong_body_has_anthropics_shape_on_its_routes() -> None:
    async with app_of() as app, client(app) as http:
        answer = await http.post("/v1/messages", json={"messages": 3})
        assert answer.status_code == 400
        assert answer.json()["error"]["type"] == "invalid_request_error"
        assert answer.json()["error"]["message"].startswith("messages: ")


@pytest.mark.parametrize("path", ["/v1/fail/bug", "/v1/fail/alone", "/v1/messages/alone"])
async def test_a_bug_is_logged_with_the_request_id_and_told_to_nobody(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("mini_vllm").addHandler(caplog.handler)
    try:
        async with app_of() as app, client(app) as http:
            answer = await http.post(path, headers={"x-request-id": "find-me"})
            assert (answer.status_code, answer.headers["x-request-id"]) == (500, "find-me")
            assert "secret" not in answer.text
        assert len(set(map(id, caplog.records))) == 1 and "find-me" in caplog.text
        assert str(FAILURES[path.split("/")[-1]]) in caplog.text
    finally:
        logging.getLogger("mini_vllm").removeHandler(caplog.handler)


async def test_an_error_has_a_message_of_bounded_length() -> None:
    from mini_vllm.entrypoints.server.errors import ApiError

    assert len(ApiError(400, "x" * 10**6).message) <= MAX_MESSAGE + 3


# -- routes --------------------------------------------------------------------------------------------------


async def test_an_unknown_path_is_a_404_in_the_envelope() -> None:
    async with app_of() as app, client(app) as http:
        answer = await http.get("/v1/nothing")
        assert answer.status_code == 404
        assert answer.json()["error"]["type"] == "not_found_error"
        other = await http.get("/v1/messages/x/y", headers={"anthropic-version": "2023-06-01"})
        assert (other.status_code, other.json()["error"]["type"]) == (404, "not_found_error")


async def test_a_wrong_method_is_a_405_that_names_the_right_ones() -> None:
    async with serving(IdleEngine()) as app, client(app) as http:
        answer = await http.delete("/ping")
        assert (answer.status_code, answer.headers["allow"]) == (405, "GET, POST")
        assert "GET, POST" in answer.json()["error"]["message"]
