"""Routes for those who run the server: is it well, how busy is it, what is it doing."""

import dataclasses
import os
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from starlette.responses import PlainTextResponse, Response

from mini_vllm import __version__
from mini_vllm.engine.chrome_trace import chrome_trace
from mini_vllm.entrypoints.server.encoding import json_response
from mini_vllm.entrypoints.server.errors import ApiError
from mini_vllm.entrypoints.server.serve_args import ServeArgs
from mini_vllm.entrypoints.server.state import Phase, ServerState, state_of
from mini_vllm.exceptions import EngineDeadError

router = APIRouter(tags=["operations"])
debug_router = APIRouter(tags=["debugging"])
dev_router = APIRouter(tags=["development"])


def routers(args: ServeArgs) -> list[APIRouter]:
    """Those that these arguments turn on."""
    chosen = [router]
    if args.enable_debug_steps:
        chosen.append(debug_router)
    if args.enable_dev_mode or os.environ.get("VLLM_SERVER_DEV_MODE") == "1":
        chosen.append(dev_router)
    return chosen


_NOT_SERVING: dict[int | str, dict[str, Any]] = {
    503: {"description": "Requests are not served just now.", "content": {"text/plain": {"schema": {"type": "string"}}}}
}


@router.get("/health", response_class=Response, responses=_NOT_SERVING)
async def health(request: Request) -> Response:
    """Empty with 200 while requests are served; 503 while they are not."""
    state = state_of(request)
    if state.phase is not Phase.READY:
        return PlainTextResponse(str(state.phase), 503, {"retry-after": "1"})
    try:
        await state.engine.check_health()
    except EngineDeadError as error:
        return PlainTextResponse(str(error), 503, {"retry-after": "1"})
    return Response(status_code=200)


@router.get("/ping", response_class=Response, responses=_NOT_SERVING)
@router.post("/ping", response_class=Response, responses=_NOT_SERVING)
async def ping(request: Request) -> Response:
    """The same under the name that SageMaker asks for."""
    return await health(request)


@router.get("/version")
async def version() -> Response:
    return json_response({"version": __version__})


@router.get("/load")
async def load(request: Request) -> Response:
    """How many requests are under way."""
    return json_response({"server_load": state_of(request).num_in_flight})


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Everything Prometheus may want to know, in its text format or OpenMetrics'."""
    state = state_of(request)
    if state.metrics is None:
        raise ApiError(404, "This server keeps no metrics.")
    text, content_type = state.metrics.text(request.headers.get("accept"))
    return Response(text, headers={"content-type": content_type})


@debug_router.get("/debug/steps")
async def debug_steps(
    request: Request,
    n: Annotated[int, Query(ge=1, le=100_000, description="How many steps at most, the last ones.")] = 64,
    format: Annotated[Literal["json", "chrome"], Query(description="chrome: for Perfetto.")] = "json",
) -> Response:
    """What the last steps did, oldest first, and of each request that waits now, why it waits."""
    engine = state_of(request).engine
    records = await engine.step_records(n)
    if format == "chrome":
        return json_response(chrome_trace(records))
    return json_response({"waiting": await engine.waiting_reasons(), "steps": records})


@dev_router.post("/reset_prefix_cache")
async def reset_prefix_cache(request: Request) -> Response:
    await state_of(request).engine.reset_prefix_cache()
    return Response(status_code=200)


@dev_router.get("/server_info")
async def server_info(request: Request) -> Response:
    """The arguments the server runs with, less its keys."""
    return json_response(_shown(state_of(request)))


def _shown(state: ServerState) -> dict[str, Any]:
    args = {f.name: getattr(state.args, f.name) for f in dataclasses.fields(state.args)}
    return {"version": __version__, "phase": str(state.phase), "serve_args": args | {"api_key": len(state.api_keys)}}
