"""When a request was queued and admitted, told once; and the other things that news and statistics say of time."""

import pytest

from mini_vllm.core.scheduler_output import EngineCoreOutput, SchedulerOutput
from mini_vllm.engine.core import EngineCore
from mini_vllm.request import Request, RequestStatus
from tests.core.harness import PagedExecutor, make_request, make_scheduler, run_engine


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def engine_with_clock(**kwargs: object) -> tuple[EngineCore, Clock]:
    clock = Clock()
    num_blocks = kwargs.pop("num_blocks", 64)
    assert isinstance(num_blocks, int)
    scheduler = make_scheduler(num_blocks=num_blocks, clock=clock, **kwargs)  # type: ignore[arg-type]
    return EngineCore(scheduler, PagedExecutor(num_blocks, 4)), clock


def all_news(engine: EngineCore, clock: Clock) -> list[EngineCoreOutput]:
    """News of every step, a second apart."""
    news = []
    while engine.scheduler.has_work():
        outputs = engine.step()
        assert outputs.timestamp == clock.now
        news += outputs.outputs
        clock.now += 1
    return news


def times_told(news: list[EngineCoreOutput]) -> dict[str, tuple[float, float | None]]:
    """Times by request; each must come with the first news and never again."""
    told: dict[str, tuple[float, float | None]] = {}
    seen: set[str] = set()
    for item in news:
        assert (item.times is not None) == (item.request_id not in seen), item
        seen.add(item.request_id)
        if item.times is not None:
            told[item.request_id] = item.times
    return told


def test_core_and_scheduler_have_one_clock() -> None:
    engine, clock = engine_with_clock()
    assert engine.clock is engine.scheduler.clock is clock


def test_times_come_once_with_the_first_news() -> None:
    engine, clock = engine_with_clock(max_num_seqs=1)
    engine.add_request(make_request("a", 4, max_tokens=3))
    clock.now = 102.0
    engine.add_request(make_request("b", 4, max_tokens=3))
    assert times_told(all_news(engine, clock)) == {"a": (100.0, 102.0), "b": (102.0, 105.0)}


def test_a_preemption_does_not_change_when_it_was_first_admitted() -> None:
    engine, clock = engine_with_clock(num_blocks=5)
    a, b = make_request("a", 8, max_tokens=8), make_request("b", 8, max_tokens=8)
    engine.add_request(a)
    engine.add_request(b)
    told = times_told(all_news(engine, clock))
    assert b.num_preemptions == 1
    assert told == {"a": (100.0, 100.0), "b": (100.0, 100.0)}
    assert b.scheduled_time == 100.0


def test_children_are_told_the_times_of_their_parent() -> None:
    engine, clock = engine_with_clock(max_num_batched_tokens=4)
    engine.add_request(make_request("p", 10, max_tokens=3, n=3))
    times = (100.0, 100.0)
    assert times_told(all_news(engine, clock)) == {"p": times, "1_p": times, "2_p": times}


def test_who_fails_before_it_was_ever_admitted_has_no_time_of_admission() -> None:
    engine, clock = engine_with_clock(num_blocks=5)
    hog = make_request("hog", 12, max_tokens=4)
    doomed = make_request("doomed", 8, n=2)
    engine.add_request(hog)
    engine.add_request(doomed)
    engine.step()
    doomed.num_tokens = 1000  # as if the pool had shrunk under it
    told = times_told([news for news in all_news(engine, clock) if news.request_id != "hog"])
    assert doomed.status is RequestStatus.FINISHED_ERROR
    assert told == {"doomed": (100.0, None), "1_doomed": (100.0, None)}


def test_whoever_fails_with_its_step_was_admitted() -> None:
    engine, clock = engine_with_clock()
    executor = engine.executor
    assert isinstance(executor, PagedExecutor)
    executor.fail_on = lambda plan: bool(plan.num_scheduled_tokens)
    engine.add_request(make_request("a", 4, n=2))
    news = all_news(engine, clock)
    assert [item.finish_reason for item in news] == ["error", "error"]
    assert times_told(news) == {"a": (100.0, 100.0), "1_a": (100.0, 100.0)}


class Refuse:
    """A rule that holds one request back."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id

    def clamp(self, request: Request, start: int, num_tokens: int) -> tuple[int, str]:
        return (0, "not today") if request.request_id == self.request_id else (num_tokens, "")

    def commit(self, request: Request, start: int, num_tokens: int) -> None:
        pass

    def refund(self, request: Request) -> None:
        pass


def test_waiting_for_something_other_than_room_is_counted_apart() -> None:
    engine, _ = engine_with_clock(rules=[Refuse("b")])
    for name in "abc":
        engine.add_request(make_request(name, 4))
    stats = engine.step().stats
    assert (stats.num_running_reqs, stats.num_waiting_reqs, stats.num_waiting_deferred_reqs) == (1, 2, 1)
    engine.abort_requests("abc")
    crowded, _ = engine_with_clock(max_num_seqs=1)
    for name in "abc":
        crowded.add_request(make_request(name, 4))
    stats = crowded.step().stats
    assert (stats.num_waiting_reqs, stats.num_waiting_deferred_reqs) == (2, 0)
    crowded.abort_requests("abc")


# -- what the record of a step says ------------------------------------------------------------------------------


def failing_preemption() -> tuple[EngineCore, list[list[str]]]:
    """An engine whose step that preempts fails, and the preempted of each record after a full run."""
    engine, _ = engine_with_clock(num_blocks=5)
    executor = engine.executor
    assert isinstance(executor, PagedExecutor)
    failed: list[SchedulerOutput] = []

    def fail(plan: SchedulerOutput) -> bool:
        if plan.preempted_req_ids and not failed:
            failed.append(plan)
            return True
        return False

    executor.fail_on = fail
    engine.add_request(make_request("a", 8))
    engine.add_request(make_request("b", 8))
    run_engine(engine)
    assert failed
    return engine, [list(record.preempted_req_ids) for record in engine.trace.last()]


def test_a_failed_steps_preemptions_are_told_to_the_worker_again_but_recorded_once() -> None:
    engine, preempted = failing_preemption()
    executor = engine.executor
    assert isinstance(executor, PagedExecutor)
    assert sum(ids.count("b") for ids in preempted) == engine.scheduler.num_preemptions == 1
    assert sum(plan.preempted_req_ids.count("b") for plan in executor.plans) == 2, "the worker may not have seen it"


def test_an_interrupted_steps_preemptions_are_in_the_next_record() -> None:
    engine, _ = engine_with_clock()
    executor = engine.executor
    assert isinstance(executor, PagedExecutor)

    def interrupt(plan: SchedulerOutput) -> bool:
        raise KeyboardInterrupt

    executor.fail_on = interrupt
    engine.add_request(make_request("a", 8))
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    executor.fail_on = lambda plan: False
    run_engine(engine)
    assert [list(record.preempted_req_ids) for record in engine.trace.last()] == [["a"], [], [], []]


def test_a_detailed_trace_says_why_each_request_waits() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    engine = EngineCore(scheduler, PagedExecutor(64, 4), trace_detailed=True)
    for name in "abc":
        engine.add_request(make_request(name, 4, max_tokens=1))
    run_engine(engine)
    first, second, third = engine.trace.last()
    assert first.waiting == {"b": "batch full (max_num_seqs)", "c": "behind the head of the queue"}
    assert second.waiting == {"c": "batch full (max_num_seqs)"} and third.waiting == {}
    assert first.waiting[first.waiting_head or ""] == first.waiting_reason


def test_a_plain_trace_names_only_the_head() -> None:
    engine, _ = engine_with_clock(max_num_seqs=1)
    for name in "abc":
        engine.add_request(make_request(name, 4, max_tokens=1))
    run_engine(engine)
    first = engine.trace.last()[0]
    assert (first.waiting, first.waiting_head, first.num_waiting) == ({}, "b", 2)
