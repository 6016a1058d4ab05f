"""The bodies of POST /v1/responses and of its count of input tokens.

Names and meanings are OpenAI's; how to sample beyond them is vLLM's. `None` is the same as leaving a field out.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, StringConstraints, model_validator

from mini_vllm.entrypoints.openai.field_tables import ACCEPTED_BY_ALL, REFUSED_BY_ALL
from mini_vllm.entrypoints.openai.responses.input import InputItem
from mini_vllm.entrypoints.openai.sampling_request import SamplingFields, StrictModel
from mini_vllm.entrypoints.server.fields import ApiModel, Refused
from mini_vllm.exceptions import InvalidParameterError

LOGPROBS = "message.output_text.logprobs"
Includable = Literal[
    "message.output_text.logprobs",
    # of tools, images and reasoning, none of which an answer has here: there is nothing to leave out
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
]
_MAX_TAGS = 16


def _is_plain_text(value: Any) -> bool:
    """Whether `text` asks for nothing: plain text of the usual length."""
    if not isinstance(value, dict) or not value.keys() <= {"format", "verbosity"}:
        return False
    return value.get("format") in (None, {"type": "text"}) and value.get("verbosity") in (None, "medium")


def _is_no_reasoning(value: Any) -> bool:
    """Whether `reasoning` asks for none."""
    return isinstance(value, dict) and all(item in (None, "none") for item in value.values())


def _is_free_choice(value: Any) -> bool:
    return value in ("auto", "none")


_CANNOT = "Is not available in this release"
_NOT_HERE = ("personality", "tool_choice")
"""Of what the count of tokens refuses: no field of a response, and one that is in the answer."""


class ResponsesInput(StrictModel):
    """What makes up the prompt of a response; all of the body of POST /v1/responses/input_tokens."""

    ACCEPTED: ClassVar[Mapping[str, str]] = {"parallel_tool_calls": "No tools are called."}
    REFUSED: ClassVar[Mapping[str, Refused]] = {
        "conversation": Refused("Conversations are not kept; previous_response_id continues a stored response"),
        "personality": Refused("The model has no styles to choose from"),
        "reasoning": Refused("Reasoning is not told apart from the answer in this release", _is_no_reasoning),
        "text": Refused("Constrained decoding is not available in this release; plain text is", _is_plain_text),
        "tool_choice": Refused("Tools are not called in this release", _is_free_choice),
        "tools": Refused("Tools are not called in this release; their calls and outputs in `input` are understood"),
    }

    model: str | None = Field(None, description="One of the names in /v1/models. Default: the first.")
    input: str | list[InputItem] | None = Field(
        None, description="What the model is given: text, or a list of items. Required but after an earlier response."
    )
    instructions: str | None = Field(
        None, description="A system message before everything else; earlier responses do not pass theirs on."
    )
    previous_response_id: str | None = Field(None, description="Go on after this stored response.")
    truncation: Literal["auto", "disabled"] | None = Field(
        None, description="auto: leave out the oldest items of an input that is too long. Default disabled: refuse it."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Variables for the chat template.")

    @model_validator(mode="after")
    def _check_input(self) -> "ResponsesInput":
        if self.input is None and self.previous_response_id is None:
            raise InvalidParameterError("input", "is required unless `previous_response_id` is given")
        return self


class ResponsesStreamOptions(StrictModel):
    """How to stream."""

    REFUSED: ClassVar[Mapping[str, Refused]] = {"include_obfuscation": Refused("Events are never padded")}


_Tag = Annotated[str, StringConstraints(max_length=64)]
_TagValue = Annotated[str, StringConstraints(max_length=512)]


def _is_includable(value: Any) -> bool:
    return ({value} if isinstance(value, str) else set(value)) <= set(get_args(Includable))


class ResponseQuery(ApiModel):
    """What GET /v1/responses/{id} may be asked with."""

    REFUSED: ClassVar[Mapping[str, Refused]] = {
        "include": Refused("Names something that no response has", _is_includable),
        "include[]": Refused("Names something that no response has", _is_includable),
        "include_obfuscation": Refused("Events are never padded", lambda value: value in ("false", "False", "0")),
    }

    stream: bool = Field(False, description="Follow its events, which takes one made with `background` and `stream`.")
    starting_after: int | None = Field(None, ge=0, description="Of the events, leave out those up to this number.")


class ResponsesRequest(ResponsesInput, SamplingFields):
    """Generate a response."""

    ACCEPTED: ClassVar[Mapping[str, str]] = {
        **{name: ACCEPTED_BY_ALL[name] for name in ("prompt_cache_options", "prompt_cache_retention", "service_tier")},
        "session_id": ACCEPTED_BY_ALL["session_id"],
    }
    REFUSED: ClassVar[Mapping[str, Refused]] = {
        **{name: refused for name, refused in REFUSED_BY_ALL.items() if name != "response_format"},
        **{name: refused for name, refused in ResponsesInput.REFUSED.items() if name not in _NOT_HERE},
        "access_programs": Refused(_CANNOT),
        "context_management": Refused("The context is not compacted; see truncation"),
        "image": Refused("This model takes and gives text only"),
        "moderation": Refused(_CANNOT),
        "prompt": Refused("There are no stored prompt templates"),
        "enable_response_messages": Refused(_CANNOT),
        "previous_input_messages": Refused("previous_response_id, or the items themselves, continue a conversation"),
    }

    background: bool | None = Field(None, description="Answer at once, and generate for who asks later; with `store`.")
    include: list[Includable] | None = Field(None, description=f"{LOGPROBS} gives the output its logprobs.")
    max_output_tokens: int | None = Field(None, ge=1, description="Tokens to generate at most.")
    max_tool_calls: int | None = Field(None, ge=1, description="Comes back in the response; no tools are called.")
    metadata: dict[_Tag, _TagValue] | None = Field(
        None, max_length=_MAX_TAGS, description="Comes back in the response: up to 16 pairs of 64 and 512 characters."
    )
    parallel_tool_calls: bool | None = Field(None, description="Comes back in the response; no tools are called.")
    prompt_cache_key: str | None = Field(None, max_length=1024, description="Comes back in the response.")
    safety_identifier: str | None = Field(None, max_length=128, description="Comes back in the response.")
    store: bool | None = Field(None, description="Keep the response for later requests. Default: if the server may.")
    stream: bool | None = Field(None, description="Send the response as events while it is generated.")
    stream_options: ResponsesStreamOptions | None = Field(None, description="Only with `stream`.")
    tool_choice: Literal["auto", "none"] | None = Field(None, description="Comes back in the response.")
    top_logprobs: int | None = Field(
        None, ge=0, le=20, description="Report the logprobs of this many of the likeliest tokens at each position."
    )

    @model_validator(mode="after")
    def _check_combinations(self) -> "ResponsesRequest":
        if self.stream_options is not None and not self.stream:
            raise InvalidParameterError("stream_options", "is only allowed when `stream` is enabled")
        if self.background and self.store is False:
            raise InvalidParameterError("background", "needs `store`: nobody could fetch the response")
        return self

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.top_logprobs) or LOGPROBS in (self.include or ())
