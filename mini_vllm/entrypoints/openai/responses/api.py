"""/v1/responses: create, fetch, follow, cancel and delete responses, list what they were given, count its tokens."""

import asyncio
import time
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response

from mini_vllm.engine.protocol import RequestStream
from mini_vllm.entrypoints.openai.bodies import ChatLogprob
from mini_vllm.entrypoints.openai.call import Call, closing_all, served_model
from mini_vllm.entrypoints.openai.chat_prompt import ChatPrompter
from mini_vllm.entrypoints.openai.chat_request import ChatCompletionRequest
from mini_vllm.entrypoints.openai.documentation import answers, object_of, schema_of
from mini_vllm.entrypoints.openai.limits import check_sampling
from mini_vllm.entrypoints.openai.logprobs import ChatLogprobsShaper
from mini_vllm.entrypoints.openai.responses.input import KeptItem
from mini_vllm.entrypoints.openai.responses.objects import ItemList, ResponseObject
from mini_vllm.entrypoints.openai.responses.prompt import Fitter, about_input, as_chat, conversation_of, resolved_input
from mini_vllm.entrypoints.openai.responses.request import ResponseQuery, ResponsesInput, ResponsesRequest
from mini_vllm.entrypoints.openai.responses.run import Generation, LogprobsOf, run_in_background
from mini_vllm.entrypoints.openai.responses.store import EventLog, ResponseStore, StoredResponse
from mini_vllm.entrypoints.openai.sampling import chat_params, with_max_tokens
from mini_vllm.entrypoints.openai.sampling_request import explicit
from mini_vllm.entrypoints.server.context import context_of
from mini_vllm.entrypoints.server.disconnect import run_until_disconnect
from mini_vllm.entrypoints.server.encoding import encode, json_response
from mini_vllm.entrypoints.server.errors import ApiError
from mini_vllm.entrypoints.server.routing import ApiRoute
from mini_vllm.entrypoints.server.state import ServerState, state_of
from mini_vllm.entrypoints.server.streaming import sse_response
from mini_vllm.exceptions import InvalidParameterError
from mini_vllm.outputs import RequestOutput
from mini_vllm.sampling_params import SamplingParams
from mini_vllm.text.tokenizer import Tokenizer

router = APIRouter(route_class=ApiRoute, tags=["responses"])

_ECHOED = (
    "instructions", "max_output_tokens", "max_tool_calls", "metadata", "parallel_tool_calls", "previous_response_id",
    "prompt_cache_key", "safety_identifier", "tool_choice", "top_logprobs", "truncation", "user",
)  # fmt: skip
_EVENT = object_of(type={"type": "string"}, sequence_number={"type": "integer"})
_RESPONSE = answers(schema_of(ResponseObject), 404, 413, 500, 503, events=_EVENT)
_DELETED = object_of(id={"type": "string"}, object={"type": "string"}, deleted={"type": "boolean"})
_COUNT = object_of(object={"type": "string"}, input_tokens={"type": "integer"})


# -- create ------------------------------------------------------------------------------------------------------


@router.post("/v1/responses", responses=_RESPONSE)
async def create_response(body: ResponsesRequest, request: Request) -> Response:
    """Generate a response: at once, as events, or in the background."""
    chat = as_chat(body)
    call = Call.begin(request, chat, "resp_")
    store = _store(call.state)
    keeps = _keeps(body, store)
    if (call.context.owner, call.id) in store:
        raise InvalidParameterError("request_id", f"there is a stored response {call.id!r} already")
    if body.background:
        store.check_room()
    items = resolved_input(body, store, call.context.owner)
    params, stream = await _submit(call, chat, body, items)
    response = _new_response(call, body, params, keeps)
    generation = Generation(response, stream, _logprobs_of(call.engine.get_tokenizer(), params))
    if body.background:
        return _start(generation, _record(call, response, items), store, call.state, bool(body.stream))
    if keeps:
        generation.on_end = lambda: store.add(_record(call, response, items))
    if body.stream:
        return call.stream(generation.frames(), [stream])
    async with closing_all([stream]):
        await run_until_disconnect(request, generation.run())
    return json_response(response)


def _store(state: ServerState) -> ResponseStore:
    store: ResponseStore = state.response_store
    return store


def _keeps(body: ResponsesRequest, store: ResponseStore) -> bool:
    """Whether the response is stored. Raises `InvalidParameterError` where it should be but cannot."""
    if store.enabled:
        return body.store is not False
    for name in ("store", "background"):
        if getattr(body, name):
            raise InvalidParameterError(name, "this server keeps no responses (--max-stored-responses 0)")
    return False


async def _submit(
    call: Call, chat: ChatCompletionRequest, body: ResponsesRequest, items: list[KeptItem]
) -> tuple[SamplingParams, RequestStream]:
    """Check everything, then queue the request."""
    args, engine = call.state.args, call.engine
    check_sampling(chat, args, engine.input_processor.vocab_size)
    if len(items) > args.max_messages:
        raise InvalidParameterError("input", f"may have at most {args.max_messages} items, got {len(items)}")
    params = chat_params(chat, engine.get_default_sampling_params())
    prompt, max_tokens = await Fitter(call.state, body, body.max_output_tokens).fit(items)
    params = with_max_tokens(params, max_tokens)
    (stream,) = await call.submit([prompt], [params])
    return params, stream


def _new_response(call: Call, body: ResponsesRequest, params: SamplingParams, keeps: bool) -> ResponseObject:
    return ResponseObject(
        id=call.id,
        created_at=int(time.time()),
        status="queued" if body.background else "in_progress",
        background=bool(body.background),
        model=call.model,
        store=keeps,
        temperature=params.temperature,
        top_p=params.top_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        **explicit(body, _ECHOED),
    )


def _logprobs_of(tokenizer: Tokenizer, params: SamplingParams) -> LogprobsOf:
    if params.logprobs is None:
        return lambda output: []
    shaper = ChatLogprobsShaper(tokenizer, params, as_ids=False)

    def shaped(output: RequestOutput) -> list[ChatLogprob]:
        completion = output.outputs[0]
        return shaper.shape(completion.token_ids, completion.logprobs or []).content

    return shaped


def _record(call: Call, response: ResponseObject, items: list[KeptItem]) -> StoredResponse:
    ids = tuple(item["id"] for item in items) + tuple(item.id for item in response.output)
    return StoredResponse(response.id, call.context.owner, encode(response), encode(items), ids, response.background)


def _start(
    generation: Generation, record: StoredResponse, store: ResponseStore, state: ServerState, streams: bool
) -> Response:
    if streams:
        record.events = EventLog()
    record.task = asyncio.create_task(run_in_background(generation, record, store))
    store.add(record)
    if record.events is not None:
        return sse_response(record.events.follow(), keep_alive=state.args.sse_keep_alive_interval)
    return _as_kept(record)


# -- what is stored ----------------------------------------------------------------------------------------------


@router.get("/v1/responses/{response_id}", responses=_RESPONSE)
async def get_response(response_id: str, request: Request, query: Annotated[ResponseQuery, Query()]) -> Response:
    """A stored response, or the events of one in the background from `starting_after` on."""
    record = _stored(request, response_id)
    if not query.stream:
        if query.starting_after is not None:
            raise InvalidParameterError("starting_after", "acts only with `stream`")
        return _as_kept(record)
    if record.events is None:
        raise ApiError(
            400, "Only responses created with background=true and stream=true can be streamed again.", param="stream"
        )
    start = 0 if query.starting_after is None else query.starting_after + 1
    return sse_response(record.events.follow(start), keep_alive=state_of(request).args.sse_keep_alive_interval)


@router.post("/v1/responses/{response_id}/cancel", responses=answers(schema_of(ResponseObject), 404))
async def cancel_response(response_id: str, request: Request) -> Response:
    """Stop a response that is generated in the background."""
    record = _stored(request, response_id)
    if not record.background:
        raise ApiError(400, "Cannot cancel a synchronous response.", param="response_id")
    if not record.is_running and (status := record.response()["status"]) != "cancelled":
        raise ApiError(400, f"Cannot cancel a response that is {status}.", param="response_id")
    await record.stop()
    return _as_kept(record)


@router.delete("/v1/responses/{response_id}", responses=answers(_DELETED, 404))
async def delete_response(response_id: str, request: Request) -> Response:
    """Forget a response; one that is still generated is stopped."""
    await _store(state_of(request)).remove(_stored(request, response_id))
    return json_response({"id": response_id, "object": "response", "deleted": True})


@router.get("/v1/responses/{response_id}/input_items", responses=answers(schema_of(ItemList), 404))
async def list_input_items(
    response_id: str,
    request: Request,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
    after: str | None = None,
) -> Response:
    """What a response was given, the newest first: its own input, and before it that of earlier turns."""
    items = _stored(request, response_id).input_items()
    if order == "desc":
        items.reverse()
    start = 0
    if after is not None:
        start = next((i for i, item in enumerate(items, start=1) if item["id"] == after), 0)
        if not start:
            raise ApiError(404, f"Item with id '{after[:100]}' not found.", param="after")
    page = items[start : start + limit]
    first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
    return json_response(ItemList(data=page, first_id=first, last_id=last, has_more=start + limit < len(items)))


def _stored(request: Request, response_id: str) -> StoredResponse:
    return _store(state_of(request)).get(response_id, context_of(request).owner)


def _as_kept(record: StoredResponse) -> Response:
    return Response(record.body, media_type="application/json")


# -- count -------------------------------------------------------------------------------------------------------


@router.post("/v1/responses/input_tokens", responses=answers(_COUNT, 404, 413, 503))
async def count_input_tokens(body: ResponsesInput, request: Request) -> Response:
    """How many tokens the prompt of a response would have; too many are counted too, unless `truncation` is auto."""
    state = state_of(request)
    served_model(state, body.model)
    items = resolved_input(body, _store(state), context_of(request).owner)
    if body.truncation == "auto":
        prompt, _ = await Fitter(state, body).fit(items)
        number = len(prompt.token_ids)
    else:
        with about_input():
            number = await ChatPrompter(state).count(conversation_of(body, items))
    return json_response({"object": "response.input_tokens", "input_tokens": number})
