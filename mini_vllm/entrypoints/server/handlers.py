"""From whatever was raised to the answer: status, shape and words that OpenAI's and Anthropic's clients understand.

Wrong bodies are told as `messages.0.content: ...` in the body's own spelling, whatever route pydantic took through
unions and validators; little of the body is quoted, and nothing of the server's inside.
"""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import Scope

from mini_vllm.entrypoints.server.context import context_of
from mini_vllm.entrypoints.server.disconnect import ClientGoneError
from mini_vllm.entrypoints.server.encoding import json_response
from mini_vllm.entrypoints.server.errors import ApiError, anthropic_error, api_error_from, is_explained, openai_error
from mini_vllm.exceptions import InvalidParameterError, MiniVLLMError
from mini_vllm.logger import init_logger

logger = init_logger(__name__)

_RETRY_AFTER = {429: "1", 503: "1", 529: "1"}
_MAX_PART = 64
_MAX_QUOTED = 60


def add_exception_handlers(app: FastAPI) -> None:
    for kind in (ApiError, MiniVLLMError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _answer)
    app.add_exception_handler(ClientGoneError, _nobody_listens)
    app.add_exception_handler(ClientDisconnect, _nobody_listens)


async def _answer(request: Request, error: Exception) -> Response:
    if isinstance(error, MiniVLLMError) and not is_explained(error):
        logger.error("request %s failed: %s", context_of(request).request_id, error)
    return error_response(request, error)


async def _nobody_listens(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # for the access log and the metrics


def error_response(request: Request, error: Exception) -> Response:
    """The answer to `error`, in the shape that this request's client reads."""
    if isinstance(error, RequestValidationError):
        known = _from_validation(error)
    elif isinstance(error, HTTPException):
        known = _from_http(request, error)
    else:
        known = api_error_from(error)
    if not is_anthropic(request):
        return json_response(openai_error(known), known.status, _headers(known, known.status))
    status = 529 if known.status == 503 else known.status
    request_id = context_of(request).request_id
    headers = _headers(known, status) | {"request-id": request_id}
    return json_response(anthropic_error(known, request_id), status, headers)


def route_path(scope: Scope) -> str:
    """The path that routes are matched with: without the prefix of a proxy, whether or not it strips that itself."""
    path, prefix = scope["path"], scope.get("root_path", "")
    if prefix and (path == prefix or path.startswith(prefix + "/")):
        return path[len(prefix) :]  # type: ignore[no-any-return]
    return path  # type: ignore[no-any-return]


def is_anthropic(request: Request) -> bool:
    """Whether Anthropic's client asks."""
    path = route_path(request.scope)
    if path == "/v1/messages" or path.startswith("/v1/messages/"):
        return True
    return "anthropic-version" in request.headers and (path == "/v1/models" or path.startswith("/v1/models/"))


def _headers(error: ApiError, status: int) -> dict[str, str]:
    retry = {"retry-after": _RETRY_AFTER[status]} if status in _RETRY_AFTER else {}
    return retry | {name.lower(): value for name, value in error.headers.items()}


def _from_http(request: Request, error: HTTPException) -> ApiError:
    method, path = request.method, request.scope["path"]
    if error.status_code == 404:
        return ApiError(404, f"There is no {method} {path[:200]} here.", code="not_found")
    if error.status_code == 405:
        allowed = ", ".join(_allowed_methods(request))
        return ApiError(405, f"{path[:200]} takes {allowed}, not {method[:20]}.", headers={"allow": allowed})
    return ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {}))


def _allowed_methods(request: Request) -> list[str]:
    """Of all routes of this path: starlette knows those of the first one only."""
    found: set[str] = set()
    for route in request.app.routes:
        if route.matches(request.scope)[0] is not Match.NONE:
            found |= getattr(route, "methods", None) or set()
    return sorted(found)


# -- bodies that do not fit their model ------------------------------------------------------------------------


def _from_validation(error: RequestValidationError) -> ApiError:
    """Of all complaints, those about the first field that is wrong, and of these the ones that saw most of it."""
    located = [(_path(item["loc"], error.body), item) for item in error.errors()]
    first = located[0][0][:1]
    located = [pair for pair in located if pair[0][:1] == first]
    path = max((pair[0] for pair in located), key=len)
    items = [item for found, item in located if found == path]
    for item in items:
        inner = item.get("ctx", {}).get("error")
        if isinstance(inner, InvalidParameterError):
            return _at(path, inner)
    param = _spelt(path)
    message = " or ".join(dict.fromkeys(_words(item) for item in items))
    return ApiError(400, f"{param or 'body'}: {message[:300]}{_quoted(items)}", param=param)


def _at(path: Sequence[str | int], error: InvalidParameterError) -> ApiError:
    """What a model of ours said about one of its own fields, seen from the whole body."""
    known = api_error_from(error)
    if path and path[-1] == error.field:
        path = path[:-1]
    param = _spelt([*path, error.field])
    message = f"{param}: {str(error).removeprefix(error.field + ': ')}"
    return ApiError(400, message, param=param, code=known.code)


def _path(loc: Sequence[str | int], body: Any) -> list[str | int]:
    """`loc` without what is no part of the body: 'body' itself, tags of unions, names of validators."""
    if loc and loc[0] in ("query", "path"):
        return list(loc[1:2])
    found: list[str | int] = []
    value, parts = body, list(loc[1:] if loc and loc[0] == "body" else loc)
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        if isinstance(value, dict) and isinstance(part, str) and (part in value or (last and _is_name(part))):
            found.append(part)
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            found.append(part)
            value = value[part]
    return found


def _is_name(part: str) -> bool:
    return part.isidentifier()


def _spelt(path: Sequence[str | int]) -> str | None:
    return ".".join(str(part)[:_MAX_PART] for part in path)[:200] or None


def _words(item: dict[str, Any]) -> str:
    if item["type"] == "missing":
        return "is required" if len(item["loc"]) > 1 else "a JSON object is required"
    message: str = item["msg"].removeprefix("Value error, ")
    return message


def _quoted(items: Sequence[dict[str, Any]]) -> str:
    """What was there instead, if it is short: a number, a word."""
    value = items[0].get("input")
    if items[0]["type"] in ("missing", "value_error") or not isinstance(value, str | int | float | bool | None):
        return ""
    shown = repr(value[: _MAX_QUOTED + 1] if isinstance(value, str) else value)
    return f", got {shown}" if len(shown) <= _MAX_QUOTED else ""
