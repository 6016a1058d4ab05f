"""What splitting a model costs: shares of ranks, the bill of collectives, the bubble of a pipeline, the toll of a
hand-over between a prefill and a decode machine. Formulas over plain numbers, in bytes and seconds.

Tensor parallelism (Shoeybi et al., 2019) pays two all-reduces a layer: after the attention's output matrix and after
the MLP's. A ring all-reduce moves 2(N-1)/N of the payload in 2(N-1) hops.
"""

from dataclasses import dataclass

from mini_vllm.exceptions import ConfigError
from mini_vllm.simulator.planner.geometry import ModelGeometry

ALL_REDUCES_PER_LAYER = 2

# --- tensor parallel -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorParallelSplit:
    """What one rank of `size` holds. Norms are on every rank; KV heads are copied when there are fewer than ranks."""

    size: int
    heads: int
    kv_heads: int
    kv_heads_replicated: bool
    replicated_parameters: int
    parameters: int


def tensor_parallel_split(model: ModelGeometry, size: int) -> TensorParallelSplit:
    """Raises `ConfigError` where something does not divide."""
    if size < 1:
        raise ConfigError(f"tensor_parallel_size: must be at least 1, got {size}")
    if model.num_heads % size:
        raise ConfigError(
            f"tensor_parallel_size: {size} does not divide the {model.num_heads} attention heads of {model.name}"
        )
    kv, widest = model.num_kv_heads, model.intermediate_size
    if kv % size and size % kv:
        raise ConfigError(f"tensor_parallel_size: {size} neither divides nor is a multiple of the {kv} KV heads")
    if widest % size:
        raise ConfigError(f"tensor_parallel_size: {size} does not divide intermediate_size {widest}")
    copied = model.parameters.norms + model.parameters.router + model.parameters.positions
    if size > kv and not any(layers.replicated for layers in model.kv_layers):
        copied += _key_value_parameters(model) * (size - kv) // (size - 1)
    split = -(-(model.num_parameters - copied) // size)
    return TensorParallelSplit(size, model.num_heads // size, max(1, kv // size), size > kv, copied, copied + split)


def _key_value_parameters(model: ModelGeometry) -> int:
    """Of the K and V matrices of all attention layers."""
    return sum(kind.num_layers for kind in model.kv_layers if kind.kind != "mamba") * sum(
        linear.in_features * linear.out_features for linear in model.linears if linear.name in ("k_proj", "v_proj")
    )


def allreduce_payload_bytes(batch_tokens: int, hidden: int, dtype_bytes: int = 2) -> int:
    """One row of activations per token."""
    return batch_tokens * hidden * dtype_bytes


def ring_allreduce_traffic_per_rank(payload: float, num_ranks: int) -> float:
    """2(N-1)/N of the payload leaves each rank."""
    return 2 * (num_ranks - 1) / num_ranks * payload


def allreduce_seconds(payload: float, num_ranks: int, bandwidth: float, latency: float) -> float:
    """Traffic over bandwidth, and 2(N-1) hops. One rank pays nothing."""
    if num_ranks == 1:
        return 0.0
    return ring_allreduce_traffic_per_rank(payload, num_ranks) / bandwidth + 2 * (num_ranks - 1) * latency


def tp_comm_seconds_per_step(
    num_layers: int, batch_tokens: int, hidden: int, num_ranks: int, bandwidth: float, latency: float,
    dtype_bytes: int = 2,
) -> float:  # fmt: skip
    payload = allreduce_payload_bytes(batch_tokens, hidden, dtype_bytes)
    return ALL_REDUCES_PER_LAYER * num_layers * allreduce_seconds(payload, num_ranks, bandwidth, latency)


def comm_fraction(comm_seconds: float, compute_seconds: float) -> float:
    """Share of a step spent communicating, when the two do not overlap."""
    return comm_seconds / (comm_seconds + compute_seconds)


def expert_all_to_all_bytes(batch_tokens: int, hidden: int, experts_per_token: int, dtype_bytes: int = 2) -> int:
    """Both ways of one MoE layer under expert parallelism, if no token finds its experts at home."""
    return 2 * batch_tokens * experts_per_token * hidden * dtype_bytes


# --- pipeline parallel ---------------------------------------------------------------------------------------


def pipeline_total_ticks(num_stages: int, num_microbatches: int) -> int:
    """p + m - 1: microbatch b is in stage s at tick s + b."""
    return num_stages + num_microbatches - 1


def bubble_fraction(num_stages: int, num_microbatches: int) -> float:
    """Idle share of the grid: (p - 1) / (p + m - 1)."""
    return (num_stages - 1) / pipeline_total_ticks(num_stages, num_microbatches)


def interleaved_bubble_fraction(num_stages: int, num_microbatches: int, chunks_per_stage: int) -> float:
    """With v pieces of the model per stage (Narayanan et al., 2021): (p - 1) / (v m + p - 1)."""
    return (num_stages - 1) / (chunks_per_stage * num_microbatches + num_stages - 1)


def simulate_schedule(num_stages: int, num_microbatches: int) -> list[list[int | None]]:
    """The grid, one row a stage: which microbatch is there at each tick."""
    ticks = range(pipeline_total_ticks(num_stages, num_microbatches))
    return [[t - s if 0 <= t - s < num_microbatches else None for t in ticks] for s in range(num_stages)]


def min_microbatches_for_bubble(num_stages: int, budget: float) -> int:
    """Fewest microbatches (requests in flight) whose bubble stays within `budget`."""
    if not 0 < budget <= 1:
        raise ConfigError(f"bubble budget: must be in (0, 1], got {budget}")
    count = max(1, int((num_stages - 1) * (1 - budget) / budget) - 1)
    while bubble_fraction(num_stages, count) > budget + 1e-12:  # the quotient may miss by one in floats
        count += 1
    return count


def pipeline_handoff_seconds(
    num_stages: int, batch_tokens: int, hidden: int, bandwidth: float, latency: float, dtype_bytes: int = 2
) -> float:
    """One activation per hand-over, p - 1 of them a step."""
    payload = allreduce_payload_bytes(batch_tokens, hidden, dtype_bytes)
    return (num_stages - 1) * (payload / bandwidth + latency)


# --- disaggregated prefill -----------------------------------------------------------------------------------


def kv_payload_bytes(prompt_tokens: int, kv_bytes_per_token: int) -> int:
    """What a finished prefill has to ship."""
    return prompt_tokens * kv_bytes_per_token


def transfer_seconds(payload_bytes: float, link_gbps: float) -> float:
    """link_gbps: giga*bits* per second, as networks are sold."""
    if not link_gbps > 0:
        raise ConfigError(f"kv_transfer_gbps: must be above 0, got {link_gbps}")
    return payload_bytes * 8 / (link_gbps * 1e9)


def colocated_itl_worst(decode_step_seconds: float, chunk_seconds: float) -> float:
    """The gap a running sequence sees when a chunk of somebody's prompt is in its step."""
    return decode_step_seconds + chunk_seconds


def disagg_ttft_penalty(visible_transfer_seconds: float, prefill_seconds: float) -> float:
    """The toll, once a request, as a share of the prefill."""
    return visible_transfer_seconds / prefill_seconds


def visible_transfer_seconds(transfer: float, overlap_fraction: float) -> float:
    """What is left of a transfer that runs layer by layer behind the prefill."""
    if not 0 <= overlap_fraction <= 1:
        raise ConfigError(f"overlap: must be in [0, 1], got {overlap_fraction}")
    return transfer * (1 - overlap_fraction)


def overlap_needed(transfer: float, prefill_seconds: float, penalty: float) -> float:
    """Overlap from which the toll is at most `penalty` of the prefill; 0 if it is so without."""
    return max(0.0, 1 - penalty * prefill_seconds / transfer)


def disagg_wins(
    decode_step_seconds: float,
    chunk_seconds: float,
    visible_transfer: float,
    prefill_seconds: float,
    *,
    max_ttft_penalty: float = 0.25,
    min_itl_gain: float = 1.5,
) -> bool:
    """Both sides of the ledger: the worst gap shrinks by enough, and first tokens are late by little enough."""
    gain = colocated_itl_worst(decode_step_seconds, chunk_seconds) / decode_step_seconds
    return gain >= min_itl_gain and disagg_ttft_penalty(visible_transfer, prefill_seconds) <= max_ttft_penalty
