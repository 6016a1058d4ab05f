"""Small frozen configs. Each component receives only its own; `engine/arg_utils.py` builds them from
the arguments a user gives. Sizes are in tokens or bytes, as the field's name says.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from mini_vllm.exceptions import ConfigError

SchedulingPolicy = Literal["fcfs", "priority", "fair"]
PreemptionPolicy = Literal["latest", "least-work"]
LoadFormat = Literal["auto", "safetensors", "gguf", "dummy"]
DEFAULT_BLOCK_SIZE = 16
INT8_KV_CACHE_DTYPE = "int8_per_token_head"
KV_CACHE_DTYPE_ALIASES = {"int8": INT8_KV_CACHE_DTYPE}
KV_CACHE_DTYPES = ("auto", "bfloat16", "float16", "float32", INT8_KV_CACHE_DTYPE)
QUANTIZATION_METHODS = ("int8", "int4", "int8_per_channel_weight_only")


@dataclass(frozen=True)
class SchedulerConfig:
    """What one step may hold.

    max_num_batched_tokens: the token budget of a step.
    max_num_seqs: requests that may be running at once.
    long_prefill_token_threshold: tokens of one prompt per step at most; 0 is off.
    policy: 'fcfs', 'priority' (a lower number goes first, then earlier arrival), or 'fair' (tenants share the tokens
        computed by their weights).
    preemption_policy: who gives way when the pool is full: 'latest' (the one the policy puts last), or 'least-work'
        (of those it holds in least regard, the one with the fewest computed tokens to lose). Neither ever takes the one
        that is furthest ahead, so that every workload ends.
    tenant_weights: under 'fair', the share of a tenant by its name relative to others; 1 where none is given.
    max_model_len: a request ends at this many tokens; None is unlimited (toy engine).
    same_step_prefix_sharing: let a request admitted in a step read prefix blocks that the same step writes.
    async_scheduling: plan a step while the one before it computes.
    """

    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 256
    long_prefill_token_threshold: int = 0
    policy: SchedulingPolicy = "fcfs"
    preemption_policy: PreemptionPolicy = "latest"
    tenant_weights: Mapping[str, float] = field(default_factory=dict)
    max_model_len: int | None = None
    same_step_prefix_sharing: bool = True
    async_scheduling: bool = False

    def __post_init__(self) -> None:
        _require_at_least("max_num_batched_tokens", self.max_num_batched_tokens, 1)
        _require_at_least("max_num_seqs", self.max_num_seqs, 1)
        _require_at_least("long_prefill_token_threshold", self.long_prefill_token_threshold, 0)
        _require_one_of("scheduling_policy", self.policy, get_args(SchedulingPolicy))
        _require_one_of("preemption_policy", self.preemption_policy, get_args(PreemptionPolicy))
        for name, weight in self.tenant_weights.items():
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
                raise ConfigError(f"tenant_weights: the weight of {name!r} must be a number above 0, got {weight!r}")


@dataclass(frozen=True)
class CacheConfig:
    """How large the KV cache is and whether prefixes are kept.

    Exactly one of these decides the size, in this order: `num_gpu_blocks_override` (blocks),
    `kv_cache_memory_bytes`, `gpu_memory_utilization` (share of the device's free memory; on a CPU, of
    what the machine or its cgroup still has free after the weights).

    kv_cache_dtype: what keys and values are stored in; 'auto' is the model's dtype, 'int8_per_token_head' has a scale
        for each token and KV head.
    """

    block_size: int = DEFAULT_BLOCK_SIZE
    enable_prefix_caching: bool = True
    gpu_memory_utilization: float = 0.9
    kv_cache_memory_bytes: int | None = None
    num_gpu_blocks_override: int | None = None
    kv_cache_dtype: str = "auto"

    def __post_init__(self) -> None:
        _require_one_of("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
        _require_at_least("block_size", self.block_size, 1)
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(f"gpu_memory_utilization: must be in (0, 1], got {self.gpu_memory_utilization}")
        if self.kv_cache_memory_bytes is not None:
            _require_at_least("kv_cache_memory_bytes", self.kv_cache_memory_bytes, 1)
        if self.num_gpu_blocks_override is not None:
            _require_at_least("num_gpu_blocks_override", self.num_gpu_blocks_override, 2)


@dataclass(frozen=True)
class QuantizationOptions:
    """How weights are quantised while they load; a checkpoint's own format needs none of this.

    method: 'int8' (weights per channel, activations per token), 'int8_per_channel_weight_only', or 'int4' (weights per
        group, activations as for int8).
    group_size: inputs that share a scale; None is 32. symmetric: int4 weights around 0, else above a minimum.
    activation_scales: 'token', or 'group' (`group_size` inputs of a token).
    lm_head: 'int8', 'int4', 'same' (as the other layers) or 'none'.
    skip_layers: names of layers, parts of names, or patterns (*.down_proj), that stay as they are.
    """

    method: str
    group_size: int | None = None
    symmetric: bool = True
    activation_scales: str = "token"
    lm_head: str = "int8"
    skip_layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _require_one_of("quantization", self.method, QUANTIZATION_METHODS)
        _require_one_of("quantization_activation_scales", self.activation_scales, ("token", "group"))
        _require_one_of("quantization_lm_head", self.lm_head, ("int8", "int4", "same", "none"))
        if self.group_size is not None:
            _require_one_of("quantization_group_size", self.group_size, (32, 64, 128))
        weight_only = self.method == "int8_per_channel_weight_only"
        has_int4 = self.method == "int4" or self.lm_head == "int4"
        if weight_only and (self.activation_scales == "group" or self.lm_head == "int4"):
            raise ConfigError(
                f"quantization: {self.method!r} leaves activations as they are, so it goes with neither "
                "quantization_activation_scales='group' nor quantization_lm_head='int4'"
            )
        if not has_int4 and not self.symmetric:
            raise ConfigError("quantization_symmetric: False is for int4 weights; int8 ones are always symmetric")
        if not has_int4 and self.activation_scales == "token" and self.group_size is not None:
            raise ConfigError(
                "quantization_group_size: nothing has groups here; it goes with int4 weights or "
                "quantization_activation_scales='group'"
            )

    @property
    def resolved_group_size(self) -> int:
        return 32 if self.group_size is None else self.group_size


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and in what precision.

    model: folder that holds config.json and the weights.
    hf_config: the parsed `mini_vllm.hf_config.HFConfig`.
    dtype: resolved torch dtype name ('float32', 'bfloat16', 'float16'), never 'auto'.
    max_model_len: resolved limit in tokens; None means 'auto' until the pool is sized.
    tokenizer_vocab_size: ids above this are masked, since no token stands behind them; None masks nothing.
    quantization: what plain weights become while they load; None leaves them as they are.
    logits_processors: classes (or "module:Class") of `sampling.logits_processor.LogitsProcessor`.
    batch_invariant: a request's logits must not depend on its neighbours or on how its prompt was cut, to the last bit.
    """

    model: str
    hf_config: Any
    dtype: str
    max_model_len: int | None
    tokenizer: str | None = None
    tokenizer_vocab_size: int | None = None
    served_model_name: str | None = None
    quantization: QuantizationOptions | None = None
    seed: int = 0
    logits_processors: tuple[Any, ...] = ()
    batch_invariant: bool = False


@dataclass(frozen=True)
class LoadConfig:
    """Where weights come from: 'auto'/'safetensors' read the folder, 'gguf' a file, 'dummy' makes random ones."""

    load_format: LoadFormat = "auto"
    use_tqdm: bool = True

    def __post_init__(self) -> None:
        _require_one_of("load_format", self.load_format, get_args(LoadFormat))


@dataclass(frozen=True)
class ParallelConfig:
    """Ranks. Only 1 exists so far; the layers are already written in shapes per rank."""

    tensor_parallel_size: int = 1

    def __post_init__(self) -> None:
        if self.tensor_parallel_size != 1:
            raise ConfigError(f"tensor_parallel_size: only 1 is supported so far, got {self.tensor_parallel_size}")


@dataclass(frozen=True)
class DeviceConfig:
    """Where tensors live and how many CPU threads compute; None leaves both to the platform.

    enforce_eager: run the model's Python in every step instead of replaying a recording of it.
    """

    device: str = "auto"
    num_threads: int | None = None
    attention_backend: str | None = None
    enforce_eager: bool = False


@dataclass(frozen=True)
class ObservabilityConfig:
    """What is noted down of each step.

    step_trace_capacity: records kept, the newest; 0 keeps none.
    step_trace_detailed: each says why every waiting request waits, not only the first.
    """

    step_trace_capacity: int = 256
    step_trace_detailed: bool = False

    def __post_init__(self) -> None:
        _require_at_least("step_trace_capacity", self.step_trace_capacity, 0)


@dataclass(frozen=True)
class EngineConfig:
    """All of the above, for the one place that builds an engine."""

    model: ModelConfig
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    load: LoadConfig = field(default_factory=LoadConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    device: DeviceConfig = field(default_factory=DeviceConfig)
    observability: ObservabilityConfig = field(default_factory=ObservabilityConfig)


def _require_at_least(name: str, value: int, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(f"{name}: must be an integer of at least {minimum}, got {value!r}")


def _require_one_of(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}: must be one of {', '.join(map(str, choices))}, got {value!r}")
