"""The application: routes of every API around one `ServerState`, behind the middlewares."""

from typing import Any

from fastapi import APIRouter, FastAPI
from starlette.middleware.cors import CORSMiddleware

from mini_vllm import __version__
from mini_vllm.entrypoints.anthropic.api import router as anthropic_router
from mini_vllm.entrypoints.openai.api import router as openai_router
from mini_vllm.entrypoints.server import ops
from mini_vllm.entrypoints.server.handlers import add_exception_handlers
from mini_vllm.entrypoints.server.middleware import AuthMiddleware, BodyLimitMiddleware, RequestMiddleware
from mini_vllm.entrypoints.server.state import ServerState


def build_app(state: ServerState) -> FastAPI:
    """The ASGI application of one server."""
    return assemble(state, [openai_router, anthropic_router, *ops.routers(state.args)])


def assemble(state: ServerState, routers: list[APIRouter]) -> FastAPI:
    """An application of these routers alone."""
    app = _Application(title="mini-vllm", version=__version__, redirect_slashes=False, **_docs(state))
    app.root_path = state.args.root_path  # not uvicorn's, which is for proxies that strip the prefix alone
    app.state.server = state
    # flat, since an included router is searched twice for each request, and before FastAPI's own routes of the docs
    app.router.routes[:0] = [route for router in routers for route in router.routes]
    add_exception_handlers(app)
    # the last one added is the outermost
    app.add_middleware(BodyLimitMiddleware, limit=state.args.max_request_body_bytes)
    app.add_middleware(AuthMiddleware, state=state)
    app.add_middleware(RequestMiddleware, state=state)
    if state.args.allowed_origins:
        app.add_middleware(CORSMiddleware, **_cors(state))
    return app


class _Application(FastAPI):
    """Documents the errors that are sent: FastAPI would promise a 422 of its own for every body."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            schema = super().openapi()
            schemas = schema.setdefault("components", {}).setdefault("schemas", {})
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            schemas["Error"] = _ERROR_SCHEMA
            for path in schema["paths"].values():
                for operation in path.values():
                    if operation["responses"].pop("422", None):
                        operation["responses"].setdefault("400", _ERROR_RESPONSE)
                    operation["responses"].setdefault("default", _ERROR_RESPONSE)
        return self.openapi_schema or {}


_ERROR_RESPONSE = {
    "description": "An error",
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
}
_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "integer", "null"]},
            },
        }
    },
}
"""OpenAI's shape; Anthropic's routes add `type` and `request_id` around it and have no `param` and `code`."""


def _docs(state: ServerState) -> dict[str, Any]:
    return {"openapi_url": None, "docs_url": None, "redoc_url": None} if state.args.disable_fastapi_docs else {}


def _cors(state: ServerState) -> dict[str, Any]:
    args = state.args
    return {
        "allow_origins": args.allowed_origins,
        "allow_methods": args.allowed_methods,
        "allow_headers": args.allowed_headers,
        "allow_credentials": args.allow_credentials,
        "expose_headers": ("x-request-id", "retry-after"),
    }
