"""A step planned while another computes, over an executor that reads its paged memory and takes its time.

Whatever is wrong with a plan shows: as a token, as a wrong read, or as a leak.
"""

import dataclasses
import random
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mini_vllm.core.scheduler_output import ModelRunnerOutput, SchedulerOutput
from mini_vllm.engine.core import EngineCore
from mini_vllm.request import Request
from tests.core.harness import PagedExecutor, assert_nothing_leaked, expected_outputs, make_request, make_scheduler


class SlowExecutor(PagedExecutor):
    """Yields before it looks at a plan; raises what it is told to, in the steps it is told to."""

    def __init__(self, num_blocks: int, block_size: int, raises: dict[int, BaseException] | None = None) -> None:
        super().__init__(num_blocks, block_size)
        self.raises = raises or {}
        self.wrong: AssertionError | None = None

    def execute_model(self, plan: SchedulerOutput) -> ModelRunnerOutput:
        time.sleep(0.0002)
        if error := self.raises.pop(len(self.plans), None):
            self.plans.append(plan)
            raise error
        try:
            return super().execute_model(plan)
        except AssertionError as error:
            self.wrong = error
            raise


def overlapped(
    num_blocks: int = 64, block_size: int = 4, raises: dict[int, BaseException] | None = None, **config: Any
) -> tuple[EngineCore, SlowExecutor]:
    scheduler = make_scheduler(num_blocks=num_blocks, block_size=block_size, async_scheduling=True, **config)
    executor = SlowExecutor(num_blocks, block_size, raises)
    return EngineCore(scheduler, executor), executor


def drain(engine: EngineCore, executor: SlowExecutor) -> None:
    for _ in range(2000):
        if not engine.has_work():
            break
        engine.step()
        engine.scheduler.check_integrity()
    assert executor.wrong is None, executor.wrong
    assert executor.memory.tables == {}, "the worker kept a row"
    assert_nothing_leaked(engine.scheduler)
    engine.shutdown()


def right(request: Request) -> bool:
    told = request.output_token_ids
    return told == expected_outputs(request, len(told), request.sample_index)


def test_tokens_are_those_of_the_cache_and_every_plan_but_the_first_is_made_ahead() -> None:
    engine, executor = overlapped()
    requests = [make_request(f"r{i}", 5 + i, max_tokens=9) for i in range(4)]
    for request in requests:
        engine.add_request(request)
    engine.step()
    assert [len(request.output_token_ids) for request in requests] == [1] * 4
    assert all(request.num_output_placeholders == 1 for request in requests), "the next step is in flight"
    drain(engine, executor)
    assert all(right(request) and request.num_output_tokens == 9 for request in requests)
    assert sum(bool(plan.num_scheduled_tokens) for plan in executor.plans) == 9, "no step was wasted"


def test_a_failed_step_fails_its_requests_and_the_step_upon_it_is_not_begun() -> None:
    engine, executor = overlapped(raises={2: RuntimeError("on fire")}, max_num_seqs=2)
    doomed = [make_request(f"d{i}", 8, max_tokens=9) for i in range(2)]
    for request in doomed:
        engine.add_request(request)
    later = make_request("later", 8, max_tokens=9)
    engine.add_request(later)
    drain(engine, executor)
    assert [request.finish_reason for request in doomed] == ["error", "error"]
    assert later.finish_reason == "length" and right(later)


def test_an_interrupt_of_the_executor_loses_nothing() -> None:
    engine, executor = overlapped(raises={2: KeyboardInterrupt()})
    requests = [make_request(f"r{i}", 8, max_tokens=6) for i in range(3)]
    for request in requests:
        engine.add_request(request)
    with pytest.raises(KeyboardInterrupt):
        for _ in range(20):
            engine.step()
    engine.scheduler.check_integrity()
    drain(engine, executor)
    assert all(right(request) and request.num_output_tokens == 6 for request in requests)


def test_an_interrupt_while_waiting_leaves_the_steps_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, executor = overlapped()
    requests = [make_request(f"r{i}", 8, max_tokens=6) for i in range(3)]
    for request in requests:
        engine.add_request(request)
    engine.step()

    class Interrupted:
        def exception(self) -> None:
            raise KeyboardInterrupt

    step = engine._in_flight[0]
    engine._in_flight[0] = dataclasses.replace(step, result=Interrupted())  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        engine._finish_oldest()
    engine._in_flight[0] = step
    engine.abort_requests(["r1"])
    drain(engine, executor)
    assert right(requests[0]) and right(requests[2]) and requests[0].num_output_tokens == 6


def test_an_id_is_used_again_while_its_last_step_is_in_flight() -> None:
    engine, executor = overlapped()
    first, again = make_request("r", 8, max_tokens=20), make_request("r", [1, 2, 3, 4, 5], max_tokens=6)
    engine.add_request(first)
    engine.step()
    engine.step()
    engine.abort_requests(["r"])
    engine.add_request(again)
    drain(engine, executor)
    assert again.num_output_tokens == 6 and right(again)


CASE = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10**6),
        "blocks": st.integers(8, 40),
        "block_size": st.sampled_from([1, 2, 4]),
        "budget": st.sampled_from([3, 8, 64]),
        "max_num_seqs": st.sampled_from([2, 4, 8]),
        "policy": st.sampled_from(["fcfs", "priority", "fair"]),
        "preemption_policy": st.sampled_from(["latest", "least-work"]),
        "sharing": st.booleans(),
        "fails": st.booleans(),
    }
)


def play(case: dict[str, Any]) -> None:
    rng = random.Random(case["seed"])
    raises: dict[int, BaseException] = {rng.randrange(1, 15): RuntimeError("flaky")} if case["fails"] else {}
    engine, executor = overlapped(
        case["blocks"], case["block_size"], raises,
        max_num_batched_tokens=case["budget"], max_num_seqs=case["max_num_seqs"], policy=case["policy"],
        preemption_policy=case["preemption_policy"], same_step_prefix_sharing=case["sharing"],
    )  # fmt: skip
    room = (case["blocks"] - 1) * case["block_size"]
    requests = []
    told: dict[str, list[int]] = {}
    for step in range(60):
        if rng.random() < 0.3:
            length = rng.randrange(1, max(2, min(10, room // 3)))
            shared = [7] * length if rng.random() < 0.5 else length
            request = make_request(
                f"r{step}", shared, max_tokens=rng.randrange(1, 9), n=rng.choice([1, 1, 3]),
                stop_token_ids=range(0, 256, 9), ignore_eos=True, priority=rng.randrange(3),
            )  # fmt: skip
            if engine.scheduler.kv.can_ever_fit(length + 9):
                engine.add_request(request)
                requests.append(request)
        if engine.scheduler.requests and rng.random() < 0.1:
            engine.abort_requests([rng.choice(sorted(engine.scheduler.requests))])
        for news in engine.step().outputs:
            told.setdefault(news.request_id, []).extend(news.new_token_ids)
        engine.scheduler.check_integrity()
    for _ in range(500):
        if not engine.has_work():
            break
        for news in engine.step().outputs:
            told.setdefault(news.request_id, []).extend(news.new_token_ids)
    drain(engine, executor)
    for request in requests:
        for index in range(request.sampling_params.n):
            tokens = told.get(request.request_id if index == 0 else f"{index}_{request.request_id}", [])
            assert tokens == expected_outputs(request, len(tokens), index)


@settings(max_examples=60, deadline=None)
@given(case=CASE)
def test_random_lives_leak_nothing_and_change_no_token(case: dict[str, Any]) -> None:
    play(case)


def test_random_lives_find_children_that_part_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken control: the plan after a fork is made before the children are there."""
    monkeypatch.setattr(EngineCore, "_may_plan_ahead", lambda self, plan: self.scheduler.may_plan_ahead())
    with pytest.raises((AssertionError, KeyError)):  # a wrong token, a wrong read, or no end
        for seed in range(20):
            play(
                {
                    "seed": seed, "blocks": 40, "block_size": 4, "budget": 64, "max_num_seqs": 8, "policy": "fcfs",
                    "preemption_policy": "latest", "sharing": True, "fails": False,
                }
            )  # fmt: skip
