"""A light HTTP/1.1 client: POST a body, be told of every server-sent event at the moment its bytes arrive.

The load generator shares the machine with the server that it measures, so each microsecond it spends on a token is
taken from that server. Events are handed to a callback from within `data_received`; no task is woken for them. What
it costs beside a general client is in `docs/benchmarking.md`.
"""

import asyncio
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

import httptools

from mini_vllm.exceptions import ConfigError

OnEvent = Callable[[float, bytes], None]
"""Told the time (of `time.perf_counter`) at which the bytes came, and what stood after `data:`."""

MAX_ERROR_BODY = 1 << 16
"""Bytes kept of a response that is not a stream of events: enough for any error message."""


class ConnectionFailedError(Exception):
    """The server could not be reached, or went away in the middle of an answer."""


@dataclass
class Response:
    """status: of HTTP. body: what came that was no stream of events, cut at `MAX_ERROR_BODY`."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Origin:
    """Where the server is. prefix: the path that every endpoint's path follows."""

    host: str
    port: int
    prefix: str = ""
    tls: ssl.SSLContext | None = None

    @classmethod
    def from_url(cls, url: str, *, insecure: bool = False) -> "Origin":
        """Raises `ConfigError` for what is no http or https URL. insecure: take any certificate."""
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"base_url: {url!r} is not a URL: {error}") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"base_url: must look like http://HOST:PORT, got {url!r}")
        tls = None
        if parts.scheme == "https":
            tls = ssl.create_default_context()
            if insecure:
                tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
        return cls(parts.hostname, port or (443 if tls else 80), parts.path.rstrip("/"), tls)

    @property
    def authority(self) -> str:
        """For the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


class EventSplitter:
    """Cuts a byte stream into server-sent events; comments and names of events are left out."""

    def __init__(self, on_data: Callable[[bytes], None]) -> None:
        self._on_data = on_data
        self._rest = b""

    def feed(self, body: bytes) -> None:
        data = self._rest + body if self._rest else body
        if b"\r" in data:  # rare; a frame that ends in half a line break waits for the other half
            tail = b"\r" if data.endswith(b"\r") else b""
            data = data[: len(data) - len(tail)].replace(b"\r\n", b"\n") + tail
        *frames, self._rest = data.split(b"\n\n")
        for frame in frames:
            if frame.startswith(b"data: ") and b"\n" not in frame:
                self._on_data(frame[6:])
            elif lines := [line[5:].removeprefix(b" ") for line in frame.split(b"\n") if line.startswith(b"data:")]:
                self._on_data(b"\n".join(lines))


class Connection(asyncio.Protocol):
    """One connection, one request at a time. Made by `ConnectionPool`."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._done: asyncio.Future[Response] | None = None
        self._response = Response(0)
        self._splitter: EventSplitter | None = None
        self._on_event: OnEvent = lambda now, data: None
        self._now = 0.0
        self.reusable = False

    async def request(self, head_and_body: bytes, on_event: OnEvent) -> Response:
        """Send and wait for the end of the answer. Cancelling closes the connection, which tells the server."""
        assert self._transport is not None and self._done is None
        self._response, self._on_event, self._splitter = Response(0), on_event, None
        self._done = asyncio.get_running_loop().create_future()
        self.reusable = False
        self._transport.write(head_and_body)
        try:
            return await self._done
        finally:
            self._done = None
            self._on_event = lambda now, data: None
            if not self.reusable:
                self.close()

    @property
    def answered(self) -> bool:
        """Whether anything of the answer to the last request came."""
        return self._response.status != 0

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # -- called by the event loop ----------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is not a subclass

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(f"the answer is not HTTP/1.1: {error}")

    def connection_lost(self, error: Exception | None) -> None:
        self.reusable = False
        headers = self._response.headers
        if self._response.status and not error and not {"content-length", "transfer-encoding"} & set(headers):
            self._finish()  # the end of the connection is the end of the body
        self._fail(f"the server closed the connection{f': {error}' if error else ' before the end of its answer'}")

    def _fail(self, message: str) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(ConnectionFailedError(message))

    # -- called by the parser --------------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        self._response.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self._response.status = self._parser.get_status_code()
        if "text/event-stream" in self._response.headers.get("content-type", ""):
            self._splitter = EventSplitter(self._emit)

    def _emit(self, data: bytes) -> None:
        try:
            self._on_event(self._now, data)
        except Exception as error:  # an event that cannot be read fails its request, not the connection's parser
            self._fail(f"{type(error).__name__}: {error}")

    def on_body(self, body: bytes) -> None:
        if self._splitter is not None:
            self._splitter.feed(body)
        elif len(self._response.body) < MAX_ERROR_BODY:
            self._response.body = (self._response.body + body)[:MAX_ERROR_BODY]

    def on_message_complete(self) -> None:
        self.reusable = self._parser.should_keep_alive()
        self._finish()

    def _finish(self) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(self._response)


class ConnectionPool:
    """Connections to one server, kept open between requests. Use as an asynchronous context manager."""

    def __init__(self, origin: Origin, headers: Mapping[str, str] | None = None) -> None:
        self.origin = origin
        self._headers = dict(headers or {})
        self._idle: list[Connection] = []

    async def __aenter__(self) -> "ConnectionPool":
        return self

    async def __aexit__(self, *_: object) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()
        await asyncio.sleep(0)  # lets the transports close before the loop does

    async def get(self, path: str) -> Response:
        return await self._send("GET", path, b"", {}, lambda now, data: None)

    async def post(
        self, path: str, body: bytes, on_event: OnEvent, headers: Mapping[str, str] | None = None
    ) -> Response:
        """Raises `ConnectionFailedError`. The answer's status is for the caller to judge."""
        return await self._send("POST", path, body, headers or {}, on_event)

    async def _send(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str], on_event: OnEvent
    ) -> Response:
        message = self._head(method, path, len(body), headers) + body
        while connection := self._take_idle():
            try:
                return await self._exchange(connection, message, on_event)
            except ConnectionFailedError:
                if connection.answered:
                    raise
                # the server closed the idle connection just before this request reached it
        return await self._exchange(await self._connect(), message, on_event)

    async def _exchange(self, connection: Connection, message: bytes, on_event: OnEvent) -> Response:
        response = await connection.request(message, on_event)
        if connection.reusable:
            self._idle.append(connection)
        return response

    def _head(self, method: str, path: str, length: int, headers: Mapping[str, str]) -> bytes:
        lines = {"Host": self.origin.authority, "Accept": "*/*", **self._headers, **headers}
        if method == "POST":
            lines |= {"Content-Type": "application/json", "Content-Length": str(length)}
        text = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        return f"{method} {self.origin.prefix}{path} HTTP/1.1\r\n{text}\r\n".encode("latin-1")

    def _take_idle(self) -> Connection | None:
        """The one used last that the server has not closed meanwhile."""
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable:
                return connection
        return None

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        origin = self.origin
        try:
            _, connection = await loop.create_connection(Connection, origin.host, origin.port, ssl=origin.tls)
        except OSError as error:
            raise ConnectionFailedError(f"cannot connect to {origin.authority}: {error}") from error
        return connection
