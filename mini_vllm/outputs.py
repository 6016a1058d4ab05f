"""What a caller gets back, with vLLM's field names."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Logprob(NamedTuple):
    """How likely the model held one token to be, before anything changed its logits."""

    logprob: float
    rank: int | None = None
    """1 is the likeliest; None for a token that was asked for by id."""
    decoded_token: str | None = None


LogprobsAtPosition = dict[int, Logprob]
"""By token id: the token that is there first, then the likeliest ones, then those asked for by id."""


@dataclass
class CompletionOutput:
    """One generated sequence. With `output_kind` DELTA, text, ids and logprobs are those since the last output.

    index: which of the `n` samples. cumulative_logprob: of all tokens so far; None unless logprobs were asked for.
    logprobs: one dict for each of `token_ids`.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[LogprobsAtPosition] | None = None
    finish_reason: str | None = None
    """'stop', 'length', 'abort' or 'error'; None while unfinished."""
    stop_reason: int | str | None = None
    """The stop token id or stop string that ended it; None for end of sequence or length."""
    lora_request: Any = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class RequestMetrics:
    """Times of one request on the engine's clock, in seconds."""

    arrival_time: float = 0.0
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0
    queued_time: float | None = None
    """When the core took it into its queue."""
    scheduled_time: float | None = None
    """When it was first admitted to the batch."""

    @property
    def time_to_first_token(self) -> float | None:
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time


@dataclass
class RequestOutput:
    """The state of one request as of now.

    outputs: its `n` sequences in order of their index; with `output_kind` DELTA those that have something new.
    prompt_logprobs: None for the first token, which nothing predicts, then a dict for each token of the prompt.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[LogprobsAtPosition | None] | None = None
    metrics: RequestMetrics | None = None
    lora_request: Any = None
    num_cached_tokens: int = 0
    """Prompt tokens taken from the prefix cache."""
    kv_transfer_params: dict[str, Any] | None = None
    error: str | None = None
    """Why it ended with finish_reason 'error'."""
    messages: list[dict[str, Any]] | None = field(default=None, repr=False)


@dataclass
class BeamSearchSequence:
    """One hypothesis. tokens: prompt and output; text: of all of them. cum_logprob: the sum over the output.

    logprobs: a dict for each output token: what was looked at when it was chosen.
    score: the sum divided by (number of output tokens ** length_penalty), by which hypotheses are ranked.
    """

    tokens: list[int]
    logprobs: list[LogprobsAtPosition]
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    score: float = 0.0
    lora_request: Any = None


@dataclass
class BeamSearchOutput:
    """The hypotheses of one prompt, best first."""

    sequences: list[BeamSearchSequence]
