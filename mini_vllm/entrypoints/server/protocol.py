"""uvicorn's HTTP protocol with a limit on the request line and headers, which httptools collects without one.

It also tells the request that runs, and not only the last one that was pipelined behind it, when its client leaves.

What does not parse as HTTP never reaches the application, so its answer is made here, in the API's own shape.
"""

from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from mini_vllm.entrypoints.server.encoding import encode
from mini_vllm.entrypoints.server.errors import ApiError, openai_error

_REASONS = {400: b"Bad Request", 431: b"Request Header Fields Too Large"}


class HeadersTooLargeError(Exception):
    """More bytes of headers than the server takes."""


def limited_protocol(max_header_bytes: int) -> type[HttpToolsProtocol]:
    """The protocol for `uvicorn.Config(http=...)`."""
    return type("LimitedProtocol", (_LimitedProtocol,), {"max_header_bytes": max_header_bytes})


class _LimitedProtocol(HttpToolsProtocol):
    max_header_bytes: int
    _num_header_bytes = 0
    _running: RequestResponseCycle | None = None

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def connection_lost(self, exc: Exception | None) -> None:
        running = self._running
        if running is not None and not running.response_complete:
            running.disconnected = True
            running.message_event.set()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        self._num_header_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def _count(self, num_bytes: int) -> None:
        """Raising makes the parser stop, and uvicorn call `send_400_response`."""
        self._num_header_bytes += num_bytes
        if self._num_header_bytes > self.max_header_bytes:
            raise HeadersTooLargeError

    def send_400_response(self, msg: str) -> None:
        if self._num_header_bytes > self.max_header_bytes:
            error = ApiError(431, f"The headers have more than {self.max_header_bytes} bytes (--max-header-bytes).")
        else:
            error = ApiError(400, msg)
        body = encode(openai_error(error))
        self.transport.write(
            b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s"
            % (error.status, _REASONS[error.status], len(body), body)
        )
        self.transport.close()
