"""/v1/messages and its count of tokens, on top of the chat API.

`max_tokens` is a bound and no reservation, as at Anthropic: an output that fills the context before ends with the
stop_reason `model_context_window_exceeded`.
"""

from contextlib import AbstractContextManager

from starlette.requests import Request
from starlette.responses import Response

from mini_vllm.engine.protocol import RequestStream
from mini_vllm.entrypoints.anthropic.answer import Answer
from mini_vllm.entrypoints.anthropic.conversation import chat_messages, is_prefill
from mini_vllm.entrypoints.anthropic.protocol import MessagesRequest, PromptFields, TokenCount
from mini_vllm.entrypoints.anthropic.stream import message_events
from mini_vllm.entrypoints.openai.call import Call, served_model
from mini_vllm.entrypoints.openai.chat_prompt import ChatPrompter, Conversation
from mini_vllm.entrypoints.openai.chat_request import ChatCompletionRequest, ChatMessage
from mini_vllm.entrypoints.openai.limits import check_sampling
from mini_vllm.entrypoints.openai.sampling import chat_params, with_max_tokens
from mini_vllm.entrypoints.openai.sampling_request import explicit
from mini_vllm.entrypoints.server.context import context_of
from mini_vllm.entrypoints.server.encoding import json_response
from mini_vllm.entrypoints.server.fields import renamed, translated
from mini_vllm.entrypoints.server.serve_args import ServeArgs
from mini_vllm.entrypoints.server.state import state_of
from mini_vllm.entrypoints.server.streaming import anthropic_error_frames, sse_response
from mini_vllm.exceptions import InvalidParameterError

_SAME_NAME = ("temperature", "top_p", "top_k", "model", "cache_salt", "priority")


async def create_message(body: MessagesRequest, request: Request) -> Response:
    """Answer a conversation, or go on with its last message if that is the model's own."""
    with _anthropic_names():
        call = Call.begin(request, _as_chat(body), "msg_")
        stream = await _submit(call, body)
    headers = {"request-id": call.context.request_id}
    answer = Answer(call.id, call.model, body.max_tokens)
    if body.stream:
        return sse_response(
            message_events(answer, stream),
            keep_alive=call.state.args.sse_keep_alive_interval,
            on_error=anthropic_error_frames,
            headers=headers,
            closing=[stream],
        )
    for output in await call.finish([stream]):
        answer.take(output)
    return json_response(answer.message(), headers=headers)


async def count_tokens(body: PromptFields, request: Request) -> Response:
    """How many tokens the prompt would have, be they too many or not."""
    state = state_of(request)
    served_model(state, body.model)
    with _anthropic_names():
        number = await ChatPrompter(state).count(_conversation(body, state.args))
    return json_response(TokenCount(number), headers={"request-id": context_of(request).request_id})


def _anthropic_names() -> AbstractContextManager[None]:
    return renamed({"stop": "stop_sequences", "prompt": "messages"})


def _as_chat(body: MessagesRequest) -> ChatCompletionRequest:
    """The same request to the chat API, but for its messages."""
    return translated(
        ChatCompletionRequest,
        {
            "messages": [{"role": "user"}],
            "stream": body.stream,
            "stop": body.stop_sequences,
            "user": None if body.metadata is None else body.metadata.user_id,
            **explicit(body, _SAME_NAME),
        },
    )


async def _submit(call: Call, body: MessagesRequest) -> RequestStream:
    """Check everything, then queue the request."""
    engine = call.engine
    check_sampling(call.body, call.state.args, engine.input_processor.vocab_size)
    assert isinstance(call.body, ChatCompletionRequest)
    params = chat_params(call.body, engine.get_default_sampling_params())
    prompt = await ChatPrompter(call.state).prompt(_conversation(body, call.state.args))
    room = engine.max_model_len - len(prompt.token_ids)
    (stream,) = await call.submit([prompt], [with_max_tokens(params, min(body.max_tokens, room))])
    return stream


def _conversation(body: PromptFields, args: ServeArgs) -> Conversation:
    if len(body.messages) > args.max_messages:
        raise InvalidParameterError("messages", f"may have at most {args.max_messages}, got {len(body.messages)}")
    messages = chat_messages(body)
    continues = is_prefill(messages)
    return Conversation(
        messages=[ChatMessage.model_validate(message) for message in messages],
        add_generation_prompt=not continues,
        continue_final_message=continues,
        variables=body.chat_template_kwargs or {},
    )
