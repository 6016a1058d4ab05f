"""Block tables of the requests and the prefix cache over them.

The scheduler asks three things: what of this prompt is cached (`get_computed_blocks`), may this request
have room for n more tokens (`allocate_slots`; None means no, and nothing was touched), and give it all back
(`free`). Tables only grow at the end and their ids never change, so a worker is told each id once.

A full block becomes findable when the plan that writes it is made. Plans run in order and every layer
writes before it reads, so a request admitted later in the same plan may already share it. Until the
step is confirmed the block is provisional: a preemption or a failed step makes it unfindable again. Two plans may
be unconfirmed at once; each has its own provisional blocks, and `confirm_step` says which plan it means.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from mini_vllm.core.block_pool import BlockPool, KVCacheBlock, extend_block_hashes
from mini_vllm.core.interfaces import KVEventSink
from mini_vllm.core.scheduler_output import BlockCopy, BlockIds
from mini_vllm.request import Request

ComputedBlocks = tuple[list[KVCacheBlock], ...]
"""Cached blocks of a prompt, one list per KV group, all of the same length."""


@dataclass(slots=True)
class UnconfirmedPlan:
    """What one plan is to write, as long as nobody knows that it did.

    provisional: by request, the blocks it made findable. deferred: by request, how many full blocks it will have.
    """

    provisional: dict[str, list[KVCacheBlock]] = field(default_factory=dict)
    deferred: dict[str, tuple[Request, int]] = field(default_factory=dict)


_NEVER_AGAIN = 2**62
"""In place of a number of cached blocks: whatever this request writes from here on is not made findable."""


class KVCacheManager:
    """Owns every block table.

    num_blocks: blocks in the pool, null block included.
    num_groups: KV groups (layers that share a table); each takes its own blocks from the one pool.
    same_step_sharing: let a provisional block be found before its step is confirmed.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        enable_caching: bool = True,
        num_groups: int = 1,
        same_step_sharing: bool = True,
        event_sink: KVEventSink | None = None,
    ) -> None:
        self.block_size = block_size
        self.enable_caching = enable_caching
        self.num_groups = num_groups
        self.same_step_sharing = same_step_sharing
        self.block_pool = BlockPool(num_blocks, enable_caching, event_sink=event_sink)
        self.prefix_cache_queries = 0
        self.prefix_cache_hits = 0
        self._tables: dict[str, tuple[list[KVCacheBlock], ...]] = {}
        self._num_cached_blocks: dict[str, int] = {}
        self._newest = UnconfirmedPlan()
        self._unconfirmed: dict[int, UnconfirmedPlan] = {0: self._newest}
        """By step, oldest first."""
        self._no_new_blocks: BlockIds = tuple([] for _ in range(num_groups))

    @property
    def usage(self) -> float:
        return self.block_pool.get_usage()

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens of one request take, over all groups."""
        return -(-num_tokens // self.block_size) * self.num_groups

    def can_ever_fit(self, num_tokens: int) -> bool:
        """Whether a lone request of that many tokens fits the empty pool."""
        return self.num_blocks_for(num_tokens) <= self.block_pool.num_usable_blocks

    def block_ids(self, request_id: str) -> BlockIds:
        """The whole table of a request, as physical ids per group."""
        return tuple([block.block_id for block in table] for table in self._tables[request_id])

    # -- prefix cache ------------------------------------------------------------------------------------

    def get_computed_blocks(self, request: Request) -> tuple[ComputedBlocks, int]:
        """(cached blocks from the front, tokens they hold). No side effects.

        Never the whole prompt: at least one token is left to compute, because it yields the logits.
        """
        if not self.enable_caching or not request.reads_prefix_cache:
            return self._no_hits(), 0
        limit = (request.num_tokens - 1) // self.block_size
        extend_block_hashes(request, limit, self.block_size)
        hits = min(self._hit_length(request, group, limit) for group in range(self.num_groups))
        blocks = tuple(self._cached(request, group, hits) for group in range(self.num_groups))
        return blocks, hits * self.block_size

    def record_prefix_lookup(self, num_queried_tokens: int, num_hit_tokens: int) -> None:
        """Count one admission in the hit rate (both in tokens)."""
        self.prefix_cache_queries += num_queried_tokens
        self.prefix_cache_hits += num_hit_tokens

    def _no_hits(self) -> ComputedBlocks:
        return tuple([] for _ in range(self.num_groups))

    def _hit_length(self, request: Request, group: int, limit: int) -> int:
        for index in range(limit):
            if self.block_pool.get_cached_block(request.block_hashes[index], group) is None:
                return index
        return limit

    def _cached(self, request: Request, group: int, count: int) -> list[KVCacheBlock]:
        blocks = (self.block_pool.get_cached_block(h, group) for h in request.block_hashes[:count])
        return [block for block in blocks if block is not None]

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes, whether their blocks are in use or not.

        What living requests go on writing stays unfindable too: it continues a prefix from before.
        """
        self.block_pool.reset_prefix_cache()
        self._num_cached_blocks = dict.fromkeys(self._num_cached_blocks, _NEVER_AGAIN)
        for plan in self._unconfirmed.values():
            plan.provisional.clear()
            plan.deferred.clear()

    # -- slots -------------------------------------------------------------------------------------------

    def allocate_slots(
        self,
        request: Request,
        num_new_tokens: int,
        new_computed_blocks: ComputedBlocks | None = None,
        *,
        num_external_computed_tokens: int = 0,
        num_lookahead_tokens: int = 0,
        delay_cache_blocks: bool = False,
    ) -> BlockIds | None:
        """Room for `num_new_tokens` after `request.num_computed_tokens` (which includes prefix hits).

        Returns the ids of newly taken blocks per group (hits not among them), or None when the pool cannot
        give them; then nothing was changed. External tokens arrive by KV transfer, lookahead slots are for
        drafts, and `delay_cache_blocks` leaves findability to the transfer's end.
        """
        num_written = request.num_computed_tokens + num_external_computed_tokens + num_new_tokens
        num_slots = num_written + num_lookahead_tokens
        if num_slots <= request.quiet_until:
            return self._no_new_blocks
        tables = self._tables.get(request.request_id)
        if tables is None or new_computed_blocks:
            new_ids = self._grow(request.request_id, num_slots, new_computed_blocks or self._no_hits())
        elif len(tables[0]) * self.block_size >= num_slots:
            new_ids = self._no_new_blocks
        else:
            new_ids = self._extend(tables, -(-num_slots // self.block_size) - len(tables[0]))
        if new_ids is None:
            return None
        if self.enable_caching and not delay_cache_blocks:
            self._cache_written(request, min(num_written, request.num_tokens))
        self._note_quiet(request)
        return new_ids

    def _note_quiet(self, request: Request) -> None:
        """Up to how many tokens there is no block to take, and none that becomes full. It stays true until the request
        is freed: tables only grow, full blocks stay full."""
        quiet = len(self._tables[request.request_id][0]) * self.block_size
        if self.enable_caching:
            quiet = min(quiet, (self._num_cached_blocks[request.request_id] + 1) * self.block_size - 1)
        request.quiet_until = quiet

    def _grow(self, request_id: str, num_slots: int, hits: ComputedBlocks) -> BlockIds | None:
        tables = self._tables.get(request_id) or tuple([] for _ in range(self.num_groups))
        missing = max(-(-num_slots // self.block_size) - len(tables[0]) - len(hits[0]), 0)
        revived = sum([block.ref_cnt == 0 for group in hits for block in group])
        if missing * self.num_groups + revived > self.block_pool.free_queue.num_free_blocks:
            return None
        for table, group_hits in zip(tables, hits, strict=True):
            self.block_pool.touch(group_hits)
            table.extend(group_hits)
        if request_id not in self._tables:
            self._tables[request_id] = tables
            self._num_cached_blocks[request_id] = len(hits[0])
        return self._extend(tables, missing)

    def _extend(self, tables: ComputedBlocks, missing: int) -> BlockIds | None:
        """`missing` blocks more for each table; None, and nothing changed, if they are not there."""
        if missing * self.num_groups > self.block_pool.free_queue.num_free_blocks:
            return None
        return tuple([self._append_blocks(table, missing) for table in tables])

    def _append_blocks(self, table: list[KVCacheBlock], count: int) -> list[int]:
        """Ids of the blocks that a table has grown by."""
        blocks = self.block_pool.get_new_blocks(count)
        table += blocks
        return [block.block_id for block in blocks]

    def num_missing_blocks(self, request: Request, num_new_tokens: int) -> int:
        """Blocks that `allocate_slots` would take for a request that has a table, over all groups."""
        missing = self.num_blocks_for(request.num_computed_tokens + num_new_tokens)
        return max(0, missing - len(self._tables[request.request_id][0]) * self.num_groups)

    def free(self, request: Request) -> None:
        """Drop all references of a request, tail first so that shared prefixes are evicted last."""
        tables = self._tables.pop(request.request_id, None)
        if tables is None:
            return
        for table in tables:
            self.block_pool.free_blocks(reversed(table))
        del self._num_cached_blocks[request.request_id]
        request.quiet_until = 0
        for plan in self._unconfirmed.values():
            plan.deferred.pop(request.request_id, None)

    def fork(self, parent: Request, child: Request) -> list[BlockCopy] | None:
        """Give `child` the parent's computed tokens: full blocks shared, a partial tail copied into a fresh block.

        Call between steps, for a child whose tokens start with the parent's computed ones. Any number of
        children. Returns the copies the worker must make before anything else is written, or None when no
        block is free (nothing was changed).
        """
        if child.request_id in self._tables:
            raise ValueError(f"request {child.request_id} already has a block table")
        num_full, partial = divmod(parent.num_computed_tokens, self.block_size)
        fresh_per_group = 1 if partial else 0
        if fresh_per_group * self.num_groups > self.block_pool.get_num_free_blocks():
            return None
        copies = []
        tables = []
        for group, table in enumerate(self._tables[parent.request_id]):
            shared = table[:num_full]
            self.block_pool.touch(shared)
            fresh = self.block_pool.get_new_blocks(fresh_per_group)
            copies += [BlockCopy(group, table[num_full].block_id, block.block_id) for block in fresh]
            tables.append(shared + fresh)
        self._tables[child.request_id] = tuple(tables)
        num_cached = self._num_cached_blocks[parent.request_id]
        if num_cached != _NEVER_AGAIN:
            num_cached = min(num_cached, num_full)
        self._num_cached_blocks[child.request_id] = num_cached
        child.num_computed_tokens = parent.num_computed_tokens
        child.block_hashes = parent.block_hashes[:num_full]
        return copies

    # -- when blocks become findable ---------------------------------------------------------------------

    def _cache_written(self, request: Request, num_known_tokens: int) -> None:
        """Make the blocks findable that this plan fills with tokens whose values are known."""
        num_full = num_known_tokens // self.block_size
        if num_full <= self._num_cached_blocks[request.request_id]:
            return
        if self.same_step_sharing:
            self._make_findable(request, num_full)
        else:
            self._newest.deferred[request.request_id] = (request, num_full)

    def _make_findable(self, request: Request, num_full: int) -> None:
        request_id = request.request_id
        first = self._num_cached_blocks[request_id]
        hashes = extend_block_hashes(request, num_full, self.block_size)[first:num_full]
        provisional = self._newest.provisional.setdefault(request_id, [])
        for group, table in enumerate(self._tables[request_id]):
            provisional += self.block_pool.cache_full_blocks(table[first:num_full], hashes, group)
        self._num_cached_blocks[request_id] = num_full

    def cache_known(self, request: Request) -> None:
        """Make the blocks findable that plans fill already and whose last tokens became known only now."""
        if self.enable_caching and request.request_id in self._tables:
            self._cache_written(request, min(request.num_computed_tokens, request.num_tokens))

    def begin_step(self, step_id: int) -> None:
        """What follows is the plan of another step; ids only grow."""
        self._newest = self._unconfirmed[step_id] = UnconfirmedPlan()

    def confirm_step(self, step_id: int | None = None) -> None:
        """The writes planned up to this step (None: all) happened: their provisional blocks are now simply cached."""
        for written in [number for number in self._unconfirmed if step_id is None or number <= step_id]:
            plan = self._unconfirmed.pop(written)
            for request, num_full in plan.deferred.values():
                self._make_findable(request, num_full)
            if plan is self._newest:
                self._newest = self._unconfirmed[written] = UnconfirmedPlan()

    def forget_unwritten(self, request_id: str, step_id: int | None = None) -> None:
        """This step (None: any that is not confirmed) will not write, or did not write, the request's blocks: nobody
        may find them. Also for a request that was freed since the plan was made."""
        plans = self._unconfirmed.values() if step_id is None else [self._unconfirmed.get(step_id, UnconfirmedPlan())]
        for plan in plans:
            plan.deferred.pop(request_id, None)
            for block in plan.provisional.pop(request_id, ()):
                self.block_pool.uncache(block)

    # -- checks ------------------------------------------------------------------------------------------

    def check_integrity(self, request_ids: Sequence[str] | None = None) -> None:
        """Raise AssertionError unless references equal table entries (and, if given, tables match the ids)."""
        self.block_pool.check_integrity()
        references: dict[int, int] = {}
        for tables in self._tables.values():
            for table in tables:
                for block in table:
                    references[block.block_id] = references.get(block.block_id, 0) + 1
        for block in self.block_pool.blocks:
            expected = references.get(block.block_id, 0)
            if not block.is_null:
                assert block.ref_cnt == expected, f"block {block.block_id}: {block.ref_cnt} refs, {expected} in tables"
        assert self._tables.keys() == self._num_cached_blocks.keys(), "tables and hash counters differ"
        if request_ids is not None:
            assert set(self._tables) == set(request_ids), "a table outlived its request"
