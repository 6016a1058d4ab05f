"""One token budget per step: who gets how much, in which order, and what stops admission."""

from collections.abc import Iterator

import pytest

from mini_vllm.core.scheduler import Scheduler
from mini_vllm.request import Request, RequestStatus, WaitingReason
from tests.core.harness import (
    assert_nothing_leaked,
    fake_result,
    make_request,
    make_scheduler,
    run_all,
    run_step,
)


def add(scheduler: Scheduler, *requests: Request) -> None:
    for request in requests:
        scheduler.add_request(request)


# -- budget, slots, threshold --------------------------------------------------------------------------------


def test_the_budget_caps_a_step() -> None:
    """Three prompts of 8 with a budget of 10: 8 + 2, and the third is not admitted."""
    scheduler = make_scheduler(max_num_batched_tokens=10)
    add(scheduler, *(make_request(name, 8) for name in "abc"))
    plan = run_step(scheduler)
    assert plan.num_scheduled_tokens == {"a": 8, "b": 2}
    assert plan.total_num_scheduled_tokens == 10
    assert [r.request_id for r in scheduler.waiting] == ["c"]


def test_max_num_seqs_caps_the_batch() -> None:
    scheduler = make_scheduler(max_num_seqs=4)
    add(scheduler, *(make_request(f"r{i}", 2) for i in range(10)))
    assert len(run_step(scheduler).num_scheduled_tokens) == 4
    for plan in run_all(scheduler):
        assert len(plan.num_scheduled_tokens) <= 4


def test_a_finished_request_leaves_its_slot_to_the_next_in_the_same_step_order() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    add(scheduler, make_request("a", 2, max_tokens=2), make_request("b", 2, max_tokens=1))
    assert [list(plan.num_scheduled_tokens) for plan in run_all(scheduler)] == [["a"], ["a"], ["b"]]


@pytest.mark.parametrize(
    ("prompt", "threshold", "budget", "chunks"),
    [
        (100, 16, 2048, [16] * 6 + [4]),
        (100, 0, 2048, [100]),
        (100, 0, 30, [30, 30, 30, 10]),
        (100, 64, 30, [30, 30, 30, 10]),
        (64, 16, 2048, [16] * 4),
        (17, 16, 2048, [16, 1]),
        (16, 16, 2048, [16]),
        (1, 16, 1, [1]),
    ],
)
def test_a_long_prompt_is_cut_by_threshold_and_budget(
    prompt: int, threshold: int, budget: int, chunks: list[int]
) -> None:
    scheduler = make_scheduler(max_num_batched_tokens=budget, long_prefill_token_threshold=threshold)
    add(scheduler, make_request("a", prompt, max_tokens=1))
    assert [plan.num_scheduled_tokens["a"] for plan in run_all(scheduler)] == chunks


def test_the_threshold_is_per_request_and_the_budget_is_for_all() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=40, long_prefill_token_threshold=32)
    add(scheduler, make_request("decoding", 2, max_tokens=50))
    run_step(scheduler)
    add(scheduler, make_request("a", 100), make_request("b", 100))
    assert run_step(scheduler).num_scheduled_tokens == {"decoding": 1, "a": 32, "b": 7}


def test_running_requests_are_served_before_waiting_ones() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8)
    add(scheduler, make_request("a", 4, max_tokens=5))
    run_step(scheduler)
    add(scheduler, make_request("b", 20))
    assert list(run_step(scheduler).num_scheduled_tokens.items()) == [("a", 1), ("b", 7)]


def test_a_running_request_advances_in_every_step_whatever_arrives() -> None:
    """Prefill never starves decodes: budget goes to those who run, in order of admission."""
    scheduler = make_scheduler(max_num_batched_tokens=16, num_blocks=256)
    add(scheduler, make_request("old", 3, max_tokens=40))
    run_step(scheduler)
    for i in range(30):
        add(scheduler, make_request(f"long{i}", 50, max_tokens=2))
        before = [r.request_id for r in scheduler.running]
        plan = run_step(scheduler)
        assert set(before) <= set(plan.num_scheduled_tokens)
        assert plan.total_num_scheduled_tokens <= 16


def test_every_token_is_scheduled_exactly_once() -> None:
    """Without caching and preemption, a request costs prompt + max_tokens - 1 under any budget and threshold."""
    for budget, threshold in ((1, 0), (7, 0), (7, 3), (64, 5), (2048, 0)):
        scheduler = make_scheduler(max_num_batched_tokens=budget, long_prefill_token_threshold=threshold)
        requests = [make_request(f"r{i}", 3 + 5 * i, max_tokens=2 + i) for i in range(4)]
        add(scheduler, *requests)
        spent = dict.fromkeys((r.request_id for r in requests), 0)
        for plan in run_all(scheduler):
            assert plan.total_num_scheduled_tokens == sum(plan.num_scheduled_tokens.values()) <= budget
            for rid, n in plan.num_scheduled_tokens.items():
                spent[rid] += n
        assert spent == {r.request_id: r.num_prompt_tokens + r.max_tokens - 1 for r in requests}  # type: ignore[operator]
        assert_nothing_leaked(scheduler)


def test_a_token_is_sampled_exactly_when_computed_catches_up() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=4)
    request = make_request("a", 10, max_tokens=2)
    add(scheduler, request)
    seen = []
    while scheduler.has_unfinished_requests():
        plan = scheduler.schedule()
        seen.append((request.num_computed_tokens, Scheduler.needs_sample(request)))
        scheduler.update_from_output(plan, fake_result(scheduler, plan))
    assert seen == [(4, False), (8, False), (10, True), (11, True)]


def test_the_last_sampled_token_is_never_computed() -> None:
    scheduler = make_scheduler()
    request = make_request("a", 5, max_tokens=4)
    add(scheduler, request)
    run_all(scheduler)
    assert (request.num_tokens, request.num_computed_tokens) == (9, 8)


def test_an_idle_scheduler_makes_an_empty_plan() -> None:
    scheduler = make_scheduler()
    plan = run_step(scheduler)
    assert plan.num_scheduled_tokens == {} and plan.total_num_scheduled_tokens == 0
    assert not scheduler.has_unfinished_requests() and not scheduler.has_work()


# -- memory --------------------------------------------------------------------------------------------------


def test_admission_stops_at_the_first_request_that_does_not_fit() -> None:
    """No skipping ahead: the small one behind the big one waits too, and nothing is admitted in part."""
    scheduler = make_scheduler(num_blocks=5)
    add(scheduler, make_request("a", 8), make_request("big", 12), make_request("small", 1))
    assert list(run_step(scheduler).num_scheduled_tokens) == ["a"]
    big = scheduler.requests["big"]
    assert (big.status, big.num_computed_tokens) == (RequestStatus.WAITING, 0)
    assert "big" not in scheduler.kv._tables


def test_a_chunk_needs_room_for_the_chunk_alone() -> None:
    scheduler = make_scheduler(num_blocks=5, max_num_batched_tokens=4)
    add(scheduler, make_request("a", 16, max_tokens=1))
    run_step(scheduler)
    assert len(scheduler.kv.block_ids("a")[0]) == 1


def test_prefix_hits_cost_no_budget() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8)
    tokens = list(range(24))
    first = make_request("a", tokens, max_tokens=1)
    add(scheduler, first)
    run_all(scheduler)
    second = make_request("b", tokens, max_tokens=1)
    add(scheduler, second)
    (plan,) = run_all(scheduler)
    assert plan.num_scheduled_tokens == {"b": 4}
    assert plan.new_reqs[0].num_computed_tokens == 20
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 20)


def test_prefix_savings_are_followers_times_shared_blocks() -> None:
    """64 shared tokens and one of their own, block size 4, 8 prompts, 4 tokens each: 544 without, 96 with."""
    totals, firsts = {}, {}
    for caching in (False, True):
        scheduler = make_scheduler(num_blocks=256, enable_caching=caching)
        add(scheduler, *(make_request(f"r{i}", [83] * 64 + [i]) for i in range(8)))
        plans = run_all(scheduler)
        totals[caching] = sum(plan.total_num_scheduled_tokens for plan in plans)
        firsts[caching] = list(plans[0].num_scheduled_tokens.values())
    assert totals == {False: 544, True: 96}
    assert firsts[True] == [65, 1, 1, 1, 1, 1, 1, 1]


def test_same_step_sharing_forbidden_pays_for_the_first_step_once_more() -> None:
    scheduler = make_scheduler(num_blocks=256, same_step_prefix_sharing=False, max_num_seqs=2)
    add(scheduler, *(make_request(f"r{i}", [83] * 64 + [i], max_tokens=1) for i in range(4)))
    plans = run_all(scheduler)
    assert [list(plan.num_scheduled_tokens.values()) for plan in plans] == [[65, 65], [1, 1]]


def test_hit_rate_counts_tokens_of_first_admissions() -> None:
    scheduler = make_scheduler(num_blocks=256)
    add(scheduler, *(make_request(f"r{i}", [83] * 64 + [i]) for i in range(8)))
    run_all(scheduler)
    stats = scheduler.stats()
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (8 * 65, 7 * 64)


# -- cost of a step ------------------------------------------------------------------------------------------


class CountingQueue:
    """Stands in for the waiting queue and counts how many requests anybody looks at."""

    def __init__(self, inner: object) -> None:
        self.inner = inner
        self.looked_at = 0

    def __getattr__(self, name: str) -> object:
        if name in ("peek", "pop", "requeue", "remove"):
            self.looked_at += 1
        return getattr(self.inner, name)

    def __len__(self) -> int:
        return len(self.inner)  # type: ignore[arg-type]

    def __bool__(self) -> bool:
        return len(self) > 0

    def __iter__(self) -> Iterator[Request]:
        for request in self.inner:  # type: ignore[attr-defined]
            self.looked_at += 1
            yield request


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_a_step_looks_at_what_runs_and_not_at_what_waits(policy: str) -> None:
    looks = {}
    for num_waiting in (10, 10_000):
        scheduler = make_scheduler(policy=policy, max_num_seqs=4, num_blocks=256)
        add(scheduler, *(make_request(f"r{i}", [i % 256, i // 256], max_tokens=50) for i in range(num_waiting)))
        run_step(scheduler)
        queue = CountingQueue(scheduler.waiting)
        scheduler.waiting = queue  # type: ignore[assignment]
        for _ in range(5):
            plan = scheduler.schedule()
            scheduler.update_from_output(plan, fake_result(scheduler, plan))
        looks[num_waiting] = queue.looked_at
        assert len(plan.num_scheduled_tokens) == 4
    assert looks[10] == looks[10_000] <= 10


def test_the_counting_queue_sees_a_scan() -> None:
    """Broken control: asking for every reason does walk the queue."""
    scheduler = make_scheduler(max_num_seqs=1)
    add(scheduler, *(make_request(f"r{i}", 2) for i in range(100)))
    queue = CountingQueue(scheduler.waiting)
    scheduler.waiting = queue  # type: ignore[assignment]
    assert len(scheduler.waiting_reasons()) == 100
    assert queue.looked_at == 100


# -- why is my request waiting? --------------------------------------------------------------------------------


def reasons_after_step(scheduler: Scheduler) -> dict[str, str]:
    run_step(scheduler)
    return scheduler.waiting_reasons()


def test_a_request_that_was_never_tried_says_so() -> None:
    scheduler = make_scheduler()
    add(scheduler, make_request("a", 2))
    assert scheduler.waiting_reasons() == {"a": WaitingReason.NOT_TRIED}


def test_waiting_for_the_token_budget() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8)
    add(scheduler, make_request("a", 8), make_request("b", 8), make_request("c", 8))
    assert reasons_after_step(scheduler) == {"b": WaitingReason.TOKEN_BUDGET, "c": WaitingReason.BEHIND_HEAD}


def test_waiting_for_a_place_in_the_batch() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    add(scheduler, make_request("a", 8), make_request("b", 8))
    assert reasons_after_step(scheduler) == {"b": WaitingReason.MAX_NUM_SEQS}


def test_waiting_for_memory() -> None:
    scheduler = make_scheduler(num_blocks=5)
    add(scheduler, make_request("a", 8), make_request("b", 12), make_request("c", 1))
    assert reasons_after_step(scheduler) == {"b": WaitingReason.KV_CACHE_FULL, "c": WaitingReason.BEHIND_HEAD}


def test_waiting_because_others_were_preempted() -> None:
    scheduler = make_scheduler(num_blocks=5)
    add(scheduler, make_request("a", 8), make_request("b", 8))
    run_step(scheduler)
    add(scheduler, make_request("c", 1))
    reasons = reasons_after_step(scheduler)
    assert list(reasons) == ["b", "c"]
    assert reasons == {"b": WaitingReason.PREEMPTION, "c": WaitingReason.BEHIND_HEAD}


def test_a_reason_is_replaced_when_it_changes() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=9, num_blocks=5)
    add(scheduler, make_request("a", 9, max_tokens=4), make_request("b", 12))
    assert reasons_after_step(scheduler) == {"b": WaitingReason.TOKEN_BUDGET}
    assert reasons_after_step(scheduler) == {"b": WaitingReason.KV_CACHE_FULL}
    run_all(scheduler)
    assert scheduler.waiting_reasons() == {}
