"""One random life of a toy engine: tiny pools, odd knobs, shared prefixes, aborts, failing steps.

Whatever happens, each step must keep the laws of the scheduler and read only slots that hold what they should,
and at the end nothing may be left and every token must be the one that a roomy engine gives.
"""

import dataclasses
import random
from dataclasses import dataclass
from typing import Any

from mini_vllm.core.scheduler_output import ModelRunnerOutput, SchedulerOutput
from mini_vllm.exceptions import PromptTooLongError
from mini_vllm.request import Request, RequestStatus, Tenant
from mini_vllm.sampling_params import SamplingParams
from mini_vllm.toy import TOY_MODELS, ToyEngine, ToyExecutor
from tests.core.harness import PagedMemory, assert_nothing_leaked

MAX_STEPS = 3000


class CheckedExecutor:
    """The toy executor, with every plan carried out on paged memory first; it fails in the steps it is told to."""

    max_model_len = ToyExecutor.max_model_len

    def __init__(self, inner: ToyExecutor, num_blocks: int, block_size: int, fails: frozenset[int]) -> None:
        self.inner = inner
        self.memory = PagedMemory(num_blocks, block_size)
        self.fails = fails
        self.num_calls = 0
        self.wrong: AssertionError | None = None

    def execute_model(self, plan: SchedulerOutput) -> ModelRunnerOutput | None:
        self.num_calls += 1
        if self.num_calls in self.fails:
            raise RuntimeError("a flaky device")  # it did not even see the plan
        try:
            self.memory.run(plan)
        except AssertionError as error:
            self.wrong = error  # the engine would only fail the step; the run must fail
            raise
        return self.inner.execute_model(plan)

    def sample_tokens(self, grammar_output: Any = None) -> ModelRunnerOutput:
        result = self.inner.sample_tokens(grammar_output)
        self.memory.append(result)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@dataclass
class Arrival:
    """A request of the workload: when it comes, when (if ever) it is aborted, and what it asks."""

    step: int
    prompt: list[int]
    params: SamplingParams
    priority: int
    salt: str | None
    tenant: Tenant
    abort_step: int | None


@dataclass
class Outcome:
    """What became of one run, summed up over many by the tests."""

    preemptions: int = 0
    hits: int = 0
    aborts: int = 0
    errors: int = 0
    refused: int = 0
    finished: int = 0
    steps: int = 0

    def add(self, other: "Outcome") -> None:
        for name in ("preemptions", "hits", "aborts", "errors", "refused", "finished", "steps"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


def random_knobs(rng: random.Random, arrivals: list[Arrival]) -> dict[str, Any]:
    """A pool of half to four times what the largest request needs, so that most are cramped and some refuse."""
    block_size = rng.choice([1, 2, 3, 4, 4, 8, 16])
    largest = max(len(a.prompt) + (a.params.max_tokens or 0) for a in arrivals)
    usable = max(1, round(rng.choice([0.6, 1, 1, 1.2, 1.2, 1.5, 2, 4]) * -(-largest // block_size)))
    return {
        "num_blocks": 1 + usable,
        "block_size": block_size,
        "enable_caching": rng.random() < 0.75,
        "max_num_batched_tokens": rng.choice([1, 3, 5, 8, 16, 64, 64]),
        "long_prefill_token_threshold": rng.choice([0, 0, 1, 3, 8]),
        "max_num_seqs": rng.choice([1, 3, 8, 8]),
        "policy": rng.choice(["fcfs", "priority", "fair", "fair"]),
        "preemption_policy": rng.choice(["latest", "least-work"]),
    }


def random_arrivals(rng: random.Random) -> list[Arrival]:
    family = [rng.choice(b"ab") for _ in range(40)]
    arrivals = []
    for _ in range(rng.randint(2, 8)):
        shared, own = rng.choice([0, 0, 4, 8, 12, 20]), rng.randint(1, 12)
        step = rng.choice([0, 0, 0, rng.randint(0, 20)])
        arrivals.append(
            Arrival(
                step=step,
                prompt=family[:shared] + [rng.choice(b"abc") for _ in range(own)],
                params=random_params(rng),
                priority=rng.choice([0, 0, 1, -3]),
                salt=rng.choice([None, None, None, "x", "y"]),
                tenant=Tenant(rng.choice(["", "p", "q"]), rng.choice(["", "u"])),
                abort_step=step + rng.randint(0, 15) if rng.random() < 0.25 else None,
            )
        )
    return arrivals


def random_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice([0.0, 0.0, 0.7]),
        seed=rng.randint(0, 5),
        max_tokens=rng.choice([1, 4, 12, 24]),
        ignore_eos=rng.random() < 0.7,
        stop_token_ids=(ord("e"),) if rng.random() < 0.2 else (),
    )


def roomy_outputs(arrivals: list[Arrival], model: str) -> list[list[int]]:
    """What each request gets in an engine with room for everything."""
    engine = ToyEngine(num_blocks=512, block_size=4, enable_caching=False, model=model)
    ids = [engine.add_request(arrival.prompt, arrival.params) for arrival in arrivals]
    while engine.has_unfinished_requests():
        engine.step()
    return [engine.requests[rid].output_token_ids for rid in ids]


class RandomRun:
    """Everything about one seed; `play` runs it and returns its outcome, or raises."""

    def __init__(self, seed: int, *, async_scheduling: bool = False) -> None:
        self.is_async = async_scheduling
        rng = random.Random(seed)
        self.arrivals = random_arrivals(rng)
        self.knobs = random_knobs(rng, self.arrivals)
        self.model = rng.choice(sorted(TOY_MODELS))
        fails = frozenset(rng.sample(range(1, 20), 2)) if rng.random() < 0.2 else frozenset[int]()
        self.reset_step = rng.randint(0, 20) if rng.random() < 0.1 else None
        self.engine = ToyEngine(model=self.model, **self.knobs)
        scheduler = self.engine.scheduler
        scheduler.config = dataclasses.replace(scheduler.config, async_scheduling=async_scheduling)
        pool = self.knobs["num_blocks"], self.knobs["block_size"]
        self.checked = CheckedExecutor(self.engine.executor, *pool, fails)
        self.engine.engine_core.executor = self.checked
        self.requests: dict[int, Request] = {}
        self.outcome = Outcome()

    def play(self) -> Outcome:
        for step in range(MAX_STEPS):
            self._arrive_and_abort(step)
            if step > 40 and not self.engine.has_unfinished_requests():
                break
            self._step()
        else:
            raise AssertionError("the engine makes no progress")
        self.engine.step()
        while self.engine.engine_core.has_work():
            self.engine.step()
        self.engine.engine_core._plan_thread.shutdown()
        if self.checked.wrong is not None:
            raise self.checked.wrong
        assert self.engine.executor.rows == {} and self.checked.memory.tables == {}, "the worker kept a row"
        assert_nothing_leaked(self.engine.scheduler)
        self._compare()
        return self.outcome

    def _arrive_and_abort(self, step: int) -> None:
        for index, arrival in enumerate(self.arrivals):
            if arrival.step == step:
                self._add(index, arrival)
            if arrival.abort_step == step and index in self.requests:
                self.engine.abort_request(self.requests[index].request_id)
        if step == self.reset_step:
            self.engine.engine_core.reset_prefix_cache()
        self.engine.scheduler.check_integrity()

    def _add(self, index: int, arrival: Arrival) -> None:
        kv = self.engine.scheduler.kv
        try:
            rid = self.engine.add_request(
                arrival.prompt,
                arrival.params,
                priority=arrival.priority,
                cache_salt=arrival.salt,
                tenant=arrival.tenant,
            )
        except PromptTooLongError:
            assert not kv.can_ever_fit(len(arrival.prompt))
            self.outcome.refused += 1
            return
        assert kv.can_ever_fit(len(arrival.prompt))
        self.requests[index] = self.engine.requests[rid]

    def _step(self) -> None:
        """One step, and the laws that hold in each."""
        scheduler = self.engine.scheduler
        running = {r.request_id for r in scheduler.running}
        num_preemptions = scheduler.num_preemptions
        self.engine.step()
        if self.checked.wrong is not None:
            raise self.checked.wrong
        scheduler.check_integrity()
        record = self.engine.engine_core.trace.last(1)[0]
        assert record.total_num_scheduled_tokens <= self.knobs["max_num_batched_tokens"]
        assert len(scheduler.running) <= self.knobs["max_num_seqs"]
        if self.is_async:  # the record is of an earlier plan than the newest
            self.outcome.steps += 1
            return
        preempted = scheduler.num_preemptions > num_preemptions
        assert not (preempted and record.new_req_ids), "admission in a step that preempted"
        for rid in running - record.num_scheduled_tokens.keys():
            assert preempted or record.finished.get(rid) == "error", f"{rid} ran and did not advance"
        reasons = scheduler.waiting_reasons()
        assert reasons.keys() == {r.request_id for r in scheduler.waiting} and all(reasons.values())
        self.outcome.steps += 1

    def _compare(self) -> None:
        roomy = roomy_outputs(self.arrivals, self.model)
        for index, request in self.requests.items():
            self._count(request)
            if request.finish_reason in ("stop", "length"):
                assert request.output_token_ids == roomy[index], "another schedule, another token"
                continue
            assert request.output_token_ids == roomy[index][: request.num_output_tokens]
            if request.status is RequestStatus.FINISHED_ERROR:
                outgrown = not self.engine.scheduler.kv.can_ever_fit(request.num_tokens)
                assert outgrown or (self.checked.fails and "flaky" in (request.error or "")), request.error

    def _count(self, request: Request) -> None:
        assert request.is_finished
        self.outcome.preemptions += request.num_preemptions
        self.outcome.hits += max(request.num_cached_tokens, 0)
        self.outcome.aborts += request.finish_reason == "abort"
        self.outcome.errors += request.finish_reason == "error"
        self.outcome.finished += request.finish_reason in ("stop", "length")
