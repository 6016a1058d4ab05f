"""A sweep as text: a table for people, JSON and CSV for programs.

The table has one row a point: the values of the axes, then the figures a person looks at first. JSON and CSV hold all
of them, unrounded.
"""

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from mini_vllm.simulator.sweep import SweepPoint, SweepResult

COLUMNS = {
    "request_throughput": "req/s",
    "output_throughput": "out tok/s",
    "median_ttft_ms": "TTFT p50",
    "p99_ttft_ms": "TTFT p99",
    "median_tpot_ms": "TPOT p50",
    "p99_tpot_ms": "TPOT p99",
    "p99_e2el_ms": "E2E p99",
    "mean_running": "running",
    "max_kv_cache_usage": "KV max %",
    "num_preemptions": "preempted",
    "token_prefix_hit_rate": "hits %",
    "slo_attainment": "in SLO %",
    "request_goodput": "good/s",
}
"""Figure -> head of its column. Latencies are in ms."""
_SHARES = {"max_kv_cache_usage", "token_prefix_hit_rate", "slo_attainment"}


def sweep_table(result: SweepResult, columns: Sequence[str] | None = None, marked: Sequence[SweepPoint] = ()) -> str:
    """columns: figures to show; None shows those of `COLUMNS` that some point has. marked: points with a star."""
    head, rows = sweep_cells(result, columns, marked)
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head) - 1)]
    return "\n".join(_aligned(row, widths) for row in [head, *rows])


def sweep_cells(
    result: SweepResult, columns: Sequence[str] | None = None, marked: Sequence[SweepPoint] = ()
) -> tuple[list[str], list[list[str]]]:
    """(head, rows) of the table, as text. The last column has the stars and the errors."""
    names = list(columns) if columns is not None else [name for name in COLUMNS if _is_interesting(result, name)]
    axes = [axis.name for axis in result.axes]
    head = [*axes, *(COLUMNS.get(name, name) for name in names), ""]
    return head, [_row(point, axes, names, marked) for point in result.points]


def _row(point: SweepPoint, axes: list[str], names: list[str], marked: Sequence[SweepPoint]) -> list[str]:
    cells = [str(point.values[axis]) for axis in axes]
    if point.error:
        return [*cells, *("-" for _ in names), point.error]
    return [*cells, *(_shown(name, point.metrics.get(name)) for name in names), "*" if point in marked else ""]


def _aligned(row: list[str], widths: list[int]) -> str:
    cells = [cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=True)]
    return ("  ".join(cells) + f"  {row[-1]}").rstrip()


def _is_interesting(result: SweepResult, name: str) -> bool:
    """Some point has it, and it is not nought everywhere."""
    return any(point.metrics.get(name) for point in result.done)


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    if name in _SHARES:
        return f"{100 * value:.1f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def sweep_json(result: SweepResult) -> str:
    return json.dumps(result.as_dict(), indent=1) + "\n"


def sweep_csv(result: SweepResult) -> str:
    """A header, then one line a point. Axes first, then every figure; `error` last."""
    axes = [axis.name for axis in result.axes]
    names = list(dict.fromkeys(name for point in result.done for name in point.metrics if name not in axes))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*axes, *names, "error"])
    for point in result.points:
        figures = [point.metrics.get(name) for name in names]
        writer.writerow(
            [*(point.values[axis] for axis in axes), *("" if v is None else v for v in figures), point.error]
        )
    return out.getvalue()
