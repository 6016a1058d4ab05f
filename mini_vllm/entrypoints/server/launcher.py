"""The life of a server process: bind, start the engine, serve, and end in an orderly way, whatever ends it.

The socket listens from the first moment; until the engine is ready a small application answers 503 on it. A signal
drains: requests in flight may finish within `shutdown_timeout`, new ones get 503. A second signal ends at once. When
the engine is dead for good, its requests have got their errors, and the process leaves with status 1.
"""

import asyncio
import contextlib
import gc
import logging
import os
import secrets
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from importlib import import_module
from types import FrameType
from typing import Any

import uvicorn
import uvloop
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from mini_vllm.engine.arg_utils import EngineArgs
from mini_vllm.engine.async_llm import AsyncLLM
from mini_vllm.entrypoints.server.context import RequestContext
from mini_vllm.entrypoints.server.errors import ApiError
from mini_vllm.entrypoints.server.observers import Observers
from mini_vllm.entrypoints.server.protocol import limited_protocol
from mini_vllm.entrypoints.server.serve_args import ServeArgs
from mini_vllm.entrypoints.server.sockets import listening_socket
from mini_vllm.entrypoints.server.state import Phase, ServerState, make_state
from mini_vllm.logger import init_logger

logger = init_logger(__name__)

_APP = "mini_vllm.entrypoints.server.app"
_FLUSH_SECONDS = 5
"""For connections to take the end of their answers once no request is left."""
_DEAD_SECONDS = 1.0
"""For which /health says that the engine is dead, before the process leaves."""

Announce = Callable[[ServerState, socket.socket], None]


def run_server(engine_args: EngineArgs, args: ServeArgs, model_name: str, announce: Announce) -> int:
    """Serve until a signal or the engine's death; returns the exit status.

    model_name: of the model where `served_model_name` says nothing. announce: called when requests are served. Raises
    `ConfigError` and its like when the server cannot start.
    """
    tls = args.tls_context()
    with listening_socket(args) as sock, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_Life(engine_args, args, model_name, tls, announce).run(sock))


class _Life:
    def __init__(
        self, engine_args: EngineArgs, args: ServeArgs, model_name: str, tls: ssl.SSLContext | None, announce: Announce
    ) -> None:
        self.engine_args = engine_args
        self.args = args
        self.model_name = model_name
        self.tls = tls
        self.announce = announce
        self.app: ASGIApp = _starting
        self.stopping = asyncio.Event()
        self.hurrying = asyncio.Event()
        self.signal = 0

    async def run(self, sock: socket.socket) -> int:
        observers = Observers(self.engine_args, self.args, self._first_name)
        self.server = _Server(_uvicorn_config(self._dispatch, self.args, self.tls), self._on_signal)
        serving = asyncio.create_task(self.server.serve([sock]))
        try:
            start = asyncio.ensure_future(self._start_engine(observers))
            if await _first(start, self.stopping.wait()) == 1:
                return 128 + self.signal
            engine = start.result()
            try:
                return await self._serve(engine, observers, sock)
            finally:
                engine.shutdown()
        finally:
            observers.close()
            self.server.should_exit = True
            await serving

    @property
    def _first_name(self) -> str:
        return (self.args.served_model_name or (self.model_name,))[0]

    async def _start_engine(self, observers: Observers) -> AsyncLLM:
        """The web framework, a second or two of imports, is loaded while the engine's process does the same."""
        engine, _ = await asyncio.gather(self._make_engine(observers), asyncio.to_thread(import_module, _APP))
        return engine

    async def _make_engine(self, observers: Observers) -> AsyncLLM:
        args = self.args
        return await AsyncLLM.from_engine_args(
            self.engine_args,
            stat_loggers=observers.stat_loggers,
            stream_interval=args.stream_interval,
            max_num_queued_reqs=args.max_num_queued_reqs,
            max_num_queued_tokens=args.max_num_queued_tokens,
            text_timeout=args.text_timeout,
            watchdog_timeout=args.watchdog_timeout,
            restart=args.restart_engine,
            trace_recorder=observers.recorder,
            tracer=observers.tracer,
        )

    async def _serve(self, engine: AsyncLLM, observers: Observers, sock: socket.socket) -> int:
        state = make_state(engine, self.args, self.model_name)
        state.metrics = observers.watch(engine)
        from mini_vllm.entrypoints.server.app import build_app  # there since `_start_engine`

        self.app = build_app(state)
        gc.freeze()  # what is there now stays; a full collection that looks at it stops every stream for 100 ms
        self.announce(state, sock)
        if await _first(engine.wait_dead(), self.stopping.wait()) == 0:
            return await self._mourn(state, engine)
        await self._drain(state, engine)
        return 128 + self.signal if self.hurrying.is_set() else 0

    async def _drain(self, state: ServerState, engine: AsyncLLM) -> None:
        state.phase = Phase.DRAINING
        if engine.num_unfinished_requests:
            logger.info(
                "shutting down: unfinished requests (%d) have %g s; a second signal ends them",
                engine.num_unfinished_requests,
                self.args.shutdown_timeout,
            )
        await _first(engine.drain(self.args.shutdown_timeout), self.hurrying.wait())
        await state.response_store.close()
        self.server.should_exit = True
        await _first(self.server.ended.wait(), self.hurrying.wait())

    async def _mourn(self, state: ServerState, engine: AsyncLLM) -> int:
        state.phase = Phase.DEAD
        logger.error("the engine is dead (%s); leaving", engine.dead_error)
        await asyncio.sleep(_DEAD_SECONDS)
        return 1

    def _on_signal(self, number: int) -> None:
        """The first drains, the second ends at once."""
        self.signal = number
        if self.stopping.is_set():
            self.hurrying.set()
            self.server.force_exit = True
        self.stopping.set()

    async def _dispatch(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)


class _Server(uvicorn.Server):
    """uvicorn whose signals are ours to handle."""

    def __init__(self, config: uvicorn.Config, on_signal: Callable[[int], None]) -> None:
        super().__init__(config)
        self.ended = asyncio.Event()
        self._num_signals = 0
        self._on_signal = on_signal
        self._loop = asyncio.get_running_loop()

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().serve(sockets)
        finally:
            self.ended.set()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._num_signals += 1
        if self._num_signals > 2:  # an event loop that hangs would never hear of it
            os._exit(128 + sig)
        self._loop.call_soon_threadsafe(self._on_signal, sig)


async def _first(*work: Awaitable[Any]) -> int:
    """Which of these ended first; the others are cancelled, and have cleaned up when this returns."""
    tasks = [asyncio.ensure_future(item) for item in work]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return next(i for i, task in enumerate(tasks) if task.done())
    finally:
        for task in tasks:
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task


async def _starting(scope: Scope, receive: Receive, send: Send) -> None:
    """The application until the engine is ready."""
    scope.setdefault("state", {})["context"] = RequestContext(secrets.token_hex(16), time.monotonic())
    from mini_vllm.entrypoints.server.handlers import error_response  # the web framework: not before it is needed

    error = ApiError(503, "The server is starting: its model is being loaded.", code="starting")
    await error_response(Request(scope), error)(scope, receive, send)


def _uvicorn_config(app: ASGIApp, args: ServeArgs, tls: ssl.SSLContext | None) -> uvicorn.Config:
    _set_up_logs(args)
    config = uvicorn.Config(
        app,
        interface="asgi3",
        http=limited_protocol(args.max_header_bytes),
        ws="none",
        lifespan="off",
        log_config=None,
        log_level=args.uvicorn_log_level,
        access_log=not args.disable_uvicorn_access_log,
        server_header=False,
        timeout_graceful_shutdown=_FLUSH_SECONDS,
    )
    config.load()
    config.ssl = tls
    return config


def _set_up_logs(args: ServeArgs) -> None:
    """uvicorn's lines look like ours and go where ours go."""
    uvicorn_logger = logging.getLogger("uvicorn")
    uvicorn_logger.handlers = logging.getLogger("mini_vllm").handlers
    uvicorn_logger.propagate = False
    hidden = frozenset(filter(None, (args.disable_access_log_for_endpoints or "").split(",")))
    logging.getLogger("uvicorn.access").filters = [_PathFilter(hidden)] if hidden else []


class _PathFilter(logging.Filter):
    def __init__(self, hidden: frozenset[str]) -> None:
        super().__init__()
        self.hidden = hidden

    def filter(self, record: logging.LogRecord) -> bool:
        """Arguments of an access line: client, method, path with query, version, status."""
        args = record.args
        return not (isinstance(args, tuple) and len(args) > 2 and str(args[2]).partition("?")[0] in self.hidden)
