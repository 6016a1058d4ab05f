"""The free queue, the pool and the index of cached blocks, one claim a test."""

import pytest

from mini_vllm.core.block_pool import BlockPool, FreeKVCacheBlockQueue, KVCacheBlock, hash_block_tokens
from mini_vllm.core.interfaces import KVCacheEvent


def ids(blocks: list[KVCacheBlock]) -> list[int]:
    return [block.block_id for block in blocks]


def make_queue(n: int) -> tuple[list[KVCacheBlock], FreeKVCacheBlockQueue]:
    blocks = [KVCacheBlock(i) for i in range(n)]
    return blocks, FreeKVCacheBlockQueue(blocks)


# -- FreeKVCacheBlockQueue ---------------------------------------------------------------------------------


def test_queue_hands_out_blocks_in_the_order_they_were_given() -> None:
    _, queue = make_queue(4)
    assert [queue.popleft().block_id for _ in range(4)] == [0, 1, 2, 3]
    assert queue.num_free_blocks == 0


@pytest.mark.parametrize("position", range(5))
def test_queue_removes_from_anywhere_and_keeps_the_order(position: int) -> None:
    blocks, queue = make_queue(5)
    queue.remove(blocks[position])
    rest = [i for i in range(5) if i != position]
    assert ids(queue.get_all_free_blocks()) == rest
    assert queue.num_free_blocks == 4
    queue.append(blocks[position])
    assert ids(queue.get_all_free_blocks()) == [*rest, position]


def test_removing_touches_only_the_neighbours() -> None:
    """O(1): with 1,000 blocks in the queue, three have their links written."""
    blocks, queue = make_queue(1000)
    links = {b.block_id: (b.prev_free, b.next_free) for b in blocks}
    queue.remove(blocks[500])
    changed = [b.block_id for b in blocks if links[b.block_id] != (b.prev_free, b.next_free)]
    assert changed == [499, 500, 501]


def test_queue_refuses_to_remove_a_block_that_is_not_in_it() -> None:
    blocks, queue = make_queue(2)
    queue.remove(blocks[0])
    with pytest.raises(RuntimeError, match="not in the free queue"):
        queue.remove(blocks[0])
    assert ids(queue.get_all_free_blocks()) == [1]


def test_empty_queue_never_hands_out_a_sentinel() -> None:
    _, queue = make_queue(1)
    queue.popleft()
    with pytest.raises(ValueError, match="no free blocks"):
        queue.popleft()
    assert queue.get_all_free_blocks() == []
    assert queue.num_free_blocks == 0


def test_queue_works_again_after_it_was_empty() -> None:
    blocks, queue = make_queue(2)
    assert ids(queue.popleft_n(2)) == [0, 1]
    queue.append_n([blocks[1], blocks[0]])
    assert ids(queue.get_all_free_blocks()) == [1, 0]


# -- BlockPool ---------------------------------------------------------------------------------------------


def test_block_0_is_the_null_block_and_is_never_handed_out() -> None:
    pool = BlockPool(4)
    assert pool.null_block is pool.blocks[0] and pool.null_block.is_null
    assert ids(pool.get_new_blocks(3)) == [1, 2, 3]
    assert pool.get_num_free_blocks() == 0


def test_usage_does_not_count_the_null_block() -> None:
    pool = BlockPool(5)
    assert pool.get_usage() == 0.0
    blocks = pool.get_new_blocks(1)
    assert pool.get_usage() == pytest.approx(0.25)
    blocks += pool.get_new_blocks(3)
    assert pool.get_usage() == 1.0
    pool.free_blocks(blocks)
    assert pool.get_usage() == 0.0


def test_pool_needs_a_block_beside_the_null_block() -> None:
    with pytest.raises(ValueError, match="num_blocks"):
        BlockPool(1)


def test_asking_for_too_many_blocks_changes_nothing() -> None:
    pool = BlockPool(4)
    with pytest.raises(ValueError, match="4 blocks asked for, 3 free"):
        pool.get_new_blocks(4)
    assert ids(pool.free_queue.get_all_free_blocks()) == [1, 2, 3]
    pool.check_integrity()


def test_a_shared_block_is_free_only_after_its_last_reference() -> None:
    pool = BlockPool(3)
    blocks = pool.get_new_blocks(1)
    pool.touch(blocks)
    pool.touch(blocks)
    for remaining in (2, 1):
        pool.free_blocks(blocks)
        assert blocks[0].ref_cnt == remaining
        assert pool.get_num_free_blocks() == 1
    pool.free_blocks(blocks)
    assert pool.get_num_free_blocks() == 2
    pool.check_integrity()


def test_freeing_an_unreferenced_block_is_seen_by_the_integrity_check() -> None:
    """Broken control: a double free must not pass unseen."""
    pool = BlockPool(3)
    blocks = pool.get_new_blocks(1)
    pool.free_blocks(blocks)
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        pool.free_blocks(blocks)
        pool.check_integrity()


def test_freed_blocks_queue_up_in_the_order_given() -> None:
    pool = BlockPool(5)
    blocks = pool.get_new_blocks(4)
    pool.free_blocks(reversed(blocks))
    assert ids(pool.free_queue.get_all_free_blocks()) == [4, 3, 2, 1]


def test_a_cached_block_stays_findable_while_free() -> None:
    pool = BlockPool(3)
    key = hash_block_tokens(None, [1, 2])
    blocks = pool.get_new_blocks(1)
    pool.cache_full_blocks(blocks, [key])
    pool.free_blocks(blocks)
    assert pool.get_cached_block(key) is blocks[0]


def test_touching_a_cached_free_block_revives_it_from_the_middle_of_the_queue() -> None:
    pool = BlockPool(5)
    blocks = pool.get_new_blocks(4)
    pool.free_blocks(blocks)
    pool.touch([blocks[2]])
    assert ids(pool.free_queue.get_all_free_blocks()) == [1, 2, 4]
    assert blocks[2].ref_cnt == 1
    pool.check_integrity()


def test_reusing_a_block_forgets_what_it_held() -> None:
    pool = BlockPool(2)
    key = hash_block_tokens(None, [1, 2])
    blocks = pool.get_new_blocks(1)
    pool.cache_full_blocks(blocks, [key])
    pool.free_blocks(blocks)
    (reused,) = pool.get_new_blocks(1)
    assert reused is blocks[0] and reused.block_hash is None
    assert pool.get_cached_block(key) is None
    assert len(pool.cached_block_hash_to_block) == 0


def test_identical_content_lives_in_different_blocks_and_outlives_one_of_them() -> None:
    """No deduplication: tables never change ids, and evicting one copy leaves the other findable."""
    pool = BlockPool(3)
    key = hash_block_tokens(None, [1, 2])
    first, second = pool.get_new_blocks(2)
    pool.cache_full_blocks([first], [key])
    pool.cache_full_blocks([second], [key])
    assert pool.get_cached_block(key) is first
    pool.free_blocks([first])
    (reused,) = pool.get_new_blocks(1)
    assert reused is first
    assert pool.get_cached_block(key) is second
    pool.check_integrity()


def test_a_duplicate_block_carries_no_stale_hash_into_its_next_life() -> None:
    """With one block per hash, the second holder would keep its hash on reuse and never be cached again."""
    pool = BlockPool(3)
    old, new = hash_block_tokens(None, [1, 2]), hash_block_tokens(None, [3, 4])
    first, second = pool.get_new_blocks(2)
    pool.cache_full_blocks([first, second], [old, old])
    pool.free_blocks([second])
    (reused,) = pool.get_new_blocks(1)
    assert reused is second
    assert pool.cache_full_blocks([reused], [new]) == [second]
    assert pool.get_cached_block(new) is second
    assert pool.get_cached_block(old) is first


def test_the_null_block_and_findable_blocks_are_not_cached_again() -> None:
    pool = BlockPool(3)
    key = hash_block_tokens(None, [1])
    blocks = pool.get_new_blocks(1)
    assert pool.cache_full_blocks([pool.null_block, *blocks], [key, key]) == blocks
    assert pool.cache_full_blocks(blocks, [key]) == []
    assert pool.null_block.block_hash is None


def test_groups_keep_their_prefixes_apart() -> None:
    pool = BlockPool(3)
    key = hash_block_tokens(None, [1])
    blocks = pool.get_new_blocks(1)
    pool.cache_full_blocks(blocks, [key], 1)
    assert pool.get_cached_block(key, 0) is None
    assert pool.get_cached_block(key, 1) is blocks[0]


def test_resetting_forgets_every_prefix_and_leaves_references_alone() -> None:
    pool = BlockPool(4)
    used, idle = pool.get_new_blocks(2)
    pool.cache_full_blocks([used, idle], [hash_block_tokens(None, [1]), hash_block_tokens(None, [2])])
    pool.free_blocks([idle])
    pool.reset_prefix_cache()
    assert len(pool.cached_block_hash_to_block) == 0
    assert used.ref_cnt == 1 and pool.get_num_free_blocks() == 2
    pool.check_integrity()


def test_every_stored_event_is_answered_by_one_removed_event() -> None:
    events: list[KVCacheEvent] = []
    pool = BlockPool(3, event_sink=lambda event: events.append(event))
    blocks = pool.get_new_blocks(2)
    pool.cache_full_blocks(blocks, [hash_block_tokens(None, [1]), hash_block_tokens(None, [2])])
    pool.free_blocks(blocks)
    pool.get_new_blocks(2)
    assert [(e.kind, e.block_id) for e in events] == [("stored", 1), ("stored", 2), ("removed", 1), ("removed", 2)]
    assert {e.block_hash for e in events[:2]} == {e.block_hash for e in events[2:]}


def test_integrity_check_sees_a_referenced_block_in_the_free_queue() -> None:
    pool = BlockPool(3)
    pool.blocks[1].ref_cnt = 1
    with pytest.raises(AssertionError, match="free <=> unreferenced"):
        pool.check_integrity()


def test_integrity_check_sees_a_stale_hash() -> None:
    pool = BlockPool(3)
    blocks = pool.get_new_blocks(1)
    pool.cache_full_blocks(blocks, [hash_block_tokens(None, [1])])
    blocks[0].reset_hash()
    with pytest.raises(AssertionError, match="stale hash"):
        pool.check_integrity()
