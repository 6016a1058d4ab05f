"""What the simulator predicts, beside what the engine does: the same requests served in real time and simulated.

A step cost is fitted to this machine by the simulator's own calibration, on request sets of its own. Then the very same
engine serves workloads it was not calibrated on, each several times: requests are added when they are due and the
engine is stepped in between. Each is simulated with the same token ids, output lengths and times of arrival, and the
figures are laid side by side; percentiles come from the same functions. Workloads: mixed lengths below and past the
knee, long prompts, prefixes shared in groups, and a pool so small that requests are preempted. Whether the real runs
did what the name says is checked and recorded (`doubts`). Loads are fractions of the capacity that was measured for
that shape of requests: what the engine serves when all are there at once. Part `server` sends the first workload to
`mini-vllm serve` over HTTP. All of it takes four to five minutes.

TTFT is counted from when a request was due. `steps` compares seconds of the steps the real run took with what the
fitted cost says of these very plans: the part of an error that comes from the cost and not from the queue.
`same speed` is the error of a simulation whose steps are slowed as the machine was during that run, by a probe that is
not the engine (`fidelity_weather.py`).
"""

import argparse
import json
import logging
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from fidelity_engine import TEMPERATURE, engine_flags, engine_of, options_of, serve, warm_up
from fidelity_report import compare, doubts, print_quality, print_workload, step_error, summary
from fidelity_requests import SHAPES, Listed, Shape, Timed, make_requests, small_pool
from fidelity_server import Client, client_of, outside_seconds
from fidelity_weather import Climate, Weather, expose, learn

from mini_vllm.bench.environment import collect_environment
from mini_vllm.bench.noise import CpuMeter
from mini_vllm.bench.throughput import usable_token_ids
from mini_vllm.engine.llm_engine import LLMEngine
from mini_vllm.simulator.calibrate import calibrate
from mini_vllm.simulator.driver import Simulation
from mini_vllm.simulator.fitted import FittedCost

RESULTS = Path(__file__).resolve().parent / "results"
LEAST_REQUESTS = 8
MOST_REQUESTS = 4000
IDLE_REQUESTS = 16
"""Sent to an idle server one by one, to see what HTTP adds to a first token."""


@dataclass
class Bench:
    """One engine, its simulated twin, and what they are asked."""

    engine: LLMEngine
    cost: FittedCost
    climate: Climate
    args: argparse.Namespace

    def __post_init__(self) -> None:
        self.options = options_of(self.engine)
        self.token_ids = usable_token_ids(self.engine)

    def requests(self, shape: Shape, count: float, rate: float | None) -> list[Timed]:
        number = min(max(round(count), LEAST_REQUESTS), MOST_REQUESTS)
        return make_requests(shape, number, rate, self.engine.max_model_len, self.token_ids, self.args.seed)

    def simulate(
        self, requests: Sequence[Timed], weather: Weather | None = None, outside: float = 0.0
    ) -> dict[str, Any]:
        """Figures. weather: of a real run. outside: seconds of a request outside the engine."""
        options = replace(self.options, request_latency_ms=1e3 * outside)
        simulation = Simulation(options, Listed(requests), self.cost)
        if weather is not None:
            expose(simulation, weather)
        return simulation.run().metrics()

    def at_once(self, shape: Shape) -> dict[str, Any]:
        """All there from the start, which measures the capacity: requests a second."""
        few = self.requests(shape, 2 * self.args.max_num_seqs, None)
        serve(self.engine, few[:LEAST_REQUESTS])  # warms an engine that was not calibrated on
        # the prediction only decides how many requests fill the time; the capacity is measured
        expected = self.simulate(few)["request_throughput"]
        row = self.workload(shape, self.requests(shape, expected * self.args.seconds / 3, None), None)
        return row | {"capacity": float(np.median([run["request_throughput"] for run in row["runs"]]))}

    def shape(self, shape: Shape) -> list[dict[str, Any]]:
        """At once; then each load as a fraction of that capacity."""
        rows = [self.at_once(shape)]
        capacity = rows[0]["capacity"]
        for load in self.args.loads or shape.loads:
            rate = load * capacity
            rows.append(self.workload(shape, self.requests(shape, rate * self.args.seconds, rate), load, rate))
            rows[-1] |= {"capacity": capacity}
        return rows

    def workload(
        self, shape: Shape, requests: list[Timed], load: float | None, rate: float | None = None
    ) -> dict[str, Any]:
        """Real runs, the simulated one and those under the weather of each real run, and how they compare."""
        served = [serve(self.engine, requests) for _ in range(self.args.runs)]
        runs, weathers = [run.metrics() for run in served], [Weather.of(run.probes, self.climate) for run in served]
        simulated = self.simulate(requests)
        row = {
            "name": f"{shape.name}, " + ("at once" if load is None else f"load {load:g}"), "shape": asdict(shape),
            "load": load, "rate": rate, "num_requests": len(requests), "num_gpu_blocks": self.options.num_gpu_blocks,
            "compared": compare(runs, simulated, [self.simulate(requests, weather) for weather in weathers]),
            "steps": [step_error(self.cost, run.notes) for run in served],
            "slowdown": [weather.mean for weather in weathers], "runs": runs,
            "noise": [asdict(run.noise) | {"noisy": run.noise.noisy} for run in served], "simulated": simulated,
        }  # fmt: skip
        row["doubts"] = doubts(row)
        print_workload(row)
        return row

    # -- against a server --------------------------------------------------------------------------------

    def server(self, shape: Shape, capacity: float) -> list[dict[str, Any]]:
        """The loads of a shape, as fractions of what the engine serves in this process, over HTTP."""
        rows = []
        with client_of(engine_flags(self.args), TEMPERATURE) as client:
            client.serve(self.requests(shape, IDLE_REQUESTS, None))
            outside = self.outside(client, shape)
            print(f"\nserver: {1e3 * outside:.2f} ms of a request are outside the engine", flush=True)
            for load in self.args.loads or shape.loads:
                rate = load * capacity
                requests = self.requests(shape, rate * self.args.seconds, rate)
                rows.append(self.over_http(client, shape, requests, load, rate, outside))
        return rows

    def outside(self, client: Client, shape: Shape) -> float:
        """Seconds of a request outside the engine, from first tokens of a server that has nothing else to do."""
        requests = [Timed(0.0, timed.prompt[:8], 2) for timed in self.requests(shape, IDLE_REQUESTS, None)]
        predicted = [self.simulate([timed])["median_ttft_ms"] / 1e3 for timed in requests]
        return outside_seconds(client.idle_latencies(requests), predicted)

    def over_http(
        self, client: Client, shape: Shape, requests: list[Timed], load: float, rate: float, outside: float
    ) -> dict[str, Any]:
        served = [client.serve(requests) for _ in range(self.args.runs)]
        runs = [run.metrics() for run in served]
        simulated = self.simulate(requests, outside=outside)
        row = {
            "name": f"server, {shape.name}, load {load:g}", "shape": asdict(shape), "load": load, "rate": rate,
            "num_requests": len(requests), "request_latency_ms": 1e3 * outside, "compared": compare(runs, simulated),
            "steps": [], "runs": runs, "noise": [asdict(run.noise) | {"noisy": run.noise.noisy} for run in served],
            "simulated": simulated,
        }  # fmt: skip
        row["doubts"] = doubts(row)
        print_workload(row)
        return row


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Calibrate, then every shape."""
    rows: list[dict[str, Any]] = []
    shapes = [shape for shape in SHAPES if not args.shapes or shape.name in args.shapes]
    with engine_of(args) as engine:
        cost, climate, about = prepare(engine, args)
        bench = Bench(engine, cost, climate, args)
        for shape in shapes:
            if shape.pool is None and "engine" in args.part:
                rows += bench.shape(shape)
        if "server" in args.part:
            first = next((row for row in rows if row["load"] is None), None) or bench.at_once(shapes[0])
            rows += bench.server(shapes[0], first["capacity"])
    for shape in shapes:  # the cost stays: what a step takes does not depend on the pool
        if shape.pool is not None and "engine" in args.part:
            with engine_of(args, small_pool(shape, bench.options, engine.max_model_len)) as small:
                rows += Bench(small, cost, climate, args).shape(shape)
    engine_options = {k: v for k, v in vars(bench.options).items() if k != "tenant_weights"}
    return {"calibration": about, "engine": engine_options, "workloads": rows}


def prepare(engine: LLMEngine, args: argparse.Namespace) -> tuple[FittedCost, Climate, dict[str, Any]]:
    """The cost of a step, how disturbances of this machine show in it, and both for the report."""
    warmed = warm_up(engine, min(args.seconds, 3.0))
    meter = CpuMeter().start()
    if args.cost_file:
        cost = FittedCost.load(args.cost_file)
    else:
        cost = calibrate(engine, temperature=TEMPERATURE, detokenize=False, seconds=args.calibrate_seconds)
    noise = meter.stop()
    print_quality(cost, noise.others_share or 0.0)
    climate = learn(engine, usable_token_ids(engine), min(args.seconds, 8.0))
    before, after = climate.left
    print(
        f"disturbances of equal steps: {before:.1%}; {after:.1%} are left when a step slows as the probe to the power "
        f"of {climate.exponent:.2f}",
        flush=True,
    )
    if args.save_cost_file:
        cost.save(args.save_cost_file)
    noises = asdict(noise) | {"noisy": noise.noisy}
    return cost, climate, cost.describe() | {"warmed_up_to": warmed, "noise": noises, "climate": asdict(climate)}


def machine_name(environment: dict[str, Any]) -> str:
    """Of the processor, as part of a file's name."""
    cpu = environment["cpu"]
    return re.sub(r"[^a-z0-9]+", "-", f"{cpu['model']} {cpu['cpus_usable']}cpu".lower()).strip("-")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default=None, help="model folder; default: the bundled model")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--part", nargs="+", choices=("engine", "server"), default=["engine", "server"])
    parser.add_argument("--runs", type=int, default=2, help="real runs of each workload")
    parser.add_argument("--seconds", type=float, default=8.0, help="of arrivals in each; a third when all at once")
    parser.add_argument("--calibrate-seconds", type=float, default=45.0)
    parser.add_argument("--cost-file", default=None, help="a fitted cost of this machine, instead of calibrating")
    parser.add_argument("--save-cost-file", default=None, help="keep the fitted cost here")
    parser.add_argument("--loads", type=float, nargs="+", help="of the capacity, in place of each shape's own")
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--max-model-len", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    names = [shape.name for shape in SHAPES]
    parser.add_argument("--workloads", dest="shapes", nargs="+", choices=names, help="only these; default: all")
    parser.add_argument("--quick", action="store_true", help="does it run? Seconds, and figures that say little")
    parser.add_argument("--output", type=Path, default=None, help="JSON file; default: in benchmarks/results/")
    parser.add_argument("--no-save", action="store_true", help="print only")
    args = parser.parse_args(argv)
    if args.runs < 1 or not args.seconds > 0:
        parser.error("--runs must be at least 1, and --seconds above 0")
    if args.quick:
        args.runs, args.seconds, args.calibrate_seconds = 2, 0.7, 1.0
        args.max_num_seqs, args.max_model_len = 8, 256
    return args


def main() -> None:
    args = parse_args()
    logging.getLogger("mini_vllm").setLevel(logging.WARNING)
    begin = time.perf_counter()
    report = measure(args)
    for kind in ("error_percent", "same_speed_error_percent"):
        print(summary(report["workloads"], kind))
    print(f"\n{time.perf_counter() - begin:.0f} s in all")
    environment = collect_environment()
    del environment["system"]["executable"]  # where this machine keeps it is of no use to others
    arguments = {k: v for k, v in vars(args).items() if k not in ("output", "model", "cost_file", "save_cost_file")}
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
