"""Has the lines of a batch answered by the application that `mini-vllm serve` runs, so that the two cannot differ.

At most `concurrency` lines are under way, and at most `window` lie between the first unfinished one and the last that
was begun, so memory does not depend on the length of the input.
"""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx2
import msgspec

from mini_vllm.engine.protocol import EngineClient
from mini_vllm.entrypoints.batch.lines import BatchLine, Problem
from mini_vllm.entrypoints.batch.output import OrderedOutput
from mini_vllm.exceptions import EngineDeadError

Answer = Callable[[BatchLine], Awaitable["Result"]]
WINDOW_FACTOR = 8
"""Lines that may be done ahead of one that takes long, for each that may be under way."""


@dataclass(frozen=True)
class Result:
    """line: of the output, without its end."""

    line: bytes
    succeeded: bool


class _Response(msgspec.Struct):
    status_code: int
    request_id: str
    body: msgspec.Raw | None


class _OutputLine(msgspec.Struct):
    id: str
    custom_id: str | None
    response: _Response
    error: Any


class Answerer:
    """Sends lines to an ASGI application. Raises `EngineDeadError` when there is no engine any more to answer."""

    def __init__(self, app: Any, engine: EngineClient) -> None:
        transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)
        self._http = httpx2.AsyncClient(transport=transport, base_url="http://batch", timeout=None)
        self._engine = engine

    async def aclose(self) -> None:
        await self._http.aclose()

    async def answer(self, line: BatchLine) -> Result:
        request_id = f"batch_req_{secrets.token_hex(16)}"
        if line.problem is not None:
            return _failed(line, request_id, 400, line.problem)
        headers = {"content-type": "application/json", "x-request-id": request_id}
        response = await self._http.post(line.url, content=line.body, headers=headers)
        if response.status_code >= 500:
            await self._engine.check_health()
        if response.status_code != 200:
            return _failed(line, request_id, response.status_code, _error_in(response))
        answer = _Response(200, request_id, msgspec.Raw(response.content))
        return Result(msgspec.json.encode(_OutputLine(request_id, line.custom_id, answer, None)), True)


def _failed(line: BatchLine, request_id: str, status: int, error: Any) -> Result:
    response = _Response(status, request_id, None)
    return Result(msgspec.json.encode(_OutputLine(request_id, line.custom_id, response, error)), False)


def _error_in(response: httpx2.Response) -> Any:
    """The error object of OpenAI's or Anthropic's shape."""
    try:
        error = msgspec.json.decode(response.content)["error"]
        return error if isinstance(error, dict) else Problem(str(error), code=response.status_code)
    except (msgspec.MsgspecError, KeyError, TypeError):
        return Problem(f"HTTP {response.status_code}", code=response.status_code)


async def run_lines(
    lines: Iterator[tuple[int, BatchLine]],
    answer: Answer,
    output: OrderedOutput,
    *,
    concurrency: int,
    on_done: Callable[[bool], None] = lambda succeeded: None,
) -> None:
    """Answer all (position in the output, line) that the output does not have yet. on_done: after each of them.

    Raises `EngineDeadError` when the engine is dead; what was answered until then is in the output.
    """
    free, moved, window = asyncio.Semaphore(concurrency), asyncio.Event(), concurrency * WINDOW_FACTOR

    async def one(position: int, line: BatchLine) -> None:
        try:
            result = await answer(line)
            output.add(position, result.line)
            on_done(result.succeeded)
        finally:
            free.release()
            moved.set()

    try:
        async with asyncio.TaskGroup() as group:
            for position, line in lines:
                if output.has(position):
                    continue
                await free.acquire()
                while position - output.position >= window:
                    moved.clear()
                    await moved.wait()
                group.create_task(one(position, line))
    except* EngineDeadError as errors:
        raise EngineDeadError(str(errors.exceptions[0])) from errors
