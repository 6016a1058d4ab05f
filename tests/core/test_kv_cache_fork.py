"""Forks, KV groups and resets of the block manager."""

import pytest

from mini_vllm.core.kv_cache_manager import KVCacheManager
from mini_vllm.core.scheduler_output import BlockCopy
from tests.core.harness import make_request
from tests.core.kv_steps import decode, free_ids, kv_snapshot, prefill, ref_counts, table

PROMPT = list(range(32))
"""Eight blocks of four."""


# -- fork ------------------------------------------------------------------------------------------------------


def test_fork_at_100_tokens_shares_six_blocks_and_copies_the_seventh() -> None:
    kv = KVCacheManager(64, 16)
    parent = make_request("p", 100)
    prefill(kv, parent)
    child = make_request("c", parent.prompt_token_ids)
    copies = kv.fork(parent, child)
    assert copies == [BlockCopy(0, table(kv, parent)[6], table(kv, child)[6])]
    assert table(kv, child)[:6] == table(kv, parent)[:6]
    assert table(kv, child)[6] != table(kv, parent)[6]
    assert ref_counts(kv, parent) == [2] * 6 + [1]
    assert child.num_computed_tokens == 100
    kv.check_integrity(["p", "c"])


def test_fork_at_a_block_boundary_copies_nothing() -> None:
    kv = KVCacheManager(64, 16)
    parent = make_request("p", 112)
    prefill(kv, parent)
    child = make_request("c", parent.prompt_token_ids)
    free_before = len(free_ids(kv))
    assert kv.fork(parent, child) == []
    assert table(kv, child) == table(kv, parent) and len(table(kv, child)) == 7
    assert len(free_ids(kv)) == free_before


def test_any_number_of_children_and_the_last_one_frees_the_prefix() -> None:
    kv = KVCacheManager(64, 16)
    parent = make_request("p", 100)
    prefill(kv, parent)
    children = [make_request(f"c{i}", parent.prompt_token_ids) for i in range(5)]
    for child in children:
        assert kv.fork(parent, child) is not None
    assert ref_counts(kv, parent) == [6] * 6 + [1]
    assert 63 - len(free_ids(kv)) == 7 + 5
    for request in (children[2], parent, children[0], children[4], children[1]):
        kv.free(request)
        kv.check_integrity()
    assert ref_counts(kv, children[3]) == [1] * 7
    kv.free(children[3])
    assert len(free_ids(kv)) == 63


def test_forked_sequences_write_to_blocks_of_their_own() -> None:
    """Fork at 100, then 50 tokens each: what one writes is nowhere in the other's table."""
    kv = KVCacheManager(64, 16)
    parent = make_request("p", 100, max_tokens=60)
    prefill(kv, parent)
    child = make_request("c", parent.prompt_token_ids, max_tokens=60)
    kv.fork(parent, child)
    for step in range(50):
        assert decode(kv, parent, step) and decode(kv, child, 200 - step)
    shared = set(table(kv, parent)) & set(table(kv, child))
    assert shared == set(table(kv, parent)[:6])
    assert len(table(kv, parent)) == len(table(kv, child)) == 10
    kv.check_integrity(["p", "c"])


def test_forked_children_are_findable_under_their_own_tokens() -> None:
    kv = KVCacheManager(64, 4)
    parent = make_request("p", 6, max_tokens=20)
    prefill(kv, parent)
    child = make_request("c", parent.prompt_token_ids, max_tokens=20)
    kv.fork(parent, child)
    for token_id in (1, 2, 3, 4):
        decode(kv, parent, token_id)
        decode(kv, child, token_id + 100)
    for request in (parent, child):
        blocks, num_cached = kv.get_computed_blocks(make_request("probe", [*request.all_token_ids, 5]))
        assert num_cached == 8
        assert [b.block_id for b in blocks[0]] == table(kv, request)[:2]


def test_a_child_of_a_half_computed_prompt_has_hashes_of_its_own() -> None:
    """The parent's prompt was hashed beyond what is computed; the child goes another way from there."""
    kv = KVCacheManager(64, 4)
    parent = make_request("p", PROMPT)
    prefill(kv, parent, 10)
    child = make_request("c", PROMPT[:10] + [99] * 10)
    kv.fork(parent, child)
    kv.allocate_slots(child, 10)
    kv.confirm_step()
    assert kv.get_computed_blocks(make_request("x", PROMPT))[1] == 8
    assert kv.get_computed_blocks(make_request("y", [*child.all_token_ids, 1]))[1] == 20


def test_a_fork_without_a_free_block_touched_nothing() -> None:
    kv = KVCacheManager(3, 4)
    parent = make_request("p", 6)
    prefill(kv, parent)
    before = kv_snapshot(kv)
    child = make_request("c", parent.prompt_token_ids)
    assert kv.fork(parent, child) is None
    assert kv_snapshot(kv) == before and child.num_computed_tokens == 0


def test_forking_onto_a_living_request_is_refused() -> None:
    kv = KVCacheManager(64, 4)
    a, b = make_request("a", 6), make_request("b", 6)
    prefill(kv, a)
    prefill(kv, b)
    with pytest.raises(ValueError, match="already has a block table"):
        kv.fork(a, b)


# -- groups and reset ------------------------------------------------------------------------------------------


def test_each_group_has_its_own_blocks_and_a_hit_needs_all_groups() -> None:
    kv = KVCacheManager(64, 4, num_groups=2)
    a = make_request("a", PROMPT)
    prefill(kv, a)
    full, other = kv.block_ids("a")
    assert len(full) == len(other) == 8 and not set(full) & set(other)
    kv.free(a)
    kv.block_pool.uncache(kv.block_pool.blocks[other[3]])
    blocks, num_cached = kv.get_computed_blocks(make_request("b", PROMPT))
    assert num_cached == 12
    assert [len(group) for group in blocks] == [3, 3]


def test_resetting_the_prefix_cache_forgets_everything_and_disturbs_nobody() -> None:
    kv = KVCacheManager(64, 4)
    a = make_request("a", PROMPT)
    prefill(kv, a)
    before = table(kv, a)
    kv.reset_prefix_cache()
    assert table(kv, a) == before and ref_counts(kv, a) == [1] * 8
    assert prefill(kv, make_request("b", PROMPT)) == 0


def test_a_block_begun_before_a_reset_is_not_found_after_it() -> None:
    """Its first tokens are from before: half a forgotten prefix is still a forgotten prefix."""
    kv = KVCacheManager(64, 4)
    a = make_request("a", PROMPT[:6], max_tokens=20)
    prefill(kv, a)
    kv.reset_prefix_cache()
    old = table(kv, a)
    for token_id in PROMPT[6:12]:
        decode(kv, a, token_id)
    prefill(kv, make_request("b", PROMPT[:5]))
    blocks, _ = kv.get_computed_blocks(make_request("c", PROMPT))
    assert not {b.block_id for b in blocks[0]} & set(old)


def test_can_ever_fit_counts_usable_blocks() -> None:
    kv = KVCacheManager(5, 4)
    assert kv.can_ever_fit(16) and not kv.can_ever_fit(17)
    assert kv.num_blocks_for(17) == 5
