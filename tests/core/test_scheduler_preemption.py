"""Giving way: who is preempted, what is kept, and how a request comes back."""

import pytest

from mini_vllm.core.scheduler import Scheduler
from mini_vllm.request import Request, RequestStatus
from tests.core.harness import (
    PagedMemory,
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


def waiting_ids(scheduler: Scheduler) -> list[str]:
    return [request.request_id for request in scheduler.waiting]


def running_ids(scheduler: Scheduler) -> list[str]:
    return [request.request_id for request in scheduler.running]


def cramped() -> tuple[Scheduler, Request, Request]:
    """Two prompts of 8 fill 4 usable blocks of 4; the first decode needs a fifth."""
    scheduler = make_scheduler(num_blocks=5)
    a, b = make_request("a", 8, max_tokens=9), make_request("b", 8, max_tokens=9)
    add(scheduler, a, b)
    assert run_step(scheduler).num_scheduled_tokens == {"a": 8, "b": 8}
    return scheduler, a, b


# -- fcfs ------------------------------------------------------------------------------------------------------


def test_the_latest_admitted_gives_way() -> None:
    scheduler, a, b = cramped()
    plan = run_step(scheduler)
    assert plan.preempted_req_ids == ["b"]
    assert plan.num_scheduled_tokens == {"a": 1}
    assert (a.status, b.status) == (RequestStatus.RUNNING, RequestStatus.PREEMPTED)


def test_a_preempted_request_keeps_its_outputs_and_loses_its_blocks() -> None:
    scheduler, _, b = cramped()
    outputs, epoch = list(b.output_token_ids), b.epoch
    assert len(outputs) == 1
    run_step(scheduler)
    assert (b.output_token_ids, b.num_computed_tokens, b.num_tokens) == (outputs, 0, 9)
    assert b.num_preemptions == 1 and b.epoch != epoch
    assert "b" not in scheduler.kv._tables
    assert scheduler.stats().num_preemptions == 1


def test_a_preempted_request_is_sent_again_in_full() -> None:
    scheduler, _, b = cramped()
    for plan in run_all(scheduler):
        for new in plan.new_reqs:
            assert new.req_id == "b" and new.num_prompt_tokens == 8
            assert new.token_ids == b.all_token_ids[: len(new.token_ids)] and len(new.token_ids) == 9
    assert_nothing_leaked(scheduler)


def test_nobody_is_admitted_in_a_step_that_preempted() -> None:
    scheduler, _, _ = cramped()
    add(scheduler, make_request("tiny", 1))
    plan = run_step(scheduler)
    assert plan.preempted_req_ids == ["b"] and plan.new_reqs == []
    assert waiting_ids(scheduler) == ["b", "tiny"]


def test_several_victims_come_back_in_their_old_order() -> None:
    """Each takes the front in turn, so arrival order holds, also against those who never ran."""
    scheduler = make_scheduler(num_blocks=9, max_num_seqs=4)
    add(scheduler, *(make_request(name, 7, max_tokens=30) for name in "abcd"))
    add(scheduler, make_request("later", 4))
    while len(running_ids(scheduler)) != 2:
        run_step(scheduler)
    assert running_ids(scheduler) == ["a", "b"]
    assert waiting_ids(scheduler) == ["c", "d", "later"]


def test_one_allocation_may_need_several_victims() -> None:
    scheduler = make_scheduler(num_blocks=5, max_num_batched_tokens=10, enable_caching=False)
    add(scheduler, make_request("long", 16, max_tokens=1))
    scheduler.config = type(scheduler.config)(max_num_batched_tokens=4)
    run_step(scheduler)  # one block of four
    scheduler.config = type(scheduler.config)(max_num_batched_tokens=64)
    held = [make_request(name, 4, max_tokens=9) for name in "xyz"]
    for request in held:  # fill the pool behind it, as earlier steps would have
        assert scheduler.kv.allocate_slots(request, 4) is not None
        scheduler.requests[request.request_id] = request
        request.status = RequestStatus.RUNNING
        request.num_computed_tokens = 4
        scheduler.running.append(request)
    plan = scheduler.schedule()
    assert plan.preempted_req_ids == ["z", "y", "x"]
    assert plan.num_scheduled_tokens == {"long": 12}
    assert waiting_ids(scheduler) == ["x", "y", "z"]
    scheduler.check_integrity()


def test_a_request_may_have_to_give_way_itself() -> None:
    scheduler = make_scheduler(num_blocks=5)
    a, b = make_request("a", 7, max_tokens=9), make_request("b", 8, max_tokens=8)
    add(scheduler, a, b)
    run_step(scheduler)
    plan = run_step(scheduler)  # a's eighth token fits its block, b needs a fifth block
    assert plan.preempted_req_ids == ["b"] and plan.num_scheduled_tokens == {"a": 1}


@pytest.mark.parametrize(
    ("max_tokens", "caching", "num_steps", "num_tokens"),
    [(4, False, 7, 30), (8, False, 15, 38), (9, False, 17, 40), (4, True, 7, 26)],
)
def test_steps_and_work_of_the_cramped_pool(max_tokens: int, caching: bool, num_steps: int, num_tokens: int) -> None:
    """Two prompts of 8 in 4 usable blocks: b is preempted once and its tokens are computed again."""
    scheduler = make_scheduler(num_blocks=5, enable_caching=caching)
    a, b = make_request("a", 8, max_tokens=max_tokens), make_request("b", 8, max_tokens=max_tokens)
    add(scheduler, a, b)
    plans = run_all(scheduler)
    total = sum(plan.total_num_scheduled_tokens for plan in plans)
    assert (len(plans), total) == (num_steps, num_tokens)
    assert (a.num_preemptions, b.num_preemptions) == (0, 1)
    assert len(a.output_token_ids) == len(b.output_token_ids) == max_tokens


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_preemption_changes_no_token(policy: str) -> None:
    outputs = {}
    for num_blocks in (7, 256):
        scheduler = make_scheduler(num_blocks=num_blocks, policy=policy)
        requests = [make_request(f"r{i}", 5 + i, max_tokens=12, priority=i % 2, arrival_time=i) for i in range(4)]
        add(scheduler, *requests)
        run_all(scheduler)
        outputs[num_blocks] = [r.output_token_ids for r in requests]
        assert (scheduler.num_preemptions > 0) == (num_blocks == 7)
    assert outputs[7] == outputs[256]


# -- priority --------------------------------------------------------------------------------------------------


def test_the_lowest_number_goes_first_then_the_earliest() -> None:
    scheduler = make_scheduler(policy="priority", max_num_seqs=1)
    add(
        scheduler,
        make_request("late", 2, max_tokens=1, priority=1, arrival_time=3.0),
        make_request("low", 2, max_tokens=1, priority=5, arrival_time=1.0),
        make_request("early", 2, max_tokens=1, priority=1, arrival_time=2.0),
        make_request("urgent", 2, max_tokens=1, priority=-1, arrival_time=4.0),
    )
    assert waiting_ids(scheduler) == ["urgent", "early", "late", "low"]
    order = [next(iter(plan.num_scheduled_tokens)) for plan in run_all(scheduler)]
    assert order == ["urgent", "early", "late", "low"]


def test_a_late_urgent_request_overtakes_the_queue_without_stalling_decodes() -> None:
    scheduler = make_scheduler(policy="priority", max_num_batched_tokens=8)
    add(scheduler, make_request("running", 4, max_tokens=9, arrival_time=0.0))
    run_step(scheduler)
    add(scheduler, make_request("queued", 20, arrival_time=1.0))
    add(scheduler, make_request("urgent", 5, priority=-1, arrival_time=2.0))
    assert list(run_step(scheduler).num_scheduled_tokens.items()) == [("running", 1), ("urgent", 5), ("queued", 2)]


def test_the_least_important_gives_way_even_if_it_was_admitted_first() -> None:
    scheduler = make_scheduler(policy="priority", num_blocks=5)
    add(scheduler, make_request("low", 4, priority=9, arrival_time=0.0, max_tokens=9))
    run_step(scheduler)
    add(scheduler, make_request("high", 5, priority=0, arrival_time=1.0, max_tokens=9))
    preempted = [plan.preempted_req_ids for plan in run_all(scheduler)]
    assert ["low"] in preempted and ["high"] not in preempted


def test_a_preempted_request_returns_to_its_place_by_priority_and_arrival() -> None:
    """Not to the front: an urgent newcomer stays ahead of it, and those who arrived later stay behind."""
    scheduler = make_scheduler(policy="priority", num_blocks=5)
    add(scheduler, make_request("a", 8, arrival_time=1.0), make_request("b", 8, arrival_time=2.0))
    run_step(scheduler)
    add(scheduler, make_request("later", 2, arrival_time=3.0))
    add(scheduler, make_request("urgent", 2, priority=-1, arrival_time=4.0))
    add(scheduler, make_request("earlier", 2, arrival_time=0.0))
    assert run_step(scheduler).preempted_req_ids == ["b"]
    assert waiting_ids(scheduler) == ["urgent", "earlier", "b", "later"]


def test_equal_priority_and_arrival_time_falls_back_to_order_of_arrival() -> None:
    """A simulated clock, or a batch added at once, gives equal times; the latest admitted still gives way."""
    scheduler = make_scheduler(policy="priority", num_blocks=9, max_num_seqs=4)
    add(scheduler, *(make_request(name, 7, max_tokens=30) for name in "abcd"))
    add(scheduler, make_request("later", 4))
    while len(running_ids(scheduler)) != 2:
        run_step(scheduler)
    assert running_ids(scheduler) == ["a", "b"]
    assert waiting_ids(scheduler) == ["c", "d", "later"]


def test_a_victim_scheduled_this_step_is_taken_out_of_the_plan() -> None:
    """The low-priority request is first in the batch, is given its token, and then must give everything back."""
    scheduler = make_scheduler(policy="priority", num_blocks=5)
    low = make_request("low", 7, priority=9, arrival_time=0.0, max_tokens=9)
    high = make_request("high", 8, priority=0, arrival_time=1.0, max_tokens=9)
    add(scheduler, low, high)
    scheduler.config = type(scheduler.config)(policy="priority", max_num_batched_tokens=15)
    run_step(scheduler)
    scheduler.running.sort(key=lambda r: r.request_id != "low")  # low first in the batch
    assert (low.num_tokens, high.num_tokens) == (8, 9)
    plan = scheduler.schedule()
    assert plan.preempted_req_ids == ["low"]
    assert plan.num_scheduled_tokens == {"high": 1}
    assert plan.total_num_scheduled_tokens == 1
    assert plan.epochs.keys() == {"high"}
    assert plan.cached_reqs.req_ids == ["high"] and plan.cached_reqs.num_computed_tokens == [8]
    assert plan.cached_reqs.new_block_ids.keys() == {"high"}
    scheduler.update_from_output(plan, fake_result(scheduler, plan))
    scheduler.check_integrity()


def test_the_hashes_of_an_unscheduled_victim_are_rolled_back() -> None:
    """Its eighth token would have filled a block. It is never written, so nobody may find it."""
    scheduler = make_scheduler(policy="priority", num_blocks=5)
    low = make_request("low", 7, priority=9, arrival_time=0.0, max_tokens=9)
    high = make_request("high", 8, priority=0, arrival_time=1.0, max_tokens=9)
    add(scheduler, low, high)
    run_step(scheduler)
    scheduler.running.sort(key=lambda r: r.request_id != "low")
    plan = scheduler.schedule()
    assert plan.preempted_req_ids == ["low"]
    probe = make_request("probe", [*low.all_token_ids, 1])
    assert low.num_tokens == 8 and scheduler.kv.get_computed_blocks(probe)[1] == 4


def test_the_budget_of_an_unscheduled_victim_goes_to_those_after_it() -> None:
    """Of a budget of 6, low takes 4 and high 1; c, left with 1, needs a block, and what low gives back goes to d."""
    scheduler = make_scheduler(
        policy="priority", num_blocks=11, long_prefill_token_threshold=4, max_num_batched_tokens=16
    )
    low = make_request("low", 20, priority=9)
    high, c, d = make_request("high", 8), make_request("c", 20), make_request("d", 20)
    add(scheduler, low, high, c, d)
    run_step(scheduler)
    run_step(scheduler)  # eight tokens each, two blocks each
    scheduler.running = [low, high, c, d]
    scheduler.config = type(scheduler.config)(
        policy="priority", long_prefill_token_threshold=4, max_num_batched_tokens=6
    )
    plan = scheduler.schedule()
    assert plan.preempted_req_ids == ["low"]
    assert plan.num_scheduled_tokens == {"high": 1, "c": 1, "d": 4}
    assert plan.cached_reqs.new_block_ids.keys() == {"high", "c", "d"}, "low's new block went to another"
    assert plan.total_num_scheduled_tokens == 6
    scheduler.update_from_output(plan, fake_result(scheduler, plan))
    run_all(scheduler)
    assert_nothing_leaked(scheduler)


def test_an_aborted_waiting_request_leaves_no_trace_in_the_priority_queue() -> None:
    """Not even when the head never moves: a queue of the dead must not grow without bound."""
    scheduler = make_scheduler(policy="priority", max_num_seqs=1)
    add(scheduler, make_request("head", 2, priority=-1))
    for i in range(1000):
        add(scheduler, make_request(f"r{i}", 2))
        scheduler.finish_requests([f"r{i}"], RequestStatus.FINISHED_ABORTED)
    assert waiting_ids(scheduler) == ["head"] and len(scheduler.waiting) == 1
    assert len(scheduler.waiting._heap) < 50  # type: ignore[attr-defined]


# -- the plan stays executable -----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_a_worker_that_obeys_every_plan_always_reads_what_was_written(policy: str) -> None:
    scheduler = make_scheduler(policy=policy, num_blocks=9, max_num_batched_tokens=12)
    memory = PagedMemory(9, 4)
    prefix = list(range(8))
    requests = [
        make_request(f"r{i}", [*prefix[: 2 * i], *range(i, i + 5)], max_tokens=9, priority=i % 3) for i in range(6)
    ]
    add(scheduler, *requests)
    while scheduler.has_unfinished_requests():
        plan = scheduler.schedule()
        memory.run(plan)
        result = fake_result(scheduler, plan)
        memory.append(result)
        scheduler.update_from_output(plan, result)
        scheduler.check_integrity()
    assert scheduler.num_preemptions > 0
    assert all(len(r.output_token_ids) == 9 for r in requests)
    assert_nothing_leaked(scheduler)
