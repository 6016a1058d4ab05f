"""Pictures of sweeps: latency against load with its knee, throughput against latency, and one knob turned."""

import math
from collections.abc import Sequence
from typing import Any

from mini_vllm.simulator.capacity import Capacity
from mini_vllm.simulator.curves import find_knee, pareto_front
from mini_vllm.simulator.plots.style import (
    BLUE,
    CYCLE,
    GREEN,
    GREY,
    LINES,
    ORANGE,
    RED,
    Picture,
    drawn,
    from_zero,
    label,
    legend,
    limit,
    load_scale,
    log_y,
    mark,
    milliseconds,
    panels,
    percent,
    say_ms,
    thousands,
)
from mini_vllm.simulator.sweep import LOADS, SweepPoint, SweepResult

LATENCY = "p99_ttft_ms"

_MAX_LABELS = 9


def sweep_pictures(result: SweepResult, limit_ms: float | None = None) -> list[Picture]:
    """Those that make sense for these axes. limit_ms: of p99 TTFT, to be drawn as a line."""
    pictures = []
    numeric = [axis.name for axis in result.axes if axis.is_numeric and len(axis.values) >= 2]
    for name in numeric:
        if name in LOADS:
            pictures.append(latency_against_load(result, name, limit_ms))
        else:
            pictures.append(knob(result, name))
    if len(result.done) >= 2:
        pictures.append(throughput_against_latency(result))
    return pictures


def _xy(points: Sequence[SweepPoint], name: str, figure: str) -> tuple[list[float], list[float]]:
    """Without the points that lack the figure."""
    pairs = [(float(p.values[name]), float(p.metrics[figure])) for p in points if p.metrics.get(figure) is not None]
    return [x for x, _ in pairs], [y for _, y in pairs]


@drawn
def latency_against_load(result: SweepResult, name: str = "rate", limit_ms: float | None = None) -> Picture:
    """Percentiles of TTFT (and of TPOT) against the load, with the knee of p99 TTFT where the curve has one."""
    figure, axes = panels(2, sharex=True, height=5.6)
    series = result.series(name)
    knees = []
    for number, (others, points) in enumerate(series):
        if len(series) == 1:
            _percentiles(axes[0], points, name, "ttft")
            _percentiles(axes[1], points, name, "tpot")
        else:
            for axis, metric in zip(axes, ("p99_ttft_ms", "p99_tpot_ms"), strict=True):
                axis.plot(*_xy(points, name, metric), marker="o", color=CYCLE[number % len(CYCLE)],
                          ls=LINES[number // len(CYCLE) % len(LINES)], label=others)  # fmt: skip
        x, y = _xy(points, name, LATENCY)
        knee = find_knee(x, y) if len(x) >= 3 else None
        if knee is not None:
            knees.append((knee.x, CYCLE[number % len(CYCLE)] if len(series) > 1 else GREY))
            axes[0].plot(knee.x, knee.y, "o", ms=12, mfc="none", mec=knees[-1][1], mew=1.6)
    for axis, what in zip(axes, ("time to first token", "time per output token"), strict=True):
        label(axis, y="latency", title=what if len(series) == 1 else f"{what}, p99")
        log_y(axis)
    label(axes[1], f"load ({LOADS.get(name, name)})")
    load_scale(axes[1], [float(point.values[name]) for point in result.done])
    for x_knee, colour in knees if len(knees) == 1 else []:
        mark(axes[0], x_knee, f"knee at {x_knee:g}", colour)
    if limit_ms is not None:
        limit(axes[0], limit_ms, f"limit of p99: {say_ms(limit_ms)}", side="left")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    reading = (
        "Left of the knee more load costs little; right of it requests queue and the first token waits for them. "
        "The ring is the point of p99 TTFT farthest below a straight line from the first point to the end of the "
        "steepest rise (on linear axes); the scale here is logarithmic."
    )
    return Picture(f"latency_against_{name}", "Latency against load", reading, figure)


def _percentiles(axis: Any, points: Sequence[SweepPoint], name: str, metric: str) -> None:
    low, high = _xy(points, name, f"median_{metric}_ms"), _xy(points, name, f"p99_{metric}_ms")
    axis.plot(*low, "o-", color=BLUE, label="p50")
    axis.plot(*_xy(points, name, f"p90_{metric}_ms"), "s--", color=ORANGE, label="p90", ms=4)
    axis.plot(*high, "^-.", color=RED, label="p99")
    if low[0] == high[0]:
        axis.fill_between(low[0], low[1], high[1], color=BLUE, alpha=0.07, lw=0)


@drawn
def throughput_against_latency(result: SweepResult, gain: str = "output_throughput", cost: str = LATENCY) -> Picture:
    """Every point by what it delivers and what it costs; those that no other beats are joined."""
    figure, axis = panels()
    points = [p for p in result.done if p.metrics.get(gain) is not None and p.metrics.get(cost) is not None]
    gains = [float(point.metrics[gain]) for point in points]
    costs = [float(point.metrics[cost]) for point in points]
    front = pareto_front(gains, costs)
    rest = [i for i in range(len(points)) if i not in set(front)]
    if rest:
        axis.plot([costs[i] for i in rest], [gains[i] for i in rest], "o", color="#b9b9b9", label="beaten by another")
    axis.plot([costs[i] for i in front], [gains[i] for i in front], "o-", color=GREEN, label="Pareto front")
    named: set[tuple[str, str]] = set()
    for place in sorted({round(k * (len(front) - 1) / (_MAX_LABELS - 1)) for k in range(_MAX_LABELS)}):
        i = front[place]
        where = (f"{costs[i]:.2g}", f"{gains[i]:.2g}")
        if where not in named:
            _name_point(axis, costs[i], gains[i], points[i], at_the_bottom=gains[i] < 0.07 * max(gains))
            named.add(where)
    if costs and min(costs) > 0 and max(costs) / min(costs) > 20:
        axis.set_xscale("log")
    milliseconds(axis.xaxis)
    from_zero(axis, 1.12)
    axis.margins(x=0.16)
    thousands(axis.yaxis)
    label(axis, f"{_in_words(cost)}", _in_words(gain))
    figure.legend(loc="outside upper right", ncols=2)
    reading = (
        "Up and to the left is better; no point gives more than one on the green line for the same latency. Where "
        "the line turns flat, further throughput is bought with latency alone."
    )
    return Picture("throughput_against_latency", "What throughput costs in latency", reading, figure)


def _name_point(axis: Any, x: float, y: float, point: SweepPoint, at_the_bottom: bool) -> None:
    text = "\n".join(f"{_SHORT.get(key, key + '=')}{value}" for key, value in point.values.items())
    beside = (9, 0) if at_the_bottom else (6, -4)
    side = "center" if at_the_bottom else "top"
    axis.annotate(text, (x, y), xytext=beside, textcoords="offset points", fontsize=8, color=GREY, va=side)


_SHORT = {
    "rate": "rate ", "users": "users ", "max_num_seqs": "seqs ", "max_num_batched_tokens": "budget ",
    "long_prefill_token_threshold": "chunk ", "num_replicas": "replicas ", "num_gpu_blocks": "blocks ",
    "block_size": "block ",
}  # fmt: skip


def _in_words(figure: str) -> str:
    words = {
        "output_throughput": "output tokens per second", "total_token_throughput": "tokens per second",
        "request_throughput": "requests per second", "request_goodput": "good requests per second",
    }  # fmt: skip
    if figure in words:
        return words[figure]
    rank, _, rest = figure.partition("_")
    metric = rest.removesuffix("_ms").replace("e2el", "e2e").upper()
    return f"{rank} {metric}" if rest.endswith("_ms") else figure


@drawn
def knob(result: SweepResult, name: str) -> Picture:
    """One engine argument turned: throughput on the left, p99 of TTFT and of the gaps between tokens on the right."""
    figure, axes = panels(1, 2)
    series = result.series(name)
    for number, (others, points) in enumerate(series):
        alone, colour = len(series) == 1, CYCLE[number % len(CYCLE)]
        axes[0].plot(*_xy(points, name, "output_throughput"), "o-", color=GREEN if alone else colour, label=others)
        axes[1].plot(*_xy(points, name, LATENCY), "o-", color=RED if alone else colour, label=others or "p99 TTFT")
        if alone:
            axes[1].plot(*_xy(points, name, "p99_itl_ms"), "s--", color=BLUE, label="p99 ITL")
            _mark_saturation(axes[0], points, name)
    from_zero(axes[0], 1.15)
    thousands(axes[0].yaxis)
    log_y(axes[1])
    label(axes[0], name, "output tokens per second", "throughput")
    label(axes[1], name, "latency", "latency" if len(series) == 1 else "p99 TTFT")
    for axis in axes:
        load_scale(axis, [float(point.values[name]) for point in result.done], wide=3)
        axis.tick_params(axis="x", labelrotation=35)
    if len(series) == 1:
        legend(axes[1])
    else:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    reading = (
        f"Turn {name} up as long as throughput rises and stop before the latency you care about does; where the left "
        "curve is flat, something else is the limit."
    )
    return Picture(f"knob_{name}", f"Turning {name}", reading, figure)


def _mark_saturation(axis: Any, points: Sequence[SweepPoint], name: str) -> None:
    """Where throughput stops paying: by the logarithm of the knob, as such knobs are turned by doubling."""
    x, y = _xy(points, name, "output_throughput")
    if len(x) >= 3 and min(x) > 0:
        knee = find_knee([math.log(value) for value in x], y, "saturating")
        if knee is not None:
            mark(axis, x[knee.index], f"knee at {x[knee.index]:g}")


@drawn
def capacity_search(found: Capacity, what: str = "requests per second", metric: str = LATENCY) -> Picture:
    """The loads that were tried and what became of each."""
    figure, axis = panels()
    for ok, marker, colour, name in ((True, "o", BLUE, "keeps the limits"), (False, "X", RED, "does not")):
        probes = [p for p in found.probes if p.ok is ok and p.metrics.get(metric) is not None]
        axis.plot([p.load for p in probes], [p.metrics[metric] for p in probes], marker, color=colour, label=name, ms=7)
    log_y(axis)
    load_scale(axis, [probe.load for probe in found.probes])
    label(axis, f"load ({what})", _in_words(metric))
    mark(axis, found.load, f"capacity {found.load:.4g}", BLUE)
    figure.legend(loc="outside upper right", ncols=2)
    reading = (
        "Each mark is a whole simulated run; the search doubles the load until a limit breaks, then halves the "
        "bracket, then tries loads in between to see that nothing below the answer breaks."
    )
    return Picture("capacity", "How much load keeps the limits", reading, figure)


@drawn
def slo_attainment(result: SweepResult, name: str = "rate", share: float = 0.99) -> Picture:
    """Share of requests within the SLO, and good requests per second, against the load."""
    figure, axes = panels(1, 2)
    for number, (others, points) in enumerate(result.series(name)):
        colour = CYCLE[number % len(CYCLE)]
        axes[0].plot(*_xy(points, name, "slo_attainment"), "o-", color=colour, label=others or None)
        axes[1].plot(*_xy(points, name, "request_goodput"), "o-", color=colour, label=others or None)
    axes[0].set_ylim(0, 1.05)
    percent(axes[0].yaxis)
    limit(axes[0], share, f"{100 * share:.4g} %", GREY)
    from_zero(axes[1])
    label(axes[0], f"load ({LOADS.get(name, name)})", "requests within the SLO", "attainment")
    label(axes[1], f"load ({LOADS.get(name, name)})", "good requests per second", "goodput")
    for axis in axes:
        load_scale(axis, [float(point.values[name]) for point in result.done])
    if axes[0].get_legend_handles_labels()[0]:
        legend(axes[0])
    reading = "Goodput follows the load until the SLO breaks; past that point more load means fewer good answers."
    return Picture("slo_attainment", "How many requests stay within the SLO", reading, figure)
