"""What a step that was planned too early may read: blocks whose writer failed, and blocks that somebody gave back.

The executor here forgives: whoever reads what he did not write gets a wrong token, as from a real model.
"""

import random
from typing import Any

import pytest

from mini_vllm.core.scheduler import Scheduler
from mini_vllm.core.scheduler_output import ModelRunnerOutput, SchedulerOutput
from mini_vllm.engine.core import EngineCore
from mini_vllm.request import Request
from tests.core.harness import (
    PagedExecutor,
    PagedMemory,
    assert_nothing_leaked,
    expected_outputs,
    make_request,
    make_scheduler,
)

BLOCK_SIZE = 4


class ForgivingMemory(PagedMemory):
    """Notes who reads something else than it wrote."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        super().__init__(num_blocks, block_size)
        self.misread: set[str] = set()

    def check(self, req_id: str, length: int) -> None:
        try:
            super().check(req_id, length)
        except AssertionError:
            self.misread.add(req_id)


class ForgivingExecutor(PagedExecutor):
    """A request in `doomed` fails in the first step it is in, and leaves nonsense in its slots."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        super().__init__(num_blocks, block_size)
        self.memory: ForgivingMemory = ForgivingMemory(num_blocks, block_size)
        self.doomed: set[str] = set()
        self.ever_misread: set[str] = set()

    def execute_model(self, plan: SchedulerOutput) -> ModelRunnerOutput:
        self.memory.misread.clear()
        result = super().execute_model(plan)
        self.ever_misread |= self.memory.misread
        for req_id, token_ids in zip(result.req_ids, result.sampled_token_ids, strict=True):
            if req_id in self.memory.misread:
                token_ids[0] = self.memory.token_ids[req_id][-1] = (token_ids[0] + 1) % 256
        for req_id in self.doomed & plan.num_scheduled_tokens.keys():
            self._fail(req_id, result)
        return result

    def _fail(self, req_id: str, result: ModelRunnerOutput) -> None:
        self.doomed.discard(req_id)
        for block_id in self.memory.tables[req_id]:
            for offset in range(BLOCK_SIZE):
                self.memory.slots[block_id * BLOCK_SIZE + offset] = b"nonsense"
        row = result.req_ids.index(req_id)
        del result.req_ids[row], result.sampled_token_ids[row]
        result.errors[req_id] = "no token is allowed"


def overlapped(num_blocks: int = 64, **config: Any) -> tuple[EngineCore, ForgivingExecutor]:
    scheduler = make_scheduler(num_blocks=num_blocks, block_size=BLOCK_SIZE, async_scheduling=True, **config)
    executor = ForgivingExecutor(num_blocks, BLOCK_SIZE)
    return EngineCore(scheduler, executor), executor


def run(engine: EngineCore) -> None:
    for _ in range(500):
        if not engine.has_work():
            break
        engine.step()
        engine.scheduler.check_integrity()
    assert_nothing_leaked(engine.scheduler)
    engine.shutdown()


def right(request: Request) -> bool:
    return request.output_token_ids == expected_outputs(request, request.max_tokens or 0)


# --- a row fails, and the next plan is under way -------------------------------------------------------------------


def a_reader_of_what_a_failed_row_did_not_write() -> tuple[Request, Request, ForgivingExecutor]:
    """The first is alone in its step (the budget is its prompt); the second finds its blocks in the plan after it."""
    engine, executor = overlapped(max_num_batched_tokens=12)
    prompt = list(range(12))
    writer, reader = make_request("writer", prompt, max_tokens=5), make_request("reader", [*prompt, 77], max_tokens=5)
    executor.doomed.add("writer")
    for request in (writer, reader):
        engine.add_request(request)
    run(engine)
    return writer, reader, executor


def test_whoever_was_admitted_on_the_blocks_of_a_row_that_failed_is_computed_again() -> None:
    writer, reader, executor = a_reader_of_what_a_failed_row_did_not_write()
    assert writer.finish_reason == "error"
    starts = [new.num_computed_tokens for plan in executor.plans for new in plan.new_reqs if new.req_id == "reader"]
    assert starts == [12, 0], "once on the blocks of the other, then from its beginning"
    assert executor.ever_misread == {"writer", "reader"}, "the step in flight did read them"
    assert reader.num_preemptions == 1 and right(reader)


def test_control_without_redoing_the_reader_its_tokens_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scheduler, "redo_readers", lambda self, plan: None)
    _, reader, _ = a_reader_of_what_a_failed_row_did_not_write()
    assert not right(reader)


def test_only_who_was_admitted_on_cached_blocks_is_redone() -> None:
    engine, executor = overlapped()
    bystander = make_request("bystander", 9, max_tokens=12)
    engine.add_request(bystander)
    engine.step()
    doomed, fresh = make_request("doomed", 8, max_tokens=5), make_request("fresh", 11, max_tokens=5)
    executor.doomed.add("doomed")
    engine.add_request(doomed)
    engine.step()
    engine.add_request(fresh)  # in the plan after the one whose row fails
    run(engine)
    assert doomed.finish_reason == "error"
    assert right(bystander) and right(fresh)
    assert bystander.num_preemptions == fresh.num_preemptions == 0


# --- blocks that are given back while a step that reads them is in flight -----------------------------------------


def a_pool_whose_blocks_change_hands(seed: int) -> tuple[list[Request], ForgivingExecutor, EngineCore]:
    """Three requests at a time have room; ends by length, and by a stop token that nobody can foresee."""
    rng = random.Random(seed)
    engine, executor = overlapped(num_blocks=10, max_num_seqs=8, enable_caching=seed % 2 == 0)
    requests = []
    for number in range(9):
        length = rng.randrange(5, 9)
        request = make_request(f"r{number}", length, max_tokens=4)
        if number % 2:
            stop = expected_outputs(request, 2)[1]
            request = make_request(f"r{number}", length, max_tokens=4, stop_token_ids=[stop])
        requests.append(request)
        engine.add_request(request)
    run(engine)
    return requests, executor, engine


@pytest.mark.parametrize("seed", range(4))
def test_blocks_that_are_given_back_are_handed_out_after_the_step_that_reads_them(seed: int) -> None:
    requests, executor, engine = a_pool_whose_blocks_change_hands(seed)
    assert executor.ever_misread == set()
    assert engine.scheduler.kv.block_pool.num_usable_blocks < 2 * len(requests)
    assert all_right(requests)
    assert wasted_rows(requests, executor) > 0, "some step in flight had a row of a request that had ended"


def all_right(requests: list[Request]) -> bool:
    """Up to where each ended, and none by an error (of one that writes where another does, say)."""
    return all(
        request.output_token_ids == expected_outputs(request, request.num_output_tokens)
        and request.finish_reason in ("stop", "length")
        for request in requests
    )


def wasted_rows(requests: list[Request], executor: ForgivingExecutor) -> int:
    """Times that a request was scheduled beyond what its tokens took."""
    steps = {r.request_id: 0 for r in requests}
    for plan in executor.plans:
        for req_id in plan.num_scheduled_tokens:
            steps[req_id] += 1
    return sum(steps[r.request_id] > len(r.output_token_ids) for r in requests)


@pytest.mark.broken_pool
def test_control_blocks_that_are_freed_while_a_step_reads_them_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken on purpose: a request's blocks are free as soon as its last token is planned, before that is computed."""
    schedule_waiting = Scheduler._schedule_waiting

    def early(self: Scheduler, plan: SchedulerOutput, budget: int) -> int:
        for request in self.running:
            if request.num_output_placeholders and request.ends_with_placeholders():
                self.kv.free(request)
        return schedule_waiting(self, plan, budget)

    monkeypatch.setattr(Scheduler, "_schedule_waiting", early)
    monkeypatch.setattr(Scheduler, "check_integrity", lambda self: None)
    requests, _, _ = a_pool_whose_blocks_change_hands(1)
    assert not all_right(requests)
