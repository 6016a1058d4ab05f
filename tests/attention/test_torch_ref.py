"""The reference backend against dense attention in float64, on shuffled, poisoned pages."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mini_vllm.attention import torch_ref
from mini_vllm.attention.backend import AttentionBackend, AttentionImpl
from mini_vllm.attention.kv_dtype import quantize, scales_and_rows, storage_dtype
from mini_vllm.attention.torch_ref import TorchRefBackend, TorchRefMetadataBuilder
from mini_vllm.core.interfaces import KVCacheSpec
from tests.paged import common_metadata

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Case:
    """One flat batch: row r has `query_lens[r]` new tokens after `context_lens[r]` cached ones."""

    query_lens: tuple[int, ...] = (1, 5, 1, 9)
    context_lens: tuple[int, ...] = (17, 0, 40, 23)
    num_heads: int = 4
    num_kv_heads: int = 2
    head_size: int = 8
    block_size: int = 8
    window: int | None = None
    softcap: float | None = None
    causal: bool = True
    padding: int = 0
    dtype: torch.dtype = torch.float32
    seed: int = 0
    cache_dtype: str | None = None
    """Of the cache; None is `dtype`."""


class PagedCase:
    """The tensors of a case: what is cached already, what this step brings, and a cache poisoned elsewhere."""

    def __init__(self, case: Case, backend: type[AttentionBackend] = TorchRefBackend) -> None:
        self.case, self.backend = case, backend
        rng = torch.Generator().manual_seed(case.seed)
        self.seq_lens = [c + q for c, q in zip(case.context_lens, case.query_lens, strict=True)]

        def normal(*shape):
            return torch.randn(*shape, generator=rng).to(case.dtype)

        self.keys = [normal(n, case.num_kv_heads, case.head_size) * 2 for n in self.seq_lens]
        self.values = [normal(n, case.num_kv_heads, case.head_size) for n in self.seq_lens]
        self.cached_keys, self.cached_values = (list(map(self.as_cached, t)) for t in (self.keys, self.values))
        total = sum(case.query_lens)
        self.query = normal(total + case.padding, case.num_heads, case.head_size)
        blocks = [-(-n // case.block_size) for n in self.seq_lens]
        self.num_blocks = 1 + sum(blocks) + 2
        order = 1 + np.random.default_rng(case.seed).permutation(self.num_blocks - 1)
        # What lies behind a row's own blocks is another row's block or past the pool: it must not be read.
        self.table = np.full((len(blocks), max(blocks) + 1), self.num_blocks + 7)
        for row, count in enumerate(blocks):
            self.table[row, :count], order = order[:count], order[count:]

    @property
    def cache_dtype(self) -> str:
        return self.case.cache_dtype or str(self.case.dtype).removeprefix("torch.")

    def as_cached(self, x: torch.Tensor) -> torch.Tensor:
        """What is read of keys or values once they were written."""
        if self.cache_dtype != "int8_per_token_head":
            return x.to(storage_dtype(self.cache_dtype))
        values, scales = quantize(x)
        return values.double() * scales[..., None].double()

    def cache(self) -> torch.Tensor:
        """Every slot NaN (of int8, its scale) except those of the context."""
        case = self.case
        shape = TorchRefBackend.kv_cache_shape(
            self.num_blocks, case.block_size, case.num_kv_heads, case.head_size, self.cache_dtype
        )
        dtype = storage_dtype(self.cache_dtype)
        cache = torch.full(shape, -1 if dtype is torch.int8 else float("nan"), dtype=dtype)
        scales, rows = scales_and_rows(cache) if dtype is torch.int8 else (None, cache)
        for row, context in enumerate(case.context_lens):
            for position in range(context):
                block, offset = self.table[row, position // case.block_size], position % case.block_size
                for half, tensors in enumerate((self.keys, self.values)):
                    if scales is None:
                        rows[half, block, :, offset] = tensors[row][position]
                    else:
                        rows[half, block, :, offset], scales[half, block, :, offset] = quantize(tensors[row][position])
        return cache

    def new(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        case = self.case
        rows = [t[context:] for t, context in zip(tensors, case.context_lens, strict=True)]
        padding = torch.full((case.padding, case.num_kv_heads, case.head_size), float("nan"), dtype=case.dtype)
        return torch.cat([*rows, padding])

    def paged(self, impl: AttentionImpl | None = None) -> torch.Tensor:
        case = self.case
        impl = impl or make_impl(case, self.backend)
        common = common_metadata(case.query_lens, self.seq_lens, self.table, case.block_size, case.causal)
        spec = KVCacheSpec(case.block_size, 0, "float32")
        metadata = self.backend.builder_cls(spec, torch.device("cpu")).build(common)
        output = torch.full_like(self.query, 7.0)
        impl.forward(self.query, self.new(self.keys), self.new(self.values), self.cache(), metadata, output)
        return output

    def dense(self) -> torch.Tensor:
        """Each query by itself, in float64, from the definition."""
        case, outputs, start = self.case, [], 0
        for row, query_len in enumerate(case.query_lens):
            k, v = (t[row].double().repeat_interleave(case.num_heads // case.num_kv_heads, 1)
                    for t in (self.cached_keys, self.cached_values))  # fmt: skip
            for i in range(query_len):
                position = case.context_lens[row] + i
                last = position + 1 if case.causal else self.seq_lens[row]
                first = 0 if case.window is None else max(0, position - case.window + 1)
                scores = torch.einsum("hd,nhd->hn", self.query[start + i].double(), k[first:last])
                scores /= math.sqrt(case.head_size)
                if case.softcap is not None:
                    scores = case.softcap * torch.tanh(scores / case.softcap)
                outputs.append(torch.einsum("hn,nhd->hd", scores.softmax(-1), v[first:last]))
            start += query_len
        return torch.stack(outputs)

    def error(self, impl: AttentionImpl | None = None) -> float:
        actual = self.paged(impl)[: sum(self.case.query_lens)].double()
        return float((actual - self.dense()).abs().max())


def make_impl(case: Case, backend: type[AttentionBackend] = TorchRefBackend) -> AttentionImpl:
    return backend.impl_cls(
        case.num_heads, case.head_size, case.head_size**-0.5, case.num_kv_heads,
        sliding_window=case.window, logit_softcap=case.softcap,
    )  # fmt: skip


@st.composite
def cases(draw):
    rows = draw(
        st.lists(st.tuples(st.one_of(st.just(1), st.integers(1, 20)), st.integers(0, 70)), min_size=1, max_size=7)
    )
    num_kv_heads = draw(st.sampled_from([1, 2, 3]))
    return Case(
        query_lens=tuple(q for q, _ in rows),
        context_lens=tuple(c for _, c in rows),
        num_kv_heads=num_kv_heads,
        num_heads=num_kv_heads * draw(st.sampled_from([1, 2, 4])),
        head_size=draw(st.sampled_from([4, 8, 24])),
        block_size=draw(st.sampled_from([1, 3, 8, 16, 32])),
        window=draw(st.sampled_from([None, None, 1, 5, 16, 1000])),
        softcap=draw(st.sampled_from([None, None, 3.0, 30.0])),
        padding=draw(st.sampled_from([0, 0, 3])),
        dtype=draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16])),
        cache_dtype=draw(st.sampled_from([None, None, "int8_per_token_head", "float16", "float32"])),
        seed=draw(st.integers(0, 1000)),
    )


@given(case=cases())
@settings(max_examples=150)
def test_equals_dense_attention_on_any_mixed_batch(case):
    assert PagedCase(case).error() < TOLERANCE[case.dtype]


@given(case=cases())
@settings(max_examples=60)
def test_splitting_batches_by_length_and_blocking_queries_changes_nothing(case):
    case = replace(case, context_lens=tuple(3 * c for c in case.context_lens))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_ref, "QUERY_BLOCK", 4)
        patch.setattr(torch_ref, "MAX_SCORES", 600)
        patch.setattr(torch_ref, "MAX_WASTED_BYTES", 0)
        patch.setattr(torch_ref, "MAX_GATHERED_BYTES", 16000)
        torch_ref._future_mask.cache_clear()
        error = PagedCase(case).error()
    torch_ref._future_mask.cache_clear()
    assert error < TOLERANCE[case.dtype]


def test_a_ragged_decode_batch_is_really_split():
    lens = np.array([3, 2000, 5, 1900, 40, 600])
    shape = torch_ref.CacheShape(8, 4096, None)
    parts = torch_ref._length_classes(np.arange(6), lens, shape)
    assert [part.tolist() for part in parts] == [[0, 2, 4], [5], [3], [1]]
    assert sorted(np.concatenate(parts).tolist()) == list(range(6))
    assert len(torch_ref._length_classes(np.arange(6), np.full(6, 100), shape)) == 1
    many = torch_ref._length_classes(np.arange(64), np.full(64, 1000), shape)
    assert len(many) > 1
    assert all(len(part) * 1000 * 4096 <= torch_ref.MAX_GATHERED_BYTES for part in many)


def test_long_prompts_are_scored_in_blocks_of_queries():
    assert PagedCase(Case(query_lens=(300, 1, 130), context_lens=(0, 10, 200))).error() < 2e-5


def test_decodes_of_one_length_class_keep_their_order(monkeypatch):
    monkeypatch.setattr(torch_ref, "MAX_WASTED_BYTES", 0)
    assert PagedCase(Case(query_lens=(1, 1, 1), context_lens=(40, 3, 17))).error() < 2e-5
    parts = torch_ref._length_classes(np.array([0, 1, 2]), np.array([41, 4, 18]), torch_ref.CacheShape(2, 128, None))
    assert [part.tolist() for part in parts] == [[0, 1, 2]]


@pytest.mark.parametrize("window", [None, 6])
def test_without_causality_every_token_of_the_sequence_is_seen(window):
    case = Case(query_lens=(7, 150), context_lens=(0, 0), causal=False, window=window)
    assert PagedCase(case).error() < 2e-5
    assert PagedCase(replace(case, window=None)).error(make_impl(replace(case, window=3))) > 1e-2


def test_padding_rows_of_the_output_are_zero():
    output = PagedCase(Case(padding=3)).paged()
    assert output[-3:].eq(0).all()
    assert output[:-3].ne(0).any(-1).all()


def test_new_tokens_are_written_where_the_slot_mapping_says_and_nowhere_else():
    case = Case()
    paged = PagedCase(case)
    cache, before = paged.cache(), paged.cache()
    common = common_metadata(case.query_lens, paged.seq_lens, paged.table, case.block_size)
    metadata = TorchRefMetadataBuilder(KVCacheSpec(case.block_size, 0, "float32"), torch.device("cpu")).build(common)
    new_keys, new_values = paged.new(paged.keys), paged.new(paged.values)
    make_impl(case).forward(paged.query, new_keys, new_values, cache, metadata, torch.empty_like(paged.query))
    slots = common.slot_mapping
    by_slot = cache.permute(0, 1, 3, 2, 4).reshape(2, -1, case.num_kv_heads, case.head_size)
    assert by_slot[0, slots].equal(new_keys)
    assert by_slot[1, slots].equal(new_values)
    untouched = torch.ones(by_slot.shape[1], dtype=torch.bool).index_fill_(0, slots, False)
    old = before.permute(0, 1, 3, 2, 4).reshape(by_slot.shape)
    assert torch.equal(by_slot[:, untouched].nan_to_num(9), old[:, untouched].nan_to_num(9))


# --- controls: the comparison must fail when something is wrong ---------------------------------------


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        (Case(window=6), Case(window=7)),
        (Case(window=6), Case(window=None)),
        (Case(softcap=3.0), Case(softcap=None)),
        (Case(num_heads=8), Case(num_heads=8, head_size=9)),  # a wrong scale
    ],
)
def test_control_a_wrong_option_fails_the_comparison(right, wrong):
    impl = make_impl(right)
    impl.sliding_window, impl.logit_softcap = wrong.window, wrong.softcap
    impl.scale = wrong.head_size**-0.5
    assert PagedCase(right).error() < 2e-5
    assert PagedCase(right).error(impl) > 1e-2


@pytest.mark.parametrize("query_lens", [(1, 1, 1, 1), (5, 5, 5, 5)])
def test_control_interleaved_head_groups_fail_the_comparison(query_lens):
    paged = PagedCase(Case(query_lens=query_lens))
    assert paged.error() < 2e-5
    paged.query = paged.query[:, [0, 2, 1, 3]]
    wrong = paged.paged()[:, [0, 2, 1, 3]].double()
    paged.query = paged.query[:, [0, 2, 1, 3]]
    assert float((wrong - paged.dense()).abs().max()) > 1e-2


@pytest.mark.parametrize("row", [0, 3])
def test_control_a_wrong_block_shows_as_nan(row):
    paged = PagedCase(Case())
    unwritten = (set(range(1, paged.num_blocks)) - set(paged.table.ravel().tolist())).pop()
    paged.table[row, 0] = unwritten
    cache = paged.cache()
    cache[:, unwritten] = float("nan")
    paged.cache = lambda: cache
    assert math.isnan(paged.error())


def test_copy_blocks_reads_all_sources_before_it_writes():
    cache = torch.arange(2 * 4 * 2 * 3 * 5, dtype=torch.float32).view(2, 4, 2, 3, 5)
    before = cache.clone()
    TorchRefBackend.copy_blocks(cache, [1, 2], [2, 3])
    assert cache[:, 2].equal(before[:, 1])
    assert cache[:, 3].equal(before[:, 2])
    assert cache[:, :2].equal(before[:, :2])
