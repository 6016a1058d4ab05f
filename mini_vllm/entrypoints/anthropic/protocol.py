"""The bodies of Anthropic's Messages API, as they are read and as they are sent.

Ranges are Anthropic's own, so that a request which works here works there: `temperature` and `top_p` are from 0 to 1,
texts are not empty, `max_tokens` must be given. Blocks other than text, tools in the history and a model's earlier
thinking are refused by name.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag

from mini_vllm.entrypoints.server.fields import ApiModel, Refused
from mini_vllm.exceptions import InvalidParameterError

_CACHE_CONTROL = {"cache_control": "Prefixes are cached wherever they end."}
_NO_TOOLSETS: Mapping[str, Refused] = {"toolset_name": Refused("Toolsets are not supported")}
_BLOCKS = ("text", "tool_use", "tool_result", "thinking")


class StrictModel(ApiModel):
    """Types are taken as they are: "5" is no number and 1 is no bool."""

    model_config = ConfigDict(strict=True)


# -- content blocks ----------------------------------------------------------------------------------------------


class TextBlock(StrictModel):
    """A piece of text."""

    ACCEPTED: ClassVar[Mapping[str, str]] = {
        **_CACHE_CONTROL,
        "citations": "Come back with a text that is sent again; the model is not shown them.",
    }

    type: Literal["text"] = Field(description="text")
    text: str = Field(min_length=1, description="The text.")


class ToolUseBlock(StrictModel):
    """A call that the model made earlier."""

    ACCEPTED: ClassVar[Mapping[str, str]] = {**_CACHE_CONTROL, "caller": "Who called is not shown to the model."}
    REFUSED: ClassVar[Mapping[str, Refused]] = _NO_TOOLSETS

    type: Literal["tool_use"] = Field(description="tool_use")
    id: str = Field(min_length=1, max_length=200, description="What its result refers to.")
    name: str = Field(min_length=1, description="The tool.")
    input: dict[str, Any] = Field(description="What it was called with.")


class ThinkingBlock(StrictModel):
    """What the model thought earlier; templates decide whether it is shown again."""

    ACCEPTED: ClassVar[Mapping[str, str]] = {"signature": "What the client sends is taken as it is."}

    type: Literal["thinking"] = Field(description="thinking")
    thinking: str = Field(description="The text.")


def _refuse_block(block: Any) -> Any:
    """Say what is not supported, rather than that no alternative of a union matched."""
    kind = block.get("type") if isinstance(block, dict) else None
    if isinstance(kind, str) and kind not in _BLOCKS:
        known = ", ".join(_BLOCKS)
        raise InvalidParameterError("type", f"blocks of type {kind[:64]!r} are not supported; there are {known}")
    return block


def _kind(block: Any) -> str | None:
    kind = block.get("type") if isinstance(block, dict) else getattr(block, "type", None)
    return kind if isinstance(kind, str) else None


_Text = Annotated[TextBlock, BeforeValidator(_refuse_block)]


class ToolResultBlock(StrictModel):
    """What such a call gave."""

    ACCEPTED: ClassVar[Mapping[str, str]] = _CACHE_CONTROL
    REFUSED: ClassVar[Mapping[str, Refused]] = _NO_TOOLSETS

    type: Literal["tool_result"] = Field(description="tool_result")
    tool_use_id: str = Field(min_length=1, max_length=200, description="Which call of the message before it answers.")
    content: str | list[_Text] | None = Field(None, description="Text, or blocks of text.")
    is_error: bool | None = Field(None, description='Shows the model "Error: " before the content.')


ContentBlock = Annotated[
    Annotated[TextBlock, Tag("text")]
    | Annotated[ToolUseBlock, Tag("tool_use")]
    | Annotated[ToolResultBlock, Tag("tool_result")]
    | Annotated[ThinkingBlock, Tag("thinking")],
    Discriminator(_kind),
    BeforeValidator(_refuse_block),
]


# -- requests ----------------------------------------------------------------------------------------------------


class InputMessage(StrictModel):
    """One turn, or part of one: neighbours of the same role are one turn."""

    role: Literal["user", "assistant", "system"] = Field(description="user, assistant or system.")
    content: str | list[ContentBlock] = Field(description="Text, or blocks.")


class Metadata(StrictModel):
    """On whose behalf."""

    user_id: str | None = Field(
        None, max_length=256, description="The policy `fair` shares between the users of an API key."
    )


def _asks_for_no_thinking(value: Any) -> bool:
    return isinstance(value, dict) and value.get("type") in (None, "disabled")


def _asks_for_no_tool(value: Any) -> bool:
    return isinstance(value, dict) and value.get("type") in (None, "auto", "none")


def _asks_for_nothing(value: Any) -> bool:
    return isinstance(value, dict) and not any(value.values())


class PromptFields(StrictModel):
    """What makes up the prompt."""

    ACCEPTED: ClassVar[Mapping[str, str]] = {
        **_CACHE_CONTROL,
        "billing_policy": "Nothing is billed.",
        "user_profile_id": "Whom a request is attributed to changes nothing here.",
        "workspace_id": "There are no workspaces.",
    }
    REFUSED: ClassVar[Mapping[str, Refused]] = {
        "tools": Refused("Tools are not called in this release; tool_use and tool_result blocks are understood"),
        "tool_choice": Refused("Tools are not called in this release", _asks_for_no_tool),
        "thinking": Refused("Thinking is not told apart from the answer in this release", _asks_for_no_thinking),
        "output_config": Refused("Structured outputs and effort are not available in this release", _asks_for_nothing),
        "speed": Refused("There is one speed", lambda value: value == "standard"),
        "compaction": Refused("A conversation is taken as it is"),
        "context_management": Refused("A conversation is taken as it is"),
        "mcp_servers": Refused("MCP servers are not called"),
    }

    model: str = Field(description="One of the names in /v1/models.")
    messages: list[InputMessage] = Field(
        min_length=1, description="The conversation; a last message of the assistant is gone on with."
    )
    system: str | list[_Text] | None = Field(None, description="A system message before everything else.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Variables for the chat template.")


class CountTokensRequest(PromptFields):
    """Count the tokens of a conversation."""


class MessagesRequest(PromptFields):
    """Answer a conversation. `cache_salt`, `chat_template_kwargs` and `priority` are vLLM's, the rest Anthropic's."""

    ACCEPTED: ClassVar[Mapping[str, str]] = {
        **PromptFields.ACCEPTED,
        "fallback_credit_token": "Nothing is billed.",
        "service_tier": "There is one tier, 'standard'.",
    }
    REFUSED: ClassVar[Mapping[str, Refused]] = {
        **PromptFields.REFUSED,
        "container": Refused("There are no containers"),
        "diagnostics": Refused("Why a prefix was not cached is not tracked by message"),
        "fallbacks": Refused("There is no other model to fall back to", lambda value: value in ([], "default")),
        "inference_geo": Refused("The server runs where it is"),
        "kv_transfer_params": Refused("There is no transfer between engines in this release"),
        "thread": Refused("Threads are not kept; send the whole conversation"),
    }

    max_tokens: int = Field(ge=1, description="Tokens to generate at most; fewer where the context is full before.")
    metadata: Metadata | None = Field(None, description="On whose behalf.")
    stop_sequences: list[str] | None = Field(None, description="Texts that end the output.")
    stream: bool | None = Field(None, description="Send the answer as events while it is generated.")
    temperature: float | None = Field(
        None, ge=0, le=1, description="0 is greedy; up to 1, as at Anthropic. Default: the model's own, else 1."
    )
    top_k: int | None = Field(None, ge=-1, description="Keep this many of the likeliest tokens; 0 and -1 keep all.")
    top_p: float | None = Field(None, gt=0, le=1, description="Keep the likeliest tokens up to this probability.")
    cache_salt: str | None = Field(
        None, min_length=1, max_length=1024, description="Share cached prefixes only with requests of the same salt."
    )
    priority: int | None = Field(
        None, ge=-(2**63), lt=2**63, description="Lower goes first; needs the scheduling policy `priority`."
    )


# -- responses ---------------------------------------------------------------------------------------------------


class TextContent(msgspec.Struct, kw_only=True):
    """What the model wrote."""

    type: str = "text"
    text: str


class Usage(msgspec.Struct, kw_only=True):
    """Tokens read from the prefix cache are not among `input_tokens`. Writing to it is part of reading the prompt."""

    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int
    output_tokens: int
    service_tier: str = "standard"


class DeltaUsage(msgspec.Struct, kw_only=True):
    """`Usage` at the end of a stream, all of it cumulative."""

    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int
    output_tokens: int


class Message(msgspec.Struct, kw_only=True):
    """A message of the model. `content` is empty when it wrote nothing."""

    id: str
    type: str = "message"
    role: str = "assistant"
    model: str
    content: list[TextContent]
    stop_reason: str | None
    stop_sequence: str | None
    usage: Usage


class TokenCount(msgspec.Struct):
    """The answer of count_tokens."""

    input_tokens: int
