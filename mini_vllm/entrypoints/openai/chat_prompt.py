"""A conversation becomes a prompt: messages as the chat template reads them, the template's text, its tokens.

`ChatPrompter` is handed the server and is what every API with messages uses. Templates differ in what they know:
one that loops over parts gets lists, others text; `developer` is `system` to one that has never heard of it; arguments
of tool calls are objects, as templates expect, and not the text that clients send.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mini_vllm.engine.input_processor import TokenizedPrompt
from mini_vllm.entrypoints.openai.chat_request import ChatMessage, ContentPart, FunctionCall
from mini_vllm.entrypoints.openai.prompts import Truncation, tokenized
from mini_vllm.entrypoints.server.state import ServerState
from mini_vllm.exceptions import InvalidParameterError
from mini_vllm.text.chat_template import render_chat
from mini_vllm.text.content_format import ContentFormat, content_format_of

_RESERVED = frozenset(
    "messages conversation tools documents add_generation_prompt continue_final_message chat_template tokenize".split()
)


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """What there is to render. chat_template: the request's own, or the name of one the model has.

    variables: `chat_template_kwargs`. add_special_tokens: let the tokenizer frame the text.
    """

    messages: Sequence[ChatMessage]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tools: Sequence[Mapping[str, Any]] | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    chat_template: str | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    add_special_tokens: bool = False
    truncation: Truncation | None = None


class ChatPrompter:
    """Renders conversations for one server. Raises `InvalidParameterError` for what cannot be rendered."""

    def __init__(self, state: ServerState) -> None:
        self._args = state.args
        self._engine = state.engine
        self._default_template = state.chat_template

    async def prompt(self, conversation: Conversation) -> TokenizedPrompt:
        """Its tokens, checked; `text` is what the template wrote. Off the event loop, within its time limit."""
        return await self._engine.run_text_work(lambda: self._prompt(conversation))

    async def count(self, conversation: Conversation) -> int:
        """How many tokens its prompt has, be they too many or not."""
        return await self._engine.run_text_work(lambda: self._count(conversation))

    def _count(self, conversation: Conversation) -> int:
        tokenizer = self._engine.get_tokenizer()
        return len(tokenizer.encode(self._render(conversation), conversation.add_special_tokens))

    async def text(self, conversation: Conversation) -> str:
        """What the template writes, of whatever length."""
        return await self._engine.run_text_work(lambda: self._render(conversation))

    def _prompt(self, conversation: Conversation) -> TokenizedPrompt:
        text = self._render(conversation)
        (prompt,) = tokenized(
            self._engine.input_processor,
            [text],
            add_special_tokens=conversation.add_special_tokens,
            truncation=conversation.truncation,
        )
        return prompt

    def _render(self, conversation: Conversation) -> str:
        template = self._template(conversation)
        variables = {**(self._args.default_chat_template_kwargs or {}), **conversation.variables}
        if reserved := sorted(_RESERVED & variables.keys()):
            raise InvalidParameterError("chat_template_kwargs", f"may not hold {', '.join(reserved)}")
        return render_chat(
            template,
            messages_for(template, conversation.messages, self._content_format(template)),
            tools=conversation.tools,
            documents=conversation.documents,
            add_generation_prompt=conversation.add_generation_prompt,
            continue_final_message=conversation.continue_final_message,
            variables={**self._engine.get_tokenizer().special_tokens, **variables},
        )

    def _template(self, conversation: Conversation) -> str:
        tokenizer = self._engine.get_tokenizer()
        asked = conversation.chat_template
        if asked is None:
            return tokenizer.get_chat_template(self._default_template, conversation.tools)
        if asked not in tokenizer.chat_templates and not self._args.trust_request_chat_template:
            raise InvalidParameterError(
                "chat_template", "Chat template is passed with request, but --trust-request-chat-template is not set"
            )
        return tokenizer.get_chat_template(asked)

    def _content_format(self, template: str) -> ContentFormat:
        chosen = self._args.chat_template_content_format
        return content_format_of(template) if chosen == "auto" else chosen  # type: ignore[return-value]


# -- messages as templates read them ----------------------------------------------------------------------------


def messages_for(template: str, messages: Sequence[ChatMessage], content_format: ContentFormat) -> list[dict[str, Any]]:
    """Plain dicts without the fields that a message does not have."""
    knows_developer = "developer" in template
    return [_message(message, content_format, knows_developer) for message in messages]


def _message(message: ChatMessage, content_format: ContentFormat, knows_developer: bool) -> dict[str, Any]:
    shown: dict[str, Any] = {"role": _role(message.role, knows_developer)}
    content = message.content if message.content is not None else message.refusal
    if content is not None:
        shown["content"] = _parts(content) if content_format == "openai" else text_of(content)
    for name in ("name", "tool_call_id", "reasoning", "reasoning_content"):
        if (value := getattr(message, name)) is not None:
            shown[name] = value
    if calls := _tool_calls(message):
        shown["tool_calls"] = calls
    return shown


def _role(role: str, knows_developer: bool) -> str:
    if role == "developer" and not knows_developer:
        return "system"
    return "tool" if role == "function" else role


def _parts(content: str | list[ContentPart]) -> list[dict[str, str]]:
    texts = [content] if isinstance(content, str) else [part.shown for part in content]
    return [{"type": "text", "text": text} for text in texts]


def text_of(content: str | list[ContentPart] | None) -> str:
    """All its text; parts become lines, as in vLLM."""
    if isinstance(content, list):
        return "\n".join(part.shown for part in content)
    return content or ""


def _tool_calls(message: ChatMessage) -> list[dict[str, Any]]:
    calls = [
        {"type": "function", "function": _function(call.function)} | ({} if call.id is None else {"id": call.id})
        for call in message.tool_calls or ()
    ]
    if message.function_call is not None:
        calls.append({"type": "function", "function": _function(message.function_call)})
    return calls


def _function(call: FunctionCall) -> dict[str, Any]:
    return {"name": call.name, "arguments": _arguments(call)}


def _arguments(call: FunctionCall) -> dict[str, Any]:
    """As an object: templates print it as JSON, and text would be quoted twice."""
    if isinstance(call.arguments, dict):
        return call.arguments
    try:
        arguments = json.loads(call.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise InvalidParameterError(
            "messages", f"the arguments of the call to {call.name[:64]!r} must be a JSON object, as text"
        )
    return arguments
