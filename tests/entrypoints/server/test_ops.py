"""Routes for those who run the server."""

from typing import Any

import pytest

from mini_vllm import __version__
from mini_vllm.entrypoints.server.state import Phase
from mini_vllm.exceptions import EngineDeadError
from tests.entrypoints.server.rig import client, serving, state
from tests.entrypoints.server.stand_ins import IdleEngine


@pytest.mark.parametrize(("method", "path"), [("GET", "/health"), ("GET", "/ping"), ("POST", "/ping")])
async def test_health_is_200_while_requests_are_served_and_503_while_not(method: str, path: str) -> None:
    engine = IdleEngine()
    async with serving(engine) as app, client(app) as http:
        healthy = await http.request(method, path)
        assert (healthy.status_code, healthy.content) == (200, b"")
        for phase in (Phase.DRAINING, Phase.DEAD):
            state(app).phase = phase
            ill = await http.request(method, path)
            assert (ill.status_code, ill.text, ill.headers["retry-after"]) == (503, str(phase), "1")
        state(app).phase = Phase.READY
        engine.dead = EngineDeadError("killed")
        assert (await http.request(method, path)).status_code == 503


async def test_version_and_load() -> None:
    async with serving(IdleEngine()) as app, client(app) as http:
        assert (await http.get("/version")).json() == {"version": __version__}
        assert (await http.get("/load")).json() == {"server_load": 0}


async def test_debugging_and_development_routes_are_there_only_when_asked_for() -> None:
    for options, status in (({}, 404), ({"enable_debug_steps": True, "enable_dev_mode": True}, 200)):
        engine = IdleEngine()
        async with serving(engine, **options) as app, client(app) as http:
            assert (await http.get("/debug/steps")).status_code == status
            assert (await http.get("/server_info")).status_code == status
            assert (await http.post("/reset_prefix_cache")).status_code == status
            assert engine.num_resets == (status == 200)


async def test_vllms_variable_turns_development_routes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    async with serving(IdleEngine()) as app, client(app) as http:
        assert (await http.post("/reset_prefix_cache")).status_code == 200


async def test_server_info_shows_no_key() -> None:
    async with serving(IdleEngine(), enable_dev_mode=True, api_key="very-secret") as app, client(app) as http:
        answer = await http.get("/server_info", headers={"x-api-key": "very-secret"})
        assert answer.status_code == 200
        assert "very-secret" not in answer.text
        assert answer.json()["serve_args"]["port"] == 8000


async def test_docs_can_be_left_out() -> None:
    for options, status in (({}, 200), ({"disable_fastapi_docs": True}, 404)):
        async with serving(IdleEngine(), **options) as app, client(app) as http:
            for path in ("/openapi.json", "/docs", "/redoc"):
                assert (await http.get(path)).status_code == status


async def test_the_api_document_promises_400_where_fastapi_would_say_422() -> None:
    async with serving(IdleEngine()) as app, client(app) as http:
        paths: dict[str, dict[str, Any]] = (await http.get("/openapi.json")).json()["paths"]
        operations = [operation for path in paths.values() for operation in path.values()]
        assert operations
        assert not any("422" in operation["responses"] for operation in operations)
        with_body = [operation for operation in operations if "requestBody" in operation]
        assert all("400" in operation["responses"] for operation in with_body)
        ids = [operation["operationId"] for operation in operations]
        assert len(set(ids)) == len(ids)


async def test_debug_steps_says_what_ran_and_why_the_rest_waits() -> None:
    options: dict[str, Any] = {"enable_debug_steps": True, "step_trace_detailed": True, "max_num_seqs": 1}
    async with serving(**options) as app, client(app) as http:
        body = {"model": "tiny", "prompt": [[5, 6, 7], [8, 9]], "max_tokens": 3, "ignore_eos": True}
        assert (await http.post("/v1/completions", json=body)).status_code == 200
        found = (await http.get("/debug/steps")).json()
        assert found["waiting"] == {}
        first = found["steps"][0]
        assert list(first["num_scheduled_tokens"].values()) == [3]
        (reason,) = first["waiting"].values()
        assert "max_num_seqs" in reason
        assert len((await http.get("/debug/steps?n=1")).json()["steps"]) == 1
        events = (await http.get("/debug/steps?format=chrome")).json()["traceEvents"]
        assert any(event["name"] == "step 1" for event in events)
        for wrong in ("n=0", "n=many", "format=xml"):
            answer = await http.get(f"/debug/steps?{wrong}")
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, wrong.partition("=")[0])


async def test_what_a_key_cached_is_not_found_by_another() -> None:
    body = {"model": "tiny", "prompt": list(range(3, 53)), "max_tokens": 1}
    async with serving(api_key=("one", "two")) as app, client(app) as http:

        async def cached(key: str) -> int:
            answer = await http.post("/v1/completions", json=body, headers={"x-api-key": key})
            return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

        assert [await cached(key) for key in ("one", "one", "two", "two")] == [0, 48, 0, 48]
    async with serving(api_key=("one", "two"), share_prefix_cache=True) as app, client(app) as http:
        assert [await cached(key) for key in ("one", "two")] == [0, 48]


async def test_metrics_count_requests_tokens_and_rejections() -> None:
    async with serving(max_num_queued_reqs=1, served_model_name=("first", "second")) as app, client(app) as http:
        body = {"model": "second", "prompt": [5, 6, 7], "max_tokens": 3, "ignore_eos": True}
        assert (await http.post("/v1/completions", json=body)).status_code == 200
        refused = await http.post("/v1/completions", json=body | {"prompt": [[5], [6]]})
        assert refused.status_code == 503 and refused.headers["retry-after"]
        answer = await http.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=")
        lines = answer.text.splitlines()
        assert 'vllm:generation_tokens_total{engine="0",model_name="first"} 3.0' in lines
        assert any("admission_rejections_total" in line and line.endswith(" 1.0") for line in lines)
        assert 'http_requests_total{handler="/v1/completions",method="POST",status="5xx"} 1.0' in lines
        openmetrics = await http.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
        assert openmetrics.headers["content-type"].startswith("application/openmetrics-text")
        assert openmetrics.text.endswith("# EOF\n")
