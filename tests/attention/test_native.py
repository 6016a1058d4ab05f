"""The native backend against dense attention in float64, on shuffled, poisoned pages; and bit for bit against itself
when the same work is cut, grouped or shared between threads in another way."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mini_vllm.attention.kv_dtype import scales_and_rows
from mini_vllm.attention.native import NativeBackend
from mini_vllm.attention.torch_ref import TorchRefBackend
from mini_vllm.core.interfaces import KVCacheSpec
from mini_vllm.ops.cpu import library
from tests.attention.test_torch_ref import Case, PagedCase, make_impl
from tests.paged import common_metadata

pytestmark = pytest.mark.skipif(not library.available(), reason="no native kernels here")

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(scope="module", autouse=True)
def two_threads() -> Iterator[None]:
    before = library.library().mv_num_threads()
    library.set_num_threads(2)
    yield
    library.set_num_threads(before)


@st.composite
def cases(draw):
    row = st.tuples(st.one_of(st.just(1), st.integers(1, 40)), st.one_of(st.integers(0, 70), st.integers(0, 700)))
    rows = draw(st.lists(row, min_size=1, max_size=6))
    num_kv_heads = draw(st.sampled_from([1, 2, 3]))
    return Case(
        query_lens=tuple(q for q, _ in rows),
        context_lens=tuple(c for _, c in rows),
        num_kv_heads=num_kv_heads,
        num_heads=num_kv_heads * draw(st.sampled_from([1, 2, 4, 7])),
        head_size=draw(st.sampled_from([4, 24, 32, 48, 64, 80, 128, 256])),
        block_size=draw(st.sampled_from([1, 3, 8, 16, 32])),
        window=draw(st.sampled_from([None, None, 1, 5, 16, 300])),
        softcap=draw(st.sampled_from([None, None, 3.0, 30.0])),
        padding=draw(st.sampled_from([0, 0, 3])),
        dtype=draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16])),
        cache_dtype=draw(st.sampled_from([None, "int8_per_token_head", "int8_per_token_head", "bfloat16", "float32"])),
        seed=draw(st.integers(0, 1000)),
    )


@given(case=cases())
@settings(max_examples=60)
def test_equals_dense_attention_on_any_mixed_batch(case):
    assert PagedCase(case, NativeBackend).error() < TOLERANCE[case.dtype]


@pytest.mark.parametrize("window", [None, 6])
def test_without_causality_every_token_of_the_sequence_is_seen(window):
    case = Case(query_lens=(7, 150), context_lens=(0, 0), causal=False, window=window)
    assert PagedCase(case, NativeBackend).error() < 1e-5
    narrow = make_impl(replace(case, window=3), NativeBackend)
    assert PagedCase(replace(case, window=None), NativeBackend).error(narrow) > 1e-2


def test_a_cache_of_another_shape_where_one_was_freed_is_read_by_its_own_shape(monkeypatch):
    place = torch.empty(1 << 16)

    def cache_in_place(self):
        cache = build_cache(self)
        there = place[: cache.numel()].view(cache.shape)
        there.copy_(cache)
        return there

    build_cache = PagedCase.cache
    monkeypatch.setattr(PagedCase, "cache", cache_in_place)
    impl = make_impl(Case(), NativeBackend)
    for block_size in (8, 3, 16):
        assert PagedCase(Case(block_size=block_size), NativeBackend).error(impl) < 1e-5


def test_padding_rows_of_the_output_are_zero():
    output = PagedCase(Case(padding=3), NativeBackend).paged()
    assert output[-3:].eq(0).all()
    assert output[:-3].ne(0).any(-1).all()


class Sequence:
    """One request's queries, keys and values; `attend` feeds it in chunks, beside a neighbour if asked."""

    def __init__(self, length: int, *, num_heads: int, num_kv_heads: int, window: int | None, dtype: torch.dtype):
        rng = torch.Generator().manual_seed(length)
        self.cache_dtype, dtype = dtype, torch.float32 if dtype is torch.int8 else dtype
        self.query = torch.randn(length, num_heads, 64, generator=rng).to(dtype)
        self.key, self.value = (torch.randn(length, num_kv_heads, 64, generator=rng).to(dtype) for _ in range(2))
        self.impl = NativeBackend.impl_cls(num_heads, 64, 0.125, num_kv_heads, sliding_window=window)
        self.num_blocks = -(-length // 16)

    def attend(self, chunks: list[int], *, neighbour: bool = False) -> torch.Tensor:
        """Outputs of every token, `chunks` at a time. The neighbour is a decode of 333 tokens before it."""
        length = len(self.query)
        is_int8 = self.cache_dtype is torch.int8
        name = "int8_per_token_head" if is_int8 else "auto"
        shape = NativeBackend.kv_cache_shape(self.num_blocks + 22, 16, self.key.shape[1], 64, name)
        cache = torch.full(shape, -1 if is_int8 else float("nan"), dtype=self.cache_dtype)
        cache[:, self.num_blocks + 1 :] = 60 if is_int8 else 0.25
        table = torch.zeros(2, max(self.num_blocks, 21), dtype=torch.int32).numpy()
        table[1, : self.num_blocks] = range(self.num_blocks, 0, -1)
        table[0, :21] = range(self.num_blocks + 1, self.num_blocks + 22)
        outputs, start, other = [], 0, int(neighbour)
        for chunk in chunks:
            stop = start + chunk
            lens = ([1, chunk], [333, stop]) if neighbour else ([chunk], [stop])
            common = common_metadata(*lens, table[1 - other :], 16)
            metadata = NativeBackend.builder_cls(KVCacheSpec(16, 0, "x"), torch.device("cpu")).build(common)
            q, k, v = (torch.cat([t[:other], t[start:stop]]) for t in (self.query, self.key, self.value))
            out = torch.empty_like(q)
            self.impl.forward(q, k, v, cache, metadata, out)
            outputs.append(out[other:])
            start = stop
        assert start == length
        return torch.cat(outputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("heads", [(7, 1), (4, 4), (8, 1)])
def test_chunks_neighbours_and_threads_change_no_bit(heads, window, dtype):
    sequence = Sequence(601, num_heads=heads[0], num_kv_heads=heads[1], window=window, dtype=dtype)
    whole = sequence.attend([601])
    assert whole.isfinite().all()
    assert torch.equal(sequence.attend([300, 1, 63, 237]), whole)
    assert torch.equal(sequence.attend([599, 1, 1], neighbour=True), whole)
    library.set_num_threads(1)  # no reason to share a decode's keys out
    alone = sequence.attend([590, *[1] * 11])
    library.set_num_threads(2)
    assert torch.equal(alone, whole)
    assert torch.equal(sequence.attend([590, *[1] * 11]), whole)


def test_tokens_may_lie_at_any_stride_and_nothing_else_is_written():
    paged = PagedCase(Case(), NativeBackend)
    case, cache, before = paged.case, paged.cache(), paged.cache()
    common = common_metadata(case.query_lens, paged.seq_lens, paged.table, case.block_size)
    metadata = NativeBackend.builder_cls(KVCacheSpec(case.block_size, 0, "x"), torch.device("cpu")).build(common)
    parts = (paged.query, paged.new(paged.keys), paged.new(paged.values))
    fused = torch.cat([part.flatten(1) for part in parts], 1)
    views = fused.split([part[0].numel() for part in parts], 1)
    query, key, value = (v.view(len(v), -1, case.head_size) for v in views)
    output = torch.empty(paged.query.shape)
    make_impl(case, NativeBackend).forward(query, key, value, cache, metadata, output)
    assert torch.equal(output, paged.paged())
    written = torch.zeros(cache.shape[1] * case.block_size, dtype=torch.bool)
    written[common.slot_mapping] = True
    changed = (cache != before) & ~(cache.isnan() & before.isnan())
    assert torch.equal(changed.any(-1).any(2).any(0).flatten(), written)


def test_other_types_are_refused():
    assert "float32" in (NativeBackend.supports(64, torch.float64) or "")


# --- rows that are only there to fill a batch of fixed size, and poisoned int8 slots ---------------------------------


@pytest.mark.parametrize("cache_dtype", ["float32", "int8_per_token_head"])
def test_padding_tokens_write_nothing_and_requests_of_no_length_get_zeros(cache_dtype):
    """As a recorded step has them: slot -1, and a sequence length of 0."""
    paged = PagedCase(Case(cache_dtype=cache_dtype), NativeBackend)
    case, cache = paged.case, paged.cache()
    common = common_metadata(case.query_lens, paged.seq_lens, paged.table, case.block_size)
    starts = torch.cat([common.query_start_loc, common.query_start_loc[-1:] + torch.tensor([1, 2, 2])]).int()
    padded = replace(
        common, num_actual_tokens=common.num_actual_tokens + 2, num_reqs=common.num_reqs + 3, query_start_loc=starts,
        seq_lens=torch.cat([common.seq_lens, torch.zeros(3, dtype=torch.int32)]),
        slot_mapping=torch.cat([common.slot_mapping, torch.tensor([-1, -1])]),
        block_table=torch.cat([common.block_table, common.block_table[:3] * 0 + 10**6]),
    )  # fmt: skip
    metadata = NativeBackend.builder_cls(KVCacheSpec(case.block_size, 0, "x"), torch.device("cpu")).build(padded)
    query, key, value = (torch.cat([t, t[:2] * float("nan")])
                         for t in (paged.query, paged.new(paged.keys), paged.new(paged.values)))  # fmt: skip
    output = torch.full_like(query, 7.0)
    plain = cache.clone()
    make_impl(case, NativeBackend).forward(query, key, value, cache, metadata, output)
    assert torch.equal(output[:-2], paged.paged())
    assert output[-2:].eq(0).all()
    common_only = NativeBackend.builder_cls(KVCacheSpec(case.block_size, 0, "x"), torch.device("cpu")).build(common)
    make_impl(case, NativeBackend).forward(
        paged.query, paged.new(paged.keys), paged.new(paged.values), plain, common_only, torch.empty_like(paged.query)
    )
    assert torch.equal(cache.view(torch.uint8), plain.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_size", [4, 24, 48, 128])
def test_what_is_written_as_int8_is_what_the_reference_writes(head_size, dtype):
    case = Case(head_size=head_size, dtype=dtype, cache_dtype="int8_per_token_head", query_lens=(3, 5, 1, 9))
    written = []
    for backend in (NativeBackend, TorchRefBackend):
        paged = PagedCase(case, backend)
        paged.values[1][0] = 0  # its scale is 0
        cache = paged.cache()
        paged.cache = lambda cache=cache: cache
        assert paged.paged().isfinite().all()
        written.append(cache)
    assert torch.equal(*written)


@given(case=cases())
@settings(max_examples=40)
def test_every_byte_of_the_cache_is_what_the_reference_leaves(case):
    """Written slots, those of others, and the poison in slots of nobody."""
    case = replace(case, context_lens=tuple(c % 20 for c in case.context_lens))
    written = []
    for backend in (NativeBackend, TorchRefBackend):
        paged = PagedCase(case, backend)
        cache = paged.cache()
        paged.cache = lambda cache=cache: cache
        paged.paged()
        written.append(cache.view(torch.uint8))
    assert torch.equal(*written)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_key_that_is_not_finite_is_not_hidden_by_int8(bad):
    paged = PagedCase(Case(cache_dtype="int8_per_token_head"), NativeBackend)
    paged.keys[1][-1, 0, 3] = bad
    output = paged.paged()
    assert output[5, :2].isnan().all()
    assert output[[0, 6, 7]].isfinite().all()


def test_control_a_wrong_scale_fails_the_comparison():
    paged = PagedCase(Case(cache_dtype="int8_per_token_head"), NativeBackend)
    assert paged.error() < 1e-5
    cache = paged.cache()
    scales, _ = scales_and_rows(cache)
    scales[0, paged.table[2, 1]] *= 1.1
    paged.cache = lambda: cache
    assert paged.error() > 1e-3
