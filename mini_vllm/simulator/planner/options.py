"""What a plan is asked for. Names and defaults are those of the engine's arguments where it has them.

Validated on construction: a number out of range is a `ConfigError` naming the field and the limit.
"""

from collections.abc import Callable
from dataclasses import dataclass

from mini_vllm.config import DEFAULT_BLOCK_SIZE, CacheConfig
from mini_vllm.exceptions import ConfigError
from mini_vllm.simulator.planner.geometry import WEIGHT_DTYPE_BYTES, dtype_bytes
from mini_vllm.simulator.planner.memory import quantisation


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """context: tokens a sequence holds when it counts; None is max_model_len. batch: sequences decoding at once;
    None is as many as fit and `max_num_seqs` allows. draft_cost: of one draft token, in steps of the model."""

    dtype: str = "auto"
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    max_model_len: int | None = None
    context: int | None = None
    prompt_len: int | None = None
    batch: int | None = None
    shared_prefix_tokens: int = 0

    block_size: int = DEFAULT_BLOCK_SIZE
    gpu_memory_utilization: float = CacheConfig.gpu_memory_utilization
    kv_cache_memory_bytes: int | None = None
    num_gpu_blocks_override: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    long_prefill_token_threshold: int = 0

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    max_bubble: float = 0.1
    kv_transfer_gbps: float | None = None
    kv_transfer_overlap: float = 0.0

    max_loras: int = 0
    max_lora_rank: int = 16
    lora_target_modules: tuple[str, ...] | None = None
    num_speculative_tokens: int = 0
    acceptance_rate: float = 0.7
    draft_cost: float = 0.05

    num_parameters: int | None = None
    weight_bytes: int | None = None
    activation_bytes: int | None = None
    efficiency: float = 1.0
    itl_slo_ms: float | None = None
    ttft_slo_ms: float | None = None

    def __post_init__(self) -> None:
        for name in _AT_LEAST_ONE:
            _require(self, name, lambda v: v >= 1, "at least 1")
        for name in _AT_LEAST_ZERO:
            _require(self, name, lambda v: v >= 0, "at least 0")
        for name in _SHARES:
            _require(self, name, lambda v: 0 < v <= 1, "in (0, 1]")
        for name in ("acceptance_rate", "kv_transfer_overlap"):
            _require(self, name, lambda v: 0 <= v <= 1, "in [0, 1]")
        for name in ("kv_transfer_gbps", "itl_slo_ms", "ttft_slo_ms"):
            _require(self, name, lambda v: v > 0, "above 0")
        _require(self, "num_gpu_blocks_override", lambda v: v >= 2, "at least 2 (one is the null block)")
        if self.dtype != "auto" and self.dtype not in WEIGHT_DTYPE_BYTES:
            raise ConfigError(f"dtype: must be one of auto, {', '.join(WEIGHT_DTYPE_BYTES)}, got {self.dtype!r}")
        if self.kv_cache_dtype != "auto":
            dtype_bytes(self.kv_cache_dtype)
        quantisation(self.quantization)


_AT_LEAST_ONE = (
    "max_model_len context prompt_len batch block_size kv_cache_memory_bytes max_num_seqs max_num_batched_tokens "
    "tensor_parallel_size pipeline_parallel_size max_lora_rank num_parameters weight_bytes"
).split()
_AT_LEAST_ZERO = (
    "shared_prefix_tokens long_prefill_token_threshold max_loras num_speculative_tokens draft_cost activation_bytes"
).split()
_SHARES = ("gpu_memory_utilization", "max_bubble", "efficiency")


def _require(options: PlanOptions, name: str, holds: Callable[[float], bool], limit: str) -> None:
    value = getattr(options, name)
    if value is not None and not (isinstance(value, (int, float)) and holds(value)):
        raise ConfigError(f"{name}: must be {limit}, got {value!r}")
