"""What one batch of news from the core adds up to: the numbers behind the metrics and the periodic log line.

`OutputProcessor` fills an `IterationStats`, the loggers read it and keep nothing of it. Durations are seconds on the
core's clock, and a duration of which one end never came (the first token of a request that was aborted while it
waited) is None rather than 0, so that it is not observed. What is said of a request is said of each of its samples,
as in vLLM, where these are requests of their own; only `num_samples` and `max_generation_tokens` are said once.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from mini_vllm.core.scheduler_output import SchedulerStats
from mini_vllm.logger import init_logger

logger = init_logger(__name__)


@dataclass(slots=True, kw_only=True)
class FinishedRequestStats:
    """One sequence that ended, in whatever way."""

    finish_reason: str
    """'stop', 'length', 'abort' or 'error'."""
    e2e_latency: float
    """From the request's arrival to the step (or the abort) that ended the sequence."""
    queue_time: float | None = None
    """From the core's queue to the first admission."""
    prefill_time: float | None = None
    """From the first admission to the first token."""
    decode_time: float | None = None
    """From the first token to the last."""
    inference_time: float | None = None
    """From the first admission to the last token."""
    mean_time_per_output_token: float | None = None
    """Of the tokens after the first."""
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_computed_prefill_tokens: int | None = None
    """Of the prompt, not from the prefix cache; 0 for the samples that part from the first one with its KV."""
    num_generation_tokens: int = 0
    num_preemptions: int = 0
    max_tokens_param: int | None = None


@dataclass(slots=True)
class IterationStats:
    """What one `process()` did. timestamp: when the step ended.

    num_generation_tokens: those a caller gets; tokens sampled behind a stop string are none.
    num_prompt_tokens, num_cached_tokens: of the prompts whose first token came out, once a request.
    """

    timestamp: float
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generation_tokens: int = 0
    times_to_first_token: list[float] = field(default_factory=list)
    inter_token_latencies: list[float] = field(default_factory=list)
    finished: list[FinishedRequestStats] = field(default_factory=list)
    num_samples: list[int] = field(default_factory=list)
    """`n` of each request that ended with all its samples."""
    max_generation_tokens: list[int] = field(default_factory=list)
    """Tokens of the longest sample of each of these."""


class StatLoggerBase(Protocol):
    """Who is told of every batch of news."""

    def record(self, stats: SchedulerStats | None, iteration: IterationStats) -> None:
        """stats: the scheduler's, with counters since the start of the engine (they begin again when it is restarted);
        None when no step lies behind the news, as for an abort on the caller's side."""

    def record_rejection(self, reason: str) -> None:
        """A request was not taken in, for `OverloadedError.reason`."""


def between(start: float | None, end: float | None) -> float | None:
    """Seconds from `start` to `end`, at least 0; None unless both are known."""
    return None if start is None or end is None else max(end - start, 0.0)


def record_all(loggers: Iterable[StatLoggerBase], stats: SchedulerStats | None, iteration: IterationStats) -> None:
    """Tell every logger. What one of them raises is logged: counting must not end what it counts."""
    for stat_logger in loggers:
        try:
            stat_logger.record(stats, iteration)
        except Exception:
            logger.exception("a step is missing in the statistics")
