"""What is simulated: one engine's arguments under `serve`'s names, how many replicas, and how requests are routed.

Defaults are the engine's. The size of the pool is always explicit here; `sized_for` takes it from the planner's
arithmetic for a model on a machine.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from mini_vllm.config import (
    DEFAULT_BLOCK_SIZE,
    CacheConfig,
    EngineConfig,
    ModelConfig,
    ObservabilityConfig,
    PreemptionPolicy,
    SchedulerConfig,
    SchedulingPolicy,
)
from mini_vllm.exceptions import ConfigError
from mini_vllm.simulator.planner.setup import Setup

ROUTINGS = ("round-robin", "least-loaded", "prefix-aware")


@dataclass(frozen=True, kw_only=True)
class SimulationOptions:
    """Raises `ConfigError` naming the field and the limit.

    num_gpu_blocks: of each replica's pool, the null block included. num_kv_groups: block tables per request, as the
    engine has for models whose layers look back differently far. max_model_len: None is unlimited.
    request_latency_ms: that a request spends outside the engine: network, HTTP, tokenising, its first token's way back.
    timeline_points: bins each replica's timeline is kept in, at most. step_records: the newest steps kept in full for
    a Chrome trace.
    """

    num_gpu_blocks: int = 28_816
    block_size: int = DEFAULT_BLOCK_SIZE
    num_kv_groups: int = 1
    max_num_seqs: int = SchedulerConfig.max_num_seqs
    max_num_batched_tokens: int = SchedulerConfig.max_num_batched_tokens
    long_prefill_token_threshold: int = 0
    max_model_len: int | None = None
    enable_prefix_caching: bool = True
    scheduling_policy: SchedulingPolicy = "fcfs"
    preemption_policy: PreemptionPolicy = "latest"
    tenant_weights: Mapping[str, float] = field(default_factory=dict)
    num_replicas: int = 1
    routing: str = "round-robin"
    request_latency_ms: float = 0.0
    timeline_points: int = 500
    step_records: int = 0

    def __post_init__(self) -> None:
        for name in ("num_replicas", "num_kv_groups", "timeline_points"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ConfigError(f"max_model_len: a prompt and an output token are 2, got {self.max_model_len}")
        if self.routing not in ROUTINGS:
            raise ConfigError(f"routing: must be one of {', '.join(ROUTINGS)}, got {self.routing!r}")
        if self.num_gpu_blocks < 2:
            raise ConfigError(f"num_gpu_blocks: must be at least 2 (one is the null block), got {self.num_gpu_blocks}")
        if not 0 <= self.request_latency_ms < float("inf"):
            raise ConfigError(f"request_latency_ms: must be at least 0, got {self.request_latency_ms}")
        self.engine_config()  # the engine's own checks of the rest

    def engine_config(self) -> EngineConfig:
        """What the engine's own builder is handed. Raises `ConfigError`."""
        return EngineConfig(
            model=ModelConfig("simulated", None, "float32", self.max_model_len),
            cache=CacheConfig(
                block_size=self.block_size,
                enable_prefix_caching=self.enable_prefix_caching,
                num_gpu_blocks_override=self.num_gpu_blocks,
            ),
            scheduler=SchedulerConfig(
                max_num_batched_tokens=self.max_num_batched_tokens,
                max_num_seqs=self.max_num_seqs,
                long_prefill_token_threshold=self.long_prefill_token_threshold,
                policy=self.scheduling_policy,
                preemption_policy=self.preemption_policy,
                tenant_weights=self.tenant_weights,
                max_model_len=self.max_model_len,
            ),
            observability=ObservabilityConfig(step_trace_capacity=self.step_records),
        )

    @property
    def kv_cache_tokens(self) -> int:
        """Tokens the pool of one replica has slots for."""
        return (self.num_gpu_blocks - 1) // self.num_kv_groups * self.block_size


def sized_for(setup: Setup, options: SimulationOptions | None = None) -> SimulationOptions:
    """`options` with the engine arguments of the planner's set-up: pool, block size, budget, batch, context.

    The pool is the one `mini-vllm plan` reports. Raises `ConfigError` when weights, or one request, have no room.
    """
    own = setup.options
    groups = len(setup.engine_groups) if setup.runs_in_engine else 1
    return replace(
        options or SimulationOptions(),
        num_gpu_blocks=setup.num_blocks * groups,
        num_kv_groups=groups,
        block_size=own.block_size,
        max_num_seqs=own.max_num_seqs,
        max_num_batched_tokens=own.max_num_batched_tokens,
        long_prefill_token_threshold=own.long_prefill_token_threshold,
        max_model_len=setup.max_model_len,
    )
