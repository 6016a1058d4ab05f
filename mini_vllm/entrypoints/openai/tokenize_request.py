"""The bodies of POST /tokenize and /detokenize."""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, model_validator

from mini_vllm.entrypoints.openai.chat_request import ChatMessage, ChatTemplateFields
from mini_vllm.entrypoints.openai.sampling_request import StrictModel
from mini_vllm.entrypoints.server.fields import Refused
from mini_vllm.exceptions import InvalidParameterError

_TEXT_ONLY = "This model takes text only"


class TokenizeRequest(ChatTemplateFields):
    """Token ids of a text, or of a conversation as the chat template writes it."""

    REFUSED: ClassVar[Mapping[str, Refused]] = {
        "media_io_kwargs": Refused(_TEXT_ONLY),
        "mm_processor_kwargs": Refused(_TEXT_ONLY),
    }

    messages: list[ChatMessage] | None = Field(None, description="A conversation; instead of `prompt`.")  # type: ignore[assignment]
    prompt: str | None = Field(None, description="A text; instead of `messages`.")
    model: str | None = Field(None, description="One of the names in /v1/models. Default: the first.")
    add_special_tokens: bool | None = Field(
        None, description="Frame the text as the tokenizer does. Default: true for `prompt`, false for `messages`."
    )
    return_token_strs: bool | None = Field(None, description="Add the vocabulary's spelling of each token.")
    tools: list[dict[str, Any]] | None = Field(None, description="For the template.")
    documents: list[dict[str, Any]] | None = Field(None, description="For the template.")

    @model_validator(mode="after")
    def _check_source(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise InvalidParameterError("prompt", "exactly one of `prompt` and `messages` must be given")
        if self.prompt is None:
            self.require_conversation()
        else:
            self._require_no_template_fields()
        return self

    def _require_no_template_fields(self) -> None:
        for name in _OF_CHATS:
            if getattr(self, name) is not None:
                raise InvalidParameterError(name, "acts only with `messages`")


_OF_CHATS = (
    "add_generation_prompt", "continue_final_message", "chat_template", "chat_template_kwargs", "tools", "documents",
)  # fmt: skip


class DetokenizeRequest(StrictModel):
    """The text of token ids."""

    model: str | None = Field(None, description="One of the names in /v1/models. Default: the first.")
    tokens: list[int] = Field(description="Token ids.")
