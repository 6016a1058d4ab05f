"""Servers for tests: the application in this process over ASGI, or `mini-vllm serve` as a process of its own.

    async with serving(max_num_seqs=2, api_key="k") as app, client(app) as http:
        answer = await http.post("/v1/completions", json={...})

`Call` is one HTTP request whose two sides a test holds in its hands, for streams as they come and clients that leave.
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import httpx2
from fastapi import APIRouter, FastAPI

from mini_vllm.engine.metrics.prometheus import ServerMetrics
from mini_vllm.entrypoints.server.app import assemble, build_app
from mini_vllm.entrypoints.server.serve_args import ServeArgs
from mini_vllm.entrypoints.server.state import ServerState, make_state
from tests.async_rig import SHELL_OPTIONS, engine_args, in_process_engine

BASE = "http://test"
_SERVE_FIELDS = frozenset(f.name for f in dataclasses.fields(ServeArgs))
_ENGINE_TOO = ("stream_interval", "max_num_queued_reqs", "max_num_queued_tokens", "text_timeout")
"""Arguments of the server that the engine's shell acts upon."""


@contextlib.asynccontextmanager
async def serving(
    engine: Any = None, *, routers: Sequence[APIRouter] | None = None, **options: Any
) -> AsyncIterator[FastAPI]:
    """The application over `engine` (an `EngineClient`), or over an in-process engine of the small Llama.

    options: those of `ServeArgs`; the rest goes to `in_process_engine`. routers: in place of all there are. The model
    is called "tiny" unless `served_model_name` says otherwise. `app.state.server` is the state. /metrics is there
    with an engine of the rig's own.
    """
    serve = {"served_model_name": ("tiny",)} | {name: options.pop(name) for name in [*options] if name in _SERVE_FIELDS}
    async with contextlib.AsyncExitStack() as stack:
        args = ServeArgs(**_as_given(serve))
        metrics = None
        if engine is None:
            loggers: list[Any] = []
            shell = {name: serve[name] for name in _ENGINE_TOO if name in serve} | {"stat_loggers": loggers}
            engine = await stack.enter_async_context(in_process_engine(**shell | options))
            own = {name: value for name, value in options.items() if name not in SHELL_OPTIONS}
            metrics = ServerMetrics(args.served_model_name[0], engine_args(**own), engine.client.info)
            loggers.append(metrics.engine)
        elif options:
            raise TypeError(f"options of an engine that is there already: {options}")
        state = make_state(engine, args, "tiny", metrics=metrics)
        stack.push_async_callback(state.response_store.close)
        yield build_app(state) if routers is None else assemble(state, [*routers])


def _as_given(serve: dict[str, Any]) -> dict[str, Any]:
    return {name: (value,) if name == "api_key" and isinstance(value, str) else value for name, value in serve.items()}


def state(app: FastAPI) -> ServerState:
    server: ServerState = app.state.server
    return server


def transport(app: Any, **options: Any) -> httpx2.ASGITransport:
    return httpx2.ASGITransport(app=app, raise_app_exceptions=False, **options)


def client(app: Any, api_key: str | None = None, **options: Any) -> httpx2.AsyncClient:
    """Collects whole bodies; use `Call` to see a stream as it comes."""
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    return httpx2.AsyncClient(transport=transport(app), base_url=BASE, headers=headers, timeout=60, **options)


def openai_client(app: Any, api_key: str = "none", **options: Any) -> Any:
    """`openai.AsyncOpenAI` over ASGI."""
    import openai

    http = httpx2.AsyncClient(transport=transport(app), timeout=60)
    return openai.AsyncOpenAI(base_url=f"{BASE}/v1", api_key=api_key, http_client=http, max_retries=0, **options)


def anthropic_client(app: Any, api_key: str = "none", **options: Any) -> Any:
    """`anthropic.AsyncAnthropic` over ASGI."""
    import anthropic

    http = httpx2.AsyncClient(transport=transport(app), timeout=60)
    return anthropic.AsyncAnthropic(base_url=BASE, api_key=api_key, http_client=http, max_retries=0, **options)


# -- one request, both sides ---------------------------------------------------------------------------------


class Call:
    """`async with Call(app, "POST", "/v1/completions", {...}) as call`: the application runs as a task meanwhile.

    body: JSON unless it is bytes. Leaving the block disconnects.
    """

    def __init__(self, app: Any, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None):
        self._app = app
        payload = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        given = {"content-type": "application/json", "content-length": str(len(payload)), **(headers or {})}
        self._scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
            "method": method, "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"",
            "root_path": "", "server": ("test", 80), "client": ("127.0.0.1", 1), "state": {},
            "headers": [(name.lower().encode(), value.encode()) for name, value in given.items()],
        }  # fmt: skip
        self._incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._incoming.put_nowait({"type": "http.request", "body": payload, "more_body": False})
        self._outgoing: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._start: dict[str, Any] | None = None
        self.ended = False
        self.reading = asyncio.Event()
        """Cleared, the client does not read: the application waits in `send`."""
        self.reading.set()

    async def __aenter__(self) -> "Call":
        self.task = asyncio.create_task(self._app(self._scope, self._incoming.get, self._send))
        return self

    async def __aexit__(self, *error: object) -> None:
        self.disconnect()
        await asyncio.wait_for(asyncio.wait([self.task]), 30)

    async def _send(self, message: dict[str, Any]) -> None:
        await self.reading.wait()
        self._outgoing.put_nowait(message)

    def disconnect(self) -> None:
        self._incoming.put_nowait({"type": "http.disconnect"})
        self.reading.set()

    async def start(self) -> dict[str, Any]:
        """The start of the response: `status` and `headers`."""
        if self._start is None:
            self._start = await self._next()
        return self._start

    async def chunk(self) -> bytes | None:
        """The next piece of the body; None at its end."""
        await self.start()
        if self.ended:
            return None
        message = await self._next()
        self.ended = not message.get("more_body", False)
        return message["body"] or (None if self.ended else b"")

    async def chunks(self) -> AsyncIterator[bytes]:
        while (piece := await self.chunk()) is not None:
            yield piece

    async def _next(self) -> dict[str, Any]:
        getter = asyncio.ensure_future(self._outgoing.get())
        await asyncio.wait_for(asyncio.wait([getter, self.task], return_when=asyncio.FIRST_COMPLETED), 30)
        if getter.done():
            return getter.result()
        getter.cancel()
        if not self._outgoing.empty():
            return self._outgoing.get_nowait()
        self.task.result()
        raise AssertionError("the application ended without a complete answer")


def sse_events(body: bytes | str) -> list[dict[str, Any]]:
    """The events of a whole stream, comments left out: {"event": name or None, "data": parsed JSON or text}."""
    events = []
    for frame in (body.decode() if isinstance(body, bytes) else body).split("\n\n"):
        fields = dict(line.split(": ", 1) for line in frame.splitlines() if line and not line.startswith(":"))
        if "data" in fields:
            data = fields["data"]
            events.append({"event": fields.get("event"), "data": data if data == "[DONE]" else json.loads(data)})
    return events


# -- the real process ----------------------------------------------------------------------------------------


@dataclasses.dataclass
class RunningServer:
    process: subprocess.Popen[bytes]
    url: str
    log: IO[bytes]

    def output(self) -> str:
        """Everything it printed and logged so far."""
        self.log.seek(0)
        return self.log.read().decode(errors="replace")

    def stop(self, with_signal: int = signal.SIGTERM, timeout: float = 30) -> int:
        """Signal it and wait; returns the exit status."""
        self.process.send_signal(with_signal)
        return self.process.wait(timeout)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@contextlib.contextmanager
def started_server(
    *cli_args: str, env: dict[str, str] | None = None, url: str | None = None
) -> Iterator[RunningServer]:
    """`mini-vllm serve` with these arguments on a free port, not waited for; killed in the end, with its engine."""
    port = free_port()
    command = [sys.executable, "-m", "mini_vllm", "serve", *cli_args]
    if "--port" not in cli_args:
        command += ["--port", str(port)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"} | (env or {})
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment,
            start_new_session=True, cwd=Path(__file__).resolve().parents[3],
        )  # fmt: skip
        try:
            yield RunningServer(process, url or f"http://127.0.0.1:{port}", log)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


@contextlib.contextmanager
def running_server(
    *cli_args: str, env: dict[str, str] | None = None, url: str | None = None, timeout: float = 90, **options: Any
) -> Iterator[RunningServer]:
    """The same, once /health answers 200. options: of httpx2.get, for TLS and Unix sockets."""
    with started_server(*cli_args, env=env, url=url) as server:
        wait_healthy(server, timeout, **options)
        yield server


def wait_healthy(server: RunningServer, timeout: float = 90, **options: Any) -> None:
    deadline = time.monotonic() + timeout
    with httpx2.Client(timeout=5, **options) as http:
        while True:
            if server.process.poll() is not None:
                raise AssertionError(f"the server ended with {server.process.returncode}:\n{server.output()}")
            with contextlib.suppress(httpx2.TransportError):
                if http.get(f"{server.url}/health").status_code == 200:
                    return
            assert time.monotonic() < deadline, f"not healthy in {timeout} s:\n{server.output()}"
            time.sleep(0.05)
