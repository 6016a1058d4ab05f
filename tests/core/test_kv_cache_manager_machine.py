"""The block manager against a simple model, through admissions, decodes, forks, frees, evictions, preemptions,
aborts, failed steps and resets in any order.

The model predicts every table, reference count, queue position and findable prefix. A second ledger, `memory`,
holds what was really written where: whatever can be found must be there.
"""

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from mini_vllm.core.block_pool import KVCacheBlock
from mini_vllm.core.kv_cache_manager import ComputedBlocks, KVCacheManager
from mini_vllm.request import Request
from tests.core.harness import make_request
from tests.core.kv_steps import kv_snapshot
from tests.core.test_block_pool_machine import run_quietly

Key = tuple[int, str | None, tuple[int, ...]]
"""What a full block means: group, salt, and every token up to its end."""


FAMILY = [2, 0, 1, 1, 0] * 4
"""Prompts that begin like this share prefixes."""


class KVCacheManagerMachine(RuleBasedStateMachine):
    """Plays scheduler and worker: `scheduled` holds whom the step under way has given tokens."""

    manager_class = KVCacheManager

    @initialize(
        num_blocks=st.sampled_from([2, 3, 5, 8, 8, 13, 13, 24]),
        block_size=st.integers(1, 4),
        num_groups=st.integers(1, 2),
        sharing=st.booleans(),
        caching=st.sampled_from([True, True, True, False]),
    )
    def make(self, num_blocks: int, block_size: int, num_groups: int, sharing: bool, caching: bool) -> None:
        self.kv = self.manager_class(
            num_blocks, block_size, enable_caching=caching, num_groups=num_groups, same_step_sharing=sharing
        )
        self.block_size, self.groups, self.sharing, self.caching = block_size, range(num_groups), sharing, caching
        self.live: dict[str, Request] = {}
        self.waiting: list[Request] = []
        self.names = 0
        self.tables: dict[str, list[list[int]]] = {}
        self.queue = list(range(1, num_blocks))
        self.content: dict[int, Key] = {}
        self.cached_upto: dict[str, int] = {}
        self.stale: set[str] = set()  # alive when the cache was reset
        self.scheduled: dict[str, list[int]] = {}  # request -> blocks its step made findable
        self.deferred: dict[str, int] = {}
        self.memory: dict[int, Key] = {}

    # -- the model ---------------------------------------------------------------------------------------

    def key(self, request: Request, index: int, group: int) -> Key:
        return group, request.cache_salt, tuple(request.all_token_ids[: (index + 1) * self.block_size])

    def expected_hits(self, request: Request) -> int:
        if not self.caching:
            return 0
        findable = set(self.content.values())
        hits = 0
        while hits < (request.num_tokens - 1) // self.block_size and all(
            self.key(request, hits, group) in findable for group in self.groups
        ):
            hits += 1
        return hits

    def references(self) -> dict[int, int]:
        counts: dict[int, int] = {}
        for tables in self.tables.values():
            for block_id in (b for table in tables for b in table):
                counts[block_id] = counts.get(block_id, 0) + 1
        return counts

    def take(self, n: int) -> list[int]:
        taken, self.queue = self.queue[:n], self.queue[n:]
        for block_id in taken:
            self.content.pop(block_id, None)
        return taken

    def make_findable(self, request: Request, num_full: int) -> None:
        rid = request.request_id
        for group, table in enumerate(self.tables[rid]):
            for index in range(self.cached_upto[rid], num_full):
                if table[index] not in self.content:
                    self.content[table[index]] = self.key(request, index, group)
                    self.scheduled[rid].append(table[index])
        self.cached_upto[rid] = max(self.cached_upto[rid], num_full)

    def drop(self, request: Request) -> None:
        """Free a request in the manager and in the model, tail first in each group."""
        rid = request.request_id
        self.kv.free(request)
        tables = self.tables.pop(rid)
        held_by_others = self.references()
        for table in tables:
            self.queue += [block_id for block_id in reversed(table) if block_id not in held_by_others]
        del self.live[rid], self.cached_upto[rid]
        self.stale.discard(rid)
        self.deferred.pop(rid, None)

    def forget(self, request: Request) -> None:
        self.kv.forget_unwritten(request.request_id)
        self.deferred.pop(request.request_id, None)
        for block_id in self.scheduled.pop(request.request_id, []):
            self.content.pop(block_id, None)

    def allocate(self, request: Request, n: int, hits: ComputedBlocks | None, num_hits: int) -> bool:
        """`allocate_slots` in the manager and in the model; False when there was no room."""
        rid = request.request_id
        hit_ids = [[b.block_id for b in group] for group in hits] if hits else [[] for _ in self.groups]
        old = self.tables.get(rid, [[] for _ in self.groups])
        want = [-(-(request.num_computed_tokens + n) // self.block_size)] * len(self.groups)
        wanted = [max(w - len(t) - len(h), 0) for w, t, h in zip(want, old, hit_ids, strict=True)]
        idle_hits = [b for group in hit_ids for b in group if b in self.queue]
        fits = sum(wanted) + len(idle_hits) <= len(self.queue)
        before = kv_snapshot(self.kv)
        new_ids = self.kv.allocate_slots(request, n, hits)
        assert (new_ids is not None) == fits
        if new_ids is None:
            assert kv_snapshot(self.kv) == before, "None must have touched nothing"
            return False
        for block_id in idle_hits:
            self.queue.remove(block_id)
        taken = [self.take(count) for count in wanted]
        assert [list(ids) for ids in new_ids] == taken
        self.tables[rid] = [t + h + new for t, h, new in zip(old, hit_ids, taken, strict=True)]
        self.live[rid] = request
        self.cached_upto.setdefault(rid, num_hits)
        self.scheduled.setdefault(rid, [])
        request.num_computed_tokens += n
        self.write(request)
        return True

    def write(self, request: Request) -> None:
        num_full = min(request.num_computed_tokens, request.num_tokens) // self.block_size
        if not self.caching or request.request_id in self.stale:
            return
        if self.sharing:
            self.make_findable(request, num_full)
        elif num_full > self.cached_upto[request.request_id]:
            self.deferred[request.request_id] = num_full

    # -- operations --------------------------------------------------------------------------------------

    @rule(data=st.data(), shared=st.integers(0, 20), tail=st.lists(st.integers(0, 1), min_size=1, max_size=4))
    def admit_relative(self, data: st.DataObject, shared: int, tail: list[int]) -> None:
        self.admit(data, FAMILY[:shared] + tail)

    @rule(data=st.data(), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20))
    def admit(self, data: st.DataObject, tokens: list[int]) -> None:
        self.names += 1
        salt = data.draw(st.sampled_from([None, None, "salt"]), label="salt")
        self.admit_request(data, make_request(f"r{self.names}", tokens, max_tokens=None, cache_salt=salt))

    @rule(data=st.data())
    def resume(self, data: st.DataObject) -> None:
        if not self.waiting:
            return
        self.admit_request(data, self.waiting.pop(0))

    def admit_request(self, data: st.DataObject, request: Request) -> None:
        blocks, num_cached = self.kv.get_computed_blocks(request)
        num_hits = self.expected_hits(request)
        assert num_cached == num_hits * self.block_size
        for group, group_blocks in enumerate(blocks):
            for index, block in enumerate(group_blocks):
                assert self.content[block.block_id] == self.key(request, index, group), "a hit on other content"
        n = data.draw(st.integers(1, request.num_tokens - num_cached), label="num_new_tokens")
        request.num_computed_tokens = num_cached
        if not self.allocate(request, n, blocks, num_hits):
            request.num_computed_tokens = 0

    def pick(self, data: st.DataObject, among: Iterable[str], label: str) -> Request | None:
        names = sorted(among)
        return self.live[data.draw(st.sampled_from(names), label=label)] if names else None

    @rule(data=st.data(), token=st.integers(0, 1))
    def advance(self, data: st.DataObject, token: int) -> None:
        """A prefill chunk if the request is behind, else a decode."""
        request = self.pick(data, self.live.keys() - self.scheduled.keys(), "request")
        if request is None:
            return
        if request.num_computed_tokens == request.num_tokens:
            request.append_output_token(token)
        behind = request.num_tokens - request.num_computed_tokens
        self.allocate(request, data.draw(st.integers(1, behind), label="num_new_tokens"), None, 0)

    @rule()
    def step_succeeds(self) -> None:
        self.kv.confirm_step()
        for rid, num_full in self.deferred.items():
            self.make_findable(self.live[rid], num_full)
        for rid in self.scheduled:
            self.write_memory(rid)
        self.deferred.clear()
        self.scheduled.clear()

    def write_memory(self, rid: str) -> None:
        if rid not in self.live:
            return
        request = self.live[rid]
        for group, table in enumerate(self.tables[rid]):
            for index in range(request.num_computed_tokens // self.block_size):
                self.memory[table[index]] = self.key(request, index, group)

    @rule()
    def step_fails(self) -> None:
        """Whoever had tokens in it ends; nothing of theirs was written."""
        for rid in list(self.scheduled):
            request = self.live[rid]
            self.forget(request)
            self.drop(request)
        self.kv.confirm_step()
        self.scheduled.clear()

    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        """Also of a request scheduled in this very step, as long as no later one shares what it was to write."""
        references = self.references()
        free_to_go = (r for r in self.live if all(references[b] == 1 for b in self.scheduled.get(r, [])))
        request = self.pick(data, free_to_go, "victim")
        if request is None:
            return
        self.forget(request)
        self.drop(request)
        request.num_computed_tokens = 0
        self.waiting.append(request)

    @rule(data=st.data())
    def finish_or_abort(self, data: st.DataObject) -> None:
        request = self.pick(data, self.live.keys() - self.scheduled.keys(), "request")
        if request is not None:
            self.drop(request)

    @rule(data=st.data(), sharers=st.integers(1, 3), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=3))
    def fork(self, data: st.DataObject, sharers: int, tokens: list[int]) -> None:
        parent = None if self.scheduled else self.pick(data, self.live, "parent")
        for _ in range(sharers if parent else 0):
            assert parent is not None
            self.fork_once(parent, tokens)

    def fork_once(self, parent: Request, tokens: list[int]) -> None:
        self.names += 1
        computed = parent.num_computed_tokens
        child = make_request(
            f"r{self.names}", parent.all_token_ids[:computed] + tokens, max_tokens=None, cache_salt=parent.cache_salt
        )
        num_full, partial = divmod(computed, self.block_size)
        fresh = 1 if partial else 0
        before = kv_snapshot(self.kv)
        copies = self.kv.fork(parent, child)
        assert (copies is not None) == (fresh * len(self.groups) <= len(self.queue))
        if copies is None:
            assert kv_snapshot(self.kv) == before, "None must have touched nothing"
            return
        tables = self.tables[parent.request_id]
        taken = [self.take(fresh) for _ in self.groups]
        assert [(c.group, c.source, c.destination) for c in copies] == [
            (group, tables[group][num_full], new[0]) for group, new in enumerate(taken) if new
        ]
        self.tables[child.request_id] = [t[:num_full] + new for t, new in zip(tables, taken, strict=True)]
        self.live[child.request_id] = child
        self.cached_upto[child.request_id] = min(self.cached_upto[parent.request_id], num_full)
        if parent.request_id in self.stale:
            self.stale.add(child.request_id)
        assert child.num_computed_tokens == computed

    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        """Somebody outside takes the oldest free blocks and gives them back: their contents are gone."""
        blocks = self.kv.block_pool.get_new_blocks(data.draw(st.integers(0, len(self.queue)), label="evicted"))
        taken = self.take(len(blocks))
        assert [block.block_id for block in blocks] == taken
        self.kv.block_pool.free_blocks(blocks)
        self.queue += taken
        for block_id in taken:
            self.memory.pop(block_id, None)

    @rule(really=st.integers(0, 3))
    def reset_prefix_cache(self, really: int) -> None:
        if self.scheduled or really:
            return
        self.kv.reset_prefix_cache()
        self.content.clear()
        self.stale |= set(self.live)

    # -- what must hold after each of them -----------------------------------------------------------------

    @invariant()
    def books_balance(self) -> None:
        if not hasattr(self, "kv"):
            return
        pool, references = self.kv.block_pool, self.references()
        self.kv.check_integrity(list(self.live))
        assert {rid: [list(t) for t in self.kv.block_ids(rid)] for rid in self.live} == self.tables
        assert [block.block_id for block in pool.free_queue.get_all_free_blocks()] == self.queue
        assert {b.block_id: b.ref_cnt for b in pool.blocks if b.ref_cnt} == references
        assert len(self.queue) + len(references) == pool.num_usable_blocks
        for rid, request in self.live.items():
            length = -(-request.num_computed_tokens // self.block_size)
            assert all(len(table) == length for table in self.tables[rid]), "tables are exactly as long as needed"

    @invariant()
    def exactly_what_the_model_knows_can_be_found(self) -> None:
        if not hasattr(self, "kv"):
            return
        hashes = {b.block_id: key for key, b in self.kv.block_pool.cached_block_hash_to_block.items()}
        assert hashes.keys() == self.content.keys()
        pairs = {(hashes[b], self.content[b]) for b in hashes}
        assert len({h for h, _ in pairs}) == len({k for _, k in pairs}) == len(pairs), "hash and content differ"

    @invariant()
    def whatever_can_be_found_was_written(self) -> None:
        if not hasattr(self, "kv"):
            return
        in_flight = {b for blocks in self.scheduled.values() for b in blocks}
        for block_id, content in self.content.items():
            assert block_id in in_flight or self.memory.get(block_id) == content


KVCacheManagerMachine.TestCase.settings = settings(max_examples=max(200, settings().max_examples))
TestKVCacheManagerMachine = KVCacheManagerMachine.TestCase


# -- broken controls: the machine must notice each of these ------------------------------------------------------


class SharesBeforeChecking(KVCacheManager):
    """References the hits first and asks for room afterwards."""

    def allocate_slots(self, request: Request, num_new_tokens: int, new_computed_blocks: Any = None, **kw: Any) -> Any:
        new_ids = super().allocate_slots(request, num_new_tokens, new_computed_blocks, **kw)
        if new_ids is None and new_computed_blocks:
            self.block_pool.touch(block for group in new_computed_blocks for block in group)
        return new_ids


class NeverRollsBack(KVCacheManager):
    def forget_unwritten(self, request_id: str) -> None:
        self._newest.deferred.pop(request_id, None)


class FreesHeadFirst(KVCacheManager):
    def free(self, request: Request) -> None:
        for table in self._tables.get(request.request_id, ()):
            table.reverse()
        super().free(request)


class CachesPartialBlocks(KVCacheManager):
    def _cache_written(self, request: Request, num_known_tokens: int) -> None:
        super()._cache_written(request, min(num_known_tokens + 1, request.num_tokens))


class ForkSharesThePartialTail(KVCacheManager):
    def fork(self, parent: Request, child: Request) -> Any:
        copies = super().fork(parent, child)
        for copy in copies or ():
            table = self._tables[child.request_id][copy.group]
            self.block_pool.free_blocks([table.pop()])
            shared: list[KVCacheBlock] = [self.block_pool.blocks[copy.source]]
            self.block_pool.touch(shared)
            table += shared
        return copies


BROKEN = [SharesBeforeChecking, NeverRollsBack, FreesHeadFirst, CachesPartialBlocks, ForkSharesThePartialTail]


@pytest.mark.broken_pool
@pytest.mark.parametrize("broken", BROKEN)
def test_the_machine_notices_a_broken_manager(broken: type[KVCacheManager]) -> None:
    class Machine(KVCacheManagerMachine):
        manager_class = broken

    with pytest.raises((AssertionError, AttributeError, RuntimeError, ValueError, IndexError, KeyError)):
        run_quietly(Machine)
