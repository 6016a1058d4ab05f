"""Server-sent events: whole frames from an iterator to the client, for as long as the client listens.

One task sends, one watches for the disconnect; nothing is started per token. The socket's own back-pressure makes a
slow reader wait in `send`, and meanwhile the engine's stream merges deltas. However a stream ends, the iterator is
closed, and with it the request of the engine.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mini_vllm.entrypoints.server.context import context_of
from mini_vllm.entrypoints.server.disconnect import cancel_all, disconnected
from mini_vllm.entrypoints.server.encoding import encode
from mini_vllm.entrypoints.server.errors import ApiError, anthropic_error, api_error_from, is_explained, openai_error
from mini_vllm.logger import init_logger

logger = init_logger(__name__)

DONE = b"data: [DONE]\n\n"
_KEEP_ALIVE = b": keep-alive\n\n"
_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # proxies must not collect events

ErrorFrames = Callable[[ApiError, str], bytes]
"""From an error and the request id to the frames that end a stream."""


@runtime_checkable
class Closable(Protocol):
    """An async generator, or a stream of the engine."""

    async def aclose(self) -> None: ...


def data_event(payload: bytes) -> bytes:
    """The frame of a payload of one line."""
    return b"data: " + payload + b"\n\n"


def named_event(name: str, payload: bytes) -> bytes:
    """The same with an event name."""
    return b"event: " + name.encode() + b"\ndata: " + payload + b"\n\n"


def openai_error_frames(error: ApiError, request_id: str) -> bytes:
    """How a stream of OpenAI's API ends when its request fails."""
    return data_event(encode(openai_error(error))) + DONE


def anthropic_error_frames(error: ApiError, request_id: str) -> bytes:
    """The same for Anthropic's."""
    return named_event("error", encode(anthropic_error(error, request_id)))


def sse_response(
    events: AsyncIterator[bytes],
    *,
    keep_alive: float = 0,
    on_error: ErrorFrames = openai_error_frames,
    closing: Sequence[Closable] = (),
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Stream `events`, each one or more whole frames.

    keep_alive: seconds of silence after which a comment is sent; 0 for never. on_error: what to send when `events`
    raises. closing: the engine's streams behind the events, closed in the end even if the client left so early that
    `events` never began.
    """
    return _EventStream(events, keep_alive, on_error, closing, headers or {})


class _EventStream(Response):
    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[bytes],
        keep_alive: float,
        on_error: ErrorFrames,
        closing: Sequence[Closable],
        headers: Mapping[str, str],
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({**_HEADERS, **headers})
        self._events = events
        self._keep_alive = keep_alive
        self._on_error = on_error
        self._closing = closing
        self._last_sent = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        tasks: list[asyncio.Task[None]] = []
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            tasks += [asyncio.create_task(self._send_events(scope, send)), asyncio.create_task(disconnected(receive))]
            if self._keep_alive > 0:
                tasks.append(asyncio.create_task(self._send_comments(send)))
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            try:
                await cancel_all(*tasks)
            finally:
                await self._close()
        if tasks[0].done() and not tasks[0].cancelled():
            tasks[0].result()

    async def _send_events(self, scope: Scope, send: Send) -> None:
        now = asyncio.get_running_loop().time
        try:
            async for event in self._events:
                self._last_sent = now()
                await send({"type": "http.response.body", "body": event, "more_body": True})
        except Exception as error:
            frames = self._failed(error, scope)
            await send({"type": "http.response.body", "body": frames, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _failed(self, error: Exception, scope: Scope) -> bytes:
        request_id = context_of(HTTPConnection(scope)).request_id
        if not is_explained(error):
            logger.exception("request %s failed in the middle of its stream", request_id)
        return self._on_error(api_error_from(error), request_id)

    async def _send_comments(self, send: Send) -> None:
        now = asyncio.get_running_loop().time
        self._last_sent = max(self._last_sent, now())
        while True:
            idle = now() - self._last_sent
            if idle >= self._keep_alive:
                await send({"type": "http.response.body", "body": _KEEP_ALIVE, "more_body": True})
                self._last_sent = now()
                idle = 0.0
            await asyncio.sleep(self._keep_alive - idle)

    async def _close(self) -> None:
        try:
            if isinstance(self._events, Closable):
                await self._events.aclose()
        finally:
            for stream in self._closing:
                await stream.aclose()
