"""The loop around scheduler and executor: refusals, failed steps, interrupts, records. No device: paged fakes."""

import logging
from concurrent.futures import Future
from typing import Any

import pytest

from mini_vllm.core.scheduler_output import ModelRunnerOutput, SchedulerOutput
from mini_vllm.engine.core import EngineCore
from mini_vllm.exceptions import EngineDeadError, InvalidParameterError, PromptTooLongError
from mini_vllm.request import Request, WaitingReason
from tests.core.harness import (
    PagedExecutor,
    assert_nothing_leaked,
    expected_outputs,
    make_engine,
    make_request,
    make_scheduler,
    run_engine,
)


def assert_right_outputs(*requests: Request) -> None:
    for request in requests:
        assert request.output_token_ids == expected_outputs(request, len(request.output_token_ids))


# -- the master invariant on a cache-reading fake ------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 3, 8, 16])
@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("config", [{}, {"max_num_batched_tokens": 5}, {"long_prefill_token_threshold": 3}])
def test_tokens_do_not_depend_on_how_they_are_scheduled(block_size: int, caching: bool, config: dict[str, Any]) -> None:
    """Outputs are read out of paged memory, so one wrong slot anywhere would show."""
    num_blocks = 1 + -(-60 // block_size)
    engine, _ = make_engine(num_blocks=num_blocks, block_size=block_size, enable_caching=caching, **config)
    prefix = list(range(17))
    requests = [make_request(f"r{i}", prefix[: 17 - i] + [200 + i], max_tokens=20) for i in range(6)]
    for request in requests:
        engine.add_request(request)
    run_engine(engine)
    assert all(len(r.output_token_ids) == 20 for r in requests)
    assert engine.scheduler.num_preemptions > 0
    assert_right_outputs(*requests)
    assert_nothing_leaked(engine.scheduler)


def test_a_wrong_block_table_is_noticed() -> None:
    """Broken control: two requests that get each other's blocks."""

    class Swapping(PagedExecutor):
        def execute_model(self, plan: SchedulerOutput) -> ModelRunnerOutput:
            result = super().execute_model(plan)
            if len(plan.new_reqs) == 2:
                a, b = (self.memory.tables[new.req_id] for new in plan.new_reqs)
                a[0], b[0] = b[0], a[0]
            return result

    engine = EngineCore(make_scheduler(), Swapping(64, 4))
    a, b = make_request("a", 6), make_request("b", 6)
    engine.add_request(a)
    engine.add_request(b)
    run_engine(engine)
    assert a.finish_reason == b.finish_reason == "error"
    assert a.error is not None and "holds other KV" in a.error


# -- what is refused before it is queued -------------------------------------------------------------------------


def test_a_prompt_larger_than_the_pool_is_refused_before_it_is_queued() -> None:
    engine, _ = make_engine(num_blocks=5)
    engine.add_request(make_request("fits", 16, max_tokens=1))
    with pytest.raises(PromptTooLongError, match=r"17 tokens need 5 KV cache blocks of 4 tokens.*pool has 4"):
        engine.add_request(make_request("big", 17))
    assert list(engine.scheduler.requests) == ["fits"]
    run_engine(engine)
    assert_nothing_leaked(engine.scheduler)


def test_a_prompt_that_leaves_no_room_in_the_context_is_refused() -> None:
    engine, _ = make_engine()
    engine.add_request(make_request("fits", 7, max_model_len=8))
    with pytest.raises(PromptTooLongError, match="maximum context length is 8 tokens"):
        engine.add_request(make_request("long", 8, max_model_len=8))


def test_an_empty_prompt_and_a_taken_id_are_refused() -> None:
    engine, _ = make_engine()
    engine.add_request(make_request("a", 4))
    with pytest.raises(InvalidParameterError, match="prompt"):
        engine.add_request(make_request("b", []))
    with pytest.raises(InvalidParameterError, match="request_id"):
        engine.add_request(make_request("a", 4))


# -- outgrowing the pool -----------------------------------------------------------------------------------------


def test_a_request_that_outgrows_the_pool_alone_ends_as_its_own_error() -> None:
    engine, _ = make_engine(num_blocks=5)
    greedy = make_request("greedy", 8, max_tokens=50)
    small = make_request("small", 5, max_tokens=6)
    engine.add_request(greedy)
    engine.add_request(small)
    run_engine(engine)
    assert greedy.finish_reason == "error"
    assert greedy.error is not None and "17 tokens" in greedy.error and "the whole pool has 4" in greedy.error
    assert greedy.num_tokens == 17, "it got as far as the pool goes"
    assert small.finish_reason == "length"
    assert_right_outputs(greedy, small)
    assert_nothing_leaked(engine.scheduler)


def test_the_error_of_an_outgrown_request_is_reported_in_a_step() -> None:
    engine, _ = make_engine(num_blocks=3)
    engine.add_request(make_request("a", 8, max_tokens=9))
    reported = []
    while engine.has_unfinished_requests():
        reported += [out for out in engine.step().outputs if out.finished]
    assert [(out.request_id, out.finish_reason) for out in reported] == [("a", "error")]


# -- steps that fail ---------------------------------------------------------------------------------------------


def test_a_failed_step_ends_its_own_requests_and_the_engine_goes_on() -> None:
    engine, executor = make_engine(max_num_seqs=2)
    first, second, waiting = (make_request(name, list(range(9)), max_tokens=5) for name in ("a", "b", "c"))
    for request in (first, second, waiting):
        engine.add_request(request)
    engine.step()
    executor.fail_on = lambda plan: len(executor.plans) == 2
    news = engine.step().outputs
    assert sorted(out.request_id for out in news if out.finish_reason == "error") == ["a", "b"]
    assert first.error == "the step failed: RuntimeError: the device is on fire"
    assert not waiting.is_finished
    run_engine(engine)
    assert waiting.finish_reason == "length"
    assert_right_outputs(waiting)
    assert_nothing_leaked(engine.scheduler)


def test_requests_that_were_not_in_the_failed_step_live() -> None:
    """Budget 1: one request decodes, the other runs but gets nothing in the step that fails."""
    engine, executor = make_engine(max_num_batched_tokens=9)
    a, b = make_request("a", 4, max_tokens=9), make_request("b", 4, max_tokens=9)
    engine.add_request(a)
    engine.add_request(b)
    engine.step()
    engine.scheduler.config = type(engine.scheduler.config)(max_num_batched_tokens=1)
    executor.fail_on = lambda plan: len(executor.plans) == 2
    engine.step()
    executor.fail_on = lambda plan: False
    run_engine(engine)
    assert (a.finish_reason, b.finish_reason) == ("error", "length")
    assert_right_outputs(b)
    assert_nothing_leaked(engine.scheduler)


def test_a_prefix_from_a_failed_step_is_computed_again() -> None:
    """Its hashes were findable while the step was under way; afterwards the slots hold nothing."""
    engine, executor = make_engine()
    engine.add_request(make_request("a", list(range(16))))
    executor.fail_on = lambda plan: True
    engine.step()
    executor.fail_on = lambda plan: False
    again = make_request("b", list(range(16)))
    engine.add_request(again)
    run_engine(engine)
    assert again.num_cached_tokens == 0
    assert_right_outputs(again)


@pytest.mark.broken_pool
def test_without_the_roll_back_the_next_request_reads_garbage() -> None:
    """Broken control of the test above."""
    engine, executor = make_engine()
    engine.scheduler.kv.forget_unwritten = lambda *args: None  # type: ignore[method-assign]
    engine.add_request(make_request("a", list(range(16))))
    executor.fail_on = lambda plan: True
    engine.step()
    executor.fail_on = lambda plan: False
    again = make_request("b", list(range(16)))
    engine.add_request(again)
    run_engine(engine)
    assert again.error is not None and "holds other KV" in again.error


def test_a_failed_step_repeats_to_the_worker_who_left() -> None:
    engine, executor = make_engine()
    engine.add_request(make_request("a", 4, max_tokens=1))
    engine.add_request(make_request("b", 4, max_tokens=9))
    engine.step()
    executor.fail_on = lambda plan: len(executor.plans) == 2
    engine.step()
    engine.step()
    assert executor.plans[1].finished_req_ids == ["a"]
    assert executor.plans[2].finished_req_ids == ["a", "b"]


def test_an_interrupt_passes_through_and_loses_no_request() -> None:
    class Interrupting(PagedExecutor):
        armed = True

        def execute_model(self, plan: SchedulerOutput) -> ModelRunnerOutput:
            if self.armed and len(self.plans) == 2:
                self.armed = False
                raise KeyboardInterrupt
            return super().execute_model(plan)

    engine = EngineCore(make_scheduler(), Interrupting(64, 4))
    requests = [make_request(name, 6, max_tokens=5) for name in "ab"]
    for request in requests:
        engine.add_request(request)
    with pytest.raises(KeyboardInterrupt):
        run_engine(engine)
    engine.scheduler.check_integrity()
    run_engine(engine)
    assert [r.finish_reason for r in requests] == ["length", "length"]
    assert_right_outputs(*requests)
    assert_nothing_leaked(engine.scheduler)


def test_an_executor_may_answer_with_futures_in_two_halves() -> None:
    class TwoHalves(PagedExecutor):
        def execute_model(self, plan: SchedulerOutput) -> Any:
            self.half = super().execute_model(plan)
            future: Future[ModelRunnerOutput | None] = Future()
            future.set_result(None)
            return future

        def sample_tokens(self, grammar_output: Any = None) -> Any:
            future: Future[ModelRunnerOutput] = Future()
            future.set_result(self.half)
            return future

    engine = EngineCore(make_scheduler(), TwoHalves(64, 4))
    request = make_request("a", 6)
    engine.add_request(request)
    run_engine(engine)
    assert_right_outputs(request)
    assert request.finish_reason == "length"


# -- idle, aborts, records -----------------------------------------------------------------------------------------


def test_an_idle_step_does_not_call_the_executor() -> None:
    engine, executor = make_engine()
    assert engine.step().outputs == []
    assert executor.plans == []


def test_the_executor_hears_of_the_last_abort_even_if_nothing_runs() -> None:
    engine, executor = make_engine()
    engine.add_request(make_request("a", 4))
    engine.step()
    engine.abort_requests(["a"])
    engine.step()
    assert executor.plans[-1].finished_req_ids == ["a"]
    assert executor.memory.tables == {}


def test_each_step_leaves_a_record() -> None:
    engine, _ = make_engine(max_num_batched_tokens=8, num_blocks=5)
    engine.add_request(make_request("a", 8, max_tokens=3))
    engine.add_request(make_request("b", 8, max_tokens=2))
    run_engine(engine)
    records = engine.trace.last()
    assert records[0].num_scheduled_tokens == {"a": 8}
    assert (records[0].waiting_head, records[0].waiting_reason) == ("b", WaitingReason.TOKEN_BUDGET)
    assert records[0].new_req_ids == ["a"] and records[0].num_waiting == 1
    assert [r.finished for r in records if r.finished] == [{"a": "length"}, {"b": "length"}]
    assert [r.step_id for r in records] == list(range(1, len(records) + 1))
    assert engine.trace.last(1) == records[-1:]
    text = str(records[0])
    assert "scheduled 8 tokens (a:8)" in text and "b waits: token budget" in text


def test_a_record_names_the_preempted() -> None:
    engine, _ = make_engine(num_blocks=5)
    engine.add_request(make_request("a", 8))
    engine.add_request(make_request("b", 8))
    run_engine(engine)
    preempting = [r for r in engine.trace.last() if r.preempted_req_ids]
    assert [r.preempted_req_ids for r in preempting] == [["b"]]
    assert preempting[0].waiting_reason == WaitingReason.PREEMPTION
    assert "preempted b" in str(preempting[0])


def test_the_record_is_in_the_log_at_debug(caplog: pytest.LogCaptureFixture) -> None:
    engine, _ = make_engine()
    engine.add_request(make_request("a", 4, max_tokens=1))
    logger = logging.getLogger("mini_vllm.engine.core")
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.DEBUG, logger="mini_vllm.engine.core"):
            engine.step()
    finally:
        logger.removeHandler(caplog.handler)
    assert any("scheduled 4 tokens (a:4)" in record.getMessage() for record in caplog.records)


def test_old_records_make_room() -> None:
    scheduler = make_scheduler()
    engine = EngineCore(scheduler, PagedExecutor(64, 4), trace_capacity=3)
    engine.add_request(make_request("a", 4, max_tokens=9))
    run_engine(engine)
    assert [r.step_id for r in engine.trace.last()] == [7, 8, 9]


def test_resetting_the_prefix_cache_makes_the_next_request_compute_everything() -> None:
    engine, _ = make_engine()
    for name, cached in (("a", 0), ("b", 12)):
        request = make_request(name, list(range(16)))
        engine.add_request(request)
        run_engine(engine)
        assert request.num_cached_tokens == cached
    engine.reset_prefix_cache()
    request = make_request("c", list(range(16)))
    engine.add_request(request)
    run_engine(engine)
    assert request.num_cached_tokens == 0
    assert_right_outputs(request)


def test_an_executor_that_fails_whatever_it_is_asked_ends_the_engine() -> None:
    """Its requests got their errors; telling it for ever who left would keep a processor busy and fill the log."""
    engine, executor = make_engine()
    executor.fail_on = lambda plan: True
    engine.add_request(make_request("a", 4))
    assert [news.finish_reason for news in engine.step().outputs] == ["error"]
    with pytest.raises(EngineDeadError, match="RuntimeError: the device is on fire"):
        for _ in range(5):
            engine.step()
    assert_nothing_leaked(engine.scheduler)


def test_requests_that_fail_one_after_the_other_do_not() -> None:
    engine, executor = make_engine()
    executor.fail_on = lambda plan: bool(plan.num_scheduled_tokens)
    for i in range(20):
        engine.add_request(make_request(f"r{i}", 4))
        assert [news.finish_reason for news in engine.step().outputs] == ["error"]
    executor.fail_on = lambda plan: False
    after = make_request("after", 4)
    engine.add_request(after)
    run_engine(engine)
    assert_right_outputs(after)
