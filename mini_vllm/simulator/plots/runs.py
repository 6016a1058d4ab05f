"""Pictures of one simulated run: what the engine was doing over time, and how long requests took."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mini_vllm.simulator.plots.style import (
    BLUE,
    CYCLE,
    GREEN,
    LINES,
    ORANGE,
    PURPLE,
    RED,
    Picture,
    counts,
    drawn,
    from_zero,
    label,
    legend,
    limit,
    milliseconds,
    panels,
    percent,
    say_ms,
    thousands,
)
from mini_vllm.simulator.results import SLO, LatencyHistogram, SimulationResult, Timeline

_SECONDS = "simulated time (s)"
_HIT_BINS = 40
_STACK_BINS = 120
_MAX_MARKS = 80
_LITTLE_USED = 0.2


def run_pictures(result: SimulationResult, slo: SLO | None = None) -> list[Picture]:
    """Every picture that has something to show for this run."""
    pictures = [timelines(result), batch_composition(result), latency_cdfs(result, slo)]
    if result.options.enable_prefix_caching and result.completed.num_cached_tokens.any():
        pictures.append(prefix_hits(result))
    return pictures


@drawn
def timelines(result: SimulationResult) -> Picture:
    """Queue, running requests and KV cache over simulated time."""
    figure, axes = panels(3, sharex=True)
    several = len(result.replicas) > 1
    for number, replica in enumerate(result.replicas):
        line = replica.timeline
        colours = [CYCLE[number % len(CYCLE)]] * 3 if several else [ORANGE, BLUE, GREEN]
        name = f"replica {number}" if several else ""
        _steps(axes[0], line, line.waiting, colours[0], name)
        _steps(axes[1], line, line.running, colours[1], name)
        _steps(axes[2], line, line.kv_cache_usage, colours[2], name, fill=not several)
        _preemptions(axes[2], line, number == 0)
    label(axes[0], y="requests", title="waiting")
    label(axes[1], y="requests", title="running")
    label(axes[2], _SECONDS, "of the pool", "KV cache in use")
    for axis in axes[:2]:
        from_zero(axis, 1.15)
        counts(axis.yaxis)
    most = result.options.max_num_seqs
    if most <= 1.5 * axes[1].get_ylim()[1]:
        axes[1].set_ylim(0, max(axes[1].get_ylim()[1], 1.2 * most))
        limit(axes[1], most, f"max_num_seqs {most}")
    _pool_scale(axes[2], max(replica.max_kv_cache_usage for replica in result.replicas))
    if several:
        legend(axes[0], ncols=4)
    handles, names = axes[2].get_legend_handles_labels()
    if "preemption" in names:
        place = names.index("preemption")
        figure.legend([handles[place]], ["preemption"], loc="outside upper right")
    reading = (
        "A queue that keeps growing means the load is past what the engine sustains; when it does so while the KV "
        "cache is full, memory is what is missing, and while it is not, compute or max_num_seqs is."
    )
    return Picture("timelines", "Queue, batch and KV cache over time", reading, figure)


def _pool_scale(axis: Any, most: float) -> None:
    """The whole pool, unless next to nothing of it was used: then a line along the bottom would say nothing."""
    if most >= _LITTLE_USED:
        axis.set_ylim(0, 1.12)
        percent(axis.yaxis)
        return
    axis.set_ylim(0, max(1.3 * most, 1e-4))
    axis.set_title(f"KV cache in use (at most {most:.1%} of the pool)", loc="left")
    percent(axis.yaxis, decimals=1)


def _steps(axis: Any, line: Timeline, values: NDArray[np.float64], colour: str, name: str, fill: bool = False) -> None:
    """A value that holds from each bin's start to the next one's."""
    if not len(line):
        return
    times = np.append(line.start, line.start[-1] + line.seconds[-1])
    held = np.append(values, values[-1])
    axis.plot(times, held, drawstyle="steps-post", color=colour, lw=1.4, label=name or None)
    if fill:
        axis.fill_between(times, held, step="post", color=colour, alpha=0.15, lw=0)


def _preemptions(axis: Any, line: Timeline, named: bool) -> None:
    where = line.start[line.preemptions > 0]
    if len(where):
        slot = max(float(line.start[-1] - line.start[0]), 1e-9) / _MAX_MARKS
        where = where[np.unique((where / slot).astype(np.int64), return_index=True)[1]]
        axis.plot(where, np.full(len(where), 1.06), "v", color=RED, ms=4, label="preemption" if named else None)


@drawn
def batch_composition(result: SimulationResult) -> Picture:
    """Tokens per step, decode below and prefill on top, averaged over each bin of the first replica's timeline."""
    figure, axis = panels()
    times, decode, prefill = _per_step(result.timeline)
    stacks = [np.append(part, part[-1:]) for part in (decode, prefill)]
    axis.stackplot(times, *stacks, step="post", colors=(BLUE, ORANGE), labels=("decode", "prefill"), lw=0)
    label(axis, _SECONDS, "tokens per step")
    budget = result.options.max_num_batched_tokens
    top = float((decode + prefill).max(initial=1))
    axis.set_ylim(0, 1.15 * max(top, budget if top > 0.4 * budget else 0))
    if top > 0.4 * budget:
        limit(axis, budget, f"max_num_batched_tokens {budget:,}")
    thousands(axis.yaxis)
    figure.legend(loc="outside upper right", ncols=2)
    reading = (
        "Each column is what an average step computed: the blue base is one token per running request, the orange "
        "part is prompts; orange at the budget for long means that prompts make every running request wait."
    )
    where = " of replica 0" if len(result.replicas) > 1 else ""
    return Picture("batch_composition", f"What the steps{where} were made of", reading, figure)


def _per_step(line: Timeline) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """(edges of at most `_STACK_BINS` bins, decode tokens, prefill tokens): averages over the steps in each."""
    first = np.arange(0, len(line), math.ceil(len(line) / _STACK_BINS))
    steps = np.maximum(np.add.reduceat(line.steps, first), 1)
    parts = [np.add.reduceat(tokens, first) / steps for tokens in (line.decode_tokens, line.prefill_tokens)]
    return np.append(line.start[first], line.start[-1] + line.seconds[-1]), parts[0], parts[1]


@drawn
def latency_cdfs(result: SimulationResult, slo: SLO | None = None) -> Picture:
    """Shares of requests (of gaps, for ITL) that took at most so long."""
    figure, axes = panels(1, 2, sharey=True)
    done = result.completed
    tpot = done.tpot
    _cdf(axes[0], done.ttft, "TTFT", 0, slo.ttft_ms if slo else None)
    _cdf(axes[0], done.e2el, "E2E", 1, slo.e2el_ms if slo else None)
    _cdf(axes[1], tpot[~np.isnan(tpot)], "TPOT", 2, slo.tpot_ms if slo else None)
    _histogram_cdf(axes[1], result.itl, "ITL", 3)
    for axis, title in zip(axes, ("to the first token, and to the last", "between tokens"), strict=True):
        axis.set_xscale("log")
        milliseconds(axis.xaxis)
        label(axis, "latency", title=title)
        axis.tick_params(axis="x", labelsize=9)
        legend(axis, loc="best")
    label(axes[0], y="share at or below")
    percent(axes[0].yaxis)
    axes[0].set_ylim(0, 1.02)
    reading = (
        "Read across from 50 % for the median and from 99 % for the tail; a curve that flattens before it reaches "
        "the top has a few requests that waited much longer than the rest. Dotted lines are the limits of the SLO."
    )
    return Picture("latency_cdfs", "How long requests took", reading, figure)


def _cdf(axis: Any, seconds: NDArray[np.float64], name: str, number: int, limit_ms: float | None) -> None:
    if not len(seconds):
        return
    ms = np.maximum(np.sort(seconds) * 1e3, 1e-3)
    shares = np.arange(1, len(ms) + 1) / len(ms)
    keep = np.unique(np.linspace(0, len(ms) - 1, min(len(ms), 400)).astype(int))
    _curve(axis, ms[keep], shares[keep], f"{name}, p99 {say_ms(float(np.percentile(ms, 99)))}", number, limit_ms)


def _histogram_cdf(axis: Any, histogram: LatencyHistogram, name: str, number: int) -> None:
    if not histogram.count:
        return
    ranks = np.append(np.linspace(0, 99, 100), [99.5, 99.9, 100])
    ms = np.array([histogram.percentile(float(rank)) or 0.0 for rank in ranks]) * 1e3
    tail = (histogram.percentile(99) or 0.0) * 1e3
    _curve(axis, ms, ranks / 100, f"{name}, p99 {say_ms(tail)}", number, None)


def _curve(
    axis: Any, ms: NDArray[np.float64], shares: NDArray[np.float64], name: str, number: int, limit_ms: float | None
) -> None:
    colour = CYCLE[number]
    axis.plot(ms, shares, color=colour, ls=LINES[number % 2], drawstyle="steps-post", label=name)
    if limit_ms is not None:
        axis.axvline(limit_ms, color=colour, ls=":", lw=1.3)


@drawn
def prefix_hits(result: SimulationResult) -> Picture:
    """Prefix-cache hits over time: by token, and by request (any hit at all)."""
    figure, axis = panels()
    done = result.completed
    edges = np.linspace(done.scheduled.min(), done.scheduled.max() + 1e-9, _HIT_BINS + 1)
    bins = np.clip(np.digitize(done.scheduled, edges) - 1, 0, _HIT_BINS - 1)
    prompts = np.bincount(bins, done.num_prompt_tokens, _HIT_BINS)
    hits = np.bincount(bins, done.num_cached_tokens, _HIT_BINS)
    requests = np.bincount(bins, minlength=_HIT_BINS)
    found = np.bincount(bins, done.num_cached_tokens > 0, _HIT_BINS)
    seen = requests > 0
    middles = ((edges[:-1] + edges[1:]) / 2)[seen]
    axis.plot(middles, (found[seen] / requests[seen]), color=PURPLE, ls="--", label="of requests, with any hit")
    axis.plot(middles, (hits[seen] / prompts[seen]), color=GREEN, label="of prompt tokens")
    axis.set_ylim(0, 1.05)
    percent(axis.yaxis)
    label(axis, _SECONDS, "found in the prefix cache")
    figure.legend(loc="outside upper right", ncols=2)
    reading = (
        "The gap between the two is how much of each prompt is its own; token hits that fall while requests still "
        "hit mean that shared blocks are evicted before they are asked for again."
    )
    return Picture("prefix_hits", "Prefix-cache hits over time", reading, figure)
