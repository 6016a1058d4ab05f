"""What every request meets before its handler: an id, a key, limits, a counter, CORS."""

import asyncio
from typing import Any

import pytest

from tests.entrypoints.server.rig import Call, client, serving, state
from tests.entrypoints.server.stand_ins import IdleEngine, Worker, messages_router, router

BODY = {"messages": [{"role": "user", "content": "hello"}]}
HELLO = {"role": "user", "content": "hello"}


def app_of(routers: Any = (router,), **options: Any) -> Any:
    return serving(IdleEngine(), routers=routers, **options)


# -- X-Request-Id --------------------------------------------------------------------------------------------


async def test_every_answer_has_an_id_of_its_own() -> None:
    async with app_of() as app, client(app) as http:
        answers = [await http.get("/nope"), await http.get("/nope"), await http.post("/v1/echo", json=BODY)]
        ids = [answer.headers["x-request-id"] for answer in answers]
        assert len(set(ids)) == 3
        assert answers[2].json()["request_id"] == ids[2]


@pytest.mark.parametrize("own", ["a", "x" * 128, "id-!~"])
async def test_a_clients_own_id_is_kept(own: str) -> None:
    async with app_of() as app, client(app) as http:
        answer = await http.post("/v1/echo", json=BODY, headers={"x-request-id": own})
        assert answer.headers.get_list("x-request-id") == [own]
        assert answer.json()["request_id"] == own


@pytest.mark.parametrize("bad", ["", "x" * 129, "two words", "tab\there", "gr\xfc\xdfe"])
async def test_an_id_that_is_unfit_for_headers_and_logs_is_replaced(bad: str) -> None:
    async with app_of() as app, client(app) as http:
        answer = await http.get("/nope", headers={b"x-request-id": bad.encode("latin-1")})
        assert len(answer.headers["x-request-id"]) == 32


# -- keys ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer one"},
        {"authorization": "bearer  one"},
        {"x-api-key": "one"},
        {"x-api-key": "wrong", "authorization": "Bearer two"},
    ],
)
async def test_any_of_the_keys_opens_in_either_header(headers: dict[str, str]) -> None:
    async with app_of(api_key=("one", "two")) as app, client(app) as http:
        assert (await http.post("/v1/echo", json=BODY, headers=headers)).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer"},
        {"authorization": "Bearer "},
        {"authorization": "one"},
        {"authorization": "Basic one"},
        {"authorization": "Bearer on"},
        {"authorization": "Bearer one1"},
        {"x-api-key": ""},
        {"x-api-key": "Bearer one"},
    ],
)
async def test_nothing_else_opens(headers: dict[str, str]) -> None:
    async with app_of(api_key=("one", "two")) as app, client(app) as http:
        answer = await http.post("/v1/echo", json=BODY, headers=headers)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["type"] == "authentication_error"
        assert answer.headers["x-request-id"]


async def test_a_refusal_has_anthropics_shape_on_its_routes() -> None:
    async with app_of([messages_router], api_key="one") as app, client(app) as http:
        answer = await http.post("/v1/messages", json=BODY, headers={"x-request-id": "me"})
        assert answer.status_code == 401
        assert answer.json() == {
            "type": "error",
            "error": {"type": "authentication_error", "message": answer.json()["error"]["message"]},
            "request_id": "me",
        }


async def test_keys_guard_every_route_but_health_and_ping() -> None:
    async with serving(
        IdleEngine(), api_key="one", enable_debug_steps=True, enable_dev_mode=True
    ) as app, client(app) as http:  # fmt: skip
        asked = 0
        for route in app.routes:
            path = route.path.replace("{", "").replace("}", "")
            for method in route.methods - {"HEAD"}:
                status = (await http.request(method, path)).status_code
                assert status == (200 if path in ("/health", "/ping") else 401), (method, path)
                asked += 1
        assert asked > 8
        for path in ("/nope", "/health/", "//health", "/health/../v1/models", "/v1/models/health"):
            assert (await http.get(path)).status_code == 401


async def test_a_prefix_of_a_proxy_opens_no_other_route() -> None:
    async with serving(IdleEngine(), api_key="one", root_path="/llm") as app, client(app) as http:
        assert (await http.get("/llm/health")).status_code == 200
        assert (await http.get("/health")).status_code == 200
        assert (await http.get("/llm/version")).status_code == 401
        assert (await http.get("/version")).status_code == 401
        assert (await http.get("/llm/version", headers={"x-api-key": "one"})).status_code == 200
        assert (await http.get("/version", headers={"x-api-key": "one"})).status_code == 200


async def test_without_keys_everybody_is_served() -> None:
    async with app_of() as app, client(app) as http:
        answer = (await http.post("/v1/echo", json=BODY)).json()
        assert answer["key"] == "" and answer["salt"] is None and answer["asked"] == "mine"


async def test_each_key_has_its_own_part_of_the_prefix_cache() -> None:
    async with app_of(api_key=("one", "two")) as app, client(app) as http:
        one, again, two = [
            (await http.post("/v1/echo", json=BODY, headers={"x-api-key": key})).json() for key in ("one", "one", "two")
        ]
        assert one["key"] == "key-1" and two["key"] == "key-2"
        assert (one["salt"], one["asked"]) == (again["salt"], again["asked"])
        assert len({one["salt"], two["salt"], one["asked"], two["asked"]}) == 4


async def test_the_prefix_cache_may_be_shared() -> None:
    async with app_of(api_key=("one", "two"), share_prefix_cache=True) as app, client(app) as http:
        for key in ("one", "two"):
            answer = (await http.post("/v1/echo", json=BODY, headers={"x-api-key": key})).json()
            assert answer["salt"] is None and answer["asked"] == "mine"


async def test_the_parts_of_the_prefix_cache_are_no_function_of_the_keys() -> None:
    salts = set()
    for _ in range(2):
        async with app_of(api_key="one") as app, client(app, "one") as http:
            salts.add((await http.post("/v1/echo", json=BODY)).json()["salt"])
    assert len(salts) == 2


# -- the body ------------------------------------------------------------------------------------------------


async def test_a_body_that_says_it_is_too_large_is_refused_unread() -> None:
    length = {"content-length": "1001"}
    async with app_of(max_request_body_bytes=1000) as app, Call(app, "POST", "/v1/echo", b"x", length) as call:
        assert (await call.start())["status"] == 413


async def test_a_body_that_turns_out_too_large_is_refused_when_it_does() -> None:
    async def pieces() -> Any:
        for _ in range(100):
            sent.append(1)
            yield b" " * 100

    sent: list[int] = []
    async with app_of(max_request_body_bytes=1000) as app, client(app) as http:
        answer = await http.post("/v1/echo", content=pieces(), headers={"content-type": "application/json"})
        assert answer.status_code == 413
        assert "1000 bytes" in answer.json()["error"]["message"]
        assert len(sent) == 11


async def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_failure() -> None:
    async with app_of() as app:
        async with Call(app, "POST", "/v1/echo", b"{", {"content-length": "100"}) as call:
            call._incoming.get_nowait()
            call._incoming.put_nowait({"type": "http.request", "body": b"{", "more_body": True})
            call.disconnect()
            assert (await call.start())["status"] == 499
        assert state(app).num_in_flight == 0


async def test_a_body_at_the_limit_is_taken() -> None:
    body = b'{"messages": [{"role": "user", "content": "hi"}]}'
    async with app_of(max_request_body_bytes=len(body)) as app, client(app) as http:
        headers = {"content-type": "application/json"}
        assert (await http.post("/v1/echo", content=body, headers=headers)).status_code == 200
        assert (await http.post("/v1/echo", content=body + b" ", headers=headers)).status_code == 413


async def test_a_body_too_large_for_anthropics_routes_says_so_in_their_words() -> None:
    async with app_of([messages_router], max_request_body_bytes=10) as app, client(app) as http:
        answer = await http.post("/v1/messages", json=BODY)
        assert (answer.status_code, answer.json()["error"]["type"]) == (413, "request_too_large")


# -- counting, CORS, tracing ---------------------------------------------------------------------------------


async def test_load_counts_requests_under_way_and_forgets_none() -> None:
    worker = Worker()
    async with app_of([worker.router]) as app:
        async with Call(app, "POST", "/v1/work"), Call(app, "POST", "/v1/stream") as stream:
            await stream.chunk()
            await worker.started.wait()
            assert state(app).num_in_flight == 2
        assert state(app).num_in_flight == 0


async def test_cors_is_off_unless_origins_are_named() -> None:
    asked = {"origin": "https://a.example", "access-control-request-method": "POST"}
    async with app_of(api_key="one") as app, client(app) as http:
        answer = await http.options("/v1/echo", headers=asked)
        assert answer.status_code == 405 and "access-control-allow-origin" not in answer.headers
    async with app_of(api_key="one", allowed_origins=("https://a.example",)) as app, client(app) as http:
        answer = await http.options("/v1/echo", headers=asked)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        denied = await http.post("/v1/echo", json=BODY, headers={"origin": "https://a.example"})
        assert denied.status_code == 401 and denied.headers["access-control-allow-origin"] == "https://a.example"
        other = await http.options("/v1/echo", headers=asked | {"origin": "https://b.example"})
        assert other.status_code == 400


async def test_trace_headers_reach_the_handler() -> None:
    async with app_of() as app, client(app) as http:
        headers = {"traceparent": "00-1-2-01", "tracestate": "a=b", "x-other": "no"}
        answer = await http.post("/v1/echo", json=BODY, headers=headers)
        assert answer.json()["trace"] == {"traceparent": "00-1-2-01", "tracestate": "a=b"}


async def test_http_requests_are_counted_by_route() -> None:
    seen: list[tuple[Any, ...]] = []

    class Http:
        def observe(self, method: str, handler: str | None, status: int, seconds: float, *sizes: int, **more: int):
            seen.append((method, handler, status, more["request_bytes"] > 0, more["response_bytes"] > 0))

    worker = Worker()
    async with app_of([router, worker.router]) as app, client(app) as http:
        state(app).metrics = type("Metrics", (), {"http": Http()})  # type: ignore[assignment]
        await http.post("/v1/echo", json=BODY)
        await http.post("/v1/fail/bug", content=b"")
        await http.get("/nope")
        async with Call(app, "POST", "/v1/work"):
            await worker.started.wait()
    assert seen == [
        ("POST", "/v1/echo", 200, True, True),
        ("POST", "/v1/fail/{how}", 500, False, True),
        ("GET", None, 404, False, True),
        ("POST", "/v1/work", 499, False, False),
    ]


async def test_requests_do_not_wait_for_each_other() -> None:
    worker = Worker()
    async with app_of([router, worker.router]) as app, client(app) as http, Call(app, "POST", "/v1/work"):
        await worker.started.wait()
        answers = await asyncio.gather(*(http.post("/v1/echo", json=BODY) for _ in range(20)))
        assert {answer.status_code for answer in answers} == {200}
