"""One timed run: a list of requests through an engine, with a time stamp for every output and a note of every plan.

All requests are added at once, then the engine is stepped until none is left. The plans are seen by an executor that
passes everything on (`PlanMeter`), so what a step computed is known exactly and not guessed from its outputs. What is
reported is worked out afterwards; while the clock runs, only references are kept.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from mini_vllm.bench.datasets import BenchRequest
from mini_vllm.bench.metrics import RequestTimeline
from mini_vllm.bench.noise import CpuMeter, NoiseReport
from mini_vllm.core.interfaces import KVCacheConfig
from mini_vllm.core.scheduler_output import ModelRunnerOutput, SchedulerOutput, SchedulerStats
from mini_vllm.engine.core import EngineCore
from mini_vllm.engine.core_client import InprocClient
from mini_vllm.engine.llm_engine import LLMEngine
from mini_vllm.exceptions import ConfigError
from mini_vllm.executor.base import Executor
from mini_vllm.sampling_params import RequestOutputKind, SamplingParams

ExecuteResult = ModelRunnerOutput | Future[ModelRunnerOutput] | None


@dataclass
class StepNote:
    """One step that ran. seconds: the whole step, scheduling and detokenising included; with async scheduling, from the
    results of the step before to its own."""

    plan: SchedulerOutput
    kv_cache_usage: float
    sampled_rows: int = 0
    seconds: float = 0.0

    @property
    def chunks(self) -> list[tuple[int, int]]:
        """(tokens computed before, tokens of this step) of every request in the plan."""
        counts, cached = self.plan.num_scheduled_tokens, self.plan.cached_reqs
        starts = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        starts |= {new.req_id: new.num_computed_tokens for new in self.plan.new_reqs}
        return [(starts[request_id], count) for request_id, count in counts.items()]


class PlanMeter:
    """An executor that passes everything on and notes each plan and how many rows sampled."""

    def __init__(self, executor: Executor, kv_cache_usage: Callable[[], float]) -> None:
        self.executor = executor
        self.notes: list[StepNote] = []
        self._by_step: dict[int, StepNote] = {}
        self._kv_cache_usage = kv_cache_usage

    @property
    def max_model_len(self) -> int:
        return self.executor.max_model_len

    def kv_cache_config(self) -> KVCacheConfig:
        return self.executor.kv_cache_config()

    def execute_model(self, plan: SchedulerOutput) -> ExecuteResult:
        if plan.num_scheduled_tokens:
            self.notes.append(StepNote(plan, self._kv_cache_usage()))
            self._by_step[plan.step_id] = self.notes[-1]
        result = self.executor.execute_model(plan)
        if result is not None and plan.num_scheduled_tokens:
            self._note_rows(result)
        return result

    def sample_tokens(self, grammar_output: Any = None) -> ModelRunnerOutput | Future[ModelRunnerOutput]:
        result = self.executor.sample_tokens(grammar_output)
        self._note_rows(result)
        return result

    def collective_rpc(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        return self.executor.collective_rpc(method, *args, **kwargs)

    def shutdown(self) -> None:
        self.executor.shutdown()

    def note_seconds(self, step_id: int, seconds: float) -> None:
        """How long the step took that was applied just now; another may be in flight and noted already."""
        note = self._by_step.pop(step_id, None)
        if note is not None:
            note.seconds = seconds

    def _note_rows(self, result: ModelRunnerOutput | Future[ModelRunnerOutput]) -> None:
        if not self.notes:
            return
        note = self.notes[-1]
        if isinstance(result, Future):
            result.add_done_callback(lambda done: _count_rows(note, done.result()))
        else:
            _count_rows(note, result)


def _count_rows(note: StepNote, result: ModelRunnerOutput) -> None:
    note.sampled_rows = sum(1 for token_ids in result.sampled_token_ids if token_ids)


def core_of(engine: LLMEngine) -> EngineCore:
    """The core behind an engine. Raises `ConfigError` when it is in another process, where plans cannot be seen."""
    if not isinstance(engine.engine_core, InprocClient):
        raise ConfigError("bench: needs an engine whose core runs in this process")
    return engine.engine_core.core


@contextmanager
def metered(core: EngineCore) -> Iterator[PlanMeter]:
    """Put a `PlanMeter` around the core's executor for as long as the block lasts."""
    executor = core.executor
    meter = PlanMeter(executor, lambda: core.scheduler.kv.usage)
    core.executor = meter
    try:
        yield meter
    finally:
        core.executor = executor


def _finish_in_flight(core: EngineCore) -> None:
    """With async scheduling a step was planned for rows that have ended since. Nobody waited for it: it is no part of
    the run, and the next one shall not wait for it either."""
    while core.scheduler.config.async_scheduling and core.has_work():
        core.step()


@dataclass
class Run:
    """What one run left behind. Times in seconds; counters are those of this run alone."""

    timelines: list[RequestTimeline]
    steps: list[StepNote]
    duration: float
    num_preemptions: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    noise: NoiseReport

    @property
    def peak_kv_cache_usage(self) -> float:
        return max((step.kv_cache_usage for step in self.steps), default=0.0)

    @property
    def prefix_cache_hit_rate(self) -> float | None:
        """Share of the tokens looked up that were found; None when none was looked up."""
        return self.prefix_cache_hits / self.prefix_cache_queries if self.prefix_cache_queries else None

    @property
    def errors(self) -> list[str]:
        return [f"{timeline.request_id}: {timeline.error}" for timeline in self.timelines if timeline.error]


@dataclass
class Driver:
    """Runs request lists through one engine, each run with fresh request ids.

    temperature: of every request. detokenize: whether text is made, as it would be for a caller.
    keep_prefix_cache: leave the prefix cache as the run before left it.
    """

    engine: LLMEngine
    temperature: float = 1.0
    detokenize: bool = True
    keep_prefix_cache: bool = False
    clock: Callable[[], float] = time.perf_counter
    _num_runs: int = field(default=0, init=False)

    def run(self, requests: Sequence[BenchRequest]) -> Run:
        """Add all requests, step until they are done. An interrupt or an error leaves none of them behind."""
        if not self.keep_prefix_cache:
            self.engine.reset_prefix_cache()
        core = core_of(self.engine)
        self._num_runs += 1
        prefix = f"bench-{self._num_runs}"
        params = [self._params(request) for request in requests]
        with metered(core) as meter:
            before, cpu = core.scheduler.stats(), CpuMeter().start()
            begin = self.clock()
            try:
                timelines = self._add_all(prefix, requests, params)
                self._step_all({timeline.request_id: timeline for timeline in timelines}, meter)
            finally:
                self.engine.abort_request([f"{prefix}-{index}" for index in range(len(requests))])
            duration = self.clock() - begin
            noise, after = cpu.stop(), core.scheduler.stats()
            _finish_in_flight(core)
        steps = [note for note in meter.notes if note.seconds > 0]
        return _run(timelines, steps, duration, before, after, noise)

    def _params(self, request: BenchRequest) -> SamplingParams:
        return SamplingParams(
            temperature=self.temperature,
            max_tokens=request.output_len,
            ignore_eos=True,
            detokenize=self.detokenize,
            output_kind=RequestOutputKind.DELTA,
        )

    def _add_all(
        self, prefix: str, requests: Sequence[BenchRequest], params: Sequence[SamplingParams]
    ) -> list[RequestTimeline]:
        timelines = []
        for index, (request, chosen) in enumerate(zip(requests, params, strict=True)):
            request_id = f"{prefix}-{index}"
            timelines.append(RequestTimeline(request_id, len(request.prompt_token_ids), self.clock()))
            self.engine.add_request(request_id, {"prompt_token_ids": request.prompt_token_ids}, chosen)
        return timelines

    def _step_all(self, timelines: dict[str, RequestTimeline], meter: PlanMeter) -> None:
        engine, clock, core = self.engine, self.clock, core_of(self.engine)
        while engine.has_unfinished_requests():
            begin = clock()
            outputs = engine.step()
            now = clock()
            meter.note_seconds(core.applied_step_id, now - begin)
            for output in outputs:
                timeline, completion = timelines[output.request_id], output.outputs[0]
                if completion.token_ids:
                    timeline.output_times.append(now)
                    timeline.output_counts.append(len(completion.token_ids))
                if output.finished:
                    timeline.finish_reason, timeline.error = completion.finish_reason, output.error


def _run(
    timelines: list[RequestTimeline],
    steps: list[StepNote],
    duration: float,
    before: SchedulerStats,
    after: SchedulerStats,
    noise: NoiseReport,
) -> Run:
    return Run(
        timelines=timelines,
        steps=steps,
        duration=duration,
        num_preemptions=after.num_preemptions - before.num_preemptions,
        prefix_cache_queries=after.prefix_cache_queries - before.prefix_cache_queries,
        prefix_cache_hits=after.prefix_cache_hits - before.prefix_cache_hits,
        noise=noise,
    )
