"""What adapters cost (Hu et al., 2021): two thin matrices A (r x in) and B (out x r) beside each matrix adapted."""

from collections.abc import Iterable, Sequence

from mini_vllm.exceptions import ConfigError
from mini_vllm.simulator.planner.geometry import Linear, ModelGeometry


def lora_params(in_features: int, out_features: int, rank: int) -> int:
    """r * (in + out) for one matrix."""
    return rank * (in_features + out_features)


def shrink_ratio(in_features: int, out_features: int, rank: int) -> float:
    """How many times smaller the adapter of a matrix is than the matrix."""
    return in_features * out_features / lora_params(in_features, out_features, rank)


def flop_overhead(in_features: int, out_features: int, rank: int) -> float:
    """Extra arithmetic of a row that uses an adapter, as a share of the matrix's own."""
    return lora_params(in_features, out_features, rank) / (in_features * out_features)


def adapter_bytes(hidden: int, num_layers: int, rank: int, num_targets: int = 4, dtype_bytes: int = 2) -> int:
    """Of square targets, as the attention matrices of a model without grouped heads are."""
    return lora_params(hidden, hidden, rank) * num_targets * num_layers * dtype_bytes


def target_linears(model: ModelGeometry, targets: Sequence[str] | None = None) -> list[Linear]:
    """The matrices of a layer named by `targets` (None is all). Raises `ConfigError` for names it has not."""
    known = [linear.name for linear in model.linears]
    unknown = sorted(set(targets or ()) - set(known))
    if unknown:
        raise ConfigError(f"lora_target_modules: {model.name} has no {', '.join(unknown)}; it has {', '.join(known)}")
    return [linear for linear in model.linears if targets is None or linear.name in targets]


def model_adapter_params(model: ModelGeometry, rank: int, targets: Sequence[str] | None = None) -> int:
    """Of an adapter over these targets in every layer, with their real shapes."""
    if rank < 1:
        raise ConfigError(f"max_lora_rank: must be at least 1, got {rank}")
    return model.num_layers * sum_params(target_linears(model, targets), rank)


def sum_params(linears: Iterable[Linear], rank: int) -> int:
    return sum(lora_params(linear.in_features, linear.out_features, rank) for linear in linears)


def slot_reservation_bytes(
    model: ModelGeometry, max_loras: int, max_lora_rank: int, dtype_bytes: int = 2, targets: Sequence[str] | None = None
) -> int:
    """Taken at start-up, before the KV cache: every slot has room for the largest rank, whoever uses it."""
    if max_loras < 1:
        raise ConfigError(f"max_loras: must be at least 1, got {max_loras}")
    return max_loras * model_adapter_params(model, max_lora_rank, targets) * dtype_bytes


def adapters_per_gib(bytes_each: int) -> int:
    return 2**30 // bytes_each


def gpus_saved(num_tenants: int, max_loras: int) -> int:
    """Against a device for each tenant: T - ceil(T / max_loras)."""
    return num_tenants - -(-num_tenants // max_loras)
