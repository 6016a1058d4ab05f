"""The routes of Anthropic's Messages API."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from mini_vllm.entrypoints.anthropic import messages
from mini_vllm.entrypoints.anthropic.protocol import CountTokensRequest, MessagesRequest
from mini_vllm.entrypoints.server.routing import ApiRoute

router = APIRouter(route_class=ApiRoute, tags=["Anthropic"])


@router.post("/v1/messages", responses={200: {"content": {"application/json": {}, "text/event-stream": {}}}})
async def create_message(body: MessagesRequest, request: Request) -> Response:
    """Answer a conversation, at once or as events."""
    return await messages.create_message(body, request)


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: CountTokensRequest, request: Request) -> Response:
    """Count the tokens of a conversation."""
    return await messages.count_tokens(body, request)
