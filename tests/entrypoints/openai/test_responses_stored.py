"""Claims about responses that are kept: who sees them, the background, cancelling, deleting, following, leaving."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from openai.types.responses.response_item_list import ResponseItemList

from mini_vllm.entrypoints.server.encoding import encode
from mini_vllm.exceptions import RequestError
from tests.entrypoints.sdk import CHATML, assert_fits
from tests.entrypoints.server.rig import Call, client, openai_client, serving, sse_events

GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_output_tokens": 8}
LONG: dict[str, Any] = {"model": "tiny", "temperature": 0, "input": "go", "ignore_eos": True}


async def create(app: Any, api_key: str | None = None, **fields: Any) -> dict[str, Any]:
    async with client(app, api_key) as http:
        answer = await http.post("/v1/responses", json={**GREEDY, "input": "hi", **fields})
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


async def ask(app: Any, method: str, path: str, expected: int = 200, api_key: str | None = None) -> dict[str, Any]:
    async with client(app, api_key) as http:
        answer = await http.request(method, f"/v1/responses/{path}")
    assert answer.status_code == expected, answer.text
    body: dict[str, Any] = answer.json()
    return body


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.002)


async def settled(app: Any, response_id: str) -> dict[str, Any]:
    """The response once it is in a final state."""
    async with asyncio.timeout(30):
        while (body := await ask(app, "GET", response_id))["status"] in ("queued", "in_progress"):
            await asyncio.sleep(0.01)
    return body


def num_unfinished(app: Any) -> int:
    return int(app.state.server.engine.num_unfinished_requests)


def held(app: Any, monkeypatch: pytest.MonkeyPatch, num_outputs: int = 2, error: Exception | None = None) -> None:
    """Every request of the engine stands still after some outputs, or fails with `error` there."""
    engine = app.state.server.engine
    add = engine.add_requests

    async def add_requests(requests: Any) -> Any:
        return [_Held(stream, num_outputs, error) for stream in await add(requests)]

    monkeypatch.setattr(engine, "add_requests", add_requests)


class _Held:
    def __init__(self, stream: Any, num_outputs: int, error: Exception | None) -> None:
        self._stream, self._left, self._error = stream, num_outputs, error

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        if self._left == 0:
            if self._error is not None:
                raise self._error
            await asyncio.Event().wait()
        self._left -= 1
        return await self._stream.__anext__()

    async def aclose(self) -> None:
        await self._stream.aclose()


# -- fetch, list, delete ---------------------------------------------------------------------------------------


async def test_a_stored_response_is_what_was_answered_until_it_is_deleted() -> None:
    async with serving(chat_template=CHATML) as app:
        body = await create(app)
        assert await ask(app, "GET", body["id"]) == body
        assert await ask(app, "DELETE", body["id"]) == {"id": body["id"], "object": "response", "deleted": True}
        error = (await ask(app, "GET", body["id"], 404))["error"]
        assert len(app.state.server.response_store) == 0
    assert error["message"] == f"Response with id '{body['id']}' not found."


async def test_a_streamed_response_is_stored_before_its_last_event() -> None:
    fields = {**GREEDY, "input": "hi", "stream": True}
    async with serving(chat_template=CHATML) as app, Call(app, "POST", "/v1/responses", fields) as call:
        while b"event: response.incomplete" not in (piece := await call.chunk() or b""):
            assert not call.ended
        final = sse_events(piece)[-1]["data"]["response"]
        assert await ask(app, "GET", final["id"]) == final


@pytest.mark.parametrize("stored", [{"store": False}, {}])
async def test_store_false_or_a_server_without_a_store_keeps_nothing(stored: dict[str, Any]) -> None:
    async with serving(chat_template=CHATML, max_stored_responses=0 if not stored else 10) as app:
        body = await create(app, **stored)
        assert body["store"] is False and len(app.state.server.response_store) == 0
        await ask(app, "GET", body["id"], 404)


async def test_a_server_without_a_store_says_so_to_those_who_need_it() -> None:
    async with serving(chat_template=CHATML, max_stored_responses=0) as app, client(app) as http:
        for name in ("store", "background"):
            answer = await http.post("/v1/responses", json={"input": "x", name: True})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)


async def test_input_items_come_in_pages_in_both_orders() -> None:
    items = [{"role": "user", "content": str(i)} for i in range(5)]
    async with serving(chat_template=CHATML) as app:
        body = await create(app, input=items)
        sdk = openai_client(app)
        everything = [item async for item in sdk.responses.input_items.list(body["id"], limit=2)]
        await sdk.close()
        page = await ask(app, "GET", f"{body['id']}/input_items?limit=2&order=asc")
        following = await ask(app, "GET", f"{body['id']}/input_items?limit=9&order=asc&after={page['last_id']}")
        wrong = await ask(app, "GET", f"{body['id']}/input_items?after=msg_unknown", 404)
        too_many = await ask(app, "GET", f"{body['id']}/input_items?limit=101", 400)
    assert [item.content[0].text for item in everything] == ["4", "3", "2", "1", "0"]
    assert_fits(ResponseItemList, page)
    assert (page["has_more"], following["has_more"]) == (True, False)
    texts = [item["content"][0]["text"] for item in [*page["data"], *following["data"]]]
    assert texts == ["0", "1", "2", "3", "4"]
    assert (wrong["error"]["param"], too_many["error"]["param"]) == ("after", "limit")


async def test_items_of_tools_are_listed_as_the_sdk_reads_them() -> None:
    items = [
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "x"},
        {"role": "assistant", "content": "A"},
    ]
    async with serving(chat_template=CHATML) as app:
        body = await create(app, input=items)
        page = await ask(app, "GET", f"{body['id']}/input_items?order=asc")
    assert_fits(ResponseItemList, page)
    assert [item["type"] for item in page["data"]] == ["function_call", "function_call_output", "message"]


# -- owners ----------------------------------------------------------------------------------------------------


async def test_another_keys_response_is_a_404_in_every_way() -> None:
    async with serving(chat_template=CHATML, api_key=("alice", "bob")) as app:
        body = await create(app, "alice", background=True)
        own = body["id"]
        for response_id in (own, "resp_unknown"):
            for method, path in (
                ("GET", ""), ("GET", "?stream=true"), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")
            ):  # fmt: skip
                error = (await ask(app, method, response_id + path, 404, "bob"))["error"]
                assert error["message"] == f"Response with id '{response_id}' not found."
        async with client(app, "bob") as http:
            for fields in ({"previous_response_id": own}, {"input": [{"id": body["id"]}]}):
                answer = await http.post("/v1/responses", json={**GREEDY, "input": "x", **fields})
                assert answer.status_code in (400, 404)
        assert (await ask(app, "GET", own, 200, "alice"))["id"] == own


async def test_the_oldest_response_gives_way_to_a_new_one() -> None:
    async with serving(chat_template=CHATML, max_stored_responses=2) as app:
        ids = [(await create(app))["id"] for _ in range(3)]
        await ask(app, "GET", ids[0], 404)
        for response_id in ids[1:]:
            await ask(app, "GET", response_id)
        store = app.state.server.response_store
        assert store.num_bytes == sum(store.get(response_id, "").num_bytes for response_id in ids[1:])


async def test_a_chain_outlives_the_responses_it_came_from() -> None:
    async with serving(chat_template=CHATML) as app:
        first = await create(app, input="one")
        second = await create(app, input="two", previous_response_id=first["id"])
        await ask(app, "DELETE", first["id"])
        third = await create(app, input="three", previous_response_id=second["id"])
        items = await ask(app, "GET", f"{third['id']}/input_items?order=asc")
    assert [item["role"] for item in items["data"]] == ["user", "assistant"] * 2 + ["user"]


async def test_a_request_id_names_the_response_once() -> None:
    async with serving(chat_template=CHATML) as app, client(app) as http:
        assert (await create(app, request_id="mine"))["id"] == "resp_mine"
        answer = await http.post("/v1/responses", json={"input": "x", "request_id": "mine"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "request_id")


async def test_two_keys_may_choose_the_same_request_id_at_the_same_time() -> None:
    async with serving(chat_template=CHATML, api_key=("k1", "k2")) as app:
        fields = {**LONG, "background": True, "max_output_tokens": 200, "request_id": "mine"}
        bodies = [await create(app, key, **fields) for key in ("k1", "k2")]
        assert [body["id"] for body in bodies] == ["resp_mine"] * 2 and num_unfinished(app) == 2
        await ask(app, "DELETE", "resp_mine", api_key="k1")
        await ask(app, "GET", "resp_mine", 404, "k1")
        assert (await ask(app, "GET", "resp_mine", 200, "k2"))["id"] == "resp_mine"
        assert set(app.state.server.engine._unfinished.streams) == {"resp_mine/key-2"}


async def test_a_response_may_follow_another_without_input() -> None:
    async with serving(chat_template=CHATML) as app, client(app) as http:
        first = await create(app, input="one")
        second = await create(app, input=None, previous_response_id=first["id"])
        assert second["status"] in ("completed", "incomplete")
        for path in ("/v1/responses", "/v1/responses/input_tokens"):
            answer = await http.post(path, json={"model": "tiny"})
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (400, "input") and "is required" in error["message"]


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("strem=true", "strem"),
        ("include=what", "include"),
        ("include[]=what", "include[]"),
        ("include_obfuscation=true", "include_obfuscation"),
        ("starting_after=-1&stream=true", "starting_after"),
        ("", None),
        ("include=message.output_text.logprobs&include=reasoning.encrypted_content", None),
        ("include[]=message.output_text.logprobs&include_obfuscation=false", None),
    ],
)
async def test_what_a_get_asks_for_and_is_not_known_is_refused(query: str, param: str | None) -> None:
    async with serving(chat_template=CHATML) as app:
        body = await create(app)
        answer = await ask(app, "GET", f"{body['id']}?{query}", 400 if param else 200)
    assert answer["error"]["param"] == param if param else answer["id"] == body["id"]


# -- in the background -----------------------------------------------------------------------------------------


async def test_a_background_response_is_queued_at_once_and_done_later() -> None:
    async with serving(chat_template=CHATML) as app:
        body = await create(app, background=True)
        done = await settled(app, body["id"])
        foreground = await create(app)
    assert_fits(Response, body)
    assert (body["status"], body["output"], body["usage"], body["background"]) == ("queued", [], None, True)
    assert (done["status"], done["created_at"]) == ("incomplete", body["created_at"])
    assert done["output"][0]["content"] == foreground["output"][0]["content"]
    assert done["usage"]["output_tokens"] == 8


async def test_cancelling_ends_it_with_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(chat_template=CHATML) as app:
        held(app, monkeypatch)
        body = await create(app, background=True, **LONG, max_output_tokens=100)
        while (await ask(app, "GET", body["id"]))["status"] == "queued":
            await asyncio.sleep(0.005)
        assert (await ask(app, "GET", body["id"]))["status"] == "in_progress"
        cancelled = await ask(app, "POST", f"{body['id']}/cancel")
        assert num_unfinished(app) == 0
        assert_fits(Response, cancelled)
        assert (cancelled["status"], cancelled["output"][0]["status"]) == ("cancelled", "incomplete")
        assert 1 <= cancelled["usage"]["output_tokens"] < 100
        assert await ask(app, "POST", f"{body['id']}/cancel") == cancelled  # again: the same
        assert await ask(app, "GET", body["id"]) == cancelled


async def test_only_what_runs_in_the_background_can_be_cancelled() -> None:
    async with serving(chat_template=CHATML) as app:
        foreground = await create(app)
        background = await create(app, background=True)
        await settled(app, background["id"])
        messages = [
            (await ask(app, "POST", f"{body['id']}/cancel", 400))["error"]["message"]
            for body in (foreground, background)
        ]
    assert messages == ["Cannot cancel a synchronous response.", "Cannot cancel a response that is incomplete."]


async def test_deleting_or_closing_takes_the_request_out_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(chat_template=CHATML) as app:
        held(app, monkeypatch)
        ids = [(await create(app, background=True, stream=stream, **LONG))["id"] for stream in (False, False)]
        assert num_unfinished(app) == 2
        await ask(app, "DELETE", ids[0])
        assert num_unfinished(app) == 1
        await app.state.server.response_store.close()
        assert num_unfinished(app) == 0 and len(app.state.server.response_store) == 0


async def test_a_running_response_cannot_be_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(chat_template=CHATML) as app, client(app) as http:
        held(app, monkeypatch)
        body = await create(app, background=True)
        answer = await http.post("/v1/responses", json={"input": "x", "previous_response_id": body["id"]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "previous_response_id")


async def test_a_store_full_of_running_responses_refuses_another(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(chat_template=CHATML, max_stored_responses=1) as app, client(app) as http:
        held(app, monkeypatch)
        await create(app, background=True)
        answer = await http.post("/v1/responses", json={"input": "x", "background": True})
        assert answer.status_code == 503 and "retry-after" in answer.headers
        assert num_unfinished(app) == 1


async def test_a_background_stream_can_be_left_and_followed_again() -> None:
    fields = {**LONG, "background": True, "stream": True, "max_output_tokens": 30}
    async with serving(chat_template=CHATML) as app:
        async with Call(app, "POST", "/v1/responses", fields) as call:
            (first,) = sse_events(await call.chunk() or b"")
        response_id = first["data"]["response"]["id"]
        sdk = openai_client(app)
        events = [event async for event in await sdk.responses.retrieve(response_id, stream=True)]
        rest = [event async for event in await sdk.responses.retrieve(response_id, stream=True, starting_after=4)]
        await sdk.close()
        final = await settled(app, response_id)
    for event in events:
        assert_fits(ResponseStreamEvent, event.to_dict(mode="json"))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events][:3] == ["response.created", "response.queued", "response.in_progress"]
    assert [event.to_dict() for event in rest] == [event.to_dict() for event in events[5:]]
    assert events[-1].response.to_dict() == Response.model_validate(final).to_dict()
    assert final["usage"]["output_tokens"] == 30


async def test_what_was_not_streamed_in_the_background_cannot_be_followed() -> None:
    async with serving(chat_template=CHATML) as app:
        for fields in ({}, {"stream": False, "background": True}):
            body = await create(app, **fields)
            error = (await ask(app, "GET", f"{body['id']}?stream=true", 400))["error"]
            assert error["param"] == "stream"
        await ask(app, "GET", f"{body['id']}?starting_after=3", 400)


# -- failing, leaving ------------------------------------------------------------------------------------------


async def test_a_request_that_fails_alone_is_a_failed_response(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("mini_vllm"), "propagate", True)
    async with serving(chat_template=CHATML) as app, client(app) as http:
        held(app, monkeypatch, error=RequestError("a processor raised"))
        body = await create(app, background=True, max_output_tokens=100)
        background = await settled(app, body["id"])
        answer = await http.post("/v1/responses", json={**GREEDY, **LONG, "stream": True})
        whole = await http.post("/v1/responses", json={**GREEDY, **LONG, "temperature": 1})
        assert num_unfinished(app) == 0
    ids = (body["id"], sse_events(answer.text)[0]["data"]["response"]["id"])
    assert all(sum(f"{id} failed" in line for line in caplog.messages) == 1 for id in ids)
    last = sse_events(answer.text)[-1]
    assert last["event"] == "response.failed"
    for response in (background, last["data"]["response"]):
        assert_fits(Response, response)
        assert (response["status"], response["error"]["code"]) == ("failed", "server_error")
    assert whole.status_code == 500 or len(whole.json()["output"]) == 1


@pytest.mark.parametrize("num_outputs", [0, 1])
async def test_a_request_that_the_server_ends_is_failed_in_the_background_and_a_503_otherwise(
    num_outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As at the end of a drain, be it before the first token or after it."""
    async with serving(chat_template=CHATML, max_num_seqs=1) as app:
        engine = app.state.server.engine
        ahead = await create(app, background=True, **LONG, max_output_tokens=200)
        body = await create(app, background=True, **LONG, max_output_tokens=200)
        async with client(app) as http:
            answering = asyncio.create_task(http.post("/v1/responses", json=LONG))
            await until(lambda: num_unfinished(app) == 3)
            if num_outputs:
                await ask(app, "POST", f"{ahead['id']}/cancel")
                while (await ask(app, "GET", body["id"]))["status"] == "queued":
                    await asyncio.sleep(0.001)
            await engine.drain(0)
            answer = await answering
        final = await settled(app, body["id"])
        assert (final["status"], answer.status_code) == ("failed", 503)
        assert "shutting down" in final["error"]["message"] and answer.json()["error"]["code"] == "shutting_down"
        assert_fits(Response, final)
        assert num_unfinished(app) == 0


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_takes_its_request_along(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(chat_template=CHATML) as app:
        held(app, monkeypatch, num_outputs=2 if stream else 0)
        async with Call(app, "POST", "/v1/responses", {**LONG, "stream": stream}) as call:
            if stream:
                await call.chunk()
            await until(lambda: num_unfinished(app) == 1)
        assert num_unfinished(app) == 0
        assert len(app.state.server.response_store) == 0
        await app.state.server.engine.check_integrity()


async def test_a_full_queue_is_a_503_before_anything_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(chat_template=CHATML, max_num_queued_reqs=1) as app:
        held(app, monkeypatch)
        await create(app, background=True, ignore_eos=True, max_output_tokens=200)
        sdk = openai_client(app)
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError) as error:
                await sdk.responses.create(model="tiny", input="x", stream=stream)
            assert error.value.status_code == 503 and "retry-after" in error.value.response.headers
        await sdk.close()


async def test_the_bytes_counted_are_those_that_are_kept() -> None:
    async with serving(chat_template=CHATML) as app:
        body = await create(app, background=True, stream=False, top_logprobs=2)
        final = await settled(app, body["id"])
        store = app.state.server.response_store
        items = (await ask(app, "GET", f"{body['id']}/input_items"))["data"]
        assert store.num_bytes == len(encode(final)) + len(encode(items))
