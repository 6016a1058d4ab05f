"""The report in the terminal: vLLM's block, so that eyes and scripts that read that one can read this one."""

import math
from collections.abc import Mapping
from typing import Any

_WIDTH = 50
_TITLES = {
    "ttft": ("Time to First Token", "TTFT"),
    "tpot": ("Time per Output Token (excl. 1st token)", "TPOT"),
    "itl": ("Inter-token Latency", "ITL"),
    "e2el": ("End-to-end Latency", "E2EL"),
}


def render(result: Mapping[str, Any], latencies: list[str], ranks: list[float]) -> str:
    """The whole block, then notes and errors."""
    lines = [" Serving Benchmark Result ".center(_WIDTH, "=")]
    lines += [_line(name, value) for name, value in _totals(result) if value is not None]
    for name in latencies:
        title, short = _TITLES[name]
        lines.append(title.center(_WIDTH, "-"))
        for label in ("mean", "median", *(f"p{rank:g}" for rank in ranks)):
            shown = label.upper() if label.startswith("p") else label.capitalize()
            lines.append(_line(f"{shown} {short} (ms):", result[f"{label}_{name}_ms"]))
    lines.append("=" * _WIDTH)
    lines += [f"- {note}" for note in result["notes"]]
    lines += [f"! failed {failure['count']} x: {failure['error']}" for failure in result["failures"][:5]]
    return "\n".join(lines)


def _totals(result: Mapping[str, Any]) -> list[tuple[str, Any]]:
    rate = result["request_rate"]
    return [
        ("Successful requests:", result["completed"]),
        ("Failed requests:", result["failed"]),
        ("Maximum request concurrency:", result["max_concurrency"]),
        ("Request rate configured (RPS):", None if rate == "inf" else float(rate)),
        ("Benchmark duration (s):", result["duration"]),
        ("Total input tokens:", result["total_input_tokens"]),
        ("Total cached input tokens:", result["total_cached_tokens"]),
        ("Total generated tokens:", result["total_output_tokens"]),
        ("Request throughput (req/s):", result["request_throughput"]),
        ("Request goodput (req/s):", result["request_goodput"]),
        ("Output token throughput (tok/s):", result["output_throughput"]),
        ("Peak output token throughput (tok/s):", result["max_output_tokens_per_s"]),
        ("Peak concurrent requests:", result["max_concurrent_requests"]),
        ("Total token throughput (tok/s):", result["total_token_throughput"]),
    ]


def _line(name: str, value: float | int | None) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        shown = "-"
    else:
        shown = f"{value:.2f}" if isinstance(value, float) else str(value)
    return f"{name:<40} {shown:<9}".rstrip()
