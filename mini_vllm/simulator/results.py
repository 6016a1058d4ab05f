"""What a simulation leaves behind: a row of numbers per request, a bounded timeline per replica, and their summary.

Names and definitions are those of `bench.metrics` (TTFT to the end of the step that sampled the first token, TPOT over
the tokens after it, percentiles by linear interpolation), so that a simulated and a measured run can be laid side by
side. Inter-token latencies are the one exception: there are as many as tokens, so they are counted in buckets
0.5 % wide, and their percentiles are that exact. All times are simulated seconds; names in `_ms` are milliseconds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mini_vllm.bench.metrics import LATENCY_METRICS, PERCENTILES, distribution_ms
from mini_vllm.engine.trace import StepRecord
from mini_vllm.exceptions import ConfigError
from mini_vllm.simulator.options import SimulationOptions

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

TIMELINE_COLUMNS = (
    "start", "seconds", "steps", "running", "waiting", "max_waiting", "kv_cache_usage", "max_kv_cache_usage",
    "prefill_tokens", "decode_tokens", "preemptions",
)  # fmt: skip


@dataclass(frozen=True)
class SLO:
    """Limits in milliseconds; None sets none. A request is good when it keeps all of them."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2el_ms: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not value > 0:
                raise ConfigError(f"slo {name}: must be above 0, got {value!r}")

    def __bool__(self) -> bool:
        return any(value is not None for value in vars(self).values())


@dataclass(frozen=True)
class RequestTable:
    """One row per finished request, in order of finishing. Every column is an array of that length.

    index: the request's number in the workload. arrival, scheduled, first_token, finish: seconds. tenant: a position
    in `SimulationResult.tenants`. num_cached_tokens: of the prompt, found in the prefix cache at first admission.
    failed: ended by an error of the engine.
    """

    index: Ints
    arrival: Floats
    scheduled: Floats
    first_token: Floats
    finish: Floats
    num_prompt_tokens: Ints
    num_output_tokens: Ints
    num_cached_tokens: Ints
    num_preemptions: Ints
    tenant: Ints
    replica: Ints
    failed: Ints

    def __len__(self) -> int:
        return len(self.index)

    @property
    def ttft(self) -> Floats:
        return self.first_token - self.arrival

    @property
    def queue_time(self) -> Floats:
        """From arrival to first admission."""
        return self.scheduled - self.arrival

    @property
    def e2el(self) -> Floats:
        return self.finish - self.arrival

    @property
    def tpot(self) -> Floats:
        """Of every request; NaN for those with a single token."""
        gaps = (self.num_output_tokens - 1).astype(np.float64)
        gaps[gaps == 0] = np.nan
        return (self.finish - self.first_token) / gaps

    def where(self, mask: NDArray[np.bool_]) -> "RequestTable":
        return RequestTable(**{name: column[mask] for name, column in vars(self).items()})


class LatencyHistogram:
    """How often each latency occurred, in buckets 0.5 % wide; the mean and the largest are exact."""

    STEPS_PER_E = 200
    LEAST = 1e-7
    """Seconds; whatever is shorter counts as this."""

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}
        self.count = 0
        self.total = 0.0
        self.largest = 0.0
        self.squares = 0.0

    def add(self, seconds: float, count: int = 1) -> None:
        bucket = int(math.log(seconds / self.LEAST) * self.STEPS_PER_E) if seconds > self.LEAST else 0
        self.counts[bucket] = self.counts.get(bucket, 0) + count
        self.count += count
        self.total += seconds * count
        self.squares += seconds * seconds * count
        if seconds > self.largest:
            self.largest = seconds

    def merge(self, other: "LatencyHistogram") -> None:
        for bucket, count in other.counts.items():
            self.counts[bucket] = self.counts.get(bucket, 0) + count
        self.count += other.count
        self.total += other.total
        self.squares += other.squares
        self.largest = max(self.largest, other.largest)

    @property
    def mean(self) -> float | None:
        return self.total / self.count if self.count else None

    def percentile(self, rank: float) -> float | None:
        """Seconds, linear between the nearest ranks as numpy's; None when nothing was counted."""
        if not self.count:
            return None
        place = rank / 100 * (self.count - 1)
        lower, upper = self._at(math.floor(place)), self._at(math.ceil(place))
        return lower + (place % 1) * (upper - lower)

    def _at(self, position: int) -> float:
        """The latency of that position, counted from the shortest: the middle of its bucket."""
        seen = 0
        for bucket in sorted(self.counts):
            seen += self.counts[bucket]
            if seen > position:
                return min(self.LEAST * math.exp((bucket + 0.5) / self.STEPS_PER_E), self.largest)
        return self.largest

    def distribution_ms(self, name: str) -> dict[str, float | None]:
        """The same entries as `bench.metrics.distribution_ms`."""
        labels = ["mean", "median", "std", *(f"p{rank}" for rank in PERCENTILES)]
        if not self.count or self.mean is None:
            return {f"{label}_{name}_ms": None for label in labels}
        spread = math.sqrt(max(self.squares / self.count - self.mean**2, 0.0))
        values = [self.mean, self.percentile(50), spread, *(self.percentile(rank) for rank in PERCENTILES)]
        return {f"{label}_{name}_ms": v * 1e3 for label, v in zip(labels, values, strict=True) if v is not None}


@dataclass(frozen=True)
class Timeline:
    """What a replica was doing, in at most `timeline_points` bins of consecutive steps. Columns are arrays.

    start: of the bin's first step. seconds: that its steps took (idle time between steps is not in it). running,
    waiting, kv_cache_usage: averages over these seconds; max_...: the largest at any step. prefill_tokens,
    decode_tokens, steps, preemptions: sums.
    """

    start: Floats
    seconds: Floats
    steps: Floats
    running: Floats
    waiting: Floats
    max_waiting: Floats
    kv_cache_usage: Floats
    max_kv_cache_usage: Floats
    prefill_tokens: Floats
    decode_tokens: Floats
    preemptions: Floats

    def __len__(self) -> int:
        return len(self.start)

    def columns(self) -> dict[str, list[float]]:
        return {name: getattr(self, name).tolist() for name in TIMELINE_COLUMNS}


@dataclass(frozen=True)
class ReplicaResult:
    """Counters of one replica over the whole run.

    num_request_steps: requests scheduled, summed over steps. num_tokens: computed, recomputation included.
    num_recomputed_tokens: those computed again because of a preemption. prefix_cache_queries, _hits: tokens.
    """

    num_requests: int
    num_steps: int
    num_request_steps: int
    num_tokens: int
    num_prefill_tokens: int
    busy_seconds: float
    num_preemptions: int
    num_recomputed_tokens: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    max_kv_cache_usage: float
    timeline: Timeline
    step_records: Sequence[StepRecord] = ()


@dataclass(frozen=True)
class SimulationResult:
    """One simulated run. duration: seconds from the first arrival to the last finish."""

    options: SimulationOptions
    requests: RequestTable
    replicas: tuple[ReplicaResult, ...]
    itl: LatencyHistogram
    tenants: tuple[str, ...]
    duration: float
    description: dict[str, Any] = field(default_factory=dict)
    """The workload and the cost model, for people."""

    @property
    def completed(self) -> RequestTable:
        return self.requests.where(self.requests.failed == 0)

    @property
    def timeline(self) -> Timeline:
        """Of the first replica; the others are in `replicas`."""
        return self.replicas[0].timeline

    # -- answers -----------------------------------------------------------------------------------------

    def num_good(self, slo: SLO) -> int:
        """Completed requests that kept every limit. One with a single token keeps any TPOT."""
        done = self.completed
        good = np.ones(len(done), dtype=np.bool_)
        for limit, seconds in ((slo.ttft_ms, done.ttft), (slo.e2el_ms, done.e2el)):
            if limit is not None:
                good &= seconds * 1e3 <= limit
        if slo.tpot_ms is not None:
            good &= ~(done.tpot * 1e3 > slo.tpot_ms)
        return int(good.sum())

    def goodput(self, slo: SLO) -> float:
        """Good requests per second."""
        return _rate(self.num_good(slo), self.duration)

    def metrics(self, slo: SLO | None = None) -> dict[str, Any]:
        """One flat dict: `bench.metrics.request_metrics`' entries, and those only a simulation can know."""
        return self._rates() | self._latencies() | self._engine_counters() | self._slo_metrics(slo)

    def _rates(self) -> dict[str, Any]:
        done = self.completed
        total_input, total_output = int(done.num_prompt_tokens.sum()), int(done.num_output_tokens.sum())
        return {
            "duration": self.duration,
            "completed": len(done),
            "failed": len(self.requests) - len(done),
            "total_input_tokens": total_input,
            "total_output_tokens": total_output,
            "request_throughput": _rate(len(done), self.duration),
            "output_throughput": _rate(total_output, self.duration),
            "total_token_throughput": _rate(total_input + total_output, self.duration),
        }

    def _latencies(self) -> dict[str, Any]:
        done = self.completed
        metrics: dict[str, Any] = {}
        tpot = done.tpot
        samples = {"ttft": done.ttft, "tpot": tpot[~np.isnan(tpot)], "e2el": done.e2el, "queue": done.queue_time}
        for name in (*LATENCY_METRICS, "queue"):
            if name == "itl":
                metrics |= self.itl.distribution_ms("itl")
            else:
                metrics |= distribution_ms(name, samples[name].tolist())
        return metrics

    def _engine_counters(self) -> dict[str, Any]:
        total = {name: sum(getattr(replica, name) for replica in self.replicas) for name in _SUMMED}
        done = self.completed
        most = self.options.max_num_seqs, self.options.max_num_batched_tokens
        usage = [replica.timeline.kv_cache_usage @ replica.timeline.seconds for replica in self.replicas]
        return {
            **{name: total[name] for name in _SUMMED},
            "recomputed_share": _share(total["num_recomputed_tokens"], total["num_tokens"]),
            "request_prefix_hit_rate": _share(int((done.num_cached_tokens > 0).sum()), len(done)),
            "token_prefix_hit_rate": _share(total["prefix_cache_hits"], total["prefix_cache_queries"]),
            "mean_running": _share(total["num_request_steps"], total["num_steps"]),
            "batch_use": _share(total["num_request_steps"], total["num_steps"] * most[0]),
            "budget_use": _share(total["num_tokens"], total["num_steps"] * most[1]),
            "mean_kv_cache_usage": _share(float(sum(usage)), total["busy_seconds"]),
            "max_kv_cache_usage": max(replica.max_kv_cache_usage for replica in self.replicas),
            "utilisation": _share(total["busy_seconds"], self.duration * len(self.replicas)),
        }

    def _slo_metrics(self, slo: SLO | None) -> dict[str, Any]:
        if not slo:
            return {}
        good = self.num_good(slo)
        return {"request_goodput": _rate(good, self.duration), "slo_attainment": _share(good, len(self.requests))}

    def by_tenant(self, slo: SLO | None = None) -> dict[str, dict[str, Any]]:
        """Rates and latencies (without ITL) of each tenant's requests alone, over the whole duration."""
        groups = {}
        for number, name in enumerate(self.tenants):
            part = SimulationResult(
                self.options, self.requests.where(self.requests.tenant == number), self.replicas, LatencyHistogram(),
                (name,), self.duration,
            )  # fmt: skip
            latencies = {key: value for key, value in part._latencies().items() if not key.endswith("_itl_ms")}
            groups[name] = part._rates() | latencies | part._slo_metrics(slo)
        return groups

    def as_dict(self, slo: SLO | None = None) -> dict[str, Any]:
        """Everything but the rows of requests, ready for JSON."""
        return {
            "description": self.description,
            "options": {k: dict(v) if k == "tenant_weights" else v for k, v in vars(self.options).items()},
            "slo": vars(slo) if slo else None,
            "metrics": self.metrics(slo),
            "tenants": self.by_tenant(slo) if len(self.tenants) > 1 else {},
            "timelines": [replica.timeline.columns() for replica in self.replicas],
        }


_SUMMED = (
    "num_steps", "num_request_steps", "num_tokens", "num_prefill_tokens", "busy_seconds", "num_preemptions",
    "num_recomputed_tokens", "prefix_cache_queries", "prefix_cache_hits",
)  # fmt: skip


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None
