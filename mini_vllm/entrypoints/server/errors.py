"""Errors of the API: one type inside, the shapes of OpenAI and of Anthropic outside.

`api_error_from` turns whatever a handler raised into an `ApiError`; `openai_error` and `anthropic_error` give the
bodies. Clients match on some of these words: `type` and `code` are OpenAI's and Anthropic's own.
"""

from typing import Any

from mini_vllm.exceptions import (
    EngineDeadError,
    InvalidParameterError,
    OverloadedError,
    PromptTooLongError,
)

_OPENAI_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    503: "service_unavailable_error",
}
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    529: "overloaded_error",
}
_UNEXPLAINED = "internal_error"
MAX_MESSAGE = 1000
"""Characters of a message at most: a body that is wrong is not sent back whole."""


class ApiError(Exception):
    """An answer that is an error. param: the field at fault, in the body's own spelling, such as 'messages'."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message if len(message) <= MAX_MESSAGE else message[:MAX_MESSAGE] + "..."
        self.param = param
        self.code = code
        self.headers = headers or {}


def api_error_from(error: Exception) -> ApiError:
    """The answer to what went wrong. What is not one of our own types is a bug: 500, with no details."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, PromptTooLongError):
        return ApiError(400, str(error), param=error.field, code="context_length_exceeded")
    if isinstance(error, InvalidParameterError):
        return ApiError(400, str(error), param=error.field)
    if isinstance(error, OverloadedError):
        return ApiError(503, str(error), code=error.reason, headers={"Retry-After": str(error.retry_after)})
    if isinstance(error, EngineDeadError):
        return ApiError(500, str(error), code="engine_dead")
    return ApiError(500, "The server failed on this request; its log says why.", code=_UNEXPLAINED)


def is_explained(error: Exception) -> bool:
    """Whether the answer says what went wrong. If not, the log has to."""
    return api_error_from(error).code != _UNEXPLAINED


def openai_error(error: ApiError) -> dict[str, Any]:
    """OpenAI's body. `code` is the status where there is no better word, as in vLLM."""
    return {
        "error": {
            "message": error.message,
            "type": _OPENAI_TYPES.get(error.status, "server_error"),
            "param": error.param,
            "code": error.code or error.status,
        }
    }


def anthropic_error(error: ApiError, request_id: str) -> dict[str, Any]:
    """Anthropic's body."""
    kind = _ANTHROPIC_TYPES.get(error.status, "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}, "request_id": request_id}
