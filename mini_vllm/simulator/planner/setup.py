"""One set-up, resolved: a model on a machine with options, and everything the plan's lines are computed from.

Raises `ConfigError` with the arithmetic as soon as something cannot be: no room for the weights, a context beyond the
model's, a pool that does not hold one request.
"""

from dataclasses import dataclass
from functools import cached_property

from mini_vllm.config import KV_CACHE_DTYPE_ALIASES, CacheConfig
from mini_vllm.core.interfaces import KVCacheGroup, KVCacheSpec
from mini_vllm.exceptions import ConfigError, KVCacheTooSmallError
from mini_vllm.simulator.planner import lora
from mini_vllm.simulator.planner.geometry import WEIGHT_DTYPE_BYTES, ModelGeometry
from mini_vllm.simulator.planner.hardware import Hardware
from mini_vllm.simulator.planner.memory import (
    Quantisation,
    activation_bytes,
    blocks_for,
    quantisation,
    weight_bytes,
)
from mini_vllm.simulator.planner.options import PlanOptions
from mini_vllm.simulator.planner.parallel import TensorParallelSplit, tensor_parallel_split
from mini_vllm.simulator.planner.roofline import StepModel
from mini_vllm.worker.kv_cache import KVCacheDemand, choose_num_blocks, gib

DEFAULT_CONTEXT = 4096
"""Where neither the options nor the model say."""


@dataclass(frozen=True)
class Setup:
    """All bytes are of one device."""

    model: ModelGeometry
    hardware: Hardware
    options: PlanOptions

    # -- what was asked for ------------------------------------------------------------------------------

    @cached_property
    def dtype(self) -> str:
        return self.model.dtype if self.options.dtype == "auto" else self.options.dtype

    @cached_property
    def kv_dtype(self) -> str:
        asked = self.options.kv_cache_dtype
        return self.dtype if asked == "auto" else KV_CACHE_DTYPE_ALIASES.get(asked, asked)

    @property
    def kv_dtype_bytes(self) -> float:
        return self.model.kv_dtype_bytes(self.kv_dtype)

    @cached_property
    def quant(self) -> Quantisation | None:
        return quantisation(self.options.quantization)

    @cached_property
    def max_model_len(self) -> int:
        asked, limit = self.options.max_model_len or self.options.context, self.model.max_model_len
        if asked is not None and limit is not None and asked > limit:
            field = "max_model_len" if self.options.max_model_len else "context"
            raise ConfigError(f"{field}: {asked:,} is more than the {limit:,} tokens {self.model.name} was made for")
        return asked or limit or DEFAULT_CONTEXT

    @cached_property
    def context(self) -> int:
        context = self.options.context or self.max_model_len
        if context > self.max_model_len:
            raise ConfigError(f"context: {context:,} is more than max_model_len {self.max_model_len:,}")
        return context

    @cached_property
    def prompt_len(self) -> int:
        """Of the prompt whose first token is timed: half the context unless given."""
        prompt = self.options.prompt_len or max(1, self.context // 2)
        if prompt > self.max_model_len:
            raise ConfigError(f"prompt_len: {prompt:,} is more than max_model_len {self.max_model_len:,}")
        return prompt

    @cached_property
    def split(self) -> TensorParallelSplit:
        size = self.options.pipeline_parallel_size
        if size > self.model.num_layers:
            raise ConfigError(f"pipeline_parallel_size: {size} is more than the {self.model.num_layers} layers")
        return tensor_parallel_split(self.model, self.options.tensor_parallel_size)

    # -- memory ------------------------------------------------------------------------------------------

    @cached_property
    def model_bytes(self) -> int:
        """Weights of the whole model."""
        return self.options.weight_bytes or weight_bytes(
            self.model, self.dtype, self.quant, packs_weights=self.hardware.packs_weights
        )

    @cached_property
    def weight_bytes(self) -> int:
        share = self.split.parameters / self.model.num_parameters
        return round(self.model_bytes * share / self.options.pipeline_parallel_size)

    @cached_property
    def activation_bytes(self) -> int:
        if self.options.activation_bytes is not None:
            return self.options.activation_bytes
        o = self.options
        return activation_bytes(self.model, o.max_num_batched_tokens, o.max_num_seqs, WEIGHT_DTYPE_BYTES[self.dtype])

    @cached_property
    def lora_bytes(self) -> int:
        if not self.options.max_loras:
            return 0
        o = self.options
        size = lora.slot_reservation_bytes(
            self.model, o.max_loras, o.max_lora_rank, WEIGHT_DTYPE_BYTES[self.dtype], o.lora_target_modules
        )
        return size // (o.tensor_parallel_size * o.pipeline_parallel_size)

    @cached_property
    def usable_bytes(self) -> int:
        return int(self.hardware.memory_bytes * self.options.gpu_memory_utilization)

    @cached_property
    def kv_budget_bytes(self) -> int:
        """What is left for the KV cache by vLLM's rule. Raises `ConfigError` when that is nothing."""
        if self.options.kv_cache_memory_bytes is not None:
            return self.options.kv_cache_memory_bytes
        budget = self.usable_bytes - self.weight_bytes - self.activation_bytes - self.lora_bytes
        if budget <= 0:
            raise ConfigError(self._no_room(budget))
        return budget

    def _no_room(self, budget: int) -> str:
        o, parts = self.options, [f"weights {gib(self.weight_bytes)}", f"activations {gib(self.activation_bytes)}"]
        parts += [f"LoRA slots {gib(self.lora_bytes)}"] if self.lora_bytes else []
        needed = self.usable_bytes - budget
        return (
            f"gpu_memory_utilization: no room for a KV cache on {self.hardware.name}: "
            f"{gib(self.hardware.memory_bytes)} x {o.gpu_memory_utilization} = {gib(self.usable_bytes)}, "
            f"and {' + '.join(parts)} = {gib(needed)} are "
            f"{gib(-budget)} too many{self._advice()}"
        )

    def _advice(self) -> str:
        """The least tensor parallelism whose weights fit, if there is one."""
        fixed = self.activation_bytes + self.lora_bytes
        for size in (2, 4, 8, 16):
            try:
                split = tensor_parallel_split(self.model, size)
            except ConfigError:
                continue
            share = self.model_bytes * split.parameters / self.model.num_parameters
            if size > self.options.tensor_parallel_size and share + fixed < self.usable_bytes:
                return f"; the weights fit with tensor_parallel_size {size}, or quantised"
        return "; use a larger machine or quantise the weights"

    # -- KV cache ----------------------------------------------------------------------------------------

    @cached_property
    def kv_bytes_per_token(self) -> int:
        whole = self.model.kv_bytes_per_token(self.kv_dtype, self.options.tensor_parallel_size)
        return max(1, -(-whole // self.options.pipeline_parallel_size))

    @cached_property
    def block_bytes(self) -> int:
        return self.kv_bytes_per_token * self.options.block_size

    @cached_property
    def num_blocks(self) -> int:
        """The null block included. Raises `KVCacheTooSmallError` when a request of `context` tokens has no room."""
        blocks = self.options.num_gpu_blocks_override or self.kv_budget_bytes // self.block_bytes
        self._check_fits(blocks * self.block_bytes)
        if blocks * self.block_bytes - self.block_bytes < self._bytes_of_one():
            have = max(0, blocks - 1)
            raise KVCacheTooSmallError(
                f"context: one sequence of {self.context:,} tokens needs {gib(self._bytes_of_one())} of KV cache "
                f"({self.kv_bytes_per_token:,} bytes per token), but the pool has {have:,} blocks of "
                f"{self.options.block_size} tokens = {gib(have * self.block_bytes)} (block 0 is reserved)"
            )
        return blocks

    def _check_fits(self, pool_bytes: int) -> None:
        """For pools whose size was given: nothing above has compared them with the memory."""
        fixed = self.weight_bytes + self.activation_bytes + self.lora_bytes
        if fixed + pool_bytes > self.hardware.memory_bytes:
            field = (
                "kv_cache_memory_bytes" if self.options.num_gpu_blocks_override is None else "num_gpu_blocks_override"
            )
            raise ConfigError(
                f"{field}: a pool of {gib(pool_bytes)} beside weights {gib(self.weight_bytes)} and activations "
                f"{gib(self.activation_bytes + self.lora_bytes)} is {gib(fixed + pool_bytes)}, "
                f"but {self.hardware.name} has {gib(self.hardware.memory_bytes)}"
            )

    def _bytes_of_one(self) -> int:
        return self.sequence_bytes(self.context)

    def sequence_bytes(self, tokens: int) -> int:
        """Of a sequence in whole blocks on one device; windows hold no more than they show."""
        slots = blocks_for(tokens, self.options.block_size) * self.options.block_size
        whole = self.model.kv_bytes_per_sequence(slots, self.kv_dtype, self.options.tensor_parallel_size)
        return -(-whole // self.options.pipeline_parallel_size)

    @cached_property
    def max_concurrency(self) -> float:
        return (self.num_blocks - 1) * self.block_bytes / self.sequence_bytes(self.context)

    @cached_property
    def batch(self) -> int:
        """Sequences that decode together."""
        return self.options.batch or max(1, min(self.options.max_num_seqs, int(self.max_concurrency)))

    @cached_property
    def runs_in_engine(self) -> bool:
        """Whether this engine has caches of all these kinds, and the options it has."""
        return all(layers.kind in ("full", "sliding_window") for layers in self.model.kv_layers)

    @cached_property
    def engine_groups(self) -> tuple[KVCacheGroup, ...]:
        """The KV groups this engine would make: layers of one window share a block table."""
        groups = []
        for layers in self.model.kv_layers:
            page = round(layers.elements_per_token * self.kv_dtype_bytes) * self.options.block_size
            spec = KVCacheSpec(self.options.block_size, page, self.kv_dtype, layers.kind, layers.window)
            groups.append(KVCacheGroup(tuple(f"{layers.kind}.{i}" for i in range(layers.num_layers)), spec))
        return tuple(groups)

    def engine_num_blocks(self) -> tuple[int, str]:
        """(blocks this engine would choose, why): its own function, given this machine's memory."""
        o = self.options
        cache = CacheConfig(
            block_size=o.block_size,
            gpu_memory_utilization=o.gpu_memory_utilization,
            kv_cache_memory_bytes=o.kv_cache_memory_bytes,
            num_gpu_blocks_override=o.num_gpu_blocks_override,
        )
        free = max(0, self.hardware.memory_bytes - self.weight_bytes - self.activation_bytes)
        demand = KVCacheDemand(o.max_num_seqs, self.max_model_len, self.model.max_model_len or self.max_model_len)
        return choose_num_blocks(
            cache, self.engine_groups, demand, available_bytes=lambda: free, default_limit_bytes=None
        )

    # -- speed -------------------------------------------------------------------------------------------

    @cached_property
    def prefill_chunk(self) -> int:
        """Tokens of one prompt that a step may compute."""
        o = self.options
        return min(o.max_num_batched_tokens, o.long_prefill_token_threshold or o.max_num_batched_tokens)

    @cached_property
    def steps(self) -> StepModel:
        o = self.options
        return StepModel(
            self.model, self.hardware, self.dtype, self.kv_dtype, self.quant, o.tensor_parallel_size, o.efficiency
        )
