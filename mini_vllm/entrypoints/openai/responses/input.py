"""What a model is given through the Responses API: items, as a request spells them and as they are kept.

`InputItem` is the union of the items that can be shown to a chat template; every other kind that OpenAI knows is
refused by name. `kept_item` gives an item the shape in which it is stored, listed and continued: plain JSON, with an
id, its text in parts.
"""

import secrets
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, StringConstraints, Tag

from mini_vllm.entrypoints.openai.sampling_request import StrictModel
from mini_vllm.entrypoints.server.fields import Refused
from mini_vllm.exceptions import InvalidParameterError

_UNSUPPORTED_PARTS = {
    "input_image": "images",
    "input_file": "files",
    "input_audio": "audio",
    "input_video": "video",
    "computer_screenshot": "images",
}
ItemId = Annotated[str, StringConstraints(min_length=1, max_length=200)]
_ID = "By which it is listed and referred to. Default: a random one."


def _refuse_part(part: Any) -> Any:
    """Say what is not supported, rather than that no alternative of a union matched."""
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind in _UNSUPPORTED_PARTS:
        raise InvalidParameterError("type", f"{kind}: this model reads no {_UNSUPPORTED_PARTS[kind]}")
    return part


class TextPart(StrictModel):
    """A piece of text, be it the user's or the model's."""

    ACCEPTED: ClassVar[Mapping[str, str]] = {
        "annotations": "Come back with an answer that is sent again; the model is not shown them.",
        "logprobs": "Come back with an answer that is sent again; the model is not shown them.",
        "prompt_cache_breakpoint": "Prefixes are cached wherever they end.",
    }

    type: Literal["input_text", "output_text"] = Field(description="input_text or output_text.")
    text: str = Field(description="The text.")


class RefusalPart(StrictModel):
    """The model's own words when it refused; shown to it as what it said."""

    type: Literal["refusal"] = Field(description="refusal")
    refusal: str = Field(description="The text.")


_Part = Annotated[
    Annotated[TextPart, Tag("text")] | Annotated[RefusalPart, Tag("refusal")],
    Discriminator(lambda part: "refusal" if _type_of(part) == "refusal" else "text"),
    BeforeValidator(_refuse_part),
]
Content = str | list[_Part]


class MessageItem(StrictModel):
    """A message of anyone; `developer` is the system's newer name."""

    ACCEPTED: ClassVar[Mapping[str, str]] = {
        "phase": "Is not shown to the model.",
        "status": "What is sent is taken as complete.",
    }

    type: Literal["message"] = Field("message", description="message")
    role: Literal["user", "assistant", "system", "developer"] = Field(description="Who says it.")
    content: Content = Field(description="Text, or parts of text.")
    id: ItemId | None = Field(None, description=_ID)


_TOOL_ITEM_ACCEPTED = {
    "status": "What is sent is taken as complete.",
    "caller": "Who called is not shown to the model.",
    "created_by": "Who made the item is not shown to the model.",
}
_NAMESPACE = {"namespace": Refused("Namespaces of tools are not supported")}


class FunctionCallItem(StrictModel):
    """A call that the model made earlier."""

    ACCEPTED: ClassVar[Mapping[str, str]] = _TOOL_ITEM_ACCEPTED
    REFUSED: ClassVar[Mapping[str, Refused]] = {
        **_NAMESPACE,
        "async": Refused("Calls that run on while the model does are not supported"),
    }

    type: Literal["function_call"] = Field(description="function_call")
    call_id: ItemId = Field(description="What its output refers to.")
    name: str = Field(description="The function.")
    arguments: str = Field(description="A JSON object, as text.")
    id: ItemId | None = Field(None, description=_ID)


class FunctionCallOutputItem(StrictModel):
    """What such a call gave."""

    ACCEPTED: ClassVar[Mapping[str, str]] = {
        **_TOOL_ITEM_ACCEPTED,
        "name": "The name is that of the call with the same call_id.",
    }
    REFUSED: ClassVar[Mapping[str, Refused]] = _NAMESPACE

    type: Literal["function_call_output"] = Field(description="function_call_output")
    call_id: ItemId = Field(description="Which call it answers.")
    output: Content = Field(description="Text, or parts of text.")
    id: ItemId | None = Field(None, description=_ID)


class ItemReference(StrictModel):
    """An item of a stored response, by its id."""

    type: Literal["item_reference"] | None = Field(None, description="item_reference")
    id: ItemId = Field(description="The item's.")


def _type_of(item: Any) -> Any:
    return item.get("type") if isinstance(item, dict) else getattr(item, "type", None)


_SHOWN = ("message", "function_call", "function_call_output", "item_reference")


def _item_kind(item: Any) -> str:
    """Items without a type are messages, or references if they are nothing but an id."""
    kind = _type_of(item)
    if kind is None and isinstance(item, dict) and "role" not in item and "id" in item:
        return "item_reference"
    return kind if kind in _SHOWN else "message"


def _refuse_item(item: Any) -> Any:
    kind = _type_of(item)
    if kind is not None and kind not in _SHOWN:
        shown = ", ".join(_SHOWN)
        raise InvalidParameterError("type", f"items of type {str(kind)[:64]!r} are not supported; there are {shown}")
    return item


InputItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionCallOutputItem, Tag("function_call_output")]
    | Annotated[ItemReference, Tag("item_reference")],
    Discriminator(_item_kind),
    BeforeValidator(_refuse_item),
]
KeptItem = dict[str, Any]


def kept_item(item: MessageItem | FunctionCallItem | FunctionCallOutputItem) -> KeptItem:
    """An item in the shape in which it is kept and listed."""
    if isinstance(item, FunctionCallItem):
        call = {"call_id": item.call_id, "name": item.name, "arguments": item.arguments}
        return {"id": item.id or _new_id("fc"), "type": "function_call", "status": "completed", **call}
    if isinstance(item, FunctionCallOutputItem):
        output = item.output if isinstance(item.output, str) else _parts(item.output, "input_text")
        kept = {"id": item.id or _new_id("fc"), "type": "function_call_output", "status": "completed"}
        return {**kept, "call_id": item.call_id, "output": output}
    kind = "output_text" if item.role == "assistant" else "input_text"
    content = [_text_part(kind, item.content)] if isinstance(item.content, str) else _parts(item.content, kind)
    kept = {"id": item.id or _new_id("msg"), "type": "message", "status": "completed"}
    return {**kept, "role": item.role, "content": content}


def user_message(text: str) -> KeptItem:
    """What an input that is one string stands for."""
    return kept_item(MessageItem(type="message", role="user", content=text, id=None))


def _new_id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(16)}"


def _parts(content: list[TextPart | RefusalPart], kind: str) -> list[dict[str, Any]]:
    """Parts as kept; a text is the model's or the user's by who says it, whatever it was called."""
    return [
        {"type": "refusal", "refusal": part.refusal} if isinstance(part, RefusalPart) else _text_part(kind, part.text)
        for part in content
    ]


def _text_part(kind: str, text: str) -> dict[str, Any]:
    if kind == "output_text":
        return {"type": kind, "annotations": [], "logprobs": [], "text": text}
    return {"type": kind, "text": text}


# -- as a conversation -------------------------------------------------------------------------------------------


def chat_messages(items: list[KeptItem], instructions: str | None) -> list[dict[str, Any]]:
    """Items as the messages of the chat API, with the instructions before them.

    A model's text and the calls after it are one message, as templates write them.
    """
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    names: dict[str, str] = {}
    for item in items:
        if item["type"] == "message":
            messages.append({"role": item["role"], "content": _text(item["content"])})
        elif item["type"] == "function_call":
            names[item["call_id"]] = item["name"]
            _add_call(messages, item)
        else:
            messages.append(_tool_message(item, names))
    return messages


def _add_call(messages: list[dict[str, Any]], item: KeptItem) -> None:
    function = {"name": item["name"], "arguments": item["arguments"]}
    call = {"id": item["call_id"], "type": "function", "function": function}
    if messages and messages[-1]["role"] == "assistant":
        messages[-1].setdefault("tool_calls", []).append(call)
    else:
        messages.append({"role": "assistant", "content": None, "tool_calls": [call]})


def _tool_message(item: KeptItem, names: Mapping[str, str]) -> dict[str, Any]:
    call_id = item["call_id"]
    if call_id not in names:
        raise InvalidParameterError("input", f"No tool call found for function call output with call_id {call_id}.")
    output = item["output"] if isinstance(item["output"], str) else _text(item["output"])
    return {"role": "tool", "tool_call_id": call_id, "name": names[call_id], "content": output}


def _text(parts: list[dict[str, Any]]) -> str:
    return "\n".join(part["refusal"] if part["type"] == "refusal" else part["text"] for part in parts)
