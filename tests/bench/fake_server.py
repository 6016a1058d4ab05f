"""A server that speaks the streaming APIs with known delays, for tests of clients. It runs in a thread of the test.

`fake_server(...)` yields a `FakeServer`; its fields may be changed between requests. The tokens of an answer are
"tok0 ", "tok1 ", ... and the n-th event comes `first_delay + n * gap` seconds after the request.
"""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from mini_vllm.engine.arg_utils import DEFAULT_MODEL

PROMPT_TOKENS = 7
CACHED_TOKENS = 4


@dataclass
class FakeServer:
    """first_delay, gap: seconds. tokens_per_event: how many tokens each event holds.

    usage: whether answers say their token counts. fail_every: each n-th request is refused with 503.
    break_after, error_after: events after which the connection is cut, or an error comes in its place.
    faults_from: the request (from 0) at which such faults begin. bodies: what was asked. open_streams: answers under
    way. disconnected: answers whose client went away.
    """

    first_delay: float = 0.0
    gap: float = 0.0
    tokens_per_event: int = 1
    usage: bool = True
    continuous: bool = False
    fail_every: int = 0
    break_after: int | None = None
    error_after: int | None = None
    faults_from: int = 0
    root: str = str(DEFAULT_MODEL)
    api_key: str | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    open_streams: int = 0
    peak_streams: int = 0
    disconnected: int = 0
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    # -- routes ----------------------------------------------------------------------------------------------

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/health", lambda request: Response()),
                Route("/v1/models", self._models),
                *(Route(path, self._generate, methods=["POST"]) for path in _EVENTS),
            ]
        )

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "fake", "object": "model", "root": self.root}]})

    async def _generate(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        if self.api_key and request.headers.get("authorization") != f"Bearer {self.api_key}":
            return JSONResponse({"error": {"message": "Incorrect API key", "type": "authentication_error"}}, 401)
        faulty = len(self.bodies) > self.faults_from
        if faulty and self.fail_every and len(self.bodies) % self.fail_every == 0:
            return JSONResponse({"error": {"message": "too many requests queued", "code": 503}}, 503)
        total = body.get("max_tokens") or body.get("max_completion_tokens") or body.get("max_output_tokens") or 5
        if not body.get("stream"):
            return JSONResponse(_whole(request.url.path, total))
        return StreamingResponse(self._events(request.url.path, total, faulty), media_type="text/event-stream")

    async def _events(self, path: str, total: int, faulty: bool) -> AsyncIterator[str]:
        self.open_streams += 1
        self.peak_streams = max(self.peak_streams, self.open_streams)
        ended = False
        try:
            async for frame in self._paced(path, total, faulty):
                yield frame
            ended = True
        finally:
            self.open_streams -= 1
            self.disconnected += not ended

    async def _paced(self, path: str, total: int, faulty: bool) -> AsyncIterator[str]:
        opening, token, closing = _EVENTS[path]
        for frame in opening():
            yield frame
        start = asyncio.get_running_loop().time()
        for index, first in enumerate(range(0, total, self.tokens_per_event)):
            if faulty and index == self.break_after:
                raise ConnectionError("the fake server breaks the stream, as the test asks")
            if faulty and index == self.error_after:
                yield _data({"error": {"message": "the engine stopped", "code": 500}})
                yield "data: [DONE]\n\n"
                return
            await asyncio.sleep(start + self.first_delay + index * self.gap - asyncio.get_running_loop().time())
            last = min(first + self.tokens_per_event, total)
            text = "".join(f"tok{number} " for number in range(first, last))
            usage = _usage(last) if self.continuous else None
            yield token(text, "length" if last == total else None, usage)
        for frame in closing(total if self.usage else None):
            yield frame


def _usage(completion: int) -> dict[str, Any]:
    return {
        "prompt_tokens": PROMPT_TOKENS,
        "completion_tokens": completion,
        "total_tokens": PROMPT_TOKENS + completion,
        "prompt_tokens_details": {"cached_tokens": CACHED_TOKENS},
    }


def _whole(path: str, total: int) -> dict[str, Any]:
    text = "".join(f"tok{number} " for number in range(total))
    choice = {"text": text} if path == "/v1/completions" else {"message": {"role": "assistant", "content": text}}
    return {"id": "x", "choices": [{"index": 0, "finish_reason": "length", **choice}], "usage": _usage(total)}


def _data(payload: dict[str, Any], name: str | None = None) -> str:
    return (f"event: {name}\n" if name else "") + f"data: {json.dumps(payload)}\n\n"


# --- the four APIs: (opening frames, a token's frame, closing frames) --------------------------------------


def _openai_closing(total: int | None) -> list[str]:
    usage = [] if total is None else [_data({"choices": [], "usage": _usage(total)})]
    return [": keep-alive\n\n", *usage, "data: [DONE]\n\n"]


def _completion_token(text: str, finish: str | None, usage: Any) -> str:
    return _data({"choices": [{"index": 0, "text": text, "finish_reason": finish}], "usage": usage})


def _chat_opening() -> list[str]:
    return [_data({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})]


def _chat_token(text: str, finish: str | None, usage: Any) -> str:
    return _data({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}], "usage": usage})


def _responses_closing(total: int | None) -> list[str]:
    usage = {"input_tokens": PROMPT_TOKENS, "output_tokens": total, "input_tokens_details": {"cached_tokens": 4}}
    response = {"status": "incomplete", "usage": usage if total is not None else None}
    return [_data({"type": "response.incomplete", "response": response}, "response.incomplete")]


def _responses_token(text: str, finish: str | None, usage: Any) -> str:
    return _data({"type": "response.output_text.delta", "delta": text}, "response.output_text.delta")


def _anthropic_opening() -> list[str]:
    usage = {"input_tokens": PROMPT_TOKENS - CACHED_TOKENS, "output_tokens": 0, "cache_read_input_tokens": 4}
    start = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    return [
        _data({"type": "message_start", "message": {"usage": usage}}, "message_start"),
        _data(start, "content_block_start"),
    ]


def _anthropic_token(text: str, finish: str | None, usage: Any) -> str:
    delta = {"type": "text_delta", "text": text}
    return _data({"type": "content_block_delta", "index": 0, "delta": delta}, "content_block_delta")


def _anthropic_closing(total: int | None) -> list[str]:
    usage = {"output_tokens": total} if total is not None else None
    final = {"type": "message_delta", "delta": {"stop_reason": "max_tokens"}, "usage": usage}
    return [_data(final, "message_delta"), _data({"type": "message_stop"}, "message_stop")]


_EVENTS: dict[str, tuple[Any, Any, Any]] = {
    "/v1/completions": (list, _completion_token, _openai_closing),
    "/v1/chat/completions": (_chat_opening, _chat_token, _openai_closing),
    "/v1/responses": (list, _responses_token, _responses_closing),
    "/v1/messages": (_anthropic_opening, _anthropic_token, _anthropic_closing),
}


@contextmanager
def fake_server(**behaviour: Any) -> Iterator[FakeServer]:
    """A server on a free port of 127.0.0.1 for as long as the block lasts."""
    fake = FakeServer(**behaviour)
    config = uvicorn.Config(fake.app(), host="127.0.0.1", port=0, log_config=None, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.01)
        if not thread.is_alive():
            raise RuntimeError("the fake server did not start")
    fake.port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield fake
    finally:
        server.should_exit = True
        thread.join()
