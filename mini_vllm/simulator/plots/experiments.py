"""Pictures of the small experiments: quadratic against linear work, batch stacks, spikes, and curves with a bend."""

import math
from collections.abc import Sequence
from typing import Any

from mini_vllm.simulator.curves import find_knee
from mini_vllm.simulator.experiments import KVWork, PrefillSpike
from mini_vllm.simulator.plots.style import (
    BLUE,
    CYCLE,
    GREEN,
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
    thousands,
)
from mini_vllm.simulator.sweep import SweepResult


@drawn
def kv_work_picture(curve: Sequence[KVWork]) -> Picture:
    """Work with and without a cache, and their ratio beside n / 2."""
    figure, axes = panels(1, 2)
    lengths = [work.num_new_tokens for work in curve]
    axes[0].plot(lengths, [work.without_cache for work in curve], color=RED, label="without a cache")
    axes[0].plot(lengths, [work.with_cache for work in curve], color=BLUE, ls="--", label="with one")
    axes[0].set_yscale("log")
    legend(axes[0])
    axes[1].plot(lengths, [length / 2 for length in lengths], color=GREEN, lw=6, alpha=0.25, label="n / 2")
    axes[1].plot(lengths, [work.ratio for work in curve], color=GREEN, label="ratio")
    legend(axes[1])
    from_zero(axes[1])
    for axis, title, what in zip(
        axes, ("work", "how much a cache saves"), ("tokens computed", "times less work"), strict=True
    ):
        label(axis, "generated tokens n", what, title)
        axis.locator_params(axis="x", nbins=5)
        thousands(axis.xaxis)
    reading = (
        f"After a prompt of {curve[0].prompt_len} tokens: without a cache every step computes all tokens again, so "
        "the work grows with the square of the length, and the saving with half of it."
    )
    return Picture("kv_work", "What a KV cache saves", reading, figure)


@drawn
def batch_stacks_picture(steps: Sequence[dict[int, int]], budget: int | None = None) -> Picture:
    """Tokens of each request in each step, stacked."""
    figure, axis = panels(height=3.6)
    requests = sorted({request for step in steps for request in step})
    numbers = range(1, len(steps) + 1)
    bottoms = [0] * len(steps)
    few = len(steps) <= 20
    for place, request in enumerate(requests):
        heights = [step.get(request, 0) for step in steps]
        bars = axis.bar(numbers, heights, 0.8, bottoms, color=CYCLE[place % len(CYCLE)], edgecolor="white", lw=0.6,
                        label=f"request {request}", hatch=("", "//", "..")[place // len(CYCLE) % 3])  # fmt: skip
        if few:
            axis.bar_label(bars, [height or "" for height in heights], label_type="center", color="white", fontsize=9)
        bottoms = [below + height for below, height in zip(bottoms, heights, strict=True)]
    axis.set_ylim(0, 1.15 * max([*bottoms, budget or 0]))
    if budget is not None:
        limit(axis, budget, f"budget {budget}")
    label(axis, "step", "tokens")
    axis.grid(axis="x", visible=False)
    if few:
        axis.set_xticks(list(numbers))
    if len(requests) <= 8:
        figure.legend(loc="outside upper right", ncols=len(requests))
    reading = (
        "Each column is one step and each colour one request: tall parts are prompts, cut where the budget ends, and "
        "parts of one token are decodes, which come first in every step."
    )
    return Picture("batch_stacks", "What each step computed, request by request", reading, figure)


@drawn
def prefill_spike_picture(spikes: Sequence[PrefillSpike]) -> Picture:
    """Tokens (or seconds) of the steps that a decoding request waits for, with several thresholds."""
    figure, axes = panels(1, 2, gridspec_kw={"width_ratios": [3, 2]})
    for number, spike in enumerate(spikes):
        name = f"chunks of {spike.threshold}" if spike.threshold else "whole prompts"
        axes[0].plot(range(1, len(spike.tokens) + 1), spike.tokens, marker="o", ls=LINES[number % 4], ms=4,
                     color=CYCLE[number % len(CYCLE)], label=name)  # fmt: skip
    axes[0].set_yscale("log", base=2)
    thousands(axes[0].yaxis)
    legend(axes[0])
    label(axes[0], "token of the decoding request", "tokens in its step", "a long prompt arrives")
    names = [str(spike.threshold) if spike.threshold else "none" for spike in spikes]
    places = range(len(spikes))
    axes[1].bar([p - 0.2 for p in places], [s.worst for s in spikes], 0.4, color=RED, label="worst step, tokens")
    bars = axes[1].bar([p + 0.2 for p in places], [s.first_token_steps for s in spikes], 0.4, color=BLUE,
                       label="steps to the first token")  # fmt: skip
    axes[1].bar_label(axes[1].containers[0], fontsize=8)
    axes[1].bar_label(bars, fontsize=8)
    axes[1].set_xticks(list(places), names)
    axes[1].set_yscale("log", base=2)
    axes[1].set_ylim(0.7, axes[1].get_ylim()[1] * 8)
    thousands(axes[1].yaxis)
    axes[1].grid(axis="x", visible=False)
    label(axes[1], "long_prefill_token_threshold", title="what chunks cost and save")
    legend(axes[1], loc="upper right")
    reading = (
        "Without chunks one token of the decoding request waits for the whole prompt; with them each waits for one "
        "chunk, and the prompt's own first token comes that many steps later. The tokens computed are the same."
    )
    return Picture("prefill_spikes", "A long prompt beside a decoding request", reading, figure)


@drawn
def budget_knee_picture(result: SweepResult) -> Picture:
    """Steps and throughput against the budget, and what it does to the gaps between tokens."""
    figure, axes = panels(1, 2)
    points = result.along("max_num_batched_tokens")
    budgets = [float(point.values["max_num_batched_tokens"]) for point in points]
    steps = [point.metrics["num_steps"] for point in points]
    axes[0].plot(budgets, steps, "o-", color=GREEN)
    _mark_budget_knee(axes[0], budgets, steps)
    from_zero(axes[0])
    thousands(axes[0].yaxis)
    for metric, style, colour, name in (
        ("p99_ttft_ms", "o-", RED, "p99 TTFT"), ("p99_itl_ms", "s--", BLUE, "p99 ITL"),
    ):  # fmt: skip
        axes[1].plot(budgets, [point.metrics[metric] for point in points], style, color=colour, label=name)
    log_y(axes[1])
    legend(axes[1])
    label(axes[0], "max_num_batched_tokens", "steps for the same work", "steps")
    label(axes[1], "max_num_batched_tokens", "latency", "latency")
    for axis in axes:
        load_scale(axis, budgets, wide=8)
        axis.tick_params(axis="x", labelrotation=35)
    reading = (
        "Below the knee prompts are cut into many steps, each with its fixed cost; above it a larger budget saves "
        "few steps, and the longest steps make whoever is decoding wait."
    )
    return Picture("budget_knee", "How many tokens a step should hold", reading, figure)


def _mark_budget_knee(axis: Any, budgets: list[float], steps: list[float]) -> None:
    """Of the saving, over the logarithm of the budget, as budgets are doubled."""
    if len(budgets) >= 3:
        knee = find_knee([math.log(budget) for budget in budgets], [-count for count in steps], "saturating")
        if knee is not None:
            mark(axis, budgets[knee.index], f"knee at {budgets[knee.index]:g}")


@drawn
def hockey_stick_picture(result: SweepResult) -> Picture:
    """Median and p99 TTFT against the rate on linear axes, where the bend shows its shape."""
    figure, axis = panels()
    for number, (others, points) in enumerate(result.series("rate")):
        colour = CYCLE[number % len(CYCLE)]
        rates = [float(point.values["rate"]) for point in points]
        tail = [point.metrics["p99_ttft_ms"] for point in points]
        axis.plot(rates, tail, "o-", color=colour, label=f"p99, {others}" if others else "p99")
        axis.plot(rates, [p.metrics["median_ttft_ms"] for p in points], "s--", color=colour, ms=4, lw=1.2,
                  label=f"p50, {others}" if others else "p50")  # fmt: skip
        knee = find_knee(rates, tail) if len(rates) >= 3 else None
        if knee is not None:
            axis.plot(knee.x, knee.y, "o", ms=13, mfc="none", mec=colour, mew=1.6)
            axis.annotate(f"knee at {knee.x:g}", (knee.x, knee.y), xytext=(-9, 9), textcoords="offset points",
                          ha="right", va="bottom", fontsize=9, color=colour)  # fmt: skip
    from_zero(axis)
    milliseconds(axis.yaxis)
    legend(axis)
    label(axis, "load (requests per second)", "time to first token")
    reading = (
        "The handle is the engine keeping up; past the knee the queue grows for as long as the run lasts, so the "
        "height of the blade says how long that was, not how slow the engine is."
    )
    return Picture("hockey_stick", "The hockey stick: first token against load", reading, figure)


@drawn
def pool_sizes_picture(result: SweepResult) -> Picture:
    """Steps, and computed tokens that were computed before, against the size of the pool."""
    figure, axes = panels(1, 2)
    points = result.along("num_gpu_blocks")
    blocks = [float(point.values["num_gpu_blocks"]) for point in points]
    axes[0].plot(blocks, [point.metrics["num_steps"] for point in points], "o-", color=GREEN)
    axes[1].plot(blocks, [point.metrics["num_preemptions"] for point in points], "o-", color=ORANGE)
    label(axes[0], "blocks in the pool", "steps for the same work", "steps")
    label(axes[1], "blocks in the pool", "preemptions", "preemptions")
    for axis in axes:
        from_zero(axis)
        thousands(axis.yaxis)
        load_scale(axis, blocks, wide=8)
        axis.tick_params(axis="x", labelrotation=35)
    reading = (
        "A cramped pool runs fewer requests at once and throws away work: every preemption is a prompt and its "
        "answer so far, computed a second time."
    )
    return Picture("pool_sizes", "What a small KV cache costs", reading, figure)
