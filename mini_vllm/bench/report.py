"""The report as tables for a terminal. Handed the dict of `result.py`, returns something rich can print."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mini_vllm.bench.metrics import LATENCY_METRICS, PERCENTILES

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

_LATENCY_NAMES = {
    "ttft": "TTFT (to first token)",
    "tpot": "TPOT (per token after it)",
    "itl": "ITL (between tokens)",
    "e2el": "E2EL (whole request)",
}
_RATES = (
    ("requests/s", "request_throughput", "{:.2f}"),
    ("output tokens/s", "output_throughput", "{:.1f}"),
    ("total tokens/s", "total_token_throughput", "{:.1f}"),
    ("duration (s)", "duration", "{:.3f}"),
)
_ENGINE = (
    ("steps", "num_steps", "{:.0f}"),
    ("preemptions", "num_preemptions", "{:.0f}"),
    ("prefix cache hit rate", "prefix_cache_hit_rate", "{:.1%}"),
    ("peak KV cache usage", "peak_kv_cache_usage", "{:.2%}"),
    ("CPU share of others", "cpu_share_others", "{:.1%}"),
)
_PHASES = (("whole run", "achieved"), ("decode steps", "decode"), ("prefill steps", "prefill"))


def render(result: Mapping[str, Any]) -> "Group":
    """Everything worth reading at once, for `rich.console.Console.print`."""
    from rich.console import Group
    from rich.text import Text

    parts: list[Any] = [Text(_headline(result)), _rates_table(result), _latency_table(result), _phase_table(result)]
    parts.append(Text(_ceilings_line(result["ceilings"])))
    for note in result["notes"]:
        parts.append(Text(f"{'!' if note.startswith(('warning', 'failed')) else '-'} {note}"))
    return Group(*parts)


def _headline(result: Mapping[str, Any]) -> str:
    model, ceilings = result["model"], result["ceilings"]
    lines = [
        f"mini-vllm bench {result['benchmark']}: {result['model_id']}",
        f"{model['num_parameters'] / 1e6:.1f} M parameters in {model['dtype']} ({model['weight_bytes'] / 1e6:.1f} MB), "
        f"{_count(ceilings['threads'], 'thread')}, {ceilings['device']}",
        f"{result['num_prompts']} requests ({result['failed']} failed), {result['total_input_tokens']} prompt and "
        f"{result['total_output_tokens']} output tokens, {_count(result['num_repeats'], 'repetition')}",
    ]
    if "avg_latency" in result:
        shown = ", ".join(f"p{rank} {seconds:.3f}" for rank, seconds in result["percentiles"].items())
        lines.append(f"batch latency: mean {result['avg_latency']:.3f} s ({shown})")
    return "\n".join(lines)


def _table(title: str, *columns: str) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def _rates_table(result: Mapping[str, Any]) -> "Table":
    table = _table("throughput and engine", "", "median", "min", "max")
    for title, name, form in (*_RATES, *_ENGINE):
        spread = result["spread"].get(name, (None, None))
        table.add_row(title, *(_shown(value, form) for value in (result.get(name), *spread)))
    return table


def _latency_table(result: Mapping[str, Any]) -> "Table":
    labels = ["mean", "median", "std", *(f"p{rank}" for rank in PERCENTILES if rank != 50)]
    table = _table("latency of requests (ms; median over repetitions)", "", *labels)
    for metric in LATENCY_METRICS:
        cells = [_shown(result[f"{label}_{metric}_ms"], "{:.2f}") for label in labels]
        table.add_row(_LATENCY_NAMES[metric], *cells)
    return table


def _phase_table(result: Mapping[str, Any]) -> "Table":
    table = _table(
        "use of the machine", "", "steps", "GB/s", "of read", "GFLOP/s", "of compute", "of roofline", "bound by"
    )
    for title, prefix in _PHASES:
        if result[f"{prefix}_steps"]:
            table.add_row(
                title,
                _shown(result[f"{prefix}_steps"], "{:.0f}"),
                _shown(result[f"{prefix}_gb_s"], "{:.2f}"),
                _shown(result[f"{prefix}_read_share"], "{:.1%}"),
                _shown(result[f"{prefix}_gflop_s"], "{:.1f}"),
                _shown(result[f"{prefix}_compute_share"], "{:.1%}"),
                _shown(result[f"{prefix}_roofline_share"], "{:.1%}"),
                result[f"{prefix}_bound_by"] or "-",
            )
    return table


def _ceilings_line(ceilings: Mapping[str, Any]) -> str:
    memory, gemm, resident = ceilings["memory"], ceilings["gemm"], ceilings["working_set"]
    line = (
        f"ceilings measured here: reading {memory['gb_s']:.1f} GB/s from memory ({memory['kernel']} over "
        f"{memory['buffer_bytes'] / 2**20:.0f} MiB)"
    )
    if resident is not None:
        line += f", {resident['gb_s']:.1f} GB/s over {resident['buffer_bytes'] / 2**20:.0f} MiB ({resident['kernel']})"
    return line + f"; multiplying {gemm['gflop_s']:.0f} GFLOP/s in {gemm['dtype']} (n = {gemm['size']})"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
