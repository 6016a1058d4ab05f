"""`--preemption-policy least-work`: who gives way, in which order they come back, and that everything ends."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mini_vllm.core import policy as policy_module
from mini_vllm.core.fair_queue import FairQueue
from mini_vllm.core.policy import least_work_victim
from mini_vllm.core.request_queue import FCFSQueue, PriorityQueue, RequestQueue
from mini_vllm.core.scheduler import Scheduler
from mini_vllm.engine.core import EngineCore
from mini_vllm.request import Request, RequestStatus
from tests.core.harness import (
    PagedExecutor,
    assert_nothing_leaked,
    expected_outputs,
    fake_result,
    make_request,
    make_scheduler,
    run_step,
)

POLICIES = ["fcfs", "priority", "fair"]


def running_requests(queue: RequestQueue, *rows: tuple[str, int, int, str]) -> list[Request]:
    """(id, computed tokens, priority, tenant), each added and admitted in this order."""
    requests = []
    for index, (request_id, computed, priority, tenant) in enumerate(rows):
        request = make_request(request_id, 4, priority=priority, tenant=tenant)
        request.arrival_index = index
        queue.add(request)
        queue.pop()
        queue.charge(request, computed)
        request.num_computed_tokens = computed
        requests.append(request)
    return requests


def victims(queue: RequestQueue, running: Sequence[Request]) -> list[str]:
    """Everyone, in the order in which they would give way."""
    left, order = list(running), []
    while left:
        victim = least_work_victim(queue, left)
        order.append(victim.request_id)
        left.remove(victim)
    return order


# -- who gives way ----------------------------------------------------------------------------------------------


def test_the_one_with_least_to_compute_again_gives_way_and_the_first_never() -> None:
    queue = FCFSQueue()
    running = running_requests(queue, ("a", 1, 0, ""), ("b", 9, 0, ""), ("c", 5, 0, ""), ("d", 7, 0, ""))
    assert victims(queue, running) == ["c", "d", "b", "a"]


def test_among_equals_the_latest_gives_way() -> None:
    queue = FCFSQueue()
    running = running_requests(queue, *((name, 4, 0, "") for name in "abcd"))
    assert victims(queue, running) == ["d", "c", "b", "a"]


def test_importance_comes_before_work() -> None:
    """Nobody gives way to a less important one, however little it has done."""
    rows = ("urgent", 1, -1, ""), ("idle", 50, 5, ""), ("next", 2, -1, ""), ("idler", 90, 5, "")
    queue = PriorityQueue()
    assert victims(queue, running_requests(queue, *rows)) == ["idle", "idler", "next", "urgent"]


def test_of_the_tenant_served_most_the_one_with_least_work_gives_way() -> None:
    rows = ("old", 1, 0, "light"), ("light", 10, 0, "light"), ("h1", 40, 0, "heavy"), ("h2", 60, 0, "heavy")
    queue = FairQueue()
    assert victims(queue, running_requests(queue, *rows)) == ["h1", "h2", "light", "old"]


@pytest.mark.parametrize("preemption_policy", ["latest", "least-work"])
def test_it_saves_work_where_lengths_differ(preemption_policy: str) -> None:
    """The latest has a long prompt, the one before it hardly anything: giving up the short one costs less."""
    scheduler = make_scheduler(num_blocks=16, preemption_policy=preemption_policy, enable_caching=False)
    for spec in (("first", 4), ("short", 4), ("long", 36)):
        scheduler.add_request(make_request(*spec, max_tokens=9))
    preempted, total = [], 0
    while scheduler.has_unfinished_requests():
        plan = run_step(scheduler)
        preempted += plan.preempted_req_ids
        total += plan.total_num_scheduled_tokens
    assert (preempted, total) == {"latest": (["long"], 108), "least-work": (["short"], 76)}[preemption_policy]


# -- coming back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_victims_come_back_in_the_order_in_which_they_came(policy: str) -> None:
    scheduler = make_scheduler(policy=policy, preemption_policy="least-work")
    requests = [make_request(f"r{i}", 4) for i in range(6)]
    for request in requests:
        scheduler.add_request(request)
    run_step(scheduler)
    plan = scheduler.schedule()
    scheduler.add_request(make_request("late", 4))
    for index in (4, 1, 5, 2):
        scheduler._preempt(requests[index], plan)
    assert [request.request_id for request in scheduler.waiting] == ["r1", "r2", "r4", "r5", "late"]
    scheduler.finish_requests(["r2"], RequestStatus.FINISHED_ABORTED)
    assert [scheduler.waiting.pop().request_id for _ in range(len(scheduler.waiting))] == ["r1", "r4", "r5", "late"]
    scheduler.finish_requests(list(scheduler.requests), RequestStatus.FINISHED_ABORTED)


# -- progress -----------------------------------------------------------------------------------------------------


def rounds_of_the_small_one() -> tuple[int, int]:
    """(steps, preemptions) of a request that came first and has done little, in a stream of larger ones."""
    scheduler = make_scheduler(num_blocks=7, enable_caching=False, preemption_policy="least-work")
    small = make_request("small", 1, max_tokens=13)
    scheduler.add_request(small)
    steps = num_added = 0
    while not small.is_finished:
        while len(scheduler.waiting) < 3:
            scheduler.add_request(make_request(f"big{num_added}", 8, max_tokens=4))
            num_added += 1
        plan = scheduler.schedule()
        scheduler.update_from_output(plan, fake_result(scheduler, plan))
        steps += 1
    scheduler.finish_requests(list(scheduler.requests), RequestStatus.FINISHED_ABORTED)
    assert_nothing_leaked(scheduler)
    return steps, small.num_preemptions


def test_the_first_is_never_held_up_by_those_who_did_more() -> None:
    assert rounds_of_the_small_one() == (13, 0)


def test_without_the_guarantee_the_first_is_pushed_out_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken control."""

    def unguarded(queue: RequestQueue, running: Sequence[Request]) -> Request:
        return min(reversed(running), key=lambda request: request.num_computed_tokens)

    monkeypatch.setattr(policy_module, "least_work_victim", unguarded)
    steps, num_preemptions = rounds_of_the_small_one()
    assert steps > 30 and num_preemptions > 5


class Spared:
    """Notes every choice of a victim, and objects when it is the first of several."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.pick = scheduler._pick_victim
        self.place = scheduler.waiting.place
        self.count = 0

    def __call__(self, running: Sequence[Request]) -> Request:
        victim = self.pick(running)
        assert victim in running
        assert len(running) == 1 or victim is not min(running, key=self.place), "the first gave way"
        self.count += 1
        return victim


JOBS = st.lists(
    st.fixed_dictionaries(
        {
            "prompt": st.integers(1, 20),
            "max_tokens": st.integers(1, 16),
            "priority": st.integers(0, 2),
            "tenant": st.sampled_from("ab"),
            "user": st.sampled_from("xy"),
            "n": st.sampled_from([1, 1, 1, 3]),
        }
    ),
    min_size=2,
    max_size=8,
)
SHAPES = st.fixed_dictionaries(
    {
        "policy": st.sampled_from(POLICIES),
        "preemption_policy": st.sampled_from(["latest", "least-work"]),
        "block_size": st.integers(1, 4),
        "enable_caching": st.booleans(),
        "max_num_batched_tokens": st.sampled_from([1, 2, 3, 5, 8, 30]),
        "long_prefill_token_threshold": st.sampled_from([0, 0, 1, 4]),
        "max_num_seqs": st.integers(1, 6),
    }
)


@settings(max_examples=150)
@given(jobs=JOBS, shape=SHAPES, spare=st.integers(0, 6), every=st.integers(0, 3))
def test_every_workload_ends_in_a_pool_that_hardly_holds_its_largest(
    jobs: list[dict[str, object]], shape: dict[str, object], spare: int, every: int
) -> None:
    """Whatever the policies: all tokens right, nothing leaked, and the first of those that run never gives way."""
    requests = [make_request(f"r{i}", arrival_time=i // 2, **job) for i, job in enumerate(jobs)]  # type: ignore[arg-type]
    block_size = shape["block_size"]
    assert isinstance(block_size, int)
    largest = max(-(-(r.num_prompt_tokens + (r.max_tokens or 0)) // block_size) for r in requests)
    num_blocks = 1 + largest + spare
    engine = EngineCore(make_scheduler(num_blocks=num_blocks, **shape), PagedExecutor(num_blocks, block_size))  # type: ignore[arg-type]
    if shape["policy"] == "fair" or shape["preemption_policy"] == "least-work":
        engine.scheduler._pick_victim = Spared(engine.scheduler)
    bound = 50 + 20 * sum(r.sampling_params.n * (r.num_prompt_tokens + (r.max_tokens or 0)) for r in requests)
    arriving, outputs = list(requests), dict[str, list[int]]()
    for step in range(bound):
        if arriving and (every == 0 or step % every == 0):
            engine.add_request(arriving.pop(0))
        for news in engine.step().outputs:
            assert news.error is None
            outputs.setdefault(news.request_id, []).extend(news.new_token_ids)
        engine.scheduler.check_integrity()
        if not arriving and not engine.has_unfinished_requests():
            break
    else:
        raise AssertionError("no end")
    for request in requests:
        for index in range(request.sampling_params.n):
            name = f"{index}_{request.request_id}" if index else request.request_id
            assert outputs[name] == expected_outputs(request, request.max_tokens or 0, index)
    assert_nothing_leaked(engine.scheduler)
