"""The route class of every API: bodies are strict JSON, and what is no JSON is said in one clear sentence.

FastAPI leaves parsing to `json.loads`, which lets NaN and lone surrogates through; msgspec does not, and is faster. It
also solves dependencies for each request; an endpoint of the form `(body, request)` has none and is called directly.
"""

import inspect
import re
import typing
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

MAX_CONTAINERS = 50_000
"""Objects and lists in a body: five times the messages a chat may have by default."""
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)

_decoder = msgspec.json.Decoder()

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class ApiRoute(APIRoute):
    """For `APIRouter(route_class=ApiRoute)`. Endpoints return a `Response`."""

    def get_route_handler(self) -> Handler:
        if self.body_field is None:
            return super().get_route_handler()
        if list(inspect.signature(self.endpoint).parameters) == ["body", "request"]:
            return _direct_handler(self.endpoint)
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            _require_json(request.headers.get("content-type"))
            return await handle(_JSONRequest(request.scope, request.receive))

        return handle_json


def _direct_handler(endpoint: Callable[..., Coroutine[Any, Any, Response]]) -> Handler:
    model: type[BaseModel] = typing.get_type_hints(endpoint)["body"]
    validate = model.__pydantic_validator__.validate_python

    async def handle(request: Request) -> Response:
        _require_json(request.headers.get("content-type"))
        content = await request.body()
        decoded = _decode(content) if content else None
        try:
            body = validate(decoded)
        except ValidationError as error:
            errors = [item | {"loc": ("body", *item["loc"])} for item in error.errors(include_url=False)]
            raise RequestValidationError(errors, body=decoded) from None
        return await endpoint(body, request)

    return handle


class _JSONRequest(Request):
    """Raises `HTTPException`, the one kind of error that FastAPI passes on from here as it is."""

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            self._json = _decode(await self.body())
        return self._json


def _decode(body: bytes) -> Any:
    _check_size(body)
    try:
        return _decoder.decode(body)
    except RecursionError:
        raise HTTPException(400, "The body is nested too deeply.") from None
    except UnicodeDecodeError as error:
        raise HTTPException(400, f"The body is not UTF-8: {error.reason} at byte {error.start}.") from None
    except ValueError as error:  # malformed, NaN, a number out of range
        raise HTTPException(400, f"The body is not valid JSON: {str(error)[:100]}") from None


def _check_size(body: bytes) -> None:
    """Decoding and validating an object takes Python some 10 us, during which nobody else is served."""
    if _num_brackets(body) > MAX_CONTAINERS and _num_brackets(_STRING.sub(b"", body)) > MAX_CONTAINERS:
        raise HTTPException(400, f"The body has more than {MAX_CONTAINERS} objects and lists.")


def _num_brackets(text: bytes) -> int:
    return text.count(b"{") + text.count(b"[")


def _require_json(content_type: str | None) -> None:
    """A page of another origin can post any type but this one without asking first: so none other is read."""
    kind = (content_type or "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        got = f", got {content_type[:60]!r}" if content_type else ""
        raise HTTPException(400, f"The Content-Type header must be application/json{got}.")
