"""Anthropic's turns as the messages that chat templates are written for, which are those of OpenAI's chat API.

A turn of blocks comes apart: text, thinking and calls of the model make one message, each tool result one of its own.
"""

from typing import Any

import msgspec

from mini_vllm.entrypoints.anthropic.protocol import (
    ContentBlock,
    InputMessage,
    PromptFields,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from mini_vllm.exceptions import InvalidParameterError

ChatMessage = dict[str, Any]


def chat_messages(body: PromptFields) -> list[ChatMessage]:
    """The conversation. A last turn of the model is the last message, to be gone on with (see `is_prefill`)."""
    turns = _merged(body.messages)
    last = len(turns) - 1
    messages: list[ChatMessage] = []
    if system := _text(body.system):
        messages.append({"role": "system", "content": system})
    called: set[str] = set()
    for position, (role, blocks) in enumerate(turns):
        if not blocks and not (position == last and role == "assistant"):
            raise InvalidParameterError(
                "messages", "all messages must have content, except for a last one of the assistant"
            )
        if role == "assistant":
            called = {block.id for block in blocks if isinstance(block, ToolUseBlock)}
            messages += [_assistant_message(blocks)] if blocks else []
        else:
            messages += _other_messages(role, blocks, called)
    if not messages:
        raise InvalidParameterError("messages", "at least one message must have content")
    return messages


def is_prefill(messages: list[ChatMessage]) -> bool:
    """Whether the model is to go on with the last message. Raises `InvalidParameterError` if that is a tool call."""
    last = messages[-1]
    if last["role"] != "assistant":
        return False
    if "tool_calls" in last:
        raise InvalidParameterError("messages", "tool_use blocks must be followed by their tool_result blocks")
    return True


def _merged(messages: list[InputMessage]) -> list[tuple[str, list[ContentBlock]]]:
    """Neighbours of the same role as one turn of blocks."""
    turns: list[tuple[str, list[ContentBlock]]] = []
    for message in messages:
        blocks = _blocks(message.content)
        if turns and turns[-1][0] == message.role:
            turns[-1][1].extend(blocks)
        else:
            turns.append((message.role, blocks))
    return turns


def _blocks(content: str | list[ContentBlock]) -> list[ContentBlock]:
    if not isinstance(content, str):
        return list(content)
    return [TextBlock(type="text", text=content)] if content else []


def _assistant_message(blocks: list[ContentBlock]) -> ChatMessage:
    message: ChatMessage = {"role": "assistant", "content": _text_of(blocks)}
    thinking = [block.thinking for block in blocks if isinstance(block, ThinkingBlock)]
    calls = [_call(block) for block in blocks if isinstance(block, ToolUseBlock)]
    if any(isinstance(block, ToolResultBlock) for block in blocks):
        raise InvalidParameterError("messages", "tool_result blocks belong to messages of the user")
    if thinking:
        message["reasoning_content"] = "\n".join(thinking)
    if calls:
        message["tool_calls"] = calls
    return message


def _call(block: ToolUseBlock) -> dict[str, Any]:
    function = {"name": block.name, "arguments": msgspec.json.encode(block.input).decode()}
    return {"id": block.id, "type": "function", "function": function}


def _other_messages(role: str, blocks: list[ContentBlock], called: set[str]) -> list[ChatMessage]:
    """The results of tools, each a message, then the text. Anthropic wants them in that order."""
    results = [block for block in blocks if isinstance(block, ToolResultBlock)]
    texts = [block for block in blocks if isinstance(block, TextBlock)]
    if len(results) + len(texts) < len(blocks) or (results and role != "user"):
        raise InvalidParameterError("messages", f"messages of the {role} have blocks that only others may have")
    if any(isinstance(block, TextBlock) for block in blocks[: len(results)]):
        raise InvalidParameterError("messages", "tool_result blocks must come before the text of their message")
    messages = [_result_message(block, called) for block in results]
    return [*messages, {"role": role, "content": _joined(texts)}] if texts else messages


def _result_message(block: ToolResultBlock, called: set[str]) -> ChatMessage:
    if block.tool_use_id not in called:
        raise InvalidParameterError(
            "messages", f"unexpected tool_use_id {block.tool_use_id!r}: the message before has no tool_use of that id"
        )
    content = _text(block.content)
    if block.is_error:
        content = f"Error: {content}"  # templates know no other way to say that a tool failed
    return {"role": "tool", "tool_call_id": block.tool_use_id, "content": content}


def _text_of(blocks: list[ContentBlock]) -> str:
    return _joined([block for block in blocks if isinstance(block, TextBlock)])


def _text(content: str | list[TextBlock] | None) -> str:
    return content if isinstance(content, str) else _joined(content or [])


def _joined(blocks: list[TextBlock]) -> str:
    return "\n".join(block.text for block in blocks)
