"""What /openapi.json says about answers: the schemas of the structs that are sent, and of errors."""

from typing import Any

import msgspec

ERROR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "integer", "null"]},
            },
        }
    },
}

Responses = dict[int | str, dict[str, Any]]


def answers(schema: dict[str, Any], *errors: int, events: dict[str, Any] | None = None) -> Responses:
    """For `responses=` of a route: 200 with this schema (`events`: or as a stream of these), and the errors."""
    content: dict[str, Any] = {"application/json": {"schema": schema}}
    if events is not None:
        description = "With `stream`: events whose data is one such object each, then `data: [DONE]`."
        content["text/event-stream"] = {"schema": {"type": "string", "description": description, "x-event": events}}
    # "default" keeps FastAPI from adding a 422: what is wrong with a body is a 400 here.
    statuses: list[int | str] = [400, 401, *errors, "default"]
    failures: Responses = {
        status: {"description": _REASONS[status], "content": {"application/json": {"schema": ERROR_SCHEMA}}}
        for status in statuses
    }
    return {200: {"description": "The answer.", "content": content}, **failures}


_REASONS: dict[int | str, str] = {
    "default": "Any other error.",
    400: "The request is wrong; `param` says where.",
    401: "The API key is missing or wrong.",
    404: "There is no such model.",
    413: "The body is too large.",
    500: "The server failed on this request.",
    503: "Too much is queued, or the server is shutting down; try again after `Retry-After` seconds.",
}


def schema_of(kind: type) -> dict[str, Any]:
    """The JSON schema of a struct, without references."""
    (schema,), components = msgspec.json.schema_components([kind], ref_template="{name}")
    inlined: dict[str, Any] = _inlined(schema, components)
    return inlined


def _inlined(value: Any, components: dict[str, Any]) -> Any:
    if isinstance(value, dict):
        if "$ref" in value:
            return _inlined(components[value["$ref"]], components)
        return {key: _inlined(item, components) for key, item in value.items()}
    if isinstance(value, list):
        return [_inlined(item, components) for item in value]
    return value


def object_of(**properties: Any) -> dict[str, Any]:
    """The schema of an object that has these."""
    return {"type": "object", "required": list(properties), "properties": properties}
