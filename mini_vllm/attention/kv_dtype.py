"""What a KV cache holds: which names there are, what type of tensor each is stored in, and int8 with scales.

`int8_per_token_head`: every token's key, and its value, of one KV head is `head_size` integers and one float32 scale,
max|x| / 127. Scales lie in the same tensor, int8 and shaped [2, num_blocks, num_kv_heads, block_size,
head_size + 4]; but the bytes of its last two dimensions, a page, are first the scales of its rows, then the rows,
so that both can be read as whole vectors.
"""

import torch

from mini_vllm.config import INT8_KV_CACHE_DTYPE
from mini_vllm.exceptions import ConfigError

FLOAT_KV_CACHE_DTYPES = ("bfloat16", "float16", "float32")
SCALE_BYTES = 4


def storage_dtype(cache_dtype: str) -> torch.dtype:
    """The element type of a cache tensor."""
    if cache_dtype == INT8_KV_CACHE_DTYPE:
        return torch.int8
    dtype: torch.dtype = getattr(torch, cache_dtype)
    return dtype


def cache_shape(
    num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype: str
) -> tuple[int, ...]:
    """[2 (keys, values), num_blocks, num_kv_heads, block_size, head_size, with scales + 4]. Raises `ConfigError`."""
    if cache_dtype != INT8_KV_CACHE_DTYPE:
        return 2, num_blocks, num_kv_heads, block_size, head_size
    if head_size % SCALE_BYTES:
        raise ConfigError(
            f"kv_cache_dtype: {cache_dtype} needs a head size that is a multiple of {SCALE_BYTES}, not {head_size}"
        )
    return 2, num_blocks, num_kv_heads, block_size, head_size + SCALE_BYTES


def scales_and_rows(kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of an int8 cache: float32 [2, blocks, Hkv, block_size] and int8 [2, blocks, Hkv, block_size, head_size]."""
    block_size, row = kv_cache.shape[3:]
    pages = kv_cache.flatten(3)
    scales = pages[..., : block_size * SCALE_BYTES].view(torch.float32)
    return scales, pages[..., block_size * SCALE_BYTES :].unflatten(-1, (block_size, row - SCALE_BYTES))


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., head_size] -> (int8 of that shape, float32 scales [...]); rows that are not finite have a scale of NaN."""
    x = x.float()
    absmax = x.abs().amax(-1)
    usable = absmax >= 1e-30
    inverse = torch.where(usable, absmax.new_tensor(127.0).div(absmax), 0.0)  # not 127 * (1 / absmax)
    scales = torch.where(usable, absmax / 127, 0.0)
    scales = torch.where(absmax.isfinite(), scales, torch.nan)
    return (x * inverse[..., None]).nan_to_num(0.0).round().to(torch.int8), scales
