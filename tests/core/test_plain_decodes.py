"""A decode into a block that a request has is planned without asking anybody: the same plans as by asking."""

import random
from collections.abc import Callable
from typing import Any

import pytest

from mini_vllm.core.kv_cache_manager import KVCacheManager
from mini_vllm.core.scheduler import Scheduler
from mini_vllm.core.scheduler_output import SchedulerOutput
from mini_vllm.request import Request
from tests.core.harness import assert_nothing_leaked, make_request, make_scheduler, run_step


class Agreeable:
    """A rule that leaves everything as it is; with one, every request has to be asked about."""

    def clamp(self, request: Request, start: int, num_tokens: int) -> tuple[int, str]:
        return num_tokens, ""

    def commit(self, request: Request, start: int, num_tokens: int) -> None: ...

    def refund(self, request: Request) -> None: ...


def plans_of(seed: int, note_quiet: Callable[[KVCacheManager, Request], None], **options: Any) -> list[SchedulerOutput]:
    """Of requests that come and go at random, in a pool so small that some are preempted."""
    rng = random.Random(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KVCacheManager, "_note_quiet", note_quiet)
        config = {"max_num_batched_tokens": 16, "max_num_seqs": 6, "num_blocks": 14, **options}
        scheduler, plans = make_scheduler(**config), []
        for number in range(12):
            request = make_request(
                f"{number}", rng.randint(1, 20), max_tokens=rng.randint(1, 16), n=rng.choice((1, 1, 2))
            )
            scheduler.add_request(request)
            plans += [run_step(scheduler) for _ in range(rng.randint(0, 4))]
        while scheduler.has_unfinished_requests():
            plans.append(run_step(scheduler))
    assert_nothing_leaked(scheduler)
    return plans


def as_it_is(kv: KVCacheManager, request: Request) -> None:
    NOTE(kv, request)


def never(kv: KVCacheManager, request: Request) -> None:
    request.quiet_until = 0


def one_block_too_many(kv: KVCacheManager, request: Request) -> None:
    NOTE(kv, request)
    request.quiet_until += kv.block_size


NOTE = KVCacheManager._note_quiet


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize("seed", range(6))
def test_plans_are_those_of_asking_every_time(seed: int, policy: str, caching: bool) -> None:
    options = {"policy": policy, "enable_caching": caching}
    asked = plans_of(seed, never, rules=[Agreeable()], **options)
    assert plans_of(seed, as_it_is, **options) == asked
    assert any(plan.preempted_req_ids for plan in asked)


def test_control_a_note_that_goes_too_far_shows() -> None:
    with pytest.raises(AssertionError):
        assert plans_of(1, one_block_too_many) == plans_of(1, never, rules=[Agreeable()])


def test_most_decodes_are_not_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    ask = Scheduler._schedule_one

    def noted(scheduler: Scheduler, request: Request, plan: SchedulerOutput, budget: int) -> int:
        asked.append(request.request_id)
        return ask(scheduler, request, plan, budget)

    monkeypatch.setattr(Scheduler, "_schedule_one", noted)
    scheduler = make_scheduler(block_size=4)
    scheduler.add_request(make_request("a", 4, max_tokens=16))
    while scheduler.has_unfinished_requests():
        run_step(scheduler)
    assert 3 <= len(asked) <= 8  # of 15 decodes: where a block ends or becomes full
