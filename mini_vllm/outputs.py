"""What a caller gets back, with vLLM's field names."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class CompletionOutput:
    """One generated sequence. With `output_kind` DELTA, text and ids are those since the last output."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: Any = None
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

    @property
    def time_to_first_token(self) -> float | None:
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time


@dataclass
class RequestOutput:
    """The state of one request as of now."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: Any = None
    metrics: RequestMetrics | None = None
    lora_request: Any = None
    num_cached_tokens: int = 0
    """Prompt tokens taken from the prefix cache."""
    kv_transfer_params: dict[str, Any] | None = None
    error: str | None = None
    """Why it ended with finish_reason 'error'."""
    messages: list[dict[str, Any]] | None = field(default=None, repr=False)
