"""Many random engines: nothing leaks, nothing is read that was not written, and no token depends on the schedule."""

import logging
from collections.abc import Callable, Iterator

import pytest

from mini_vllm.core import scheduler
from mini_vllm.core.block_pool import BlockPool, KVCacheBlock
from mini_vllm.core.kv_cache_manager import KVCacheManager
from mini_vllm.core.scheduler import Scheduler
from mini_vllm.engine.core import EngineCore
from mini_vllm.executor import plan_thread
from mini_vllm.request import Request
from tests.toy.random_runs import Outcome, RandomRun

NUM_QUICK = 300
NUM_SLOW = 10_000
CHUNK = 250


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Steps fail on purpose here, and each failure would print its traceback."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def play(seeds: range, *, async_scheduling: bool = False) -> Outcome:
    total = Outcome()
    for seed in seeds:
        try:
            total.add(RandomRun(seed, async_scheduling=async_scheduling).play())
        except Exception as error:
            raise AssertionError(f"random run {seed} failed: {error}") from error
    return total


def test_random_runs_leak_nothing_and_change_no_token() -> None:
    total = play(range(NUM_QUICK))
    # The runs would prove little if they never got into trouble.
    assert total.preemptions > 150 and total.hits > 500 and total.aborts > 50
    assert total.errors > 50 and total.refused > 10 and total.finished > 300


def test_random_runs_with_overlapped_steps_leak_nothing_and_change_no_token() -> None:
    total = play(range(NUM_QUICK), async_scheduling=True)
    assert total.preemptions > 150 and total.hits > 500 and total.aborts > 50
    assert total.errors > 50 and total.refused > 10 and total.finished > 300


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, NUM_SLOW, CHUNK))
def test_ten_thousand_random_runs(first: int) -> None:
    play(range(NUM_QUICK + first, NUM_QUICK + first + CHUNK))


# -- broken controls: each of these is found among the quick runs ------------------------------------------------------


def stale_hashes(patch: pytest.MonkeyPatch) -> None:
    """A reused block keeps the hash of its earlier life."""
    uncache = BlockPool.uncache

    def broken(self: BlockPool, block: KVCacheBlock) -> None:
        if block.ref_cnt:
            uncache(self, block)

    patch.setattr(BlockPool, "uncache", broken)


def no_roll_back(patch: pytest.MonkeyPatch) -> None:
    """What a failed step did not write stays findable."""
    patch.setattr(KVCacheManager, "forget_unwritten", lambda *args: None)


def early_hashes(patch: pytest.MonkeyPatch) -> None:
    """A block is findable one token before it is full."""
    original = KVCacheManager._cache_written

    def broken(self: KVCacheManager, request: Request, num_known_tokens: int) -> None:
        original(self, request, min(num_known_tokens + 1, request.num_tokens))

    patch.setattr(KVCacheManager, "_cache_written", broken)


def partial_hash(patch: pytest.MonkeyPatch) -> None:
    """The first token of each block is left out of its hash."""
    from mini_vllm.core import block_pool

    original = block_pool.hash_block_tokens
    patch.setattr(block_pool, "hash_block_tokens", lambda p, ids, extra=b"": original(p, ids[1:] or [0], extra))


def forgotten_free(patch: pytest.MonkeyPatch) -> None:
    """A finished request keeps one block."""
    original = KVCacheManager.free

    def broken(self: KVCacheManager, request: Request) -> None:
        for table in self._tables.get(request.request_id, ()):
            del table[-1:]
        original(self, request)

    patch.setattr(KVCacheManager, "free", broken)


def lost_refund(patch: pytest.MonkeyPatch) -> None:
    """A victim that was already scheduled stays in the plan."""
    patch.setattr(scheduler, "unschedule", lambda request_id, plan: plan.num_scheduled_tokens.pop(request_id, 0))


Breakage = Callable[[pytest.MonkeyPatch], None]
BROKEN: list[Breakage] = [
    stale_hashes,
    no_roll_back,
    early_hashes,
    partial_hash,
    forgotten_free,
    lost_refund,
]


@pytest.mark.broken_pool
@pytest.mark.parametrize("breakage", BROKEN)
def test_random_runs_find_a_broken_core(breakage: Breakage, monkeypatch: pytest.MonkeyPatch) -> None:
    breakage(monkeypatch)
    with pytest.raises(AssertionError, match="random run"):
        play(range(NUM_QUICK))


# -- the same for what overlapped steps rest on ------------------------------------------------------------------------


def runs_upon_a_failure(patch: pytest.MonkeyPatch) -> None:
    """A step planned upon one that failed is run all the same, and what came of it believed."""
    patch.setattr(plan_thread, "_run_after", lambda before, executor, plan: plan_thread.run_plan(executor, plan))
    patch.setattr(EngineCore, "_undo_in_flight", lambda self: None)


def forgets_the_life(patch: pytest.MonkeyPatch) -> None:
    """A step that was undone leaves its placeholders behind."""
    original = Scheduler._to_waiting

    def broken(self: Scheduler, request: Request) -> None:
        pending = request.num_output_placeholders
        original(self, request)
        request.num_output_placeholders = pending

    patch.setattr(Scheduler, "_to_waiting", broken)


@pytest.mark.broken_pool
@pytest.mark.parametrize("breakage", [runs_upon_a_failure, forgets_the_life])
def test_random_runs_find_broken_overlapping(breakage: Breakage, monkeypatch: pytest.MonkeyPatch) -> None:
    breakage(monkeypatch)
    with pytest.raises(AssertionError, match="random run"):
        play(range(NUM_QUICK), async_scheduling=True)
