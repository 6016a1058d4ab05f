"""Block tables and the prefix cache: sharing, eviction order, refusals, rolling back."""

import pytest

from mini_vllm.core.kv_cache_manager import KVCacheManager
from tests.core.harness import make_request
from tests.core.kv_steps import decode, free_ids, kv_snapshot, prefill, ref_counts, table

PROMPT = list(range(32))
"""Eight blocks of four."""


# -- tables ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(1, 1), (4, 1), (5, 2), (50, 13)])
def test_a_table_has_just_enough_blocks(num_tokens: int, num_blocks: int) -> None:
    kv = KVCacheManager(64, 4)
    request = make_request("a", num_tokens)
    prefill(kv, request)
    assert len(table(kv, request)) == num_blocks


def test_tables_grow_at_the_end_and_only_at_block_boundaries() -> None:
    kv = KVCacheManager(64, 4)
    request = make_request("a", 7, max_tokens=20)
    prefill(kv, request)
    before, sizes = table(kv, request), []
    for _ in range(6):
        assert decode(kv, request)
        sizes.append(len(table(kv, request)))
        assert table(kv, request)[: len(before)] == before
    assert sizes == [2, 3, 3, 3, 3, 4]


def test_allocation_returns_only_the_blocks_that_are_new() -> None:
    kv = KVCacheManager(64, 4)
    request = make_request("a", 10)
    first = kv.allocate_slots(request, 6)
    request.num_computed_tokens = 6
    second = kv.allocate_slots(request, 4)
    assert first is not None and second is not None
    assert (len(first[0]), len(second[0])) == (2, 1)
    assert first[0] + second[0] == table(kv, request)


def test_free_gives_every_block_back_and_freeing_twice_does_no_harm() -> None:
    kv = KVCacheManager(16, 4)
    request = make_request("a", 30)
    prefill(kv, request)
    kv.free(request)
    kv.free(request)
    assert kv.usage == 0.0 and len(free_ids(kv)) == 15
    kv.check_integrity([])


def test_integrity_check_sees_a_leaked_table() -> None:
    kv = KVCacheManager(16, 4)
    prefill(kv, make_request("a", 8))
    kv.check_integrity(["a"])
    with pytest.raises(AssertionError, match="outlived"):
        kv.check_integrity([])


@pytest.mark.broken_pool
def test_integrity_check_sees_a_lost_reference() -> None:
    kv = KVCacheManager(16, 4)
    request = make_request("a", 8)
    prefill(kv, request)
    kv.block_pool.touch([kv.block_pool.blocks[table(kv, request)[0]]])
    with pytest.raises(AssertionError, match="refs"):
        kv.check_integrity()


# -- sharing and eviction: 32-token prompts, block size 4 ----------------------------------------------------


def test_first_request_finds_a_cold_cache() -> None:
    kv = KVCacheManager(64, 4)
    a = make_request("a", PROMPT)
    assert prefill(kv, a) == 0
    assert ref_counts(kv, a) == [1] * 8


def test_identical_prompt_shares_all_but_the_tail_block() -> None:
    kv = KVCacheManager(64, 4)
    a, b = make_request("a", PROMPT), make_request("b", PROMPT)
    prefill(kv, a)
    free_before = len(free_ids(kv))
    assert prefill(kv, b) == 28
    assert ref_counts(kv, b) == [2] * 7 + [1]
    assert free_before - len(free_ids(kv)) == 1
    assert table(kv, a)[:7] == table(kv, b)[:7] and table(kv, a)[7] != table(kv, b)[7]


def test_diverging_prompt_shares_only_the_common_prefix() -> None:
    kv = KVCacheManager(64, 4)
    prefill(kv, make_request("a", PROMPT))
    assert prefill(kv, make_request("b", PROMPT[:16] + [99] * 16)) == 16


def test_a_partial_block_is_never_shared() -> None:
    kv = KVCacheManager(64, 4)
    prefill(kv, make_request("a", PROMPT[:7]))
    assert prefill(kv, make_request("b", PROMPT)) == 4


def test_tails_are_evicted_before_the_prefix_they_share() -> None:
    """A pool of exactly null + 8 + 1 blocks: two tails go first, the head of the prefix goes last."""
    kv = KVCacheManager(10, 4)
    a, b = make_request("a", PROMPT), make_request("b", PROMPT)
    prefill(kv, a)
    prefill(kv, b)
    tail_a, tail_b, prefix = table(kv, a)[7], table(kv, b)[7], table(kv, a)[:7]
    kv.free(a)
    kv.free(b)
    assert free_ids(kv) == [tail_a, tail_b, *reversed(prefix)]
    prefill(kv, make_request("c", 8))
    probe = make_request("d", PROMPT)
    assert kv.get_computed_blocks(probe)[1] == 28, "both demanded blocks came from the tails"
    assert free_ids(kv)[-1] == prefix[0]


@pytest.mark.broken_pool
def test_freeing_head_first_would_lose_the_shared_prefix() -> None:
    """Broken control of the order above."""
    kv = KVCacheManager(10, 4)
    a = make_request("a", PROMPT)
    prefill(kv, a)
    tables = kv._tables.pop("a")
    del kv._num_cached_blocks["a"]
    kv.block_pool.free_blocks(tables[0])
    prefill(kv, make_request("c", 8))
    assert kv.get_computed_blocks(make_request("d", PROMPT))[1] == 0


def test_free_order_with_three_sharers_released_in_any_order() -> None:
    kv = KVCacheManager(64, 4)
    requests = [make_request(name, PROMPT) for name in "abc"]
    for request in requests:
        prefill(kv, request)
    tails = {r.request_id: table(kv, r)[7] for r in requests}
    prefix = table(kv, requests[0])[:7]
    never_used = free_ids(kv)
    for index in (1, 2, 0):
        kv.free(requests[index])
    assert free_ids(kv) == [*never_used, tails["b"], tails["c"], tails["a"], *reversed(prefix)]


def test_cached_free_blocks_are_revived_not_recomputed() -> None:
    kv = KVCacheManager(64, 4)
    a, b = make_request("a", PROMPT), make_request("b", PROMPT)
    prefill(kv, a)
    old = table(kv, a)
    kv.free(a)
    assert prefill(kv, b) == 28
    assert table(kv, b)[:7] == old[:7]
    assert ref_counts(kv, b) == [1] * 8


def test_caching_disabled_means_no_sharing() -> None:
    kv = KVCacheManager(64, 4, enable_caching=False)
    a, b = make_request("a", PROMPT), make_request("b", PROMPT)
    assert prefill(kv, a) == 0
    assert prefill(kv, b) == 0
    assert not set(table(kv, a)) & set(table(kv, b))
    assert len(kv.block_pool.cached_block_hash_to_block) == 0


@pytest.mark.parametrize(
    ("length", "block_size", "hit"), [(66, 4, 64), (64, 4, 60), (65, 4, 64), (130, 16, 128), (1, 4, 0)]
)
def test_a_hit_always_leaves_a_token_to_compute(length: int, block_size: int, hit: int) -> None:
    kv = KVCacheManager(64, block_size)
    tokens = [i % 256 for i in range(length)]
    prefill(kv, make_request("a", tokens))
    assert prefill(kv, make_request("b", tokens)) == hit


def test_generated_tokens_are_found_by_the_next_turn() -> None:
    kv = KVCacheManager(64, 4)
    first = make_request("a", 6, max_tokens=20)
    prefill(kv, first)
    for token_id in range(7):
        decode(kv, first, token_id)
    kv.free(first)
    # 13 tokens known, all 13 computed: three full blocks.
    assert prefill(kv, make_request("b", [*first.all_token_ids, 1, 2, 3])) == 12


def test_salted_prompts_share_only_under_the_same_salt() -> None:
    kv = KVCacheManager(64, 4)
    prefill(kv, make_request("a", PROMPT, cache_salt="one"))
    assert prefill(kv, make_request("b", PROMPT, cache_salt="two")) == 0
    assert prefill(kv, make_request("c", PROMPT)) == 0
    assert prefill(kv, make_request("d", PROMPT, cache_salt="one")) == 28


def test_looking_up_a_prefix_changes_nothing() -> None:
    kv = KVCacheManager(64, 4)
    a = make_request("a", PROMPT)
    prefill(kv, a)
    kv.free(a)
    before = kv_snapshot(kv)
    assert kv.get_computed_blocks(make_request("b", PROMPT))[1] == 28
    assert kv_snapshot(kv) == before
    assert (kv.prefix_cache_queries, kv.prefix_cache_hits) == (0, 0)


# -- None touches nothing ------------------------------------------------------------------------------------


def test_a_refused_newcomer_touched_nothing() -> None:
    """Not even the hits it would have shared: a reference taken too early would leak them."""
    kv = KVCacheManager(10, 4)
    a = make_request("a", PROMPT)
    prefill(kv, a)
    longer = make_request("b", PROMPT + [1] * 8)
    before = kv_snapshot(kv)
    assert prefill(kv, longer) is None
    assert kv_snapshot(kv) == before


def test_a_refused_decode_touched_nothing() -> None:
    kv = KVCacheManager(3, 4)
    a = make_request("a", 8)
    prefill(kv, a)
    before = kv_snapshot(kv)
    assert not decode(kv, a)
    assert kv_snapshot(kv) == before


def test_idle_hits_count_as_blocks_that_are_taken() -> None:
    """Five usable blocks, all idle, four of them hits: six blocks in total do not fit, five do."""
    for extra, fits in ((4, True), (5, False)):
        kv = KVCacheManager(6, 4)
        a = make_request("a", PROMPT[:16] + [77])
        prefill(kv, a)
        kv.free(a)
        before = kv_snapshot(kv)
        assert (prefill(kv, make_request("b", PROMPT[:16] + [1] * extra)) is not None) == fits
        assert fits or kv_snapshot(kv) == before


# -- a block is findable once it is written, and not before ----------------------------------------------------


def test_only_full_blocks_of_the_chunk_written_so_far_are_findable() -> None:
    kv = KVCacheManager(64, 4)
    a, probe = make_request("a", PROMPT), make_request("b", PROMPT)
    for chunk, found in ((3, 0), (3, 4), (5, 8), (21, 28)):
        kv.allocate_slots(a, chunk)
        a.num_computed_tokens += chunk
        kv.confirm_step()
        assert kv.get_computed_blocks(probe)[1] == found


def test_a_block_with_a_token_not_yet_known_is_not_findable() -> None:
    """Planned ahead of the sample (asynchronous stepping): the slot is written, but nobody can name its token."""
    kv = KVCacheManager(64, 4)
    a = make_request("a", PROMPT[:7], max_tokens=20)
    prefill(kv, a)
    assert kv.allocate_slots(a, 1) is not None
    a.num_computed_tokens += 1
    kv.confirm_step()
    assert len(kv.block_pool.cached_block_hash_to_block) == 1
    a.append_output_token(PROMPT[7])
    assert decode(kv, a, PROMPT[8])
    assert kv.get_computed_blocks(make_request("b", PROMPT))[1] == 8


def test_a_later_request_of_the_same_step_may_share_what_that_step_writes() -> None:
    kv = KVCacheManager(64, 4)
    assert prefill(kv, make_request("a", PROMPT), confirm=False) == 0
    assert prefill(kv, make_request("b", PROMPT), confirm=False) == 28


def test_same_step_sharing_can_be_forbidden() -> None:
    kv = KVCacheManager(64, 4, same_step_sharing=False)
    a, b = make_request("a", PROMPT), make_request("b", PROMPT)
    prefill(kv, a, confirm=False)
    assert prefill(kv, b, confirm=False) == 0
    assert not set(table(kv, a)) & set(table(kv, b)), "each computes its own copy"
    kv.confirm_step()
    assert prefill(kv, make_request("c", PROMPT)) == 28
    kv.free(a)
    kv.free(b)
    kv.check_integrity(["c"])


@pytest.mark.parametrize("sharing", [True, False])
def test_unwritten_blocks_are_forgotten_and_written_ones_kept(sharing: bool) -> None:
    kv = KVCacheManager(64, 4, same_step_sharing=sharing)
    a = make_request("a", PROMPT)
    prefill(kv, a, 10)
    kv.allocate_slots(a, 10)  # blocks 2 to 4, in a step that is not carried out
    kv.forget_unwritten(a.request_id)
    kv.free(a)
    kv.confirm_step()
    assert kv.get_computed_blocks(make_request("b", PROMPT))[1] == 8
    kv.check_integrity([])


def test_without_the_roll_back_an_unwritten_block_would_be_served() -> None:
    """Broken control of the test above."""
    kv = KVCacheManager(64, 4)
    a = make_request("a", PROMPT)
    prefill(kv, a, 10)
    kv.allocate_slots(a, 10)
    kv.free(a)
    assert kv.get_computed_blocks(make_request("b", PROMPT))[1] == 20
