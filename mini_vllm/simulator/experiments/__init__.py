"""Small experiments, each a function that returns numbers: one idea at a time, on the engine's own scheduler.

`work` counts what a KV cache saves, `steps` shows what each step computed (batch stacks, spikes of latency and what
chunking does to them), `curves` turns one knob and looks at the bend. `plots.experiments` draws them all.
"""

from mini_vllm.simulator.experiments.curves import budget_knee, hockey_stick, pool_sizes
from mini_vllm.simulator.experiments.steps import PrefillSpike, Step, batch_stacks, prefill_spike, serve
from mini_vllm.simulator.experiments.work import KVWork, kv_work, kv_work_curve

__all__ = [
    "KVWork", "PrefillSpike", "Step", "batch_stacks", "budget_knee", "hockey_stick", "kv_work", "kv_work_curve",
    "pool_sizes", "prefill_spike", "serve",
]  # fmt: skip
