"""Paged attention by this package's own kernels for CPUs: `ops/cpu/csrc/attention.cpp`.

Keys and values are read where they lie, through the block table; nothing is gathered, so a step's metadata is a few
pointers. Scores, softmax and sums are float32 whatever the tensors hold. A token's result does not depend on its
neighbours in the batch nor on how its prompt was cut into chunks: it is the same to the last bit.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from mini_vllm.attention.backend import CommonAttentionMetadata
from mini_vllm.attention.kv_dtype import FLOAT_KV_CACHE_DTYPES, cache_shape
from mini_vllm.attention.torch_ref import TorchRefBackend
from mini_vllm.config import INT8_KV_CACHE_DTYPE
from mini_vllm.core.interfaces import KVCacheSpec
from mini_vllm.ops.cpu import library
from mini_vllm.ops.cpu.kernel import INT64, POINTER, Kernel
from mini_vllm.ops.cpu.library import DTYPE_CODES

CACHE_CODES: dict[torch.dtype, int] = {**DTYPE_CODES, torch.int8: 16}
"""How the kernel is told what a cache holds; int8 has a scale for each token and head."""


class _Layer(ctypes.Structure):
    """`AttentionLayer` in attention.cpp."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("num_heads", "num_kv_heads", "head_size", "block_size")),
        *((name, ctypes.c_int32) for name in ("dtype", "cache_dtype", "window")),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    ]


class _Batch(ctypes.Structure):
    """`AttentionBatch` in attention.cpp."""

    _fields_ = [
        ("num_tokens", ctypes.c_int64),
        ("num_reqs", ctypes.c_int64),
        ("query_start_loc", ctypes.c_void_p),
        ("seq_lens", ctypes.c_void_p),
        ("block_table", ctypes.c_void_p),
        ("block_table_stride", ctypes.c_int64),
        ("slot_mapping", ctypes.c_void_p),
        ("causal", ctypes.c_int32),
    ]


@dataclass(slots=True)
class NativeMetadata:
    """The step's batch as the kernel reads it; `common` keeps alive what `batch` points at."""

    num_tokens: int
    batch: _Batch
    reference: int
    """Address of `batch`."""
    common: CommonAttentionMetadata | None = None


class NativeMetadataBuilder:
    """Hands on the step's tensors by address, in one structure that stays where it is from step to step."""

    def __init__(self, spec: KVCacheSpec, device: torch.device) -> None:
        self.batch = _Batch()

    def build(self, common: CommonAttentionMetadata) -> NativeMetadata:
        batch = self.batch
        batch.num_tokens, batch.num_reqs = common.num_actual_tokens, common.num_reqs
        batch.query_start_loc, batch.seq_lens = common.query_start_loc.data_ptr(), common.seq_lens.data_ptr()
        batch.block_table, batch.block_table_stride = common.block_table.data_ptr(), common.block_table.stride(0)
        batch.slot_mapping, batch.causal = common.slot_mapping.data_ptr(), common.causal
        return NativeMetadata(common.num_actual_tokens, batch, ctypes.addressof(batch), common)

    def record(self, num_tokens: int) -> NativeMetadata:
        """Metadata to record a forward of `num_tokens` tokens with: replayed, it is that of the latest `build`."""
        return NativeMetadata(num_tokens, self.batch, ctypes.addressof(self.batch))


_KERNEL = Kernel(
    "mv_attention_rows",
    layer=POINTER, batch=POINTER, query=POINTER, key=POINTER, value=POINTER, keys=POINTER, values=POINTER,
    output=POINTER, query_stride=INT64, key_stride=INT64, value_stride=INT64,
)  # fmt: skip


class NativeAttentionImpl:
    """One layer's attention: one call, which writes the new keys and values and attends."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        *,
        sliding_window: int | None = None,
        logit_softcap: float | None = None,
    ) -> None:
        self.num_heads, self.head_size, self.num_kv_heads = num_heads, head_size, num_kv_heads
        self.scale, self.sliding_window, self.logit_softcap = scale, sliding_window, logit_softcap
        self._layer = _Layer()
        self._reference = ctypes.addressof(self._layer)
        self._cache_address = 0
        self._cache_shape = torch.Size()
        self._values_offset = 0
        self._dense = (head_size, 1)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: NativeMetadata,
        output: torch.Tensor,
    ) -> None:
        """See `AttentionImpl.forward`."""
        keys = kv_cache.data_ptr()
        if keys != self._cache_address or kv_cache.shape != self._cache_shape:  # another may lie where one was freed
            self._meet_cache(kv_cache, query.dtype)
        query, key, value = self._with_dense_heads(query), self._with_dense_heads(key), self._with_dense_heads(value)
        _KERNEL(
            len(output),
            self._reference, metadata.reference, query.data_ptr(), key.data_ptr(), value.data_ptr(),
            keys, keys + self._values_offset, output.data_ptr(), query.stride(0), key.stride(0), value.stride(0),
        )  # fmt: skip
        if len(output) > metadata.num_tokens:
            output[metadata.num_tokens :].zero_()

    def _meet_cache(self, kv_cache: torch.Tensor, dtype: torch.dtype) -> None:
        """Tell the kernel what does not change from step to step."""
        assert kv_cache.is_contiguous()
        layer = self._layer
        layer.num_heads, layer.num_kv_heads, layer.head_size = self.num_heads, self.num_kv_heads, self.head_size
        layer.block_size, layer.dtype, layer.cache_dtype = (
            kv_cache.shape[3],
            DTYPE_CODES[dtype],
            CACHE_CODES[kv_cache.dtype],
        )
        layer.window, layer.scale, layer.softcap = self.sliding_window or 0, self.scale, self.logit_softcap or 0.0
        self._values_offset = kv_cache.stride(0) * kv_cache.element_size()
        self._cache_address, self._cache_shape = kv_cache.data_ptr(), kv_cache.shape

    def _with_dense_heads(self, x: torch.Tensor) -> torch.Tensor:
        """Heads of a token side by side, tokens at any stride."""
        return x if x.stride()[1:] == self._dense else x.contiguous()


class NativeBackend:
    """Any head size and block size in float32, bfloat16 and float16, where a kernel library is to be had."""

    name: ClassVar[str] = "CPU_NATIVE"
    impl_cls: ClassVar[type[NativeAttentionImpl]] = NativeAttentionImpl
    builder_cls: ClassVar[type[NativeMetadataBuilder]] = NativeMetadataBuilder
    supported_kv_cache_dtypes: ClassVar[tuple[str, ...]] = (*FLOAT_KV_CACHE_DTYPES, INT8_KV_CACHE_DTYPE)

    @staticmethod
    def supports(head_size: int, dtype: torch.dtype) -> str | None:
        if dtype not in DTYPE_CODES:
            return "only float32, bfloat16 and float16 are implemented"
        return None if library.available() else "there is no library of native kernels (the log says why)"

    @staticmethod
    def kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype: str = "auto"
    ) -> tuple[int, ...]:
        """See `kv_dtype.cache_shape`."""
        return cache_shape(num_blocks, block_size, num_kv_heads, head_size, cache_dtype)

    @staticmethod
    def copy_blocks(kv_cache: torch.Tensor, sources: Sequence[int], destinations: Sequence[int]) -> None:
        TorchRefBackend.copy_blocks(kv_cache, sources, destinations)
