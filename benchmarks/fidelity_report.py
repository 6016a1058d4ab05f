"""What `simulator_fidelity.py` finds of a workload, and how it is printed."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from serving_report import table

from mini_vllm.bench.driver import StepNote
from mini_vllm.simulator.cost import StepLoad
from mini_vllm.simulator.fitted import FittedCost

FIGURES = {
    "median_ttft_ms": "TTFT p50 ms", "p99_ttft_ms": "TTFT p99 ms", "median_tpot_ms": "TPOT p50 ms",
    "p99_tpot_ms": "TPOT p99 ms", "median_e2el_ms": "E2E p50 ms", "p99_e2el_ms": "E2E p99 ms",
    "output_throughput": "tokens/s",
}  # fmt: skip
Metrics = dict[str, Any]


def compare(real: Sequence[Metrics], simulated: Metrics, same_speed: Sequence[Metrics] = ()) -> dict[str, Metrics]:
    """Of each figure: median of the real runs, (max - min) / median among them, the simulated one, and its error.

    same_speed: simulations under the weather of each real run; their error is the median over the runs.
    """
    rows: dict[str, Metrics] = {}
    for name in FIGURES:
        values = [float(run[name]) for run in real]
        middle = float(np.median(values))
        rows[name] = {
            "real": middle,
            "spread_percent": 100 * (max(values) - min(values)) / middle,
            "simulated": simulated[name],
            "error_percent": 100 * (simulated[name] / middle - 1),
        }
        if same_speed:
            errors = [100 * (float(run[name]) / value - 1) for run, value in zip(same_speed, values, strict=True)]
            rows[name]["same_speed_error_percent"] = float(np.median(errors))
    return rows


def step_error(cost: FittedCost, notes: Sequence[StepNote]) -> dict[str, float]:
    """Of the steps that a real run took, each beside what the cost says of its plan, in percent."""
    seconds = np.array([note.seconds for note in notes])
    predicted = np.array([cost.step_seconds(StepLoad.of(note.chunks, note.sampled_rows)) for note in notes])
    return {
        "total_error_percent": float(100 * (predicted.sum() / seconds.sum() - 1)),
        "median_error_percent": float(100 * np.median(predicted / seconds - 1)),
    }


def doubts(row: Metrics) -> list[str]:
    """What the name of a workload says and its real runs did not do: then its figures say nothing of that."""
    runs, shape, rate, found = row["runs"], row["shape"], row.get("rate"), []
    if shape["pool"] is not None and min(run["num_preemptions"] for run in runs) == 0:
        found.append("nobody was preempted, so the pool was not small")
    if shape["shared"] and min(run.get("prefix_hit_rate", 1.0) for run in runs) == 0:
        found.append("no prefix was found in the cache")
    served = max(run["request_throughput"] for run in runs)
    if (row["load"] or 0) > 1 and served >= rate:
        found.append(f"the engine kept up: {served:.2f} requests/s of {rate:.2f}, so this is not past the knee")
    return found


def print_quality(cost: FittedCost, others: float) -> None:
    quality = cost.quality
    print(
        f"calibrated on {quality['num_steps']:.0f} kinds of steps: median relative error "
        f"{quality['median_relative_error']:.1%}, 90 % within {quality['p90_relative_error']:.1%}; others used "
        f"{others:.0%} of the CPUs; {quality['disturbed_share']:.0%} of the steps were slowed, "
        f"all on average by {cost.slowdown:.3f}",
        flush=True,
    )


def print_workload(row: Metrics) -> None:
    notes = [f"{row['num_requests']} requests in {row['runs'][0]['duration']:.1f} s"]
    if row["steps"]:
        notes.append("steps " + ", ".join(f"{each['total_error_percent']:+.1f} %" for each in row["steps"]))
        notes.append("machine slowed by " + ", ".join(f"{slowdown:.2f}" for slowdown in row["slowdown"]))
        preemptions = "/".join(str(run["num_preemptions"]) for run in row["runs"])
        notes.append(f"preemptions {preemptions} (simulated {row['simulated']['num_preemptions']})")
        hits = "/".join(f"{run['prefix_hit_rate']:.0%}" for run in row["runs"])
        notes.append(f"found in the prefix cache {hits} (simulated {row['simulated']['token_prefix_hit_rate']:.0%})")
    others = max((noise["others_share"] or 0.0) for noise in row["noise"])
    title = f"\n{row['name']}: {', '.join(notes)}, others used {others:.0%}"
    cells = [
        [label, f"{found['real']:.2f}", f"{found['spread_percent']:.1f} %", f"{found['simulated']:.2f}",
         f"{found['error_percent']:+.1f} %", _percent(found.get("same_speed_error_percent"))]
        for name, label in FIGURES.items() for found in [row["compared"][name]]
    ]  # fmt: skip
    print(table(title, ["figure", "real", "spread", "simulated", "error", "same speed"], cells), flush=True)
    for doubt in row["doubts"]:
        print(f"NOT WHAT IT IS CALLED: {doubt}", flush=True)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:+.1f} %"


def summary(rows: Sequence[Metrics], kind: str = "error_percent") -> str:
    """Errors of every workload, with the spread of the real runs in brackets."""
    lines = []
    for row in rows:
        found = [row["compared"][name] for name in FIGURES]
        if all(kind in each for each in found):
            lines.append([row["name"], *(f"{f[kind]:+.1f} ({f['spread_percent']:.1f})" for f in found)])
    what = "error" if kind == "error_percent" else "error of a machine of the same speed"
    return table(f"\n{what} in percent (spread of the real runs)", ["workload", *FIGURES.values()], lines)
