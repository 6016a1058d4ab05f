"""Requests through every state: stopping, aborting, failing, and results that come too late."""

from typing import Any

import pytest

from mini_vllm.core.scheduler import Scheduler
from mini_vllm.core.scheduler_output import ModelRunnerOutput
from mini_vllm.request import Request, RequestStatus
from tests.core.harness import (
    EOS,
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


def abort(scheduler: Scheduler, *request_ids: str) -> list[str]:
    ended = scheduler.finish_requests(request_ids, RequestStatus.FINISHED_ABORTED)
    scheduler.check_integrity()
    return [request.request_id for request in ended]


# -- how a request ends ----------------------------------------------------------------------------------------


def finish(tokens: list[int], **kwargs: Any) -> Request:
    """One request fed `tokens` in turn until it ends."""
    scheduler = make_scheduler()
    request = make_request("a", 3, **kwargs)
    add(scheduler, request)
    stream = iter(tokens)
    while scheduler.has_unfinished_requests():
        run_step(scheduler, lambda _: next(stream))
    assert_nothing_leaked(scheduler)
    return request


def test_end_of_sequence_stops_and_stays_in_the_output() -> None:
    request = finish([10, 20, EOS, 99], max_tokens=10, ignore_eos=False)
    assert (request.output_token_ids, request.finish_reason) == ([10, 20, EOS], "stop")
    assert request.stop_reason is None


def test_ignored_end_of_sequence_runs_to_the_cap() -> None:
    request = finish([EOS, EOS, 5], max_tokens=3, ignore_eos=True)
    assert (request.output_token_ids, request.finish_reason) == ([EOS, EOS, 5], "length")


def test_a_stop_id_stops_and_is_named() -> None:
    request = finish([10, 42, 99], max_tokens=10, stop_token_ids=[42])
    assert (request.output_token_ids, request.finish_reason, request.stop_reason) == ([10, 42], "stop", 42)


@pytest.mark.parametrize("last", [EOS, 42])
def test_a_stop_on_the_last_allowed_token_is_a_stop(last: int) -> None:
    assert finish([10, last], max_tokens=2, ignore_eos=False, stop_token_ids=[42]).finish_reason == "stop"


def test_the_context_length_ends_a_request() -> None:
    request = finish(list(range(20)), max_tokens=None, max_model_len=7)
    assert (request.num_tokens, request.finish_reason) == (7, "length")


def test_an_unfinished_request_has_no_finish_reason() -> None:
    scheduler = make_scheduler()
    request = make_request("a", 3)
    assert request.finish_reason is None
    add(scheduler, request)
    run_step(scheduler)
    assert request.status is RequestStatus.RUNNING and request.finish_reason is None


def test_tokens_after_the_end_are_dropped_and_not_reported() -> None:
    """A ragged result may run past the end of a request (speculation does)."""
    scheduler = make_scheduler()
    request = make_request("a", 3, max_tokens=2)
    add(scheduler, request)
    plan = scheduler.schedule()
    (news,) = scheduler.update_from_output(plan, ModelRunnerOutput(["a"], [[1, 2, 3]]))
    assert news.new_token_ids == request.output_token_ids == [1, 2]
    assert news.finish_reason == "length"


def test_a_row_without_tokens_is_no_news() -> None:
    """Ragged the other way: in mid-prefill, or when every draft was refused elsewhere."""
    scheduler = make_scheduler()
    request = make_request("a", 3)
    add(scheduler, request)
    assert scheduler.update_from_output(scheduler.schedule(), ModelRunnerOutput(["a"], [[]])) == []
    assert request.output_token_ids == []


def test_a_prompt_that_never_fits_is_an_error_even_if_nobody_refused_it() -> None:
    """The engine refuses it before it is queued; a scheduler used alone must not wait for it forever."""
    scheduler = make_scheduler(num_blocks=5)
    big, small = make_request("big", 17), make_request("small", 4)
    add(scheduler, big, small)
    run_all(scheduler)
    assert (big.finish_reason, small.finish_reason) == ("error", "length")
    assert_nothing_leaked(scheduler)


# -- aborts ----------------------------------------------------------------------------------------------------


def test_abort_while_waiting() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    add(scheduler, make_request("a", 4), make_request("b", 4), make_request("c", 4))
    assert abort(scheduler, "b") == ["b"]
    run_step(scheduler)
    assert [r.request_id for r in scheduler.waiting] == ["c"]
    run_all(scheduler)
    assert_nothing_leaked(scheduler)


def test_abort_in_mid_prefill() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=4)
    request = make_request("a", 11)
    add(scheduler, request)
    run_step(scheduler)
    assert (request.num_computed_tokens, request.status) == (4, RequestStatus.RUNNING)
    abort(scheduler, "a")
    assert request.finish_reason == "abort" and scheduler.running == []
    assert_nothing_leaked(scheduler)


def test_abort_while_decoding_tells_the_worker_in_the_next_plan() -> None:
    scheduler = make_scheduler()
    add(scheduler, make_request("a", 4), make_request("b", 4))
    run_step(scheduler)
    abort(scheduler, "a")
    plan = run_step(scheduler)
    assert plan.finished_req_ids == ["a"] and list(plan.num_scheduled_tokens) == ["b"]
    assert run_step(scheduler).finished_req_ids == []


def test_abort_while_preempted() -> None:
    scheduler = make_scheduler(num_blocks=5)
    add(scheduler, make_request("a", 8), make_request("b", 8))
    run_step(scheduler)
    assert run_step(scheduler).preempted_req_ids == ["b"]
    abort(scheduler, "b")
    run_all(scheduler)
    assert_nothing_leaked(scheduler)


def test_abort_of_the_last_request_still_reaches_the_worker() -> None:
    scheduler = make_scheduler()
    add(scheduler, make_request("a", 4))
    run_step(scheduler)
    abort(scheduler, "a")
    assert not scheduler.has_unfinished_requests() and scheduler.has_work()
    assert run_step(scheduler).finished_req_ids == ["a"]
    assert not scheduler.has_work()


@pytest.mark.parametrize("sharing", [True, False])
def test_abort_while_its_step_is_under_way_drops_the_result(sharing: bool) -> None:
    scheduler = make_scheduler(same_step_prefix_sharing=sharing)
    a, b = make_request("a", 4), make_request("b", 4)
    add(scheduler, a, b)
    plan = scheduler.schedule()
    result = fake_result(scheduler, plan)
    abort(scheduler, "a")
    news = scheduler.update_from_output(plan, result)
    assert [n.request_id for n in news] == ["b"]
    assert a.output_token_ids == [] and a.finish_reason == "abort"
    run_all(scheduler)
    assert_nothing_leaked(scheduler)


@pytest.mark.parametrize("times", [1, 2])
def test_ending_twice_and_ending_strangers_does_nothing(times: int) -> None:
    scheduler = make_scheduler()
    request = make_request("a", 4, max_tokens=1)
    add(scheduler, request, make_request("b", 4))
    run_step(scheduler)
    assert request.finish_reason == "length"
    for _ in range(times):
        assert abort(scheduler, "a", "nobody") == []
    assert request.finish_reason == "length"
    assert abort(scheduler, "b", "b") == ["b"]
    assert_nothing_leaked(scheduler)


def test_an_id_may_be_used_again_once_it_is_free_and_not_before() -> None:
    scheduler = make_scheduler()
    add(scheduler, make_request("a", 4, max_tokens=1))
    with pytest.raises(ValueError, match="already in use"):
        scheduler.add_request(make_request("a", 4))
    run_all(scheduler)
    add(scheduler, make_request("a", 4, max_tokens=1))
    run_all(scheduler)
    assert_nothing_leaked(scheduler)


# -- results that come too late ----------------------------------------------------------------------------------


def test_results_of_an_earlier_life_are_dropped() -> None:
    """Planned, preempted before the result arrived: the token belongs to a forgotten run."""
    scheduler = make_scheduler()
    request = make_request("a", 4)
    add(scheduler, request)
    plan = scheduler.schedule()
    result = fake_result(scheduler, plan)
    scheduler.undo_step(plan)
    again = scheduler.schedule()
    assert again.epochs["a"] != plan.epochs["a"]
    assert scheduler.update_from_output(plan, result) == []
    assert request.output_token_ids == []
    assert len(scheduler.update_from_output(again, fake_result(scheduler, again))) == 1
    run_all(scheduler)
    assert_nothing_leaked(scheduler)


def test_results_of_a_namesake_are_dropped() -> None:
    """A caller aborts and sends the same id again while the old one's step is under way."""
    scheduler = make_scheduler()
    add(scheduler, make_request("a", [1, 2, 3]))
    plan = scheduler.schedule()
    abort(scheduler, "a")
    namesake = make_request("a", [9, 9, 9, 9])
    add(scheduler, namesake)
    assert scheduler.update_from_output(plan, ModelRunnerOutput(["a"], [[42]])) == []
    assert namesake.output_token_ids == []
    run_all(scheduler)
    assert_nothing_leaked(scheduler)


def test_a_namesake_survives_the_failure_of_the_old_ones_step() -> None:
    scheduler = make_scheduler()
    add(scheduler, make_request("a", [1, 2, 3]))
    plan = scheduler.schedule()
    abort(scheduler, "a")
    namesake = make_request("a", [9, 9, 9, 9])
    add(scheduler, namesake)
    assert scheduler.update_from_output(plan, ModelRunnerOutput(errors={"a": "boom"})) == []
    assert not namesake.is_finished


# -- failures ----------------------------------------------------------------------------------------------------


def test_a_row_error_ends_its_request_alone() -> None:
    scheduler = make_scheduler()
    a, b = make_request("a", 4), make_request("b", 4)
    add(scheduler, a, b)
    plan = scheduler.schedule()
    result = fake_result(scheduler, plan)
    result.req_ids, result.sampled_token_ids = ["b"], [[7]]
    result.errors = {"a": "no token is allowed"}
    news = {n.request_id: n for n in scheduler.update_from_output(plan, result)}
    assert (news["a"].finish_reason, news["a"].error) == ("error", "no token is allowed")
    assert news["b"].finish_reason is None and b.output_token_ids == [7]
    assert a.status is RequestStatus.FINISHED_ERROR
    run_all(scheduler)
    assert_nothing_leaked(scheduler)


def test_what_a_failed_step_did_not_write_is_not_found() -> None:
    scheduler = make_scheduler()
    add(scheduler, make_request("a", list(range(16))))
    plan = scheduler.schedule()
    scheduler.update_from_output(plan, ModelRunnerOutput(errors={"a": "boom"}))
    assert scheduler.kv.get_computed_blocks(make_request("b", list(range(16))))[1] == 0
    assert_nothing_leaked(scheduler)


def test_what_a_failed_step_did_not_write_is_not_found_though_its_request_was_aborted_meanwhile() -> None:
    scheduler = make_scheduler()
    add(scheduler, make_request("a", list(range(16))))
    plan = scheduler.schedule()
    abort(scheduler, "a")
    scheduler.update_from_output(plan, ModelRunnerOutput(errors={"a": "boom"}))
    assert scheduler.kv.get_computed_blocks(make_request("b", list(range(16))))[1] == 0


def test_what_an_interrupted_step_did_not_write_is_not_found() -> None:
    for abort_first in (False, True):
        scheduler = make_scheduler()
        add(scheduler, make_request("a", list(range(16))))
        plan = scheduler.schedule()
        if abort_first:
            abort(scheduler, "a")
        scheduler.undo_step(plan)
        assert scheduler.kv.get_computed_blocks(make_request("b", list(range(16))))[1] == 0
        scheduler.check_integrity()


def test_what_an_earlier_step_wrote_survives_the_failure() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8)
    add(scheduler, make_request("a", list(range(16))))
    run_step(scheduler)
    plan = scheduler.schedule()
    scheduler.update_from_output(plan, ModelRunnerOutput(errors={"a": "boom"}))
    assert scheduler.kv.get_computed_blocks(make_request("b", list(range(16))))[1] == 8


def test_an_undone_step_loses_nothing_and_keeps_the_order() -> None:
    scheduler = make_scheduler()
    requests = [make_request(name, 5, max_tokens=3) for name in "abc"]
    add(scheduler, *requests[:2])
    run_step(scheduler)
    add(scheduler, requests[2])
    scheduler.undo_step(scheduler.schedule())
    scheduler.check_integrity()
    assert [r.request_id for r in scheduler.waiting] == ["a", "b", "c"]
    plan = scheduler.schedule()
    assert set(plan.preempted_req_ids) == {"a", "b", "c"}, "the worker may hold rows from the undone plan"
    assert [new.req_id for new in plan.new_reqs] == ["a", "b", "c"]
    scheduler.update_from_output(plan, fake_result(scheduler, plan))
    run_all(scheduler)
    assert [len(r.output_token_ids) for r in requests] == [3, 3, 3]
    assert_nothing_leaked(scheduler)
