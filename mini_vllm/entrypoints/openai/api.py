"""The routes of OpenAI's API, and vLLM's beside it."""

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from mini_vllm.entrypoints.openai import chat, completions, models, tokenize
from mini_vllm.entrypoints.openai.bodies import ChatCompletion, Chunk, Completion
from mini_vllm.entrypoints.openai.chat_request import ChatCompletionRequest
from mini_vllm.entrypoints.openai.completion_request import CompletionRequest
from mini_vllm.entrypoints.openai.documentation import answers, object_of, schema_of
from mini_vllm.entrypoints.openai.responses import api as responses_api
from mini_vllm.entrypoints.openai.tokenize_request import DetokenizeRequest, TokenizeRequest
from mini_vllm.entrypoints.server.routing import ApiRoute

router = APIRouter(route_class=ApiRoute)

_STRING = {"type": "string"}
_INTEGERS = {"type": "array", "items": {"type": "integer"}}
_MODEL: dict[str, Any] = {"type": "object", "required": ["id"], "properties": {"id": _STRING}}


@router.post(
    "/v1/completions",
    tags=["completions"],
    responses=answers(schema_of(Completion), 404, 413, 500, 503, events=schema_of(Chunk)),
)
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Complete one prompt or several."""
    return await completions.create_completion(body, request)


@router.post(
    "/v1/chat/completions",
    tags=["chat"],
    responses=answers(schema_of(ChatCompletion), 404, 413, 500, 503, events=schema_of(Chunk)),
)
async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
    """Answer a conversation."""
    return await chat.create_chat_completion(body, request)


@router.get(
    "/v1/models",
    tags=["models"],
    responses=answers(object_of(data={"type": "array", "items": _MODEL})),
)
async def list_models(request: Request) -> Response:
    """The names that the model answers to. With the header `anthropic-version`, as Anthropic's API lists models."""
    return await models.list_models(request)


@router.get("/v1/models/{model:path}", tags=["models"], responses=answers(_MODEL, 404))
async def get_model(model: str, request: Request) -> Response:
    """One of them."""
    return await models.get_model(model, request)


@router.post(
    "/tokenize",
    tags=["tokens"],
    responses=answers(
        object_of(
            count={"type": "integer"},
            max_model_len={"type": "integer"},
            tokens=_INTEGERS,
            token_strs={"type": ["array", "null"], "items": {"type": ["string", "null"]}},
        ),
        404,
        413,
        503,
    ),
)
async def create_tokenization(body: TokenizeRequest, request: Request) -> Response:
    """Token ids of a text or of a conversation."""
    return await tokenize.tokenize(body, request)


@router.post("/detokenize", tags=["tokens"], responses=answers(object_of(prompt=_STRING), 404, 413, 503))
async def create_detokenization(body: DetokenizeRequest, request: Request) -> Response:
    """The text of token ids."""
    return await tokenize.detokenize(body, request)


# As they are: a router within a router would be looked through for each request.
router.routes.extend(responses_api.router.routes)
