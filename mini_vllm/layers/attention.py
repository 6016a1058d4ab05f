"""The attention layer models are written with: blind to backend, cache layout and batch shape.

It is handed flat queries, keys and values; by its `prefix` it finds the step's metadata and its own KV cache in the
forward context, and its backend does the rest.
"""

import math

import torch
from torch import nn

from mini_vllm.attention.context import get_forward_context
from mini_vllm.attention.kv_dtype import storage_dtype
from mini_vllm.attention.selector import get_attn_backend
from mini_vllm.core.interfaces import KVCacheSpec
from mini_vllm.exceptions import ConfigError
from mini_vllm.ops.batch_invariance import is_batch_invariant, require_attention_backend
from mini_vllm.ops.cpu.kernel import empty_like


class Attention(nn.Module):
    """Causal attention of one layer over the paged KV cache.

    num_heads, num_kv_heads: this rank's. sliding_window W: a query sees itself and the W - 1 tokens before it.
    logit_softcap c: scores become c * tanh(scores / c).
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        *,
        sliding_window: int | None = None,
        logit_softcap: float | None = None,
        dtype: torch.dtype | None = None,
        prefix: str,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_size, self.num_kv_heads = num_heads, head_size, num_kv_heads
        self.sliding_window, self.prefix = sliding_window, prefix
        self.backend = get_attn_backend(None, head_size, dtype or torch.get_default_dtype())
        if is_batch_invariant():
            require_attention_backend(self.backend.name)
        self.impl = self.backend.impl_cls(
            num_heads, head_size, scale, num_kv_heads, sliding_window=sliding_window, logit_softcap=logit_softcap
        )

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """query [N, Hq * D], key and value [N, Hkv * D] -> [N, Hq * D]."""
        context = get_forward_context()
        query = query.view(-1, self.num_heads, self.head_size)
        output = empty_like(query)
        self.impl.forward(
            query,
            key.view(-1, self.num_kv_heads, self.head_size),
            value.view(-1, self.num_kv_heads, self.head_size),
            context.kv_caches[self.prefix],
            context.attn_metadata[self.prefix],
            output,
        )
        return output.view(-1, self.num_heads * self.head_size)

    def get_kv_cache_spec(self, block_size: int, dtype: str) -> KVCacheSpec:
        """What one block of this layer takes. A sliding window still keeps every block: the mask alone is narrower.

        dtype: of the cache, never 'auto'. Raises `ConfigError` if the backend has no such cache.
        """
        supported = self.backend.supported_kv_cache_dtypes
        if dtype not in supported:
            raise ConfigError(
                f"kv_cache_dtype: attention backend {self.backend.name} stores {', '.join(supported)}, not {dtype!r}"
            )
        page = self.backend.kv_cache_shape(1, block_size, self.num_kv_heads, self.head_size, dtype)
        return KVCacheSpec(block_size, math.prod(page) * storage_dtype(dtype).itemsize, dtype)

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}/{self.num_kv_heads}, head_size={self.head_size}, backend={self.backend.name}"


def get_attention_layers(model: nn.Module) -> dict[str, Attention]:
    """Every attention layer by its prefix, in model order."""
    return {module.prefix: module for module in model.modules() if isinstance(module, Attention)}
