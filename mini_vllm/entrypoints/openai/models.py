"""GET /v1/models and /v1/models/{id}, as OpenAI's clients read them, or Anthropic's (header `anthropic-version`).

One model is served, under one name or several.
"""

from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from mini_vllm.entrypoints.openai.call import model_not_found
from mini_vllm.entrypoints.server.encoding import json_response
from mini_vllm.entrypoints.server.errors import ApiError
from mini_vllm.entrypoints.server.handlers import is_anthropic
from mini_vllm.entrypoints.server.state import ServerState, state_of
from mini_vllm.exceptions import InvalidParameterError

OWNER = "mini-vllm"
_DEFAULT_LIMIT = 20
_MAX_LIMIT = 1000


async def list_models(request: Request) -> Response:
    state = state_of(request)
    if is_anthropic(request):
        return json_response(_page(state, request))
    return json_response({"object": "list", "data": [openai_model(state, name) for name in state.model_names]})


async def get_model(model: str, request: Request) -> Response:
    """Names may have slashes in them."""
    state = state_of(request)
    if model not in state.model_names:
        raise model_not_found(state, model)
    shape = anthropic_model if is_anthropic(request) else openai_model
    return json_response(shape(state, model))


def openai_model(state: ServerState, name: str) -> dict[str, Any]:
    """With what vLLM adds: `root` is where the model was loaded from, `parent` an adapter's base."""
    return {
        "id": name,
        "object": "model",
        "created": state.created,
        "owned_by": OWNER,
        "root": state.model_root or name,
        "parent": None,
        "max_model_len": state.engine.max_model_len,
        "permission": [_permission(state, name)],
    }


def _permission(state: ServerState, name: str) -> dict[str, Any]:
    return {
        "id": f"modelperm-{name}",
        "object": "model_permission",
        "created": state.created,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }


def anthropic_model(state: ServerState, name: str) -> dict[str, Any]:
    created = datetime.fromtimestamp(state.created, UTC)
    return {
        "type": "model",
        "id": name,
        "display_name": name,
        "created_at": created.isoformat().replace("+00:00", "Z"),
        "lifecycle": "active",
        "max_input_tokens": state.engine.max_model_len - 1,
        "max_tokens": state.engine.max_model_len,
    }


def _page(state: ServerState, request: Request) -> dict[str, Any]:
    """One page of Anthropic's list: `limit` models from a cursor on."""
    names, query = list(state.model_names), request.query_params
    limit = _limit(query.get("limit"))
    after, before = query.get("after_id"), query.get("before_id")
    if after is not None:
        names = names[_position(names, after, "after_id") + 1 :]
    if before is not None:
        names = names[: _position(names, before, "before_id")]
    backwards = before is not None and after is None
    page = names[-limit:] if backwards else names[:limit]
    return {
        "data": [anthropic_model(state, name) for name in page],
        "has_more": len(names) > len(page),
        "first_id": page[0] if page else None,
        "last_id": page[-1] if page else None,
    }


def _limit(text: str | None) -> int:
    if text is None:
        return _DEFAULT_LIMIT
    if not (text.isascii() and text.isdigit() and len(text) < 6 and 1 <= int(text) <= _MAX_LIMIT):
        raise InvalidParameterError("limit", f"must be from 1 to {_MAX_LIMIT}, got {text[:20]!r}")
    return int(text)


def _position(names: list[str], name: str, field: str) -> int:
    if name not in names:
        raise ApiError(400, f"{field}: there is no model {name[:200]!r} to start from.", param=field)
    return names.index(name)
