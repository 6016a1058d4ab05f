"""A run's figures as a person asks for them: rows of a table, and the one sentence at the top."""

from collections.abc import Mapping, Sequence
from typing import Any

from mini_vllm.simulator.results import SLO, SimulationResult

Metrics = Mapping[str, Any]

_LATENCIES = {
    "ttft": "time to first token (TTFT)",
    "tpot": "time per output token (TPOT)",
    "itl": "inter-token latency (ITL)",
    "e2el": "end-to-end latency (E2E)",
    "queue": "in the queue",
}
_LABELS = ("mean", "median", "p90", "p99")


def shown_ms(value: float | None) -> str:
    """As people say it: 12.3 ms, 2.34 s."""
    if value is None:
        return "-"
    return f"{value / 1000:,.2f} s" if value >= 1000 else f"{value:.3g} ms"


def shown(value: Any, unit: str = "") -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    else:
        text = f"{value:,}" if isinstance(value, int) else str(value)
    return f"{text} {unit}".rstrip()


def shown_share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def in_one_sentence(result: SimulationResult, slo: SLO | None = None) -> str:
    """What happened, before any table."""
    metrics = result.metrics(slo)
    text = (
        f"{metrics['completed']:,} requests in {shown(metrics['duration'], 's')} of simulated time: "
        f"{shown(metrics['request_throughput'])} requests/s, {shown(metrics['output_throughput'])} output tokens/s; "
        f"half of all first tokens within {shown_ms(metrics['median_ttft_ms'])}, "
        f"99 % within {shown_ms(metrics['p99_ttft_ms'])}."
    )
    if slo:
        text += f" {shown_share(metrics['slo_attainment'])} of the requests kept the SLO."
    if metrics["failed"]:
        text += f" {metrics['failed']:,} failed."
    return text


def latency_rows(metrics: Metrics) -> list[list[str]]:
    return [[name, *(shown_ms(metrics[f"{label}_{key}_ms"]) for label in _LABELS)] for key, name in _LATENCIES.items()]


LATENCY_HEAD = ("latency", "mean", "p50", "p90", "p99")


def rate_rows(metrics: Metrics) -> list[list[str]]:
    """Throughput, and goodput where there is an SLO."""
    rows = [
        ["requests", shown(metrics["completed"])],
        ["simulated time", shown(metrics["duration"], "s")],
        ["requests per second", shown(metrics["request_throughput"])],
        ["output tokens per second", shown(metrics["output_throughput"])],
        ["tokens per second, prompts included", shown(metrics["total_token_throughput"])],
    ]
    if metrics["failed"]:
        rows.insert(1, ["failed", shown(metrics["failed"])])
    if "request_goodput" in metrics:
        rows += [
            ["requests within the SLO", shown_share(metrics["slo_attainment"])],
            ["goodput, requests per second", shown(metrics["request_goodput"])],
        ]
    return rows


def engine_rows(metrics: Metrics) -> list[list[str]]:
    """What the scheduler and the block manager did."""
    return [
        ["steps", shown(metrics["num_steps"])],
        ["busy", shown_share(metrics["utilisation"])],
        ["requests in a step, on average", shown(metrics["mean_running"])],
        ["share of max_num_seqs", shown_share(metrics["batch_use"])],
        ["share of max_num_batched_tokens", shown_share(metrics["budget_use"])],
        ["KV cache in use, on average", shown_share(metrics["mean_kv_cache_usage"])],
        ["KV cache in use, at most", shown_share(metrics["max_kv_cache_usage"])],
        ["preemptions", shown(metrics["num_preemptions"])],
        ["tokens computed again after them", shown_share(metrics["recomputed_share"])],
        ["prompt tokens found in the prefix cache", shown_share(metrics["token_prefix_hit_rate"])],
        ["requests with any such hit", shown_share(metrics["request_prefix_hit_rate"])],
    ]


TENANT_HEAD = ("tenant", "requests", "req/s", "TTFT p50", "TTFT p99", "TPOT p50", "TPOT p99", "within SLO")


def tenant_rows(tenants: Mapping[str, Metrics]) -> list[list[str]]:
    return [
        [
            name or "(none)",
            shown(metrics["completed"]),
            shown(metrics["request_throughput"]),
            *(shown_ms(metrics[f"{label}_{key}_ms"]) for key in ("ttft", "tpot") for label in ("median", "p99")),
            shown_share(metrics.get("slo_attainment")),
        ]
        for name, metrics in tenants.items()
    ]


REPLICA_HEAD = ("replica", "requests", "steps", "busy s", "KV max", "preemptions", "token hits")


def replica_rows(result: SimulationResult) -> list[list[str]]:
    return [
        [
            str(number),
            shown(replica.num_requests),
            shown(replica.num_steps),
            shown(replica.busy_seconds),
            shown_share(replica.max_kv_cache_usage),
            shown(replica.num_preemptions),
            shown_share(_hits(replica.prefix_cache_hits, replica.prefix_cache_queries)),
        ]
        for number, replica in enumerate(result.replicas)
    ]


def _hits(hits: int, queries: int) -> float | None:
    return hits / queries if queries else None


def setting_rows(settings: Mapping[str, Any], prefix: str = "") -> list[list[str]]:
    """Nested settings as flat rows of name and value; those that are not set are left out."""
    rows: list[list[str]] = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            rows += setting_rows(value, f"{prefix}{key}.")
        elif value is not None and value != "":
            rows.append([prefix + key, _setting(value)])
    return rows


def _setting(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return " ".join(f"{key}={_setting(item)}" for key, item in value.items() if item not in (None, ""))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_setting(item) for item in value)
    return str(value)
