"""An engine that does nothing but live, and a small API over it, for tests of what surrounds every request."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, ClassVar, Literal

from fastapi import APIRouter, Request
from pydantic import Field, field_validator
from starlette.responses import Response

from mini_vllm.core.scheduler_output import SchedulerStats
from mini_vllm.entrypoints.server.context import context_of
from mini_vllm.entrypoints.server.disconnect import run_until_disconnect
from mini_vllm.entrypoints.server.encoding import json_response
from mini_vllm.entrypoints.server.fields import ApiModel, Refused
from mini_vllm.entrypoints.server.routing import ApiRoute
from mini_vllm.entrypoints.server.streaming import data_event, sse_response
from mini_vllm.exceptions import (
    EngineDeadError,
    InvalidParameterError,
    OverloadedError,
    PromptTooLongError,
    RequestError,
)


class IdleEngine:
    """As much of an `EngineClient` as the operations' routes ask."""

    def __init__(self) -> None:
        self.dead: EngineDeadError | None = None
        self.num_resets = 0

    async def check_health(self) -> None:
        if self.dead is not None:
            raise self.dead

    async def step_records(self, n: int | None = None) -> list[Any]:
        return []

    async def waiting_reasons(self) -> dict[str, str]:
        return {"a": "no free KV cache blocks"}

    async def stats(self) -> SchedulerStats:
        return SchedulerStats()

    async def reset_prefix_cache(self) -> None:
        self.num_resets += 1


class TextPart(ApiModel):
    type: Literal["text"]
    text: str


class Message(ApiModel):
    role: Literal["user", "assistant"]
    content: str | list[TextPart]

    @field_validator("content")
    @classmethod
    def _not_empty(cls, value: Any) -> Any:
        if value == "":
            raise InvalidParameterError("content", "must not be empty")
        return value


class Body(ApiModel):
    ACCEPTED: ClassVar = {"metadata": "kept by nobody"}
    REFUSED: ClassVar = {"tools": Refused("there are no tools here")}

    messages: list[Message]
    n: int = Field(default=1, ge=1, le=4)
    temperature: float = 1.0


router = APIRouter(route_class=ApiRoute)
messages_router = APIRouter(route_class=ApiRoute)


@router.post("/v1/echo")
@messages_router.post("/v1/messages")
async def echo(body: Body, request: Request) -> Response:
    context = context_of(request)
    return json_response({
        "body": body.model_dump(), "request_id": context.request_id, "key": context.key_name,
        "salt": context.cache_salt(), "asked": context.cache_salt("mine"), "trace": dict(context.trace_headers),
    })  # fmt: skip


FAILURES = {
    "bug": ZeroDivisionError("a secret of the server"),
    "alone": RequestError("a secret of the engine"),
    "overloaded": OverloadedError("too many requests", "max_num_queued_reqs", retry_after=7),
    "dead": EngineDeadError("the engine died"),
    "too_long": PromptTooLongError("prompt", "This model's maximum context length is 8 tokens."),
    "parameter": InvalidParameterError("top_p", "must be in (0, 1], got 2"),
}


@router.post("/v1/fail/{how}")
@messages_router.post("/v1/messages/{how}")
async def fail(how: str) -> Response:
    raise FAILURES[how]


class Worker:
    """Handlers that take until they are told, and tell how they ended."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.go = asyncio.Event()
        self.ended: list[str] = []
        self.router = APIRouter()
        self.router.add_api_route("/v1/work", self.work, methods=["POST"])
        self.router.add_api_route("/v1/stream", self.stream, methods=["POST"])

    async def work(self, request: Request) -> Response:
        await request.body()
        return await run_until_disconnect(request, self._work())

    async def _work(self) -> Response:
        try:
            self.started.set()
            await self.go.wait()
            self.ended.append("done")
            return json_response({})
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            self.ended.append("cancelled")
            raise

    async def stream(self, request: Request, fail: str = "", keep_alive: float = 0) -> Response:
        await request.body()
        return sse_response(self._events(fail), keep_alive=keep_alive)

    async def _events(self, fail: str) -> AsyncIterator[bytes]:
        try:
            yield data_event(b"1")
            self.started.set()
            await self.go.wait()
            if fail:
                raise FAILURES[fail]
            yield data_event(b"2")
            self.ended.append("done")
        finally:
            self.ended.append("closed")
