"""Injected admission rules, and plans as plain data."""

from typing import Any

import msgspec

from mini_vllm.core.scheduler import Scheduler
from mini_vllm.core.scheduler_output import EngineCoreOutputs, SchedulerOutput
from mini_vllm.request import LoRARequest, Request, RequestStatus, WaitingReason
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


# -- rules -------------------------------------------------------------------------------------------------------


class SlotRule:
    """At most `slots` adapters at once, and no more than `chunk` tokens a step for those that use one."""

    def __init__(self, slots: int, chunk: int = 10**9) -> None:
        self.slots, self.chunk = slots, chunk
        self.held: set[str] = set()
        self.log: list[tuple[str, str, int, int]] = []

    def clamp(self, request: Request, start: int, num_tokens: int) -> tuple[int, str]:
        if request.lora_request is None:
            return num_tokens, ""
        if request.request_id not in self.held and len(self.held) >= self.slots:
            return 0, "all adapter slots are taken"
        return min(num_tokens, self.chunk), "state alignment"

    def commit(self, request: Request, start: int, num_tokens: int) -> None:
        self.log.append(("commit", request.request_id, start, num_tokens))
        if request.lora_request is not None:
            self.held.add(request.request_id)

    def refund(self, request: Request) -> None:
        self.log.append(("refund", request.request_id, 0, 0))
        self.held.discard(request.request_id)


def with_lora(name: str, prompt: int, **kwargs: Any) -> Request:
    return make_request(name, prompt, lora=LoRARequest(name, "/nowhere"), **kwargs)


def test_a_rule_may_hold_a_request_back_and_says_why() -> None:
    rule = SlotRule(slots=1)
    scheduler = make_scheduler(rules=[rule])
    add(scheduler, with_lora("a", 4), with_lora("b", 4))
    run_step(scheduler)
    assert scheduler.waiting_reasons() == {"b": f"{WaitingReason.RULE}: all adapter slots are taken"}
    run_all(scheduler)
    assert_nothing_leaked(scheduler)
    assert rule.held == set()


def test_a_rule_may_shrink_waiting_and_running_requests() -> None:
    scheduler = make_scheduler(rules=[SlotRule(slots=4, chunk=3)])
    add(scheduler, with_lora("a", 8, max_tokens=2), make_request("b", 8, max_tokens=2))
    assert [dict(p.num_scheduled_tokens) for p in run_all(scheduler)] == [
        {"a": 3, "b": 8},
        {"a": 3, "b": 1},
        {"a": 2},
        {"a": 1},
    ]


def test_a_rule_may_stop_a_running_request_for_a_step() -> None:
    class Pause(SlotRule):
        paused = False

        def clamp(self, request: Request, start: int, num_tokens: int) -> tuple[int, str]:
            return (0, "paused") if self.paused and request.request_id == "a" else (num_tokens, "")

    rule = Pause(slots=9)
    scheduler = make_scheduler(rules=[rule])
    add(scheduler, make_request("a", 4), make_request("b", 4))
    run_step(scheduler)
    rule.paused = True
    assert list(run_step(scheduler).num_scheduled_tokens) == ["b"]
    rule.paused = False
    assert list(run_step(scheduler).num_scheduled_tokens) == ["a", "b"]


def test_rules_commit_once_a_step_and_refund_once_a_life() -> None:
    rule = SlotRule(slots=9)
    scheduler = make_scheduler(rules=[rule])
    add(scheduler, make_request("a", 6, max_tokens=3))
    run_all(scheduler)
    assert rule.log == [("commit", "a", 0, 6), ("commit", "a", 6, 1), ("commit", "a", 7, 1), ("refund", "a", 0, 0)]


def test_a_rule_is_not_committed_to_when_memory_says_no() -> None:
    rule = SlotRule(slots=9)
    scheduler = make_scheduler(num_blocks=5, rules=[rule])
    add(scheduler, make_request("a", 12, max_tokens=9), make_request("b", 12))
    run_step(scheduler)
    assert [entry[:2] for entry in rule.log] == [("commit", "a")]


def test_a_preempted_request_gives_its_slot_back_and_takes_it_again() -> None:
    rule = SlotRule(slots=2)
    scheduler = make_scheduler(num_blocks=5, rules=[rule])
    add(scheduler, with_lora("a", 8), with_lora("b", 8))
    run_step(scheduler)
    assert run_step(scheduler).preempted_req_ids == ["b"]
    assert rule.held == {"a"}
    run_all(scheduler)
    per_request = {name: [e[0] for e in rule.log if e[1] == name] for name in "ab"}
    assert per_request["a"].count("refund") == 1 and per_request["b"].count("refund") == 2
    assert rule.held == set()


def test_an_abort_refunds_too() -> None:
    rule = SlotRule(slots=2)
    scheduler = make_scheduler(rules=[rule])
    add(scheduler, with_lora("a", 8))
    run_step(scheduler)
    scheduler.finish_requests(["a"], RequestStatus.FINISHED_ABORTED)
    assert rule.held == set()


# -- plans are plain data ------------------------------------------------------------------------------------------


def round_trip(value: Any) -> Any:
    return msgspec.msgpack.decode(msgspec.msgpack.encode(value), type=type(value))


def test_every_plan_survives_a_round_trip() -> None:
    scheduler = make_scheduler(num_blocks=9, max_num_batched_tokens=12)
    add(scheduler, *(with_lora(f"r{i}", 6 + i, max_tokens=9, stop_token_ids=[300]) for i in range(4)))
    kinds = set()
    while scheduler.has_unfinished_requests():
        plan = scheduler.schedule()
        copy = round_trip(plan)
        assert isinstance(copy, SchedulerOutput) and copy == plan
        kinds |= {name for name in ("new_reqs", "preempted_req_ids", "finished_req_ids") if getattr(plan, name)}
        result = fake_result(scheduler, plan)
        assert round_trip(result) == result
        news = EngineCoreOutputs(scheduler.update_from_output(copy, result), scheduler.stats())
        assert round_trip(news) == news
    assert kinds == {"new_reqs", "preempted_req_ids", "finished_req_ids"}


def test_a_plan_shares_no_list_with_the_scheduler() -> None:
    """It may be executed later or elsewhere: what happens to the request afterwards must not change it."""
    scheduler = make_scheduler()
    request = make_request("a", 6)
    add(scheduler, request)
    plan = scheduler.schedule()
    before = round_trip(plan)
    scheduler.update_from_output(plan, fake_result(scheduler, plan))
    run_all(scheduler)
    assert plan == before
