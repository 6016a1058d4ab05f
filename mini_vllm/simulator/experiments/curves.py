"""One knob turned, or one load raised, and where the curve bends: budget knee, hockey stick, and cramped pools.

Each is a sweep of `sweep.py` with the columns that matter, so its result can be drawn, searched and saved like any.
"""

from collections.abc import Sequence

from mini_vllm.simulator.cost import CostModel, TwoConstantCost
from mini_vllm.simulator.options import SimulationOptions
from mini_vllm.simulator.scenario import Scenario
from mini_vllm.simulator.sweep import Axis, SweepResult, run_sweep
from mini_vllm.simulator.workload import WorkloadOptions

ONE_GPU = TwoConstantCost(fixed_seconds=0.020, per_token_seconds=0.0001)
"""About 8 billion weights on one GPU, in two constants: 20 ms a step, 0.1 ms a token."""

BUDGETS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
RATES = (1, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 24)
POOLS = (130, 160, 200, 300, 500, 1000, 2000)


def budget_knee(
    budgets: Sequence[int] = BUDGETS,
    workload: WorkloadOptions | None = None,
    cost: CostModel = ONE_GPU,
    options: SimulationOptions | None = None,
) -> SweepResult:
    """Total steps, throughput and latency against `max_num_batched_tokens`.

    A larger budget never needs more steps while the pool is ample; what it buys is less and less, and what it costs is
    longer gaps between the tokens of whoever is decoding.
    """
    asked = workload or WorkloadOptions(num_requests=200, rate=4, prompt_len="uniform:200,1800", output_len="64")
    base = options or SimulationOptions(max_num_seqs=64)
    return run_sweep(Scenario(asked, base, cost), [Axis("max_num_batched_tokens", tuple(budgets))])


def hockey_stick(
    rates: Sequence[float] = RATES,
    workload: WorkloadOptions | None = None,
    cost: CostModel = ONE_GPU,
    options: SimulationOptions | None = None,
    max_num_seqs: Sequence[int] = (32, 128),
) -> SweepResult:
    """Latency against the load on offer, for several sizes of the batch: flat, then a knee, then a queue."""
    asked = workload or WorkloadOptions(num_requests=600, rate=1, prompt_len="lognormal:400,0.6", output_len="100")
    base = options or SimulationOptions()
    axes = [Axis("max_num_seqs", tuple(max_num_seqs)), Axis("rate", tuple(rates))]
    return run_sweep(Scenario(asked, base, cost), axes)


def pool_sizes(
    num_blocks: Sequence[int] = POOLS,
    workload: WorkloadOptions | None = None,
    cost: CostModel = ONE_GPU,
    options: SimulationOptions | None = None,
) -> SweepResult:
    """Steps, preemptions and recomputed tokens against the size of the pool, for requests that are all there."""
    asked = workload or WorkloadOptions(num_requests=64, prompt_len="uniform:200,1000", output_len="uniform:50,400")
    base = options or SimulationOptions(max_num_seqs=32)
    return run_sweep(Scenario(asked, base, cost), [Axis("num_gpu_blocks", tuple(num_blocks))])
