"""The pool against a model of a few dictionaries, under any order of operations hypothesis can think of.

After every operation: who is free and in which order, who is referenced how often, and what can be found,
all exactly as the model says.
"""

from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from mini_vllm.core.block_pool import BlockPool, KVCacheBlock, hash_block_tokens, index_key

HASHES = [hash_block_tokens(None, [i]) for i in range(4)]


class BlockPoolMachine(RuleBasedStateMachine):
    """`holders` are whoever got blocks; the model knows references, queue order and findable contents."""

    pool_class = BlockPool

    @initialize(num_blocks=st.integers(2, 9))
    def make(self, num_blocks: int) -> None:
        self.pool = self.pool_class(num_blocks)
        self.holders: list[list[KVCacheBlock]] = []
        self.refs = dict.fromkeys(range(num_blocks), 0)
        self.queue = list(range(1, num_blocks))
        self.content: dict[int, bytes] = {}

    # -- operations --------------------------------------------------------------------------------------

    @rule(n=st.integers(0, 5))
    def take(self, n: int) -> None:
        if n > len(self.queue):
            with pytest.raises(ValueError, match="free"):
                self.pool.get_new_blocks(n)
            return
        blocks = self.pool.get_new_blocks(n)
        expected, self.queue = self.queue[:n], self.queue[n:]
        assert [block.block_id for block in blocks] == expected
        for block_id in expected:
            self.refs[block_id] = 1
            self.content.pop(block_id, None)  # whatever it held is gone now, and only now
        self.holders.append(blocks)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        blocks = list(data.draw(st.sampled_from(self.holders), label="shared"))
        self.pool.touch(blocks)
        for block in blocks:
            self.refs[block.block_id] += 1
        self.holders.append(blocks)

    @rule(which=st.integers(0, 3))
    def revive_by_hash(self, which: int) -> None:
        block = self.pool.get_cached_block(HASHES[which])
        findable = {b for b, content in self.content.items() if content == HASHES[which]}
        if block is None:
            assert not findable
            return
        assert block.block_id in findable
        self.pool.touch([block])
        if self.refs[block.block_id] == 0:
            self.queue.remove(block.block_id)
        self.refs[block.block_id] += 1
        self.holders.append([block])

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), tail_first=st.booleans())
    def release(self, data: st.DataObject, tail_first: bool) -> None:
        index = data.draw(st.integers(0, len(self.holders) - 1), label="holder")
        blocks = self.holders.pop(index)
        ordered = blocks[::-1] if tail_first else blocks
        self.pool.free_blocks(ordered)
        for block in ordered:
            self.refs[block.block_id] -= 1
            if self.refs[block.block_id] == 0:
                self.queue.append(block.block_id)

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), which=st.integers(0, 3))
    def cache(self, data: st.DataObject, which: int) -> None:
        blocks = data.draw(st.sampled_from(self.holders), label="cached")
        self.pool.cache_full_blocks(blocks, [HASHES[which]] * len(blocks))
        for block in blocks:
            self.content.setdefault(block.block_id, HASHES[which])

    @precondition(lambda self: self.content)
    @rule(data=st.data())
    def forget_one(self, data: st.DataObject) -> None:
        block_id = data.draw(st.sampled_from(sorted(self.content)), label="forgotten")
        self.pool.uncache(self.pool.blocks[block_id])
        del self.content[block_id]

    @rule()
    def reset_prefix_cache(self) -> None:
        self.pool.reset_prefix_cache()
        self.content.clear()

    # -- what must hold after each of them -----------------------------------------------------------------

    @invariant()
    def books_balance(self) -> None:
        if not hasattr(self, "pool"):
            return
        pool = self.pool
        pool.check_integrity()
        assert [block.block_id for block in pool.free_queue.get_all_free_blocks()] == self.queue
        assert pool.get_num_free_blocks() == len(self.queue)
        assert {b.block_id: b.ref_cnt for b in pool.blocks} == self.refs
        used = sum(count > 0 for count in self.refs.values())
        assert used + len(self.queue) == pool.num_usable_blocks
        assert pool.get_usage() == pytest.approx(used / pool.num_usable_blocks)
        found = {block.block_id: key for key, block in pool.cached_block_hash_to_block.items()}
        assert found == {block_id: index_key(content, 0) for block_id, content in self.content.items()}


TestBlockPoolMachine = BlockPoolMachine.TestCase


class PoolThatKeepsHashes(BlockPool):
    """Broken on purpose: a reused block keeps the hash of its earlier life."""

    def uncache(self, block: KVCacheBlock) -> None:
        if block.ref_cnt:
            super().uncache(block)


class PoolThatFreesHeldBlocks(BlockPool):
    """Broken on purpose: the first release frees the block, whoever else holds it."""

    def free_blocks(self, blocks: Any) -> None:
        for block in blocks:
            block.ref_cnt = 0
            self.free_queue.append(block)


@pytest.mark.broken_pool
@pytest.mark.parametrize("broken", [PoolThatKeepsHashes, PoolThatFreesHeldBlocks])
def test_the_machine_notices_a_broken_pool(broken: type[BlockPool]) -> None:
    class Machine(BlockPoolMachine):
        pool_class = broken

    with pytest.raises((AssertionError, AttributeError, RuntimeError)):
        run_quietly(Machine)


def run_quietly(machine: type[RuleBasedStateMachine]) -> None:
    """Run a machine that is expected to fail: no shrinking, no report."""
    quiet = settings(max_examples=500, deadline=None, derandomize=True, phases=[Phase.generate], print_blob=False)
    run_state_machine_as_test(machine, settings=quiet)
