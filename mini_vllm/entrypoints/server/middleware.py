"""What happens to every HTTP request before a handler sees it: an identity, an owner, a limit on its body.

Plain ASGI, so that a streamed token passes through one function call and no task. From the outside in:
`RequestMiddleware`, `AuthMiddleware`, `BodyLimitMiddleware`; CORS, where it is on, goes around all of them.
"""

import secrets
import time
from collections.abc import Iterator

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mini_vllm.entrypoints.server.context import RequestContext
from mini_vllm.entrypoints.server.errors import ApiError
from mini_vllm.entrypoints.server.handlers import error_response, route_path
from mini_vllm.entrypoints.server.state import ServerState
from mini_vllm.logger import init_logger

logger = init_logger(__name__)

OPEN_PATHS = frozenset({"/health", "/ping"})
"""What may be asked without a key: whether the server lives."""

_MAX_REQUEST_ID = 128
_TRACE_HEADERS = (b"traceparent", b"tracestate")


def header(scope: Scope, name: bytes) -> bytes | None:
    """The first header of a name in lower case."""
    for key, value in scope["headers"]:
        if key == name:
            return value  # type: ignore[no-any-return]
    return None


class RequestMiddleware:
    """Gives a request its context and its X-Request-Id, counts it, and answers what no handler caught."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self.app = app
        self.state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        context = RequestContext(_request_id(scope), time.monotonic(), trace_headers=_trace_headers(scope))
        scope.setdefault("state", {})["context"] = context
        exchange = _Exchange(send, context.request_id)
        self.state.num_in_flight += scope["method"] == "POST"
        try:
            await self.app(scope, receive, exchange.send)
        except Exception as error:
            logger.exception("request %s: %s %s failed", context.request_id, scope["method"], scope["path"])
            if exchange.status:
                raise  # half an answer is out: the server closes the connection, so that the client notices
            await error_response(Request(scope), error)(scope, receive, exchange.send)
        finally:
            self.state.num_in_flight -= scope["method"] == "POST"
            self._observe(scope, exchange, time.monotonic() - context.arrival_time)

    def _observe(self, scope: Scope, exchange: "_Exchange", seconds: float) -> None:
        if self.state.metrics is None:
            return
        route = scope.get("route")
        self.state.metrics.http.observe(
            handler=getattr(route, "path", None),
            method=scope["method"],
            status=exchange.status or 499,
            seconds=seconds,
            request_bytes=_content_length(scope) or 0,
            response_bytes=exchange.num_bytes,
        )


class _Exchange:
    """What went out in answer to one request."""

    __slots__ = ("_request_id", "_send", "num_bytes", "status")

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._request_id = request_id.encode()
        self.status = 0
        self.num_bytes = 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.body":
            self.num_bytes += len(message.get("body", b""))
        elif message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", self._request_id)]
        await self._send(message)


class AuthMiddleware:
    """Lets a request pass with the key of somebody known, and puts the owner into its context."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self.app = app
        self.keys = state.api_keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._is_open(scope):
            await self.app(scope, receive, send)
            return
        for key in _presented_keys(scope):
            owner = self.keys.find(key)
            if owner is not None:
                context: RequestContext = scope["state"]["context"]
                scope["state"]["context"] = RequestContext(
                    context.request_id, context.arrival_time, owner.name, owner.cache_scope, context.trace_headers
                )
                await self.app(scope, receive, send)
                return
        denied = ApiError(
            401,
            "A valid API key is needed, as 'Authorization: Bearer KEY' or 'x-api-key: KEY'.",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )
        await error_response(Request(scope), denied)(scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        return not len(self.keys) or scope["method"] == "OPTIONS" or route_path(scope) in OPEN_PATHS


def _presented_keys(scope: Scope) -> Iterator[bytes]:
    for name, value in scope["headers"]:
        if name == b"x-api-key":
            yield value
        elif name == b"authorization" and value[:7].lower() == b"bearer ":
            yield value[7:].strip()


class BodyLimitMiddleware:
    """Refuses a body of more than `limit` bytes: by its Content-Length, or when that many have come."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        length = _content_length(scope)
        if length is not None and length > self.limit:
            await error_response(Request(scope), self._too_large())(scope, receive, send)
            return
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.limit:
                raise self._too_large()
            return message

        await self.app(scope, counted, send)

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"The body has more than {self.limit} bytes (--max-request-body-bytes).")


def _content_length(scope: Scope) -> int | None:
    value = header(scope, b"content-length")
    return int(value) if value is not None and value.isdigit() else None


def _request_id(scope: Scope) -> str:
    """The client's own if it is fit for headers and logs, else a new one."""
    own = header(scope, b"x-request-id") or b""
    if 0 < len(own) <= _MAX_REQUEST_ID and all(0x21 <= byte <= 0x7E for byte in own):
        return own.decode("ascii")
    return secrets.token_hex(16)


def _trace_headers(scope: Scope) -> dict[str, str]:
    return {key.decode(): value.decode("latin-1") for key, value in scope["headers"] if key in _TRACE_HEADERS}
