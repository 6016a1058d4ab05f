"""How many KV cache blocks there are, and the tensors behind them.

The arithmetic is plain integers and loads no torch, so a planner can ask the same questions. Everything is counted
in blocks of `block_size` tokens; block 0 is the null block, which no request ever owns, so a pool of `num_blocks`
holds `(num_blocks - 1) * block_size` tokens.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mini_vllm.config import CacheConfig
from mini_vllm.core.interfaces import KVCacheConfig, KVCacheGroup
from mini_vllm.exceptions import ConfigError, KVCacheTooSmallError
from mini_vllm.hf_config import HFConfig
from mini_vllm.logger import init_logger

if TYPE_CHECKING:
    import torch

logger = init_logger(__name__)

_SAMPLER_CHUNK_BYTES = 200 << 20
"""What the sampler's temporaries come to at most (it works through large vocabularies in chunks)."""


@dataclass(frozen=True)
class KVCacheDemand:
    """What has to fit. max_model_len: None means as much as the pool allows. model_limit: the model's own maximum."""

    max_num_seqs: int
    max_model_len: int | None
    model_limit: int

    @property
    def longest(self) -> int:
        """Tokens of the longest request that could be asked for."""
        return self.model_limit if self.max_model_len is None else self.max_model_len


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that `num_tokens` tokens take."""
    return -(-num_tokens // block_size)


def num_blocks_for(budget_bytes: int, bytes_per_block: int) -> int:
    """Blocks that fit into `budget_bytes`, the null block among them."""
    return max(0, budget_bytes) // bytes_per_block


def bytes_per_block(groups: Sequence[KVCacheGroup]) -> int:
    """Bytes that one block id stands for: K and V of every layer. Raises `ConfigError` if no layer has a cache."""
    total = sum(len(group.layer_names) * group.spec.page_size_bytes for group in groups)
    if total <= 0:
        raise ConfigError("model: it has no attention layer, so there is no KV cache to size")
    return total


def activation_bytes(hf_config: HFConfig, max_num_batched_tokens: int, max_num_seqs: int, itemsize: int) -> int:
    """A generous estimate of what one step needs beside weights and KV cache."""
    per_token = 6 * hf_config.hidden_size + 3 * hf_config.intermediate_size
    per_token += 4 * hf_config.num_attention_heads * hf_config.head_dim
    logits = max_num_seqs * hf_config.vocab_size * 4
    return max_num_batched_tokens * per_token * itemsize + 2 * logits + min(6 * logits, _SAMPLER_CHUNK_BYTES)


def choose_num_blocks(
    cache: CacheConfig,
    groups: Sequence[KVCacheGroup],
    demand: KVCacheDemand,
    *,
    available_bytes: Callable[[], int],
    default_limit_bytes: int | None,
) -> tuple[int, str]:
    """(blocks of the pool, what decided it). The first that is set decides: blocks, bytes, share of free memory.

    available_bytes: asked only when it matters. default_limit_bytes: set where the device's memory is everybody's;
    a share of it then stops there, and at what `max_num_seqs` requests of the longest length could use.
    """
    block_bytes = bytes_per_block(groups)
    if cache.num_gpu_blocks_override is not None:
        return cache.num_gpu_blocks_override, "num_gpu_blocks_override"
    free = available_bytes()
    if cache.kv_cache_memory_bytes is not None:
        if cache.kv_cache_memory_bytes > free:
            logger.warning(
                "kv_cache_memory_bytes %s exceeds the %s free", *map(gib, (cache.kv_cache_memory_bytes, free))
            )
        return num_blocks_for(cache.kv_cache_memory_bytes, block_bytes), "kv_cache_memory_bytes"
    share = int(free * cache.gpu_memory_utilization)
    choices = [
        (num_blocks_for(share, block_bytes), f"gpu_memory_utilization {cache.gpu_memory_utilization} of {gib(free)}")
    ]
    if default_limit_bytes is not None:
        why = f"at most {gib(default_limit_bytes)} by default; set kv_cache_memory_bytes for more"
        choices.append((num_blocks_for(default_limit_bytes, block_bytes), why))
        most = demand.max_num_seqs * blocks_for(demand.longest, groups[0].spec.block_size) + 1
        choices.append((most, f"all that max_num_seqs {demand.max_num_seqs} x {demand.longest} tokens can use"))
    return min(choices, key=lambda choice: choice[0])


def resolve_max_model_len(demand: KVCacheDemand, num_blocks: int, block_size: int, block_bytes: int) -> int:
    """The longest request in tokens: what was asked for, or for 'auto' what model and pool allow.

    Raises `KVCacheTooSmallError`, with the arithmetic, if not even one such request fits.
    """
    capacity = (num_blocks - 1) * block_size
    if demand.max_model_len is None and capacity > 0:
        return min(demand.model_limit, capacity)
    needed = blocks_for(demand.max_model_len or 1, block_size)
    if needed > num_blocks - 1:
        raise KVCacheTooSmallError(
            _too_small_message(demand.max_model_len or 1, num_blocks, needed, block_size, block_bytes)
        )
    return demand.max_model_len or 1


def _too_small_message(max_model_len: int, num_blocks: int, needed: int, block_size: int, block_bytes: int) -> str:
    usable = max(0, num_blocks - 1)
    per_token = block_bytes / block_size
    advice = f"lower max_model_len to {usable * block_size} or less (or 'auto'), or " if usable else ""
    return (
        f"max_model_len: one request of {max_model_len:,} tokens needs {needed:,} KV cache blocks of {block_size} "
        f"tokens ({gib(needed * block_bytes)} at {per_token:,.0f} bytes per token), but the pool has {usable:,} "
        f"({usable * block_size:,} tokens, {gib(usable * block_bytes)}; block 0 is reserved). To fix it, {advice}"
        f"set kv_cache_memory_bytes to at least {(needed + 1) * block_bytes} "
        f"or num_gpu_blocks_override to at least {needed + 1}."
    )


def plan_kv_cache(
    cache: CacheConfig,
    groups: tuple[KVCacheGroup, ...],
    demand: KVCacheDemand,
    *,
    available_bytes: Callable[[], int],
    default_limit_bytes: int | None,
) -> tuple[KVCacheConfig, int]:
    """(the pool, the resolved max_model_len), and the lines about them in the log. Raises `KVCacheTooSmallError`."""
    num_blocks, why = choose_num_blocks(
        cache, groups, demand, available_bytes=available_bytes, default_limit_bytes=default_limit_bytes
    )
    config = KVCacheConfig(num_blocks, groups)
    max_model_len = resolve_max_model_len(demand, num_blocks, config.block_size, config.bytes_per_block)
    size = gib(num_blocks * config.bytes_per_block)
    logger.info("KV cache: %s in %d blocks of %d tokens (%s)", size, num_blocks, config.block_size, why)
    if max_model_len < demand.longest:
        logger.info("max_model_len: 'auto' became %d tokens, all that the pool holds", max_model_len)
    for line in size_lines(config, max_model_len):
        logger.info("%s", line)
    return config, max_model_len


def size_lines(config: KVCacheConfig, max_model_len: int) -> list[str]:
    """vLLM's two lines, which people and scripts look for."""
    usable = config.num_blocks - 1
    concurrency = usable / blocks_for(max_model_len, config.block_size)
    return [
        f"GPU KV cache size: {usable * config.block_size:,} tokens",
        f"Maximum concurrency for {max_model_len:,} tokens per request: {concurrency:.2f}x",
    ]


def gib(num_bytes: int) -> str:
    """Bytes for people, in the unit that leaves digits to read."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes / 1024:.1f} KiB"


def allocate_kv_caches(
    shapes: dict[str, tuple[int, ...]], dtype: "torch.dtype", device: "torch.device"
) -> dict[str, "torch.Tensor"]:
    """One tensor per layer, zeros. In host memory the system hands them out page by page as they are written: torch
    would write the zeros itself, which is seconds for a large pool that the first requests hardly use."""
    import numpy as np
    import torch

    if device.type != "cpu":
        return {name: torch.zeros(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
    caches = {}
    for name, shape in shapes.items():
        untouched = torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8))
        caches[name] = untouched.view(dtype).view(shape)
    return caches
