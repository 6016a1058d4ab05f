"""What the simulator predicts, beside what the engine does: the same requests served in real time and simulated.

A step cost is fitted to this machine by the simulator's own calibration, on request sets that are all there from the
start. Then the very same engine serves workloads it was not calibrated on, each several times: requests are added when
they are due and the engine is stepped in between. Each is simulated once, with the same token ids, output lengths and
times of arrival, and the figures are laid side by side; percentiles come from the same functions. Loads are fractions
of the capacity that was measured for that shape of requests: what the engine serves when all are there at once.

`steps` compares seconds of the steps the real run took with what the fitted cost says of these very plans: the part of
an error that comes from the cost and not from the queue. TTFT is counted from when a request was due.
"""

import argparse
import json
import logging
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from fidelity_requests import SHAPES, Listed, Shape, Timed, make_requests, small_pool
from serving_report import table

from mini_vllm.bench.datasets import random_tokens
from mini_vllm.bench.driver import StepNote, core_of, metered
from mini_vllm.bench.environment import collect_environment
from mini_vllm.bench.metrics import RequestTimeline, request_metrics
from mini_vllm.bench.noise import CpuMeter, NoiseReport
from mini_vllm.bench.throughput import usable_token_ids
from mini_vllm.engine.arg_utils import EngineArgs
from mini_vllm.engine.llm_engine import LLMEngine
from mini_vllm.sampling_params import RequestOutputKind, SamplingParams
from mini_vllm.simulator.calibrate import calibrate
from mini_vllm.simulator.cost import StepLoad
from mini_vllm.simulator.driver import simulate
from mini_vllm.simulator.fitted import FittedCost
from mini_vllm.simulator.options import SimulationOptions
from mini_vllm.simulator.results import SimulationResult

RESULTS = Path(__file__).resolve().parent / "results"
FIGURES = {
    "median_ttft_ms": "TTFT p50 ms", "p99_ttft_ms": "TTFT p99 ms", "median_tpot_ms": "TPOT p50 ms",
    "median_e2el_ms": "E2E p50 ms", "output_throughput": "tokens/s",
}  # fmt: skip
TEMPERATURE = 1.0
SPIN_SECONDS = 0.001
"""Sleeping is this inexact; the rest of a wait is spent looking at the clock."""
WARM_UP_SHARE = 5 / 8
"""Of the context: as long as the longest prompts."""
LEAST_REQUESTS = 8
MOST_REQUESTS = 4000


# --- the real engine ------------------------------------------------------------------------------------------


@dataclass
class Served:
    """One real run. duration: from the first arrival to the last token."""

    timelines: list[RequestTimeline]
    notes: list[StepNote]
    duration: float
    num_preemptions: int
    prefix_cache_hits: int
    late_seconds: float
    noise: NoiseReport

    def metrics(self) -> dict[str, Any]:
        return request_metrics(self.timelines, self.duration) | {
            "num_steps": len(self.notes),
            "busy_seconds": sum(note.seconds for note in self.notes),
            "num_preemptions": self.num_preemptions,
            "prefix_cache_hits": self.prefix_cache_hits,
            "median_late_ms": self.late_seconds * 1e3,
        }


def serve(engine: LLMEngine, requests: Sequence[Timed], clock: Callable[[], float] = time.perf_counter) -> Served:
    """In real time: add what is due, step, until all have ended. Raises `RuntimeError` when one fails."""
    engine.reset_prefix_cache()
    core, waiting, lateness = core_of(engine), list(enumerate(requests))[::-1], []
    timelines: dict[str, RequestTimeline] = {}
    with metered(core) as meter:
        before, cpu, begin = core.scheduler.stats(), CpuMeter().start(), clock()
        while waiting or engine.has_unfinished_requests():
            now = clock() - begin
            while waiting and waiting[-1][1].arrival <= now:
                index, timed = waiting.pop()
                timelines[str(index)] = RequestTimeline(str(index), len(timed.prompt), begin + timed.arrival)
                engine.add_request(str(index), {"prompt_token_ids": timed.prompt}, params_of(timed))
                lateness.append(now - timed.arrival)
            if engine.has_unfinished_requests():
                step(engine, meter.notes, timelines, clock)
            elif waiting:
                wait_until(begin + waiting[-1][1].arrival, clock)
        noise, after = cpu.stop(), core.scheduler.stats()
    done = list(timelines.values())
    if failed := [timeline.error or timeline.request_id for timeline in done if not timeline.completed]:
        raise RuntimeError(f"{len(failed)} requests failed: {failed[0]}")
    return Served(
        done, meter.notes, max(timeline.output_times[-1] for timeline in done) - begin - requests[0].arrival,
        after.num_preemptions - before.num_preemptions, after.prefix_cache_hits - before.prefix_cache_hits,
        float(np.median(lateness)), noise,
    )  # fmt: skip


def step(
    engine: LLMEngine, notes: list[StepNote], timelines: dict[str, RequestTimeline], clock: Callable[[], float]
) -> None:
    """One step of the engine, noted as calibration notes it."""
    num_notes, begin = len(notes), clock()
    outputs = engine.step()
    now = clock()
    if len(notes) > num_notes:
        notes[-1].seconds = now - begin
    for output in outputs:
        timeline, completion = timelines[output.request_id], output.outputs[0]
        if completion.token_ids:
            timeline.output_times.append(now)
            timeline.output_counts.append(len(completion.token_ids))
        if output.finished:
            timeline.finish_reason, timeline.error = completion.finish_reason, output.error


def wait_until(when: float, clock: Callable[[], float]) -> None:
    if (left := when - clock() - SPIN_SECONDS) > 0:
        time.sleep(left)
    while clock() < when:
        pass


def params_of(timed: Timed) -> SamplingParams:
    return SamplingParams(
        temperature=TEMPERATURE, max_tokens=timed.output_len, ignore_eos=True, detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )  # fmt: skip


@contextmanager
def engine_of(args: argparse.Namespace, pool: int | None = None) -> Iterator[LLMEngine]:
    """Of the arguments. pool: KV blocks instead of what the engine takes."""
    model: dict[str, Any] = {"model": args.model} if args.model else {}
    engine = LLMEngine.from_engine_args(
        EngineArgs(
            **model,
            num_threads=args.threads,
            max_num_seqs=args.max_num_seqs,
            max_model_len=args.max_model_len,
            num_gpu_blocks_override=pool,
            disable_log_stats=True,
        )
    )
    try:
        yield engine
    finally:
        engine.shutdown()


def options_of(engine: LLMEngine) -> SimulationOptions:
    """The simulator's arguments, read off the engine that is there."""
    core = core_of(engine)
    config, cache = core.scheduler.config, core.executor.kv_cache_config()
    return SimulationOptions(
        num_gpu_blocks=cache.num_blocks,
        block_size=core.scheduler.kv.block_size,
        num_kv_groups=len(cache.groups),
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        long_prefill_token_threshold=config.long_prefill_token_threshold,
        max_model_len=engine.max_model_len,
        enable_prefix_caching=core.scheduler.kv.enable_caching,
        scheduling_policy=config.policy,
        preemption_policy=config.preemption_policy,
    )


# --- the comparison -------------------------------------------------------------------------------------------


def compare(real: Sequence[dict[str, Any]], simulated: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Of each figure: mean of the real runs, (max - min) / mean among them, the simulated one, and its error."""
    rows = {}
    for name in FIGURES:
        values = [float(run[name]) for run in real]
        mean = sum(values) / len(values)
        rows[name] = {
            "real": mean,
            "spread_percent": 100 * (max(values) - min(values)) / mean,
            "simulated": simulated[name],
            "error_percent": 100 * (simulated[name] / mean - 1),
        }
    return rows


def step_error(cost: FittedCost, notes: Sequence[StepNote]) -> dict[str, float]:
    """Of the steps that a real run took, each beside what the cost says of its plan, in percent."""
    seconds = np.array([note.seconds for note in notes])
    predicted = np.array([cost.step_seconds(StepLoad.of(note.chunks, note.sampled_rows)) for note in notes])
    return {
        "total_error_percent": float(100 * (predicted.sum() / seconds.sum() - 1)),
        "median_error_percent": float(100 * np.median(predicted / seconds - 1)),
    }


@dataclass
class Bench:
    """One engine, its simulated twin, and what they are asked."""

    engine: LLMEngine
    cost: FittedCost
    args: argparse.Namespace

    def __post_init__(self) -> None:
        self.options = options_of(self.engine)
        self.token_ids = usable_token_ids(self.engine)

    def requests(self, shape: Shape, count: float, rate: float | None) -> list[Timed]:
        number = min(max(round(count), LEAST_REQUESTS), MOST_REQUESTS)
        return make_requests(shape, number, rate, self.engine.max_model_len, self.token_ids, self.args.seed)

    def simulate(self, name: str, requests: Sequence[Timed]) -> SimulationResult:
        return simulate(self.options, Listed(requests, name), self.cost)

    def shape(self, shape: Shape) -> list[dict[str, Any]]:
        """All there at once, which measures the capacity; then each load as a fraction of that."""
        few = self.requests(shape, 2 * self.args.max_num_seqs, None)
        serve(self.engine, few[:LEAST_REQUESTS])  # warms an engine that was not calibrated on
        # the prediction only decides how many requests fill the time; the capacity is measured
        expected = self.simulate(shape.name, few).metrics()["request_throughput"]
        at_once = self.workload(shape, self.requests(shape, expected * self.args.seconds / 3, None), None)
        capacity = float(np.mean([run["request_throughput"] for run in at_once["runs"]]))
        rows = [at_once]
        for load in shape.loads:
            rate = load * capacity
            rows.append(self.workload(shape, self.requests(shape, rate * self.args.seconds, rate), load))
            rows[-1] |= {"rate": rate, "capacity": capacity}
        return rows

    def workload(self, shape: Shape, requests: list[Timed], load: float | None) -> dict[str, Any]:
        """Real runs and the simulated one, and how they compare."""
        name = f"{shape.name}, at once" if load is None else f"{shape.name}, load {load:g}"
        served = [serve(self.engine, requests) for _ in range(self.args.runs)]
        runs = [run.metrics() for run in served]
        begin = time.perf_counter()
        simulated = self.simulate(name, requests).metrics()
        row = {
            "name": name, "shape": asdict(shape), "load": load, "num_requests": len(requests),
            "num_gpu_blocks": self.options.num_gpu_blocks, "compared": compare(runs, simulated),
            "steps": [step_error(self.cost, run.notes) for run in served], "runs": runs,
            "noise": [asdict(run.noise) | {"noisy": run.noise.noisy} for run in served], "simulated": simulated,
            "simulation_seconds": time.perf_counter() - begin,
        }  # fmt: skip
        print_workload(row)
        return row


def warm_up(engine: LLMEngine, seconds: float) -> int:
    """Prompts of every length in turn, for as long as that: the first step of a new size costs more than all later.

    Returns the longest that was served.
    """
    token_ids, begin, length = usable_token_ids(engine), time.perf_counter(), 0
    rng = random.Random(0)
    while length < WARM_UP_SHARE * engine.max_model_len and time.perf_counter() - begin < seconds:
        length += 1
        serve(engine, [Timed(0.0, random_tokens(rng, token_ids, length), 2)])
    return length


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Calibrate, then every shape."""
    rows: list[dict[str, Any]] = []
    shapes = [shape for shape in SHAPES if not args.shapes or shape.name in args.shapes]
    with engine_of(args) as engine:
        warmed = warm_up(engine, max(args.seconds, 3.0))
        meter = CpuMeter().start()
        cost = calibrate(engine, temperature=TEMPERATURE, detokenize=False, repeats=args.calibrate_repeats)
        noise, bench = meter.stop(), Bench(engine, cost, args)
        print_quality(cost, noise)
        context = engine.max_model_len
        for shape in shapes:
            if shape.pool is None:
                rows += bench.shape(shape)
    for shape in shapes:  # the cost stays: what a step takes does not depend on the pool
        if shape.pool is not None:
            with engine_of(args, small_pool(shape, bench.options, context)) as engine:
                rows += Bench(engine, cost, args).shape(shape)
    calibration = cost.describe() | {"warmed_up_to": warmed, "noise": asdict(noise) | {"noisy": noise.noisy}}
    engine_options = {k: v for k, v in vars(bench.options).items() if k != "tenant_weights"}
    return {"calibration": calibration, "engine": engine_options, "workloads": rows}


# --- reporting ------------------------------------------------------------------------------------------------


def print_quality(cost: FittedCost, noise: NoiseReport) -> None:
    quality, others = cost.quality, noise.others_share or 0.0
    print(
        f"calibrated on {quality['num_steps']:.0f} steps: median relative error "
        f"{quality['median_relative_error']:.1%}, 90 % within {quality['p90_relative_error']:.1%}; "
        f"others used {others:.0%} of the CPUs",
        flush=True,
    )


def print_workload(row: dict[str, Any]) -> None:
    others = max((noise["others_share"] or 0.0) for noise in row["noise"])
    errors = ", ".join(f"{each['total_error_percent']:+.1f} %" for each in row["steps"])
    preemptions = "/".join(str(run["num_preemptions"]) for run in row["runs"])
    title = (
        f"\n{row['name']}: {row['num_requests']} requests in {row['runs'][0]['duration']:.1f} s, preemptions "
        f"{preemptions} (simulated {row['simulated']['num_preemptions']}), steps {errors}, others used {others:.0%}"
    )
    cells = [
        [label, f"{found['real']:.2f}", f"{found['spread_percent']:.1f} %", f"{found['simulated']:.2f}",
         f"{found['error_percent']:+.1f} %"]
        for name, label in FIGURES.items() for found in [row["compared"][name]]
    ]  # fmt: skip
    print(table(title, ["figure", "real", "spread", "simulated", "error"], cells), flush=True)


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Errors of every workload, with the spread of the real runs in brackets."""
    lines = []
    for row in rows:
        found = [row["compared"][name] for name in FIGURES]
        lines.append([row["name"], *(f"{f['error_percent']:+.1f} ({f['spread_percent']:.1f})" for f in found)])
    return table("\nerror in percent (spread of the real runs)", ["workload", *FIGURES.values()], lines)


def machine_name(environment: dict[str, Any]) -> str:
    """Of the processor, as part of a file's name."""
    cpu = environment["cpu"]
    return re.sub(r"[^a-z0-9]+", "-", f"{cpu['model']} {cpu['cpus_usable']}cpu".lower()).strip("-")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default=None, help="model folder; default: the bundled model")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--runs", type=int, default=2, help="real runs of each workload")
    parser.add_argument("--seconds", type=float, default=13.0, help="of arrivals in each; a third when all at once")
    parser.add_argument("--calibrate-repeats", type=int, default=3)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--max-model-len", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shapes", nargs="+", choices=[shape.name for shape in SHAPES], help="only these")
    parser.add_argument("--quick", action="store_true", help="does it run? Seconds, and figures that say little")
    parser.add_argument("--output", type=Path, default=None, help="JSON file; default: in benchmarks/results/")
    parser.add_argument("--no-save", action="store_true", help="print only")
    args = parser.parse_args(argv)
    if args.runs < 1 or not args.seconds > 0:
        parser.error("--runs must be at least 1, and --seconds above 0")
    if args.quick:
        args.runs, args.seconds, args.calibrate_repeats = 2, 0.7, 1
        args.max_num_seqs, args.max_model_len = 8, 256
    return args


def main() -> None:
    args = parse_args()
    logging.getLogger("mini_vllm").setLevel(logging.WARNING)
    begin = time.perf_counter()
    report = measure(args)
    print(summary(report["workloads"]))
    print(f"\n{time.perf_counter() - begin:.0f} s in all")
    environment = collect_environment()
    del environment["system"]["executable"]  # where this machine keeps it is of no use to others
    arguments = {k: v for k, v in vars(args).items() if k not in ("output", "model")}
    arguments["model"] = Path(args.model).name if args.model else "bundled"
    whole = {
        "benchmark": "simulator_fidelity", "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "arguments": arguments, **report, "environment": environment,
    }  # fmt: skip
    if not args.no_save:
        name = f"simulator_fidelity-{datetime.now(UTC):%Y%m%d-%H%M%S}-{machine_name(environment)}.json"
        path = args.output or RESULTS / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        print(f"written to {path}")


if __name__ == "__main__":
    main()
