"""The body of POST /v1/chat/completions: messages, and how to turn them into a prompt."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from mini_vllm.entrypoints.openai.field_tables import ACCEPTED_BY_ALL, REFUSED_BY_ALL, only
from mini_vllm.entrypoints.openai.sampling_request import SamplingRequest, StrictModel
from mini_vllm.entrypoints.server.fields import Refused
from mini_vllm.exceptions import InvalidParameterError

_TEXT_KINDS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_NO_TOOL_CALLS = "Tool calling is not available in this release; messages of earlier calls are rendered"


class ContentPart(StrictModel):
    """One part of a message."""

    ACCEPTED: ClassVar[Mapping[str, str]] = {
        "annotations": "Come back with an answer that is sent as history; the template has no use for them.",
        "logprobs": "Come back with an answer that is sent as history; the template has no use for them.",
        "cache_control": "Prefixes are cached wherever they end.",
        "prompt_cache_breakpoint": "Prefixes are cached wherever they end.",
    }

    type: str = Field(description="text (also input_text, output_text) or refusal.")
    text: str | None = Field(None, description="Of a text part.")
    refusal: str | None = Field(None, description="Of a refusal part.")

    @model_validator(mode="before")
    @classmethod
    def _check_kind(cls, data: Any) -> Any:
        """Before the fields: a part of another kind has others, and its kind is what is wrong with it."""
        if isinstance(data, dict) and isinstance(kind := data.get("type"), str):
            if kind not in _TEXT_KINDS:
                raise InvalidParameterError(
                    "type", f"content of type {kind[:64]!r} is not supported: this model takes text only"
                )
            if not isinstance(data.get(_TEXT_KINDS[kind]), str):
                raise InvalidParameterError(_TEXT_KINDS[kind], f"a part of type {kind!r} needs it, as a string")
        return data

    @property
    def shown(self) -> str:
        return (self.refusal if self.type == "refusal" else self.text) or ""


Content = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[ContentPart], Tag("parts")],
    Discriminator(lambda value: "parts" if isinstance(value, list) else "text"),  # so that errors are about one of them
]


class FunctionCall(StrictModel):
    """A call that the assistant made earlier."""

    name: str = Field(description="The function.")
    arguments: str | dict[str, Any] | None = Field(None, description="A JSON object, as text.")


class ToolCall(StrictModel):
    """The same with its id."""

    ACCEPTED: ClassVar[Mapping[str, str]] = {"index": "Where it stood in the stream it came with."}
    REFUSED: ClassVar[Mapping[str, Refused]] = {"custom": Refused("Calls with free text are not supported")}

    id: str | None = Field(None, description="What its tool message refers to.")
    type: Literal["function"] = Field("function", description="The one kind there is.")
    function: FunctionCall = Field(description="What was called.")


class ChatMessage(StrictModel):
    """One message. Roles are what the template knows; `developer` is `system` to one that does not know it."""

    ACCEPTED: ClassVar[Mapping[str, str]] = {
        "annotations": "Come back with an answer that is sent as history; the template has no use for them.",
        "provider_specific_fields": "What proxies add.",
    }
    REFUSED: ClassVar[Mapping[str, Refused]] = {"audio": Refused("This model takes text only")}

    role: str = Field(min_length=1, max_length=64, description="system, developer, user, assistant, tool, ...")
    content: Content | None = Field(None, description="Text, or parts of text.")
    name: str | None = Field(None, description="Of the speaker; for the template.")
    tool_calls: list[ToolCall] | None = Field(None, description="Calls that the assistant made; for the template.")
    tool_call_id: str | None = Field(None, description="Which call a tool message answers; for the template.")
    function_call: FunctionCall | None = Field(None, description="The older form of one tool call.")
    refusal: str | None = Field(None, description="Stands for the content where there is none.")
    reasoning: str | None = Field(None, description="Of an assistant message; for the template.")
    reasoning_content: str | None = Field(None, description="The older name of `reasoning`.")


class ChatTemplateFields(StrictModel):
    """How messages become a prompt: shared by chats and /tokenize."""

    messages: list[ChatMessage] = Field(description="The conversation so far.")
    add_generation_prompt: bool | None = Field(
        None, description="End the prompt with what opens the answer. Default true, unless `continue_final_message`."
    )
    continue_final_message: bool | None = Field(None, description="Go on with the last message.")
    add_special_tokens: bool | None = Field(
        None, description="Let the tokenizer frame what the template wrote. Default false: templates do that."
    )
    chat_template: str | None = Field(
        None, description="Another template, if the server was started with --trust-request-chat-template."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Further variables of the template.")

    def require_conversation(self) -> None:
        """Raises `InvalidParameterError` unless there is something to render in one way."""
        if not self.messages:
            raise InvalidParameterError(
                "messages", "Cannot apply chat template to an empty conversation. Provide at least one message."
            )
        if self.continue_final_message and self.add_generation_prompt:
            raise InvalidParameterError(
                "continue_final_message", "cannot be true together with `add_generation_prompt`: the one leaves the "
                "last message open, the other begins a new one",
            )  # fmt: skip

    @property
    def opens_answer(self) -> bool:
        """Whether the prompt ends with what opens an assistant turn."""
        return not self.continue_final_message if self.add_generation_prompt is None else self.add_generation_prompt


class ChatCompletionRequest(ChatTemplateFields, SamplingRequest):
    """Answer a conversation."""

    ACCEPTED: ClassVar[Mapping[str, str]] = {
        **ACCEPTED_BY_ALL,
        "parallel_tool_calls": "There are no tool calls.",
        "include_reasoning": "Reasoning is part of the answer's text.",
        "prediction": "Only ever makes answers faster.",
    }
    REFUSED: ClassVar[Mapping[str, Refused]] = {
        **REFUSED_BY_ALL,
        "tools": Refused(_NO_TOOL_CALLS),
        "tool_choice": Refused(_NO_TOOL_CALLS, only("none")),
        "functions": Refused(_NO_TOOL_CALLS),
        "function_call": Refused(_NO_TOOL_CALLS, only("none")),
        "modalities": Refused("This model gives text only", only(["text"], [])),
        "audio": Refused("This model gives text only"),
        "verbosity": Refused("How long answers are is left to the model and `max_completion_tokens`", only("medium")),
        "web_search_options": Refused("There is no web search"),
        "moderation": Refused("There is no moderation"),
    }

    max_tokens: int | None = Field(
        None, description="The older name of `max_completion_tokens`, which wins where both are given."
    )
    max_completion_tokens: int | None = Field(
        None, description="Tokens to generate at most. Default: the model's own limit, else what the context has left."
    )
    logprobs: bool | None = Field(None, description="Report the logprobs of the tokens.")
    top_logprobs: int | None = Field(None, description="And of this many of the likeliest; only with `logprobs`.")
    echo: bool | None = Field(
        None, description="Begin the answer with the last message, if that has the role of the answer."
    )
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = Field(
        None, description="A variable of the template, which few templates read."
    )
    documents: list[dict[str, Any]] | None = Field(None, description="For the template.")
    return_prompt_text: bool | None = Field(None, description="Add `prompt_text`, what the template wrote.")

    @model_validator(mode="after")
    def _check_chat(self) -> "ChatCompletionRequest":
        self.require_conversation()
        if self.top_logprobs and not self.logprobs:
            raise InvalidParameterError("top_logprobs", "when using `top_logprobs`, `logprobs` must be set to true.")
        if self.logprob_token_ids and not self.logprobs:
            raise InvalidParameterError("logprob_token_ids", "acts only when `logprobs` is true")
        return self
