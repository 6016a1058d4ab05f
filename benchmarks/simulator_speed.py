"""How fast the simulator runs: steps and request-steps a second on one core, and what a request-step costs.

A request-step is one request in one step's plan. All requests are there from the start, so that the batch is full
until the end: by default 20,000 of them, prompts of 500 and outputs of 200 tokens on average, 256 running. The cost
model is two constants, so that what is timed is the scheduler, the block manager and what the simulator adds. Runs are
repeated and the best is the figure, since other work on the machine only ever adds; all of them are in the JSON.
"""

import argparse
import json
import resource
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mini_vllm.bench.environment import collect_environment
from mini_vllm.bench.noise import CpuMeter
from mini_vllm.simulator.cost import TwoConstantCost
from mini_vllm.simulator.driver import simulate
from mini_vllm.simulator.options import SimulationOptions
from mini_vllm.simulator.workload import WorkloadOptions, make_workload

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-requests", type=int, default=20_000)
    parser.add_argument("--prompt-len", default="uniform:1,999")
    parser.add_argument("--output-len", default="uniform:1,399")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--num-gpu-blocks", type=int, default=30_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output-json", type=Path)
    args = parser.parse_args()
    runs = [measure(args) for _ in range(args.repeats)]
    best = min(runs, key=lambda run: float(run["seconds"]))
    for run in runs:
        print(
            f"{run['seconds']:.2f} s ({run['cpu_seconds']:.2f} s of CPU, others used {run['others_share']:.0%}): "
            f"{run['steps_per_second']:,.0f} steps/s, {run['request_steps_per_second']:,.0f} request-steps/s, "
            f"{run['us_per_request_step']:.2f} us each"
        )
    target = args.output_json or RESULTS / f"simulator_speed-{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
    arguments = {name: str(value) for name, value in vars(args).items()}
    target.write_text(
        json.dumps({"arguments": arguments, "best": best, "runs": runs, "environment": collect_environment()}, indent=1)
        + "\n",
        encoding="utf-8",
    )
    print(f"written to {target}")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    workload = make_workload(
        WorkloadOptions(num_requests=args.num_requests, prompt_len=args.prompt_len, output_len=args.output_len)
    )
    options = SimulationOptions(num_gpu_blocks=args.num_gpu_blocks, max_num_seqs=args.max_num_seqs)
    meter, wall, cpu = CpuMeter().start(), time.perf_counter(), time.process_time()
    result = simulate(options, workload, TwoConstantCost(0.01, 1e-6))
    seconds, cpu_seconds, noise = time.perf_counter() - wall, time.process_time() - cpu, meter.stop()
    replica = result.replicas[0]
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "others_share": noise.others_share or 0.0,
        "num_steps": replica.num_steps,
        "num_request_steps": replica.num_request_steps,
        "mean_running": replica.num_request_steps / replica.num_steps,
        "num_preemptions": replica.num_preemptions,
        "steps_per_second": replica.num_steps / seconds,
        "request_steps_per_second": replica.num_request_steps / seconds,
        "us_per_request_step": seconds / replica.num_request_steps * 1e6,
        "max_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


if __name__ == "__main__":
    main()
