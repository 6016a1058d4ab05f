"""The floor of a task: bytes moved over bandwidth, operations over the arithmetic peak, whichever takes longer.

Bytes and operations are counted from the shape alone by the package's own `bench/cost.py`: every weight once a step in
the width it is stored in, each sequence's keys and values once a step (in 16 bits), nothing else. Ceilings are
measured beside the slices, with plain torch kernels. A share of the floor is the share of those ceilings that was used.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.cpu.tasks import Task
from benchmarks.cpu.worker_protocol import split_width
from mini_vllm.bench.cost import ModelShape, StepCost, step_cost

BODY_BYTES = {"bf16": 2.0, "f32": 4.0, "int8": 1.0, "int8-weights": 1.0, "q8_0": 34 / 32, "int4": 4.5 / 8,
              "int4-head": 4.5 / 8, "q4_0": 4.5 / 8}  # fmt: skip
"""Bytes a weight, scales of groups of 32 included."""
HEAD_BYTES = BODY_BYTES | {"int4": 1.0, "q4_0": 34 / 32}
CACHE_STEP = 2**20


def weight_bytes(shape: ModelShape, width: str) -> float:
    """Bytes of weights that a step with logits reads."""
    width, _ = split_width(width)
    other = shape.other_parameters * min(BODY_BYTES[width], 2.0)
    return shape.matmul_parameters * BODY_BYTES[width] + shape.embedding_parameters * HEAD_BYTES[width] + other


def steps_of(task: Task) -> list[list[tuple[int, int]]]:
    """(tokens before, tokens now) of every request in every step that the figure is about, prompts in one step."""
    if task.more:
        return [[(p + i + 1, 1) for p, _ in task.requests] for i in range(task.more)]
    steps = [[(0, p) for p, _ in task.requests]]
    longest = max(n for _, n in task.requests)
    return steps + [[(p + i, 1) for p, n in task.requests if n > i + 1] for i in range(longest - 1)]


def task_cost(shape: ModelShape, task: Task, width: str) -> list[dict[str, float]]:
    """Bytes and operations of each of these steps."""
    found = []
    for chunks in steps_of(task):
        cost: StepCost = step_cost(shape, chunks, len(chunks))
        kv = cost.kv_read_bytes + cost.kv_write_bytes
        found.append({"bytes": weight_bytes(shape, width) + kv, "flops": float(cost.flops)})
    return found


def floor(shape: ModelShape, task: Task, width: str, ceilings: Mapping[str, float]) -> dict[str, Any]:
    """Tokens a second at the ceilings, what binds, and bytes and operations in all."""
    steps = task_cost(shape, task, width)
    rate, peak = ceilings["read_gb_s"] * 1e9, peak_of(width, ceilings) * 1e9
    reading = sum(step["bytes"] / rate for step in steps)
    computing = sum(step["flops"] / peak for step in steps)
    seconds = sum(max(step["bytes"] / rate, step["flops"] / peak) for step in steps)
    return {
        "tokens_per_second": task.counted / seconds,
        "bound_by": "bandwidth" if reading >= computing else "arithmetic",
        "bytes": sum(step["bytes"] for step in steps),
        "flops": sum(step["flops"] for step in steps),
    }


def peak_of(width: str, ceilings: Mapping[str, float]) -> float:
    """GFLOP/s: of float32 for float32 weights; else also of bfloat16, and of 8-bit integers where weights are."""
    kinds = ["float32"]
    if split_width(width)[0] != "f32":
        kinds.append("bfloat16")
    if split_width(width)[0] not in ("f32", "bf16"):
        kinds.append("int8")
    return max(ceilings[f"{kind}_gflop_s"] for kind in kinds)


# --- what the machine gives -----------------------------------------------------------------------------------


def probe(threads: int, working_set: float) -> dict[str, float]:
    """Bandwidth and arithmetic now. working_set: bytes of the model; one near the cache's size is also read itself."""
    import torch

    from mini_vllm.bench.ceilings import gemm_rate, last_level_cache_bytes, read_rate

    torch.set_num_threads(threads)
    found = {"memory_gb_s": read_rate.__wrapped__(512 * CACHE_STEP, threads).gb_s}
    found["read_gb_s"] = found["memory_gb_s"]
    if working_set < 2 * last_level_cache_bytes():
        size = -(-int(working_set) // CACHE_STEP) * CACHE_STEP
        found["read_gb_s"] = max(found["memory_gb_s"], read_rate.__wrapped__(size, threads).gb_s)
    for dtype in ("float32", "bfloat16"):
        found[f"{dtype}_gflop_s"] = gemm_rate.__wrapped__(dtype, threads).gflop_s
    found["int8_gflop_s"] = int8_rate()
    return {name: round(value, 2) for name, value in found.items()}


def int8_rate(size: int = 1024, passes: int = 4) -> float:
    """Best rate of torch's 8-bit integer product, in 10^9 operations a second; 0 where torch has none."""
    import time

    import torch

    x, weight = (torch.ones(size, size, dtype=torch.int8) for _ in range(2))
    best = float("inf")
    for _ in range(passes):
        begin = time.perf_counter()
        try:
            torch._int_mm(x, weight.t())
        except RuntimeError:
            return 0.0
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best / 1e9


def ceilings_of(probes: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of every probe."""
    return {name: statistics.median(probe[name] for probe in probes) for name in probes[0]}
