"""What an attention backend is: four roles, each small.

`AttentionBackend` says what it can do and how it lays out a layer's KV cache; nobody outside it indexes K or V.
`MetadataBuilder` turns the step's `CommonAttentionMetadata` into what the backend's kernels read, once a step for
each KV cache group. `AttentionImpl` belongs to one layer: it writes that layer's new keys and values, then attends.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import torch

from mini_vllm.core.interfaces import KVCacheSpec


@dataclass
class CommonAttentionMetadata:
    """The flat token batch of one step, built once by the model runner.

    Row r holds tokens `query_start_loc[r] : query_start_loc[r + 1]`, which are the last of the `seq_lens[r]` tokens
    that the request has after this step. Rows come in any order: one query token is a decode, more is a prefill
    chunk. Arrays ending in `_cpu` are host copies of the tensor of that name, so that planning never waits for
    the device.
    """

    num_actual_tokens: int
    """Tokens N without padding."""
    num_reqs: int
    """Rows R."""
    max_query_len: int
    max_seq_len: int
    query_start_loc: torch.Tensor
    """[R + 1] int32."""
    seq_lens: torch.Tensor
    """[R] int32, tokens computed after this step."""
    slot_mapping: torch.Tensor
    """[N] int64: block * block_size + offset, where each token's K and V are written."""
    block_table: torch.Tensor
    """[R, max_blocks] int32; what lies behind a row's own blocks is never read."""
    query_start_loc_cpu: npt.NDArray[np.int32]
    seq_lens_cpu: npt.NDArray[np.int32]
    block_table_cpu: npt.NDArray[np.int32]
    causal: bool = True


AttentionMetadata = Any
"""Whatever a backend's builder makes; only that backend's impl reads it."""


class AttentionImpl(Protocol):
    """The attention of one layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        *,
        sliding_window: int | None = None,
        logit_softcap: float | None = None,
    ) -> None: ...

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
        output: torch.Tensor,
    ) -> None:
        """Write key and value through the slot mapping, then attend into `output`.

        query, output: [N, num_heads, head_size]; key, value: [N, num_kv_heads, head_size]. Padding rows of
        `output` (behind `num_actual_tokens`) become 0.
        """


class MetadataBuilder(Protocol):
    """Makes the metadata that all layers of one KV cache group share in a step."""

    def __init__(self, spec: KVCacheSpec, device: torch.device) -> None: ...

    def build(self, common: CommonAttentionMetadata) -> AttentionMetadata:
        """The metadata of this step; valid until the next `build`."""


class AttentionBackend(Protocol):
    """Static facts of a backend; never instantiated."""

    name: ClassVar[str]
    impl_cls: ClassVar[type[AttentionImpl]]
    builder_cls: ClassVar[type[MetadataBuilder]]

    @staticmethod
    def supports(head_size: int, dtype: torch.dtype) -> str | None:
        """None when it can serve such layers, else why not."""

    supported_kv_cache_dtypes: ClassVar[tuple[str, ...]]
    """Names of `attention.kv_dtype` that caches may have, whatever the layers' own type."""

    @staticmethod
    def kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype: str = "auto"
    ) -> tuple[int, ...]:
        """Shape of one layer's cache tensor, K and V together, its elements being `kv_dtype.storage_dtype`.

        Its bytes are all that a layer keeps, scales included: pools are sized by it.
        """

    @staticmethod
    def copy_blocks(kv_cache: torch.Tensor, sources: Sequence[int], destinations: Sequence[int]) -> None:
        """Copy whole blocks of one layer's cache: `destinations[i]` becomes what `sources[i]` was before the call."""
