"""The arithmetic of the KV cache's size: what decides it, what it says, and when it refuses."""

import logging
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mini_vllm.config import CacheConfig
from mini_vllm.core.interfaces import KVCacheConfig, KVCacheGroup, KVCacheSpec
from mini_vllm.exceptions import ConfigError, KVCacheTooSmallError
from mini_vllm.worker.kv_cache import (
    KVCacheDemand,
    allocate_kv_caches,
    blocks_for,
    bytes_per_block,
    choose_num_blocks,
    gib,
    num_blocks_for,
    plan_kv_cache,
    resolve_max_model_len,
    size_lines,
)

GIB = 1 << 30
PAGE = 64 << 10
LAYERS = 4
BLOCK_BYTES = PAGE * LAYERS
GROUPS = (KVCacheGroup(tuple(f"layer{i}" for i in range(LAYERS)), KVCacheSpec(16, PAGE, "bfloat16")),)


def choose(*, free: int = 10 * GIB, limit: int | None = None, demand: Any = None, **cache: Any) -> tuple[int, str]:
    demand = demand or KVCacheDemand(max_num_seqs=256, max_model_len=4096, model_limit=8192)
    config = CacheConfig(**cache)
    return choose_num_blocks(config, GROUPS, demand, available_bytes=lambda: free, default_limit_bytes=limit)


def test_a_block_id_stands_for_one_page_of_every_layer() -> None:
    other = KVCacheGroup(("x",), KVCacheSpec(16, 100, "bfloat16"))
    assert bytes_per_block(GROUPS) == BLOCK_BYTES
    assert bytes_per_block((*GROUPS, other)) == BLOCK_BYTES + 100
    assert bytes_per_block((*GROUPS, other)) == KVCacheConfig(2, (*GROUPS, other)).bytes_per_block


def test_a_model_without_attention_has_no_cache_to_size() -> None:
    with pytest.raises(ConfigError, match="no attention layer"):
        bytes_per_block(())


@given(st.integers(0, 10**12), st.integers(1, 10**9))
def test_as_many_blocks_as_fit_and_not_one_more(budget: int, block_bytes: int) -> None:
    blocks = num_blocks_for(budget, block_bytes)
    assert blocks * block_bytes <= budget < (blocks + 1) * block_bytes


def test_the_override_decides_before_everything_and_asks_for_no_memory() -> None:
    blocks, why = choose_num_blocks(
        CacheConfig(num_gpu_blocks_override=77, kv_cache_memory_bytes=GIB),
        GROUPS,
        KVCacheDemand(1, 16, 16),
        available_bytes=lambda: pytest.fail("asked for free memory"),
        default_limit_bytes=None,
    )
    assert (blocks, why) == (77, "num_gpu_blocks_override")


def test_bytes_decide_before_utilization_and_are_not_limited() -> None:
    blocks, why = choose(kv_cache_memory_bytes=8 * GIB, limit=4 * GIB)
    assert blocks == 8 * GIB // BLOCK_BYTES
    assert why == "kv_cache_memory_bytes"


def test_more_bytes_than_are_free_are_obeyed_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "mini_vllm"):
        assert choose(kv_cache_memory_bytes=8 * GIB, free=GIB)[0] == 8 * GIB // BLOCK_BYTES
    assert "kv_cache_memory_bytes 8.00 GiB exceeds the 1.00 GiB free" in caplog.text


def test_utilization_is_a_share_of_what_is_free() -> None:
    blocks, why = choose(gpu_memory_utilization=0.5)
    assert blocks == 5 * GIB // BLOCK_BYTES
    assert "gpu_memory_utilization 0.5 of 10.00 GiB" in why


def test_shared_memory_is_taken_modestly_by_default() -> None:
    blocks, why = choose(limit=4 * GIB)
    assert blocks == 4 * GIB // BLOCK_BYTES
    assert "at most 4.00 GiB by default; set kv_cache_memory_bytes for more" in why


def test_shared_memory_is_not_taken_for_more_than_the_longest_batch() -> None:
    blocks, why = choose(limit=4 * GIB, demand=KVCacheDemand(max_num_seqs=2, max_model_len=100, model_limit=8192))
    assert blocks == 2 * 7 + 1
    assert "max_num_seqs 2 x 100 tokens" in why
    auto = KVCacheDemand(max_num_seqs=2, max_model_len=None, model_limit=8192)
    assert choose(limit=4 * GIB, demand=auto)[0] == 2 * 512 + 1


# --- max_model_len -----------------------------------------------------------------------------------------


def resolve(max_model_len: int | None, num_blocks: int, model_limit: int = 8192) -> int:
    return resolve_max_model_len(KVCacheDemand(8, max_model_len, model_limit), num_blocks, 16, BLOCK_BYTES)


def test_auto_is_the_models_maximum_when_the_pool_holds_it() -> None:
    assert resolve(None, 513) == 8192
    assert resolve(None, 10_000) == 8192


def test_auto_shrinks_to_the_pool_without_its_null_block() -> None:
    assert resolve(None, 512) == 511 * 16
    assert resolve(None, 2) == 16


def test_a_given_length_that_fits_exactly_is_kept() -> None:
    assert resolve(4096, 257) == 4096
    assert resolve(4095, 257) == 4095


def test_a_given_length_that_cannot_fit_once_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(KVCacheTooSmallError) as error:
        resolve(4096, 256)
    message = str(error.value)
    for part in (
        "one request of 4,096 tokens needs 256 KV cache blocks of 16 tokens",
        "64.00 MiB at 16,384 bytes per token",
        "the pool has 255 (4,080 tokens, 63.75 MiB; block 0 is reserved)",
        "lower max_model_len to 4080 or less (or 'auto')",
        f"kv_cache_memory_bytes to at least {257 * BLOCK_BYTES}",
        "num_gpu_blocks_override to at least 257",
    ):
        assert part in message


@given(st.integers(1, 20_000), st.integers(0, 2000), st.integers(1, 64))
def test_the_advice_of_the_refusal_works(max_model_len: int, num_blocks: int, block_size: int) -> None:
    demand = KVCacheDemand(1, max_model_len, 20_000)
    try:
        resolve_max_model_len(demand, num_blocks, block_size, BLOCK_BYTES)
    except KVCacheTooSmallError as error:
        blocks = int(str(error).rsplit(" ", 1)[1].rstrip("."))
        assert resolve_max_model_len(demand, blocks, block_size, BLOCK_BYTES) == max_model_len
        with pytest.raises(KVCacheTooSmallError):
            resolve_max_model_len(demand, blocks - 1, block_size, BLOCK_BYTES)
    else:
        assert blocks_for(max_model_len, block_size) <= num_blocks - 1


@pytest.mark.parametrize("num_blocks", [0, 1])
@pytest.mark.parametrize("max_model_len", [None, 8])
def test_a_pool_without_a_usable_block_is_refused(num_blocks: int, max_model_len: int | None) -> None:
    with pytest.raises(KVCacheTooSmallError, match="the pool has 0"):
        resolve(max_model_len, num_blocks)


# --- the log -----------------------------------------------------------------------------------------------


def test_the_log_has_vllms_lines(caplog: pytest.LogCaptureFixture) -> None:
    demand = KVCacheDemand(max_num_seqs=256, max_model_len=2048, model_limit=2048)
    with caplog.at_level(logging.INFO, "mini_vllm"):
        config, max_model_len = plan_kv_cache(
            CacheConfig(num_gpu_blocks_override=8788),
            GROUPS,
            demand,
            available_bytes=lambda: 0,
            default_limit_bytes=None,
        )
    assert (config.num_blocks, max_model_len) == (8788, 2048)
    assert "GPU KV cache size: 140,592 tokens" in caplog.messages
    assert "Maximum concurrency for 2,048 tokens per request: 68.65x" in caplog.messages


def test_concurrency_counts_whole_blocks_per_request() -> None:
    assert size_lines(KVCacheConfig(11, GROUPS), 17)[1] == "Maximum concurrency for 17 tokens per request: 5.00x"


def test_a_shrunken_auto_length_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "mini_vllm"):
        _, max_model_len = plan_kv_cache(
            CacheConfig(kv_cache_memory_bytes=3 * BLOCK_BYTES),
            GROUPS,
            KVCacheDemand(4, None, 8192),
            available_bytes=lambda: GIB,
            default_limit_bytes=None,
        )
    assert max_model_len == 32
    assert "max_model_len: 'auto' became 32 tokens, all that the pool holds" in caplog.messages


@pytest.mark.parametrize(("size", "text"), [(512, "0.5 KiB"), (3 << 20, "3.00 MiB"), (5 * GIB // 2, "2.50 GiB")])
def test_sizes_are_written_in_a_unit_with_digits(size: int, text: str) -> None:
    assert gib(size) == text


# --- tensors -----------------------------------------------------------------------------------------------


def test_every_layer_gets_a_tensor_of_its_own() -> None:
    caches = allocate_kv_caches({"a": (2, 3, 4), "b": (5,)}, torch.bfloat16, torch.device("cpu"))
    assert {name: tuple(cache.shape) for name, cache in caches.items()} == {"a": (2, 3, 4), "b": (5,)}
    assert all(cache.dtype is torch.bfloat16 and not cache.any() for cache in caches.values())


def test_the_arithmetic_loads_no_torch() -> None:
    code = "import sys, mini_vllm.worker.kv_cache; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_pool_takes_memory_only_where_it_is_written() -> None:
    program = """
import torch
from mini_vllm.worker.kv_cache import allocate_kv_caches

def anonymous_mib():
    return next(int(line.split()[1]) >> 10 for line in open("/proc/self/status") if line.startswith("RssAnon"))

before = anonymous_mib()
caches = allocate_kv_caches({"a": (2, 1 << 20, 64), "b": (2, 1 << 20, 64)}, torch.bfloat16, torch.device("cpu"))
assert all(cache.shape == (2, 1 << 20, 64) and cache.dtype is torch.bfloat16 for cache in caches.values())
assert anonymous_mib() - before < 32, "512 MiB of zeros were written"
caches["a"][1, :1000] = 1.0
assert caches["a"][1, 999, 63] == 1 and caches["a"][1, 1000:2000].count_nonzero() == 0
touched = torch.zeros(2, 1 << 20, 64, dtype=torch.bfloat16).add_(1)  # the control: this much would have been seen
assert anonymous_mib() - before > 200
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
