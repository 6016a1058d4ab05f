"""Claims about several samples of one prompt: what is computed, who shares, who waits, and that nothing is lost."""

import random
from typing import Any

import pytest

from mini_vllm.core.kv_cache_manager import KVCacheManager
from mini_vllm.core.scheduler import Scheduler
from mini_vllm.core.scheduler_output import BlockCopy, EngineCoreOutput, ModelRunnerOutput, SchedulerOutput
from mini_vllm.engine.core import EngineCore
from mini_vllm.exceptions import InvalidParameterError
from mini_vllm.request import Request, RequestStatus
from tests.core.harness import (
    PagedExecutor,
    assert_nothing_leaked,
    expected_outputs,
    fake_result,
    make_engine,
    make_request,
    make_scheduler,
    run_step,
)


class Ledger:
    """Runs an engine and keeps what each sequence was told, by the core's ids."""

    def __init__(self, engine: EngineCore) -> None:
        self.engine = engine
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, EngineCoreOutput] = {}
        self.num_scheduled = 0
        self.num_steps = 0

    def step(self) -> None:
        for news in self.engine.step().outputs:
            assert news.request_id not in self.ends, "news after the end"
            self.tokens.setdefault(news.request_id, []).extend(news.new_token_ids)
            if news.finished:
                self.ends[news.request_id] = news
        self.num_scheduled += sum(self.engine.trace.records[-1].num_scheduled_tokens.values())
        self.num_steps += 1
        self.engine.scheduler.check_integrity()

    def run(self) -> "Ledger":
        while self.engine.scheduler.has_work():
            assert self.num_steps < 2000, "the engine makes no progress"
            self.step()
        assert_nothing_leaked(self.engine.scheduler)
        return self

    def assert_right(self, request: Request, n: int, length: int) -> None:
        """All samples have the tokens that a roomy engine gives to each of them alone."""
        for index in range(n):
            core_id = request.request_id if index == 0 else f"{index}_{request.request_id}"
            assert self.tokens[core_id] == expected_outputs(request, length, index), core_id
            assert self.ends[core_id].finish_reason == "length"


def completed(request: Request, **kwargs: Any) -> Ledger:
    engine, _ = make_engine(**kwargs)
    engine.add_request(request)
    return Ledger(engine).run()


# -- what is computed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt_len", [1, 7, 8, 9, 20])
@pytest.mark.parametrize(("n", "length"), [(1, 5), (2, 1), (2, 6), (5, 4)])
@pytest.mark.parametrize("caching", [True, False])
def test_n_samples_schedule_the_prompt_once(prompt_len: int, n: int, length: int, caching: bool) -> None:
    """P + n (L - 1) tokens: whoever samples last computes nothing more. Blocks have four tokens here."""
    request = make_request("r", prompt_len, max_tokens=length, n=n)
    ledger = completed(request, enable_caching=caching)
    assert ledger.num_scheduled == prompt_len + n * (length - 1)
    ledger.assert_right(request, n, length)


def test_separate_requests_do_compute_more() -> None:
    """Broken control of the count: without forks, each sample computes what no full block holds."""
    engine, _ = make_engine()
    for name in "abc":
        engine.add_request(make_request(name, list(range(7)), max_tokens=4))
    assert Ledger(engine).run().num_scheduled == (7 + 3) + 2 * (3 + 3)


def test_the_first_step_draws_for_all_and_the_next_one_knows_all() -> None:
    scheduler = make_scheduler()
    scheduler.add_request(make_request("r", 7, max_tokens=3, n=3))
    first = run_step(scheduler)
    assert first.forks == {"r": ["1_r", "2_r"]} and list(first.num_scheduled_tokens) == ["r"]
    assert first.block_copies == [] and [new.req_id for new in first.new_reqs] == ["r"]
    second = scheduler.schedule()
    tail = scheduler.kv.block_ids("r")[0][1]
    copies = [BlockCopy(0, tail, scheduler.kv.block_ids(child)[0][1]) for child in ("1_r", "2_r")]
    assert second.block_copies == copies and second.forks == {}
    assert second.num_scheduled_tokens == {"r": 1, "1_r": 1, "2_r": 1} and second.cached_reqs.req_ids == ["r"]
    for index, new in enumerate(second.new_reqs, start=1):
        assert (new.req_id, new.sample_index, new.num_computed_tokens) == (f"{index}_r", index, 7)
        assert (len(new.token_ids), new.num_prompt_tokens, new.sampling_params.n) == (8, 7, 1)
        assert new.block_ids == scheduler.kv.block_ids(new.req_id)
    third_result = fake_result(scheduler, second)
    scheduler.update_from_output(second, third_result)
    third = scheduler.schedule()
    assert third.block_copies == [] and third.new_reqs == [] and third.cached_reqs.req_ids == ["r", "1_r", "2_r"]
    scheduler.finish_requests(["r", "1_r", "2_r"], RequestStatus.FINISHED_ABORTED)


def test_a_chunked_prompt_forks_only_when_its_last_chunk_samples() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=3)
    scheduler.add_request(make_request("r", 8, max_tokens=2, n=2))
    assert [bool(run_step(scheduler).forks) for _ in range(3)] == [False, False, True]
    scheduler.finish_requests(["r", "1_r"], RequestStatus.FINISHED_ABORTED)


def test_without_the_copies_a_child_reads_foreign_kv() -> None:
    """Broken control: the partial last block of the prompt is nobody's but the parent's."""

    class Forgetful(Scheduler):
        def schedule(self) -> SchedulerOutput:
            plan = super().schedule()
            plan.block_copies = []
            return plan

    scheduler = make_scheduler()
    forgetful = Forgetful(scheduler.config, KVCacheManager(64, 4))
    engine = EngineCore(forgetful, PagedExecutor(64, 4))
    engine.add_request(make_request("r", 7, n=2))
    ledger = Ledger(engine).run()
    assert "holds other KV" in str(ledger.ends["1_r"].error)


# -- who finds no place ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3])
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_fewer_places_than_samples_only_take_longer(max_num_seqs: int, policy: str) -> None:
    request = make_request("r", 9, max_tokens=5, n=4)
    engine, executor = make_engine(max_num_seqs=max_num_seqs, policy=policy)
    engine.add_request(request)
    ledger = Ledger(engine)
    ledger.step()
    other = make_request("other", 6, max_tokens=3, arrival_time=1.0)
    engine.add_request(other)
    assert len(engine.scheduler.running) <= max_num_seqs
    waiting = [r.request_id for r in engine.scheduler.waiting]
    assert waiting == ["1_r", "2_r", "3_r", "other"][max_num_seqs - 1 :], "in order, and before who came later"
    ledger.run()
    ledger.assert_right(request, 4, 5)
    ledger.assert_right(other, 1, 3)
    assert max(len(plan.num_scheduled_tokens) for plan in executor.plans) <= max_num_seqs


@pytest.mark.parametrize("num_blocks", [6, 7, 8, 9, 12])
@pytest.mark.parametrize("caching", [True, False])
def test_a_pool_too_small_for_all_preempts_and_loses_nothing(num_blocks: int, caching: bool) -> None:
    request = make_request("r", 9, max_tokens=8, n=4)
    engine, _ = make_engine(num_blocks=num_blocks, enable_caching=caching)
    engine.add_request(request)
    ledger = Ledger(engine).run()
    ledger.assert_right(request, 4, 8)
    assert engine.scheduler.num_preemptions > 0 or num_blocks == 12


def test_a_child_preempted_in_its_very_first_plan_is_computed_again() -> None:
    """The parent grows into a new block and the only one to give way is a child the worker never saw."""
    request = make_request("r", 8, max_tokens=8, n=3)
    engine, executor = make_engine(num_blocks=5, enable_caching=False)
    engine.add_request(request)
    ledger = Ledger(engine)
    ledger.step()
    ledger.step()
    plan = executor.plans[-1]
    assert "2_r" in plan.preempted_req_ids and "2_r" not in {new.req_id for new in plan.new_reqs}
    ledger.run().assert_right(request, 3, 8)


def test_children_beyond_the_budget_follow_in_the_next_step() -> None:
    request = make_request("r", 7, max_tokens=6, n=5)
    engine, executor = make_engine(max_num_batched_tokens=2)
    engine.add_request(request)
    ledger = Ledger(engine).run()
    ledger.assert_right(request, 5, 6)
    assert ledger.num_scheduled == 7 + 5 * 5
    assert all(plan.total_num_scheduled_tokens <= 2 for plan in executor.plans)


# -- ends ---------------------------------------------------------------------------------------------------------


def test_a_parent_that_ends_with_its_first_token_leaves_its_kv_to_the_children() -> None:
    """Its last block is free when the copies are made, and may be in other hands in the same step."""
    request = make_request("r", 7, max_tokens=5, n=3)
    first = expected_outputs(request, 1)[0]
    request = make_request("r", list(request.prompt_token_ids), max_tokens=5, n=3, stop_token_ids=[first])
    engine, _ = make_engine(num_blocks=8, enable_caching=False)
    engine.add_request(request)
    greedy_for_blocks = make_request("next", 12, max_tokens=3)
    ledger = Ledger(engine)
    ledger.step()
    engine.add_request(greedy_for_blocks)
    ledger.run()
    assert ledger.ends["r"].finish_reason == "stop" and ledger.tokens["r"] == [first]
    for index in (1, 2):
        expected = expected_outputs(request, 5, index)
        assert ledger.tokens[f"{index}_r"] == expected[: len(ledger.tokens[f"{index}_r"])]
        assert ledger.ends[f"{index}_r"].error is None
    ledger.assert_right(greedy_for_blocks, 1, 3)


def test_a_child_that_ends_with_its_first_token_takes_no_block() -> None:
    scheduler = make_scheduler()
    scheduler.add_request(make_request("r", 7, max_tokens=1, n=4))
    plan = scheduler.schedule()
    usage = scheduler.kv.usage
    news = scheduler.update_from_output(plan, fake_result(scheduler, plan))
    assert usage > 0 and scheduler.kv.usage == 0
    assert sorted(item.request_id for item in news) == ["1_r", "2_r", "3_r", "r"]
    assert all(item.finish_reason == "length" and len(item.new_token_ids) == 1 for item in news)
    assert scheduler.schedule().block_copies == []


def test_aborted_before_the_first_token_no_child_is_born() -> None:
    for steps in (0, 1):
        engine, _ = make_engine(max_num_batched_tokens=4)
        engine.add_request(make_request("r", 9, n=3))
        ledger = Ledger(engine)
        for _ in range(steps):
            ledger.step()
        engine.abort_requests(["r", "1_r", "2_r"])
        ledger.run()
        assert ledger.tokens == {}
        engine.add_request(make_request("1_r", 3))  # the ids are free again
        engine.abort_requests(["1_r"])


def test_aborted_later_each_sample_ends_by_itself() -> None:
    request = make_request("r", 9, max_tokens=6, n=3)
    engine, _ = make_engine()
    engine.add_request(request)
    ledger = Ledger(engine)
    ledger.step()
    engine.abort_requests(["r", "2_r"])
    ledger.run()
    assert ledger.tokens["1_r"] == expected_outputs(request, 6, 1)
    assert len(ledger.tokens["r"]) == len(ledger.tokens["2_r"]) == 1 and set(ledger.ends) == {"1_r"}


def test_an_id_that_a_child_has_or_will_have_is_taken() -> None:
    engine, _ = make_engine()
    engine.add_request(make_request("1_b", 3))
    engine.add_request(make_request("a", 5, n=3))
    for request in (make_request("2_a", 3), make_request("b", 3, n=2)):
        with pytest.raises(InvalidParameterError, match=r"_[ab]' is already in use"):
            engine.add_request(request)
        with pytest.raises(ValueError, match="is already in use"):
            engine.scheduler.add_request(request)
    ledger = Ledger(engine).run()
    assert set(ledger.ends) == {"1_b", "a", "1_a", "2_a"}


# -- failures -----------------------------------------------------------------------------------------------------


def test_when_the_step_that_forks_fails_every_sample_ends_with_its_error() -> None:
    engine, executor = make_engine()
    executor.fail_on = lambda plan: bool(plan.forks)
    engine.add_request(make_request("r", 9, n=3))
    ledger = Ledger(engine).run()
    assert set(ledger.ends) == {"r", "1_r", "2_r"} and ledger.tokens == {"r": [], "1_r": [], "2_r": []}
    assert all("on fire" in str(end.error) for end in ledger.ends.values())


def test_an_interrupted_fork_is_made_again() -> None:
    request = make_request("r", 9, max_tokens=4, n=3)
    engine, executor = make_engine()
    engine.add_request(request)

    def interrupt(plan: SchedulerOutput) -> bool:
        raise KeyboardInterrupt

    executor.fail_on = interrupt
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    engine.scheduler.check_integrity()
    assert [r.request_id for r in engine.scheduler.waiting] == ["r"]
    executor.fail_on = lambda plan: False
    Ledger(engine).run().assert_right(request, 3, 4)


@pytest.mark.parametrize("interrupted", [True, False])
def test_copies_that_were_never_made_are_not_relied_on(interrupted: bool) -> None:
    """The step that copies fails; children it had no budget for must not read what was not copied."""
    request = make_request("r", 7, max_tokens=4, n=4)
    engine, executor = make_engine(max_num_batched_tokens=3)
    engine.add_request(request)
    ledger = Ledger(engine)
    while not ledger.tokens:
        ledger.step()

    def fail(plan: SchedulerOutput) -> bool:
        if interrupted:
            raise KeyboardInterrupt
        return True

    executor.fail_on = fail
    try:
        ledger.step()
        assert not interrupted
    except KeyboardInterrupt:
        engine.scheduler.check_integrity()
    executor.fail_on = lambda plan: False
    ledger.run()
    survivors = {"r", "1_r", "2_r", "3_r"} if interrupted else {"3_r"}
    assert {core_id for core_id, end in ledger.ends.items() if end.error is None} == survivors
    for core_id in survivors:
        index = 0 if core_id == "r" else int(core_id[0])
        assert ledger.tokens[core_id] == expected_outputs(request, 4, index)


def test_a_child_whose_row_failed_ends_alone() -> None:
    scheduler = make_scheduler()
    scheduler.add_request(make_request("r", 7, max_tokens=3, n=3))
    plan = scheduler.schedule()
    result = fake_result(scheduler, plan)
    index = result.req_ids.index("1_r")
    result.sampled_token_ids[index] = []
    result.errors["1_r"] = "no token allowed"
    news = {item.request_id: item for item in scheduler.update_from_output(plan, result)}
    assert (news["1_r"].finish_reason, news["1_r"].error) == ("error", "no token allowed")
    scheduler.check_integrity()
    assert set(scheduler.requests) == {"r", "2_r"}
    scheduler.finish_requests(["r", "2_r"], RequestStatus.FINISHED_ABORTED)


def test_a_parent_that_fails_takes_its_unborn_children_along() -> None:
    scheduler = make_scheduler()
    scheduler.add_request(make_request("r", 7, n=3))
    plan = scheduler.schedule()
    news = scheduler.update_from_output(plan, ModelRunnerOutput(errors={"r": "no token allowed"}))
    assert {item.request_id: item.error for item in news} == dict.fromkeys(("r", "1_r", "2_r"), "no token allowed")
    assert_nothing_leaked(scheduler)


# -- prompt logprobs and min_tokens --------------------------------------------------------------------------------


def test_who_asks_for_prompt_logprobs_reads_no_cached_prefix_but_leaves_one() -> None:
    engine, executor = make_engine()
    prompt = list(range(20))
    for name, wanted in (("a", None), ("b", 0), ("c", None)):
        engine.add_request(make_request(name, prompt, max_tokens=1, prompt_logprobs=wanted))
        Ledger(engine).run()
    computed = {new.req_id: new.num_computed_tokens for plan in executor.plans for new in plan.new_reqs}
    assert computed == {"a": 0, "b": 0, "c": 16}
    assert engine.scheduler.kv.prefix_cache_queries == 40, "who does not look does not count as a miss"


def test_children_of_such_a_request_are_not_asked_for_them_again() -> None:
    scheduler = make_scheduler()
    scheduler.add_request(make_request("r", 7, n=2, prompt_logprobs=1, logprobs=2))
    run_step(scheduler)
    (child,) = scheduler.schedule().new_reqs
    assert (child.sampling_params.prompt_logprobs, child.sampling_params.logprobs) == (None, 2)
    scheduler.finish_requests(["r", "1_r"], RequestStatus.FINISHED_ABORTED)


def test_neither_eos_nor_stop_ids_count_among_the_first_min_tokens() -> None:
    for stops in ({"stop_token_ids": [9]}, {"ignore_eos": False}):
        scheduler = make_scheduler()
        request = make_request("r", 4, max_tokens=9, min_tokens=2, **stops)
        scheduler.add_request(request)
        token = 9 if "stop_token_ids" in stops else 256
        while scheduler.has_unfinished_requests():
            run_step(scheduler, lambda request, token=token: token)
        assert (request.num_output_tokens, request.finish_reason) == (3, "stop")


# -- all of it at once ----------------------------------------------------------------------------------------------


def random_life(seed: int) -> tuple[int, int]:
    """A tiny engine, requests with 1 to 5 samples, aborts and failing steps. (preemptions, forks) there were."""
    rng = random.Random(seed)
    engine, executor = make_engine(
        num_blocks=rng.choice([8, 10, 14, 40]),
        block_size=rng.choice([1, 2, 4, 4]),
        enable_caching=rng.random() < 0.7,
        max_num_seqs=rng.choice([1, 2, 3, 8]),
        max_num_batched_tokens=rng.choice([2, 5, 16, 64]),
        policy=rng.choice(["fcfs", "priority"]),
        same_step_prefix_sharing=rng.random() < 0.7,
    )
    room = engine.scheduler.kv.block_pool.num_usable_blocks * engine.scheduler.kv.block_size
    ledger, requests, aborted = Ledger(engine), {}, set()
    executor.fail_on = lambda plan: rng.random() < 0.01
    for number in range(rng.randint(1, 6)):
        prompt = [rng.choice([1, 2]) for _ in range(rng.randint(1, max(room // 2, 1)))]
        length, n = rng.randint(1, max(min(room - len(prompt), 8), 1)), rng.randint(1, 5)
        request = make_request(f"r{number}", prompt, max_tokens=length, n=n, priority=rng.choice([0, 1]))
        requests[number] = (request, n, length)
        engine.add_request(request)
        for _ in range(rng.randint(0, 4)):
            ledger.step()
        if rng.random() < 0.2:
            aborted.add(number)
            engine.abort_requests([f"r{number}", *(f"{i}_r{number}" for i in range(1, n))])
            engine.scheduler.check_integrity()
    ledger.run()
    for number, (request, n, length) in requests.items():
        for index in range(n):
            core_id = f"r{number}" if index == 0 else f"{index}_r{number}"
            got = ledger.tokens.get(core_id, [])
            assert got == expected_outputs(request, length, index)[: len(got)], (seed, core_id)
            if number not in aborted:
                end = ledger.ends[core_id]
                assert end.error is not None or len(got) == length, (seed, core_id)
                assert end.error is None or "on fire" in end.error, (seed, core_id, end.error)
    return engine.scheduler.num_preemptions, sum(len(plan.forks) for plan in executor.plans)


def test_random_lives_with_forks_keep_every_token() -> None:
    lives = [random_life(seed) for seed in range(150)]
    assert sum(preemptions for preemptions, _ in lives) > 100 and sum(forks for _, forks in lives) > 200
