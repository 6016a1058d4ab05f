"""The body of POST /v1/completions."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from mini_vllm.entrypoints.openai.field_tables import ACCEPTED_BY_ALL, REFUSED_BY_ALL
from mini_vllm.entrypoints.openai.sampling_request import SamplingRequest
from mini_vllm.entrypoints.server.fields import Refused
from mini_vllm.exceptions import InvalidParameterError

OnePrompt = str | list[int]


def _checked_prompt(value: Any) -> Any:
    """Text, token ids, or a list of either kind. By hand: a union of lists would be tried kind by kind, and its error
    would name all of them."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        if not value:
            raise InvalidParameterError("prompt", "must hold at least one prompt, got an empty list")
        kinds = set(map(type, value))
        if kinds <= {int} or kinds <= {str}:
            return value
        if kinds <= {list} and all(set(map(type, ids)) <= {int} for ids in value):
            return value
    raise InvalidParameterError("prompt", "must be text, a list of texts, token ids, or a list of lists of token ids")


Prompt = Annotated[
    Any,
    BeforeValidator(_checked_prompt),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1},
                {"type": "array", "items": {"type": "integer"}, "minItems": 1},
                {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}, "minItems": 1},
            ]
        }
    ),
]


class CompletionRequest(SamplingRequest):
    """Complete one prompt or several."""

    ACCEPTED: ClassVar[Mapping[str, str]] = ACCEPTED_BY_ALL
    REFUSED: ClassVar[Mapping[str, Refused]] = {
        **REFUSED_BY_ALL,
        "suffix": Refused("The model does not fill in the middle"),
        "prompt_embeds": Refused("Prompts are text or token ids"),
    }

    prompt: Prompt = Field(description="A text, its token ids, or a list of either.")
    max_tokens: int | None = Field(
        None, ge=0, description="Tokens to generate at most. Default 16; 0 with `echo` only scores the prompt."
    )
    echo: bool | None = Field(None, description="Begin the answer, and its logprobs, with the prompt.")
    logprobs: int | None = Field(
        None, description="Report the logprobs of the tokens and of this many of the likeliest at each position."
    )
    best_of: int | None = Field(None, description="Must equal `n`: all that is generated is returned.")
    add_special_tokens: bool | None = Field(
        None, description="Frame text as the tokenizer does, with a beginning-of-sequence token say. Default true."
    )

    @model_validator(mode="after")
    def _check_best_of(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of != (1 if self.n is None else self.n):
            raise InvalidParameterError("best_of", f"must equal n={self.n or 1}: nothing is left out of the answer")
        return self

    @property
    def prompts(self) -> list[OnePrompt]:
        """Each prompt on its own."""
        prompt = self.prompt
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            return [prompt]
        return list(prompt)

    @property
    def only_scores(self) -> bool:
        """Whether no output is wanted, only what is known of the prompt."""
        return self.max_tokens == 0
