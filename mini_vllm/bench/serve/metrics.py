"""From what the clients noted to the figures of the report, with vLLM's names and units.

Arithmetic only: no clock, no network. Latencies are over the requests that succeeded. Times in seconds inside, in
milliseconds where a name ends in `_ms`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mini_vllm.bench.metrics import RequestTimeline, percentiles


@dataclass
class RequestRecord:
    """One request as its client saw it.

    timeline: when it was sent and when its tokens came; its counts are the server's. due: when the schedule wanted it
    sent; later than that it was sent because of --max-concurrency. status: of HTTP, 0 when there was no answer.
    """

    timeline: RequestTimeline
    due: float
    text: str = ""
    status: int = 0
    cached_tokens: int | None = None
    counted_by: str = "usage"

    @property
    def succeeded(self) -> bool:
        return self.timeline.error is None and bool(self.timeline.output_times)

    @property
    def queue_time(self) -> float:
        """Seconds that the request waited inside the client."""
        return self.timeline.arrival - self.due


def serve_metrics(
    records: Sequence[RequestRecord],
    duration: float,
    *,
    latencies: Sequence[str],
    ranks: Sequence[float],
    goodput: Mapping[str, float],
) -> dict[str, Any]:
    """Counts, rates, peaks and distributions of a run of `duration` seconds.

    latencies: of ttft, tpot, itl, e2el. ranks: percentiles. goodput: limits in milliseconds; {} for none.
    """
    done = [record.timeline for record in records if record.succeeded]
    total_input = sum(timeline.num_prompt_tokens for timeline in done)
    total_output = sum(timeline.num_output_tokens for timeline in done)
    num_events = sum(len(timeline.output_times) for timeline in done)
    good = sum(is_good(timeline, goodput) for timeline in done)
    metrics: dict[str, Any] = {
        "duration": duration,
        "completed": len(done),
        "failed": len(records) - len(done),
        "total_input_tokens": total_input,
        "total_cached_tokens": _sum_or_none([record.cached_tokens for record in records if record.succeeded]),
        "total_output_tokens": total_output,
        "request_throughput": len(done) / duration,
        "request_goodput": good / duration if goodput else None,
        "output_throughput": total_output / duration,
        "total_token_throughput": (total_input + total_output) / duration,
        "max_output_tokens_per_s": peak_tokens_per_second(done),
        "max_concurrent_requests": peak_concurrency(done),
        "tokens_per_event": total_output / num_events if num_events else None,
    }
    for name in latencies:
        metrics |= distribution(name, sample_of(name, done), ranks)
    return metrics


def sample_of(name: str, timelines: Sequence[RequestTimeline]) -> list[float]:
    """All values of a latency, in seconds."""
    if name == "itl":
        return [gap for timeline in timelines for gap in timeline.itl]
    return [value for timeline in timelines if (value := getattr(timeline, name)) is not None]


def distribution(name: str, seconds: Sequence[float], ranks: Sequence[float]) -> dict[str, float | None]:
    """mean, median, std (of the population) and percentiles in ms; all None without values."""
    labels = ["mean", "median", "std", *(f"p{rank:g}" for rank in ranks)]
    if not seconds:
        return {f"{label}_{name}_ms": None for label in labels}
    ms = np.asarray(seconds, dtype=np.float64) * 1e3
    values = [float(ms.mean()), float(np.median(ms)), float(ms.std()), *percentiles(list(ms), ranks).values()]
    return {f"{label}_{name}_ms": value for label, value in zip(labels, values, strict=True)}


def is_good(timeline: RequestTimeline, limits: Mapping[str, float]) -> bool:
    """Whether every latency with a limit keeps it. A single token has no TPOT, and so keeps any."""
    return all((getattr(timeline, name) or 0.0) * 1e3 <= limit for name, limit in limits.items())


def peak_concurrency(timelines: Sequence[RequestTimeline]) -> int:
    """Most requests between sending and last token at one moment. One that ends as another begins is not counted."""
    changes = [(timeline.arrival, 1) for timeline in timelines]
    changes += [(timeline.output_times[-1], -1) for timeline in timelines]
    peak = current = 0
    for _, change in sorted(changes):
        current += change
        peak = max(peak, current)
    return peak


def peak_tokens_per_second(timelines: Sequence[RequestTimeline]) -> float:
    """Most output tokens in one of the whole seconds counted from the first request's sending."""
    if not timelines:
        return 0.0
    start = min(timeline.arrival for timeline in timelines)
    seconds: dict[int, int] = {}
    for timeline in timelines:
        for when, count in zip(timeline.output_times, timeline.output_counts, strict=True):
            second = int(when - start)
            seconds[second] = seconds.get(second, 0) + count
    return float(max(seconds.values()))


def _sum_or_none(values: Sequence[int | None]) -> int | None:
    """None when the server never said."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None
