"""Makes the pictures of docs/simulator.md: `python scripts/simulator_pictures.py [FOLDER]` (default: docs/images).

Everything is simulated, so the same version makes the same pictures anywhere, in about a minute.
"""

import os
import sys
from pathlib import Path

from mini_vllm.simulator.constraints import parse_constraint
from mini_vllm.simulator.experiments import (
    batch_stacks,
    budget_knee,
    hockey_stick,
    kv_work_curve,
    pool_sizes,
    prefill_spike,
)
from mini_vllm.simulator.options import SimulationOptions
from mini_vllm.simulator.planner.hardware import hardware_preset
from mini_vllm.simulator.planner.options import PlanOptions
from mini_vllm.simulator.planner.presets import preset_geometry
from mini_vllm.simulator.planner.setup import Setup
from mini_vllm.simulator.plots import experiments as draw
from mini_vllm.simulator.plots.runs import run_pictures
from mini_vllm.simulator.plots.style import Picture
from mini_vllm.simulator.plots.sweeps import (
    capacity_search,
    latency_against_load,
    slo_attainment,
    throughput_against_latency,
)
from mini_vllm.simulator.results import SLO
from mini_vllm.simulator.scenario import Scenario
from mini_vllm.simulator.sweep import parse_axis, run_sweep
from mini_vllm.simulator.workload import WorkloadOptions

GOALS = SLO(ttft_ms=1000, tpot_ms=50)


def scenario(**changes: object) -> Scenario:
    """Llama 3 8B on an A100 with 80 GB: chats of log-normal lengths."""
    setup = Setup(preset_geometry("llama-3-8b"), hardware_preset("a100-80g"), PlanOptions(max_model_len=8192))
    base = WorkloadOptions(num_requests=600, rate=8, prompt_len="lognormal:800,0.8,6000",
                           output_len="lognormal:250,0.6,2000")  # fmt: skip
    return Scenario(base, SimulationOptions(), None, setup, GOALS).with_values(changes)  # type: ignore[arg-type]


def one_run() -> list[Picture]:
    """With a pool too small for it, so that there is something to see."""
    changes = {"num_gpu_blocks": 4000, "max_num_seqs": 128, "rate": 10, "num_requests": 1500,
               "shared_prefix_tokens": 512, "num_prefix_groups": 40, "prefix_skew": 1.0}  # fmt: skip
    return run_pictures(scenario(**changes).run(), GOALS)


def load_sweep(processes: int) -> list[Picture]:
    base = scenario(max_num_seqs=128)
    result = run_sweep(base, [parse_axis("rate=1,2,4,6,8,10,12,14,16,18,20")], processes=processes)
    return [latency_against_load(result, "rate", GOALS.ttft_ms), slo_attainment(result)]


def grid(processes: int) -> list[Picture]:
    axes = [parse_axis("max_num_seqs=16,32,64,128,256"), parse_axis("max_num_batched_tokens=512,2048,8192")]
    return [throughput_against_latency(run_sweep(scenario(rate=12), axes, processes=processes), cost="p99_itl_ms")]


def capacity() -> list[Picture]:
    found = scenario(max_num_seqs=128).capacity([parse_constraint("p99_ttft_ms<=1000")], lowest=1, tolerance=0.05)
    return [capacity_search(found)]


def small_experiments() -> list[Picture]:
    return [
        draw.kv_work_picture(kv_work_curve(range(1, 2001, 10))),
        draw.batch_stacks_picture(batch_stacks(), 8),
        draw.prefill_spike_picture([prefill_spike(threshold) for threshold in (0, 128, 64, 32, 16)]),
        draw.budget_knee_picture(budget_knee()),
        draw.hockey_stick_picture(hockey_stick()),
        draw.pool_sizes_picture(pool_sizes()),
    ]


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images")
    processes = os.cpu_count() or 1
    for pictures in (one_run(), load_sweep(processes), grid(processes), capacity(), small_experiments()):
        for picture in pictures:
            (path,) = picture.save(folder, ["svg"])
            print(path)


if __name__ == "__main__":
    main()
