"""From time stamps to the figures that are reported, with vLLM's names.

A `RequestTimeline` holds when one request was added and when each of its outputs arrived. Everything here is
arithmetic on such timelines: no engine, no clock. Times are in seconds inside, in milliseconds where a name ends in
`_ms`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

PERCENTILES = (50, 90, 99)
LATENCY_METRICS = ("ttft", "tpot", "itl", "e2el")


@dataclass
class RequestTimeline:
    """When things happened to one request, in seconds on one clock.

    output_times: when each output arrived (the end of the step that made it). output_counts: tokens in each; 1 unless
    a step yields several.
    """

    request_id: str
    num_prompt_tokens: int
    arrival: float
    output_times: list[float] = field(default_factory=list)
    output_counts: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None

    @property
    def num_output_tokens(self) -> int:
        return sum(self.output_counts)

    @property
    def completed(self) -> bool:
        """Ended as it should, with at least one token."""
        return self.finish_reason in ("stop", "length") and bool(self.output_times)

    @property
    def ttft(self) -> float:
        """Time to first token: from arrival to the end of the step that sampled it."""
        return self.output_times[0] - self.arrival

    @property
    def e2el(self) -> float:
        """End-to-end latency: from arrival to the last token."""
        return self.output_times[-1] - self.arrival

    @property
    def itl(self) -> list[float]:
        """Inter-token latencies: the gaps between successive outputs."""
        return [later - earlier for earlier, later in zip(self.output_times, self.output_times[1:], strict=False)]

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first, (E2EL - TTFT) / (tokens - 1); None for a single token."""
        tokens = self.num_output_tokens
        return (self.e2el - self.ttft) / (tokens - 1) if tokens > 1 else None


def percentiles(values: Sequence[float], ranks: Iterable[float] = PERCENTILES) -> dict[str, float]:
    """{'50': ..., '99': ...} by linear interpolation between the nearest ranks (numpy's default, as vLLM's)."""
    return {f"{rank:g}": float(np.percentile(values, rank)) for rank in ranks}


def distribution_ms(name: str, seconds: Sequence[float]) -> dict[str, float | None]:
    """mean, median, std (of the population) and percentiles of `seconds`, in ms, as `mean_<name>_ms` and so on.

    Without values every entry is None: no request had two tokens, say, and then there is no TPOT.
    """
    labels = ["mean", "median", "std", *(f"p{rank}" for rank in PERCENTILES)]
    if not seconds:
        return {f"{label}_{name}_ms": None for label in labels}
    ms = np.asarray(seconds, dtype=np.float64) * 1e3
    values = [float(ms.mean()), float(np.median(ms)), float(ms.std()), *percentiles(list(ms)).values()]
    return {f"{label}_{name}_ms": value for label, value in zip(labels, values, strict=True)}


def request_metrics(timelines: Sequence[RequestTimeline], duration: float) -> dict[str, Any]:
    """Counts, rates and latency distributions of one run of `duration` seconds.

    Latencies are over the requests that completed; tokens of failed ones are not counted either.
    """
    done = [timeline for timeline in timelines if timeline.completed]
    total_input = sum(timeline.num_prompt_tokens for timeline in done)
    total_output = sum(timeline.num_output_tokens for timeline in done)
    metrics: dict[str, Any] = {
        "duration": duration,
        "completed": len(done),
        "failed": len(timelines) - len(done),
        "total_input_tokens": total_input,
        "total_output_tokens": total_output,
        "request_throughput": _rate(len(done), duration),
        "output_throughput": _rate(total_output, duration),
        "total_token_throughput": _rate(total_input + total_output, duration),
    }
    samples = {
        "ttft": [timeline.ttft for timeline in done],
        "tpot": [tpot for timeline in done if (tpot := timeline.tpot) is not None],
        "itl": [gap for timeline in done for gap in timeline.itl],
        "e2el": [timeline.e2el for timeline in done],
    }
    for name in LATENCY_METRICS:
        metrics |= distribution_ms(name, samples[name])
    return metrics


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0


def median_and_spread(repetitions: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Over repetitions, for every numeric field: the median, and [min, max].

    A field that some repetition lacks a number for (None) keeps the median of the others; None if none has one.
    """
    medians: dict[str, Any] = {}
    spread: dict[str, list[float]] = {}
    for name, first in repetitions[0].items():
        if isinstance(first, bool) or not (first is None or isinstance(first, (int, float))):
            continue
        values = [value for run in repetitions if (value := run.get(name)) is not None]
        medians[name] = _plain(float(np.median(values)), values) if values else None
        if values:
            spread[name] = [min(values), max(values)]
    return medians, spread


def _plain(median: float, values: Sequence[float]) -> float | int:
    """Counts stay integers where the median is one."""
    return int(median) if median.is_integer() and all(isinstance(value, int) for value in values) else median
