"""The prompt of a response: earlier turns, then its own items, as a chat that fits the context.

The chat API does the rest: `as_chat` says in its words what a request of the Responses API asks for.
"""

from contextlib import AbstractContextManager
from typing import Any

from mini_vllm.engine.input_processor import TokenizedPrompt
from mini_vllm.entrypoints.openai.chat_prompt import ChatPrompter, Conversation
from mini_vllm.entrypoints.openai.chat_request import ChatCompletionRequest, ChatMessage
from mini_vllm.entrypoints.openai.responses.input import (
    ItemReference,
    KeptItem,
    chat_messages,
    kept_item,
    user_message,
)
from mini_vllm.entrypoints.openai.responses.request import ResponsesInput, ResponsesRequest
from mini_vllm.entrypoints.openai.responses.store import ResponseStore
from mini_vllm.entrypoints.openai.sampling import tokens_to_generate
from mini_vllm.entrypoints.openai.sampling_request import SamplingFields, explicit
from mini_vllm.entrypoints.server.errors import ApiError
from mini_vllm.entrypoints.server.fields import renamed, translated
from mini_vllm.entrypoints.server.state import ServerState
from mini_vllm.exceptions import PromptTooLongError

_SAME_NAME = ("model", *SamplingFields.model_fields)


def resolved_input(body: ResponsesInput, store: ResponseStore, owner: str) -> list[KeptItem]:
    """The items of earlier turns, then the request's own. Raises `ApiError` for what `owner` does not have."""
    items = _earlier_items(body.previous_response_id, store, owner)
    if isinstance(body.input, str):
        return [*items, user_message(body.input)]
    for position, item in enumerate(body.input or ()):
        if not isinstance(item, ItemReference):
            items.append(kept_item(item))
        elif (found := store.find_item(item.id, owner)) is not None:
            items.append(found)
        else:
            raise ApiError(404, f"Item with id '{item.id}' not found.", param=f"input.{position}.id")
    return items


def _earlier_items(response_id: str | None, store: ResponseStore, owner: str) -> list[KeptItem]:
    if response_id is None:
        return []
    where: dict[str, Any] = {"param": "previous_response_id"}
    record = store.find(response_id, owner)
    if record is None:
        message = f"Previous response with id '{response_id[:100]}' not found."
        raise ApiError(400, message, code="previous_response_not_found", **where)
    if record.is_running:
        raise ApiError(400, f"Previous response with id '{response_id[:100]}' is still in progress.", **where)
    return [*record.input_items(), *record.response()["output"]]


def as_chat(body: ResponsesRequest) -> ChatCompletionRequest:
    """The same request to the chat API, but for its messages."""
    return translated(
        ChatCompletionRequest,
        {
            "messages": [{"role": "user"}],
            "stream": body.stream or body.background,
            "logprobs": body.wants_logprobs,
            "top_logprobs": body.top_logprobs if body.wants_logprobs else None,
            **explicit(body, _SAME_NAME),
        },
    )


def conversation_of(body: ResponsesInput, items: list[KeptItem]) -> Conversation:
    messages = [ChatMessage.model_validate(message) for message in chat_messages(items, body.instructions)]
    return Conversation(messages=messages, variables=body.chat_template_kwargs or {})


def about_input() -> AbstractContextManager[None]:
    """The messages are made of `input`, so what is wrong with them is wrong with that."""
    return renamed({"messages": "input", "prompt": "input"})


class Fitter:
    """Finds the prompt of a response, and how many tokens may follow it. max_output_tokens: what the request asks."""

    def __init__(self, state: ServerState, body: ResponsesInput, max_output_tokens: int | None = None) -> None:
        self._prompter = ChatPrompter(state)
        self._engine = state.engine
        self._body = body
        self._asked = max_output_tokens

    async def fit(self, items: list[KeptItem]) -> tuple[TokenizedPrompt, int]:
        """Raises `PromptTooLongError`, with truncation 'auto' only when not even the newest item fits."""
        with about_input():
            try:
                return await self._try(items)
            except PromptTooLongError:
                if self._body.truncation != "auto" or len(items) < 2:
                    raise
            return await self._cut(items)

    async def _cut(self, items: list[KeptItem]) -> tuple[TokenizedPrompt, int]:
        """Leave out as few of the oldest items as will do: bisection, since each try renders the conversation."""
        too_few, enough = 0, len(items) - 1
        found = await self._try(_without_oldest(items, enough))
        while enough - too_few > 1:
            middle = (too_few + enough) // 2
            try:
                found, enough = await self._try(_without_oldest(items, middle)), middle
            except PromptTooLongError:
                too_few = middle
        return found

    async def _try(self, items: list[KeptItem]) -> tuple[TokenizedPrompt, int]:
        prompt = await self._prompter.prompt(conversation_of(self._body, items))
        default, limit = self._engine.input_processor.default_max_tokens, self._engine.max_model_len
        return prompt, tokens_to_generate("max_output_tokens", self._asked, default, len(prompt.token_ids), limit)


def _without_oldest(items: list[KeptItem], number: int) -> list[KeptItem]:
    """The rest, without what tools gave to calls that are left out."""
    kept = items[number:]
    calls = {item["call_id"] for item in kept if item["type"] == "function_call"}
    return [item for item in kept if item["type"] != "function_call_output" or item["call_id"] in calls]
