"""Paged attention in plain torch: the reference for native kernels, and the backend where there are none.

A layer's cache is [2, num_blocks, num_kv_heads, block_size, head_size]; with keys and values seen as rows of
`head_size`, one `index_select` brings those of many requests into the shape batched products want. Rows of a cache in
another type than the queries become float32, and so do the queries (int8 rows: values times scale). Only rows that hold
written tokens are ever read: what pads a ragged batch points at the request's own last token and is masked. Row
indices and masks are made once a step and shared by all layers of a group.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch

from mini_vllm.attention.backend import CommonAttentionMetadata
from mini_vllm.attention.kv_dtype import FLOAT_KV_CACHE_DTYPES, cache_shape, quantize, scales_and_rows
from mini_vllm.config import INT8_KV_CACHE_DTYPE
from mini_vllm.core.interfaces import KVCacheSpec

QUERY_BLOCK = 128
"""Prefill queries scored at a time: the scores of a block stay in cache, and half of the square is never computed."""
MAX_SCORES = 1 << 23
"""Most scores (heads x queries x keys) of one product; longer prompts take fewer queries at a time."""
MAX_GATHERED_BYTES = 8 << 20
"""Most keys and values gathered for one batch of decodes, unless a single request is longer: what is gathered should
still be in cache when it is multiplied, and must not be large enough for fresh pages from the kernel."""
MAX_WASTED_BYTES = 1 << 20
"""Padding above which a ragged batch of decodes is split by length."""
KEY_MULTIPLE = 32
"""Decodes read a multiple of this many keys. oneDNN compiles a product's kernel for each new shape, which takes
longer than many products of it; so shapes change every 32 tokens instead of every token."""
_CLASS_LENGTH = 64


@dataclass(frozen=True)
class CacheShape:
    """What row indices depend on beside the batch; equal for all layers of a group."""

    num_kv_heads: int
    bytes_per_token: int
    """Key and value of one token, all KV heads."""
    sliding_window: int | None


@dataclass
class DecodeBatch:
    """Requests with one query token each, of similar length."""

    tokens: torch.Tensor | None
    """[R] positions in the flat batch; None when the batch is exactly these, in order."""
    rows: torch.Tensor
    """[Hkv * R * L] cache rows of the keys, and of the values."""
    mask: torch.Tensor | None
    """[Hkv * R, 1, L] float32, -inf where a row is padding; None when nothing is."""
    num_keys: int


@dataclass
class PrefillChunk:
    """Several query tokens of one request: flat positions `start:stop`, the first at sequence position `position`."""

    start: int
    stop: int
    position: int
    key_start: int
    """Sequence position of the first key gathered; more than 0 under a sliding window."""
    num_keys: int
    rows: torch.Tensor
    """[Hkv * num_keys] cache rows."""


@dataclass
class StepPlan:
    """Every index one step needs for layers of one `CacheShape`."""

    new_rows: torch.Tensor
    """[N * Hkv] cache rows where new keys and values go."""
    decodes: list[DecodeBatch]
    prefills: list[PrefillChunk]
    future: torch.Tensor
    """[QUERY_BLOCK, QUERY_BLOCK] bool, True above the diagonal."""


@dataclass
class TorchRefMetadata:
    """The step's batch, and the plans made for it so far."""

    common: CommonAttentionMetadata
    block_size: int
    plans: dict[CacheShape, StepPlan] = field(default_factory=dict)

    def plan_for(self, shape: CacheShape) -> StepPlan:
        """The plan of this shape; made by the first layer that asks."""
        if shape not in self.plans:
            self.plans[shape] = _make_plan(self.common, self.block_size, shape)
        return self.plans[shape]


class TorchRefMetadataBuilder:
    """Makes `TorchRefMetadata`; indices follow when the first layer shows its cache's shape."""

    def __init__(self, spec: KVCacheSpec, device: torch.device) -> None:
        self.block_size = spec.block_size
        self.device = device

    def build(self, common: CommonAttentionMetadata) -> TorchRefMetadata:
        return TorchRefMetadata(common, self.block_size)


def _make_plan(common: CommonAttentionMetadata, block_size: int, shape: CacheShape) -> StepPlan:
    """Planned on the host from the `_cpu` mirrors: a device is sent finished indices and never waited for."""
    device = common.slot_mapping.device
    starts = common.query_start_loc_cpu[: common.num_reqs + 1].astype(np.int64)
    seq_lens = common.seq_lens_cpu[: common.num_reqs].astype(np.int64)
    query_lens = np.diff(starts)
    window = shape.sliding_window
    first_keys = np.zeros_like(seq_lens)
    if window is not None:
        first_keys = np.maximum(seq_lens - query_lens - window + 1, 0)
    index = _RowIndex(common.block_table_cpu, block_size, shape, device)

    decodes = []
    for requests in _length_classes(np.flatnonzero(query_lens == 1), seq_lens - first_keys, shape):
        whole = len(requests) == common.num_actual_tokens
        tokens = None if whole else torch.from_numpy(starts[requests]).to(device)
        decodes.append(index.decode_batch(requests, first_keys[requests], seq_lens[requests], tokens))
    prefills = []
    for request in np.flatnonzero(query_lens > 1).tolist():
        start, stop = int(starts[request]), int(starts[request + 1])
        first, last = int(first_keys[request]), int(seq_lens[request])
        rows = index.rows(request, np.arange(first, last))
        prefills.append(PrefillChunk(start, stop, last - (stop - start), first, last - first, rows))
    new_rows = index.rows_of_slots(common.slot_mapping[: common.num_actual_tokens])
    return StepPlan(new_rows, decodes, prefills, _future_mask(device))


@functools.cache
def _future_mask(device: torch.device) -> torch.Tensor:
    return torch.ones(QUERY_BLOCK, QUERY_BLOCK, dtype=torch.bool, device=device).triu(1)


def _length_classes(
    requests: npt.NDArray[np.int64], key_lens: npt.NDArray[np.int64], shape: CacheShape
) -> list[npt.NDArray[np.int64]]:
    """Split decodes so that padding to the longest of each part wastes little and no part grows too large.

    Lengths in one part differ by at most a factor of sqrt(2) (below `_CLASS_LENGTH`, by anything); requests keep
    their order within it.
    """
    if not len(requests):
        return []
    lens = key_lens[requests]
    padded = len(lens) * int(lens.max()) * shape.bytes_per_token
    wasted = padded - int(lens.sum()) * shape.bytes_per_token
    if padded <= MAX_GATHERED_BYTES and wasted <= MAX_WASTED_BYTES:
        return [requests]
    order = np.argsort(lens, kind="stable")
    requests, lens = requests[order], lens[order]
    classes = np.ceil(2 * np.log2(np.maximum(lens, _CLASS_LENGTH)))
    parts = []
    for part in np.split(np.arange(len(lens)), np.flatnonzero(np.diff(classes)) + 1):
        most = max(1, MAX_GATHERED_BYTES // (shape.bytes_per_token * int(lens[part[-1]])))
        parts += [np.sort(requests[part[i : i + most]]) for i in range(0, len(part), most)]
    return parts


class _RowIndex:
    """Turns (request, position) into rows of keys, or values, seen as [num_blocks * Hkv * block_size, head_size]."""

    def __init__(
        self, block_table: npt.NDArray[np.int32], block_size: int, shape: CacheShape, device: torch.device
    ) -> None:
        self.block_table, self.block_size, self.device = block_table, block_size, device
        self.num_kv_heads = shape.num_kv_heads
        self.heads = np.arange(shape.num_kv_heads) * block_size

    def rows_of_slots(self, slots: torch.Tensor) -> torch.Tensor:
        """Of each slot, every KV head: [N] -> [N * Hkv]."""
        first_head = slots + slots // self.block_size * ((self.num_kv_heads - 1) * self.block_size)
        return (first_head[:, None] + torch.from_numpy(self.heads).to(slots.device)).view(-1)

    def rows(self, requests: int | npt.NDArray[np.int64], positions: npt.NDArray[np.int64]) -> torch.Tensor:
        """Of each KV head, every position: [...] -> [Hkv * ...]."""
        blocks = self.block_table[requests, positions // self.block_size].astype(np.int64)
        first_head = blocks * (self.num_kv_heads * self.block_size) + positions % self.block_size
        rows = self.heads[:, None] + first_head.reshape(-1)
        return torch.from_numpy(rows.reshape(-1)).to(self.device)

    def decode_batch(
        self,
        requests: npt.NDArray[np.int64],
        first_keys: npt.NDArray[np.int64],
        seq_lens: npt.NDArray[np.int64],
        tokens: torch.Tensor | None,
    ) -> DecodeBatch:
        """One query each over keys `first_keys : seq_lens`, padded to the longest, rounded up."""
        lens = seq_lens - first_keys
        num_keys = -(-int(lens.max()) // KEY_MULTIPLE) * KEY_MULTIPLE
        columns = np.arange(num_keys)
        # Padding re-reads the request's last token: a row that is written, and masked below.
        positions = np.minimum(first_keys[:, None] + columns, seq_lens[:, None] - 1)
        rows = self.rows(requests[:, None], positions)
        if int(lens.min()) == num_keys:
            return DecodeBatch(tokens, rows, None, num_keys)
        mask = np.where(columns < lens[:, None], np.float32(0), np.float32(-np.inf))
        mask = np.tile(mask, (self.num_kv_heads, 1))[:, None]
        return DecodeBatch(tokens, rows, torch.from_numpy(mask).to(self.device), num_keys)


class _Rows:
    """One half of a layer's cache, keys or values, as rows [num_blocks * Hkv * block_size, head_size]."""

    def __init__(self, rows: torch.Tensor, scales: torch.Tensor | None, dtype: torch.dtype) -> None:
        self.rows, self.scales, self.dtype = rows, scales, dtype

    @classmethod
    def halves(cls, kv_cache: torch.Tensor, dtype: torch.dtype) -> "tuple[_Rows, _Rows]":
        """(keys, values); what is read comes in `dtype`."""
        if kv_cache.dtype is not torch.int8:
            keys, values = (cls(half.view(-1, half.shape[-1]), None, dtype) for half in kv_cache.unbind(0))
            return keys, values
        scales, rows = scales_and_rows(kv_cache)
        keys, values = (cls(half, scale, dtype) for half, scale in zip(rows.unbind(0), scales.unbind(0), strict=True))
        return keys, values

    def write(self, at: torch.Tensor, x: torch.Tensor) -> None:
        """x [N, Hkv, head_size] to rows at [N * Hkv]."""
        x = x.reshape(-1, x.shape[-1])
        if self.scales is None:
            self.rows.index_copy_(0, at, x.to(self.rows.dtype))
            return
        place = self._place(at)
        self.rows[place], self.scales[place] = quantize(x)

    def read(self, at: torch.Tensor) -> torch.Tensor:
        """Rows at [...] -> [..., head_size]."""
        if self.scales is None:
            return self.rows.index_select(0, at).to(self.dtype)
        place = self._place(at)
        return self.rows[place].to(self.dtype) * self.scales[place][:, None]

    def _place(self, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(block, head, offset) of rows: with scales between them they have no common stride."""
        _, heads, block_size, _ = self.rows.shape
        return at // (heads * block_size), at // block_size % heads, at % block_size


class TorchRefImpl:
    """One layer's attention: write, gather, two batched products around a float32 softmax."""

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
        self.group_size = num_heads // num_kv_heads
        self.scale, self.sliding_window, self.logit_softcap = scale, sliding_window, logit_softcap

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: TorchRefMetadata,
        output: torch.Tensor,
    ) -> None:
        """See `AttentionImpl.forward`."""
        common = metadata.common
        num_tokens = common.num_actual_tokens
        dtype = query.dtype if query.dtype is kv_cache.dtype else torch.float32
        bytes_per_token = 2 * self.num_kv_heads * self.head_size * dtype.itemsize
        plan = metadata.plan_for(CacheShape(self.num_kv_heads, bytes_per_token, self.sliding_window))
        keys, values = _Rows.halves(kv_cache, dtype)
        keys.write(plan.new_rows, key[:num_tokens])
        values.write(plan.new_rows, value[:num_tokens])
        query = query.to(dtype)
        for batch in plan.decodes:
            self._decode(query, keys, values, batch, output[:num_tokens])
        for chunk in plan.prefills:
            self._prefill(query, keys, values, chunk, plan.future, common.causal, output)
        output[num_tokens:].zero_()

    def _decode(
        self, query: torch.Tensor, key_rows: _Rows, value_rows: _Rows, batch: DecodeBatch, output: torch.Tensor
    ) -> None:
        heads, group, size = self.num_kv_heads, self.group_size, self.head_size
        queries = query[: len(output)] if batch.tokens is None else query.index_select(0, batch.tokens)
        keys = key_rows.read(batch.rows).view(-1, batch.num_keys, size)
        values = value_rows.read(batch.rows).view(-1, batch.num_keys, size)
        grouped = queries.reshape(-1, heads, group, size).transpose(0, 1).reshape(-1, group, size)
        probs = self._probabilities(torch.bmm(grouped, keys.transpose(1, 2)), batch.mask)
        attended = torch.bmm(probs, values).view(heads, -1, group, size).transpose(0, 1).reshape(queries.shape)
        if batch.tokens is None:
            output.copy_(attended)
        else:
            output.index_copy_(0, batch.tokens, attended.to(output.dtype))

    def _prefill(
        self,
        query: torch.Tensor,
        key_rows: _Rows,
        value_rows: _Rows,
        chunk: PrefillChunk,
        future: torch.Tensor,
        causal: bool,
        output: torch.Tensor,
    ) -> None:
        heads, group, size = self.num_kv_heads, self.group_size, self.head_size
        keys = key_rows.read(chunk.rows).view(heads, -1, size)
        values = value_rows.read(chunk.rows).view(heads, -1, size)
        step = max(1, min(QUERY_BLOCK, MAX_SCORES // (self.num_heads * chunk.num_keys)))
        for start in range(chunk.start, chunk.stop, step):
            stop = min(start + step, chunk.stop)
            position = chunk.position + start - chunk.start
            low, high = self._key_range(chunk, position, stop - start, causal)
            queries = query[start:stop].reshape(-1, heads, group, size).permute(1, 2, 0, 3)
            scores = torch.bmm(queries.reshape(heads, -1, size), keys[:, low:high].transpose(1, 2))
            hidden = self._hidden_keys(position, stop - start, chunk.key_start + low, high - low, future, causal)
            probs = self._probabilities(scores.view(heads, group, stop - start, high - low), hidden)
            attended = torch.bmm(probs.view(heads, -1, high - low), values[:, low:high])
            output[start:stop] = attended.view(heads, group, -1, size).permute(2, 0, 1, 3).flatten(1, 2)

    def _key_range(self, chunk: PrefillChunk, position: int, num_queries: int, causal: bool) -> tuple[int, int]:
        """Gathered keys that some of these queries may see, as a slice."""
        low = 0 if self.sliding_window is None else max(0, position - self.sliding_window + 1 - chunk.key_start)
        return low, position + num_queries - chunk.key_start if causal else chunk.num_keys

    def _hidden_keys(
        self, position: int, num_queries: int, first_key: int, num_keys: int, future: torch.Tensor, causal: bool
    ) -> torch.Tensor | None:
        """Bool mask over the last keys, True where a query must not look; None when all may be seen."""
        if self.sliding_window is None:
            return future[:num_queries, :num_queries] if causal else None
        queries = torch.arange(position, position + num_queries, device=future.device)[:, None]
        keys = torch.arange(first_key, first_key + num_keys, device=future.device)
        hidden = keys <= queries - self.sliding_window
        return hidden | (keys > queries) if causal else hidden

    def _probabilities(self, scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Scale, cap, mask (additive floats, or True over the last keys), softmax in float32; in the scores' type."""
        dtype = scores.dtype
        scores = scores.to(torch.float32).mul_(self.scale)
        if self.logit_softcap is not None:
            scores = scores.div_(self.logit_softcap).tanh_().mul_(self.logit_softcap)
        if mask is not None and mask.dtype is torch.bool:
            scores[..., scores.shape[-1] - mask.shape[-1] :].masked_fill_(mask, float("-inf"))
        elif mask is not None:
            scores.add_(mask)
        return torch.softmax(scores, -1).to(dtype)


class TorchRefBackend:
    """Any head size, block size and floating-point type, on any device torch has."""

    name: ClassVar[str] = "TORCH_REF"
    impl_cls: ClassVar[type[TorchRefImpl]] = TorchRefImpl
    builder_cls: ClassVar[type[TorchRefMetadataBuilder]] = TorchRefMetadataBuilder
    supported_kv_cache_dtypes: ClassVar[tuple[str, ...]] = (*FLOAT_KV_CACHE_DTYPES, INT8_KV_CACHE_DTYPE)

    @staticmethod
    def supports(head_size: int, dtype: torch.dtype) -> str | None:
        return None if dtype.is_floating_point else "only floating-point types are implemented"

    @staticmethod
    def kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype: str = "auto"
    ) -> tuple[int, ...]:
        """See `kv_dtype.cache_shape`."""
        return cache_shape(num_blocks, block_size, num_kv_heads, head_size, cache_dtype)

    @staticmethod
    def copy_blocks(kv_cache: torch.Tensor, sources: Sequence[int], destinations: Sequence[int]) -> None:
        kv_cache[:, list(destinations)] = kv_cache[:, list(sources)]
