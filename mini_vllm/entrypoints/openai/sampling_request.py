"""What requests for completions and for chats have in common: how to sample, when to stop, what to report.

Names and meanings are OpenAI's where it has the field, else vLLM's. `None` is the same as leaving a field out. Ranges
are checked when `sampling.py` makes `SamplingParams` of these.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import msgspec
from pydantic import ConfigDict, Field, field_validator, model_validator

from mini_vllm.entrypoints.openai.field_tables import ACCEPTED_BY_ALL, REFUSED_BY_ALL
from mini_vllm.entrypoints.server.fields import ApiModel, Refused
from mini_vllm.exceptions import InvalidParameterError

TokenIds = list[int]

MAX_XARGS_BYTES = 64 * 1024
"""Of JSON, in `vllm_xargs`: it goes to the engine as it is."""


class StrictModel(ApiModel):
    """Types are taken as they are: "5" is no number and 1 is no bool, as at OpenAI."""

    model_config = ConfigDict(strict=True)


class StreamOptions(StrictModel):
    """How to stream."""

    ACCEPTED: ClassVar[Mapping[str, str]] = {"include_obfuscation": "Events are never padded."}

    include_usage: bool | None = Field(None, description="End the stream with an event that has `usage`.")
    continuous_usage_stats: bool | None = Field(None, description="Give every event the usage so far.")


class SamplingFields(StrictModel):
    """What a request of any API may say about how one output is sampled, when it stops, and who asks."""

    user: str | None = Field(
        None, max_length=512,
        description="End user on whose behalf: the policy `fair` shares between the users of an API key.",
    )  # fmt: skip

    temperature: float | None = Field(None, description="0 is greedy. Default: the model's own, else 1.")
    top_p: float | None = Field(None, description="Keep the likeliest tokens up to this probability; in (0, 1].")
    top_k: int | None = Field(None, description="Keep this many of the likeliest tokens; 0 and -1 keep all.")
    min_p: float | None = Field(None, description="Keep tokens at least this fraction as likely as the likeliest.")
    seed: int | None = Field(None, description="The same seed gives the same tokens, whoever shares the batch.")
    frequency_penalty: float | None = Field(None, description="In [-2, 2]: per occurrence in the output so far.")
    presence_penalty: float | None = Field(None, description="In [-2, 2]: for being in the output so far.")
    repetition_penalty: float | None = Field(None, description="More than 1 discourages tokens of prompt and output.")
    logit_bias: dict[str, float] | None = Field(
        None, description="Token id (as a string) to what is added to its logit, in [-100, 100]."
    )
    allowed_token_ids: TokenIds | None = Field(None, description="Sample these ids only.")
    bad_words: list[str] | None = Field(None, description="Texts that may not be generated.")

    min_tokens: int | None = Field(None, description="Tokens to generate before anything may end the output.")
    stop: str | list[str] | None = Field(None, description="Texts that end the output.")
    stop_token_ids: TokenIds | None = Field(None, description="Token ids that end the output.")
    include_stop_str_in_output: bool | None = Field(None, description="Leave the stop text in the output.")
    ignore_eos: bool | None = Field(None, description="Go on after the end-of-sequence token.")
    skip_special_tokens: bool | None = Field(None, description="Leave special tokens out of the text. Default true.")
    spaces_between_special_tokens: bool | None = Field(None, description="Between those that are shown. Default true.")

    priority: int | None = Field(
        None, ge=-(2**63), lt=2**63, description="Lower goes first; needs the scheduling policy `priority`."
    )
    request_id: str | None = Field(
        None, pattern=r"^[\w.:-]{1,128}$", description="The answer's id, after its prefix. Default: a random one."
    )
    cache_salt: str | None = Field(
        None, min_length=1, max_length=1024, description="Share cached prefixes only with requests of the same salt."
    )
    vllm_xargs: dict[str, str | int | float | list[str | int | float]] | None = Field(
        None, description="For logits processors that the server was started with; up to 64 KiB of JSON."
    )

    @field_validator("vllm_xargs", mode="before")
    @classmethod
    def _check_xargs(cls, value: Any) -> Any:
        """Before each of a million numbers is looked at."""
        if (size := len(msgspec.json.encode(value))) > MAX_XARGS_BYTES:
            raise InvalidParameterError("vllm_xargs", f"may have at most {MAX_XARGS_BYTES} bytes of JSON, got {size}")
        return value


class SamplingRequest(SamplingFields):
    """The common part of `CompletionRequest` and `ChatCompletionRequest`."""

    ACCEPTED: ClassVar[Mapping[str, str]] = ACCEPTED_BY_ALL
    REFUSED: ClassVar[Mapping[str, Refused]] = REFUSED_BY_ALL

    model: str | None = Field(None, description="One of the names in /v1/models. Default: the first.")
    stream: bool | None = Field(None, description="Send the answer as server-sent events while it is generated.")
    stream_options: StreamOptions | None = Field(None, description="Only with `stream`.")

    n: int | None = Field(None, description="Choices for each prompt. Default 1.")
    max_tokens: int | None = Field(None, description="Tokens to generate at most.")

    use_beam_search: bool | None = Field(None, description="Search for the `n` likeliest outputs instead of sampling.")
    length_penalty: float | None = Field(None, description="Of beam search: above 0 favours long outputs. Default 1.")

    truncate_prompt_tokens: int | None = Field(
        None, description="Keep this many tokens of a longer prompt; -1 keeps as many as leave room for `max_tokens`."
    )
    truncation_side: Literal["left", "right"] | None = Field(None, description="Which end is cut off. Default left.")

    prompt_logprobs: int | None = Field(
        None, description="Report this many of the likeliest tokens at each position of the prompt; not with `stream`."
    )
    logprob_token_ids: TokenIds | None = Field(None, description="Report the logprobs of these ids at each position.")
    return_token_ids: bool | None = Field(None, description="Add `prompt_token_ids` and `token_ids` to the answer.")
    return_tokens_as_token_ids: bool | None = Field(None, description="Name tokens `token_id:N` in logprobs.")

    stream_interval: int | None = Field(
        None, ge=1, description="Tokens per streamed event at least, the first and the last excepted."
    )

    @model_validator(mode="after")
    def _check_stream(self) -> "SamplingRequest":
        if not self.stream:
            if self.stream_options is not None:
                raise InvalidParameterError("stream_options", "Stream options can only be defined when `stream=True`.")
            if self.stream_interval is not None:
                raise InvalidParameterError("stream_interval", "acts only with `stream`")
        elif self.prompt_logprobs is not None:
            raise InvalidParameterError("prompt_logprobs", "`prompt_logprobs` are not available when `stream=True`.")
        return self

    @model_validator(mode="after")
    def _check_beams(self) -> "SamplingRequest":
        if not self.use_beam_search:
            if self.length_penalty not in (None, 1.0):
                raise InvalidParameterError("length_penalty", "acts only with `use_beam_search`")
            return self
        for name in _NOT_WITH_BEAMS:
            if getattr(self, name) not in (None, False, [], {}, 0):
                raise InvalidParameterError(name, "cannot be combined with `use_beam_search`")
        return self

    @property
    def wants_usage_event(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def wants_usage_always(self) -> bool:
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)


_NOT_WITH_BEAMS = (
    "temperature", "top_p", "top_k", "min_p", "seed", "frequency_penalty", "presence_penalty", "repetition_penalty",
    "logit_bias", "allowed_token_ids", "bad_words", "min_tokens", "stop", "stop_token_ids", "prompt_logprobs",
    "logprob_token_ids", "stream_interval", "vllm_xargs",
)  # fmt: skip


def stop_list(stop: str | list[str] | None) -> list[str]:
    """`stop` as a list."""
    return [stop] if isinstance(stop, str) else list(stop or ())


def explicit(body: ApiModel, names: tuple[str, ...]) -> dict[str, Any]:
    """Those of the fields that the request has a value for."""
    return {name: value for name in names if (value := getattr(body, name)) is not None}
