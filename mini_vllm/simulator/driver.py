"""The simulation: the engine's own `EngineCore` in simulated time, one per replica, and the requests that reach them.

Events are arrivals and ends of steps. Each replica has a clock that its executor moves by what the cost model says, and
a step is one call of `EngineCore.step()`; so plans, preemptions and prefix hits are the real scheduler's and the real
block manager's. What a step made is known when its time has passed, not before: only then do chats go on and routers
see it. An arrival at the very end of a step is in time for the next one. No wall clock is read.
"""

import functools
import gc
import heapq
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mini_vllm.core.scheduler_output import EngineCoreOutput, SchedulerOutput
from mini_vllm.engine.builder import build_core
from mini_vllm.exceptions import ConfigError, InvalidParameterError
from mini_vllm.request import Request, Tenant
from mini_vllm.sampling_params import SamplingParams
from mini_vllm.simulator.cost import CostModel, StepLoad
from mini_vllm.simulator.executor import LogicalClock, PredictingExecutor, StepObserver
from mini_vllm.simulator.options import SimulationOptions
from mini_vllm.simulator.recording import RequestRows, TimelineBuilder
from mini_vllm.simulator.results import LatencyHistogram, ReplicaResult, SimulationResult
from mini_vllm.simulator.routing import make_router
from mini_vllm.simulator.workload import SimRequest, Workload

Progress = Callable[[int, int], None]
"""Told (requests finished, of how many), now and then."""

PROGRESS_EVERY = 64


def simulate(
    options: SimulationOptions,
    workload: Workload,
    cost: CostModel,
    *,
    progress: Progress | None = None,
    observe: StepObserver | None = None,
) -> SimulationResult:
    """Serve the workload to its end. The same arguments give the same result.

    observe: told of every step of every replica. Raises `ConfigError` for an empty workload, and
    `InvalidParameterError` with the arithmetic when a request is longer than the context or the pool.
    """
    with _collector_paused():
        return Simulation(options, workload, cost, progress, observe).run()


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Steps make millions of small objects and no cycles; looking for some would take a tenth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _Live:
    """A request on its way. left: samples that have not ended."""

    __slots__ = ("cached", "failed", "first_token", "left", "num_output", "preemptions", "request", "scheduled")

    def __init__(self, request: SimRequest) -> None:
        self.request = request
        self.left = request.num_samples
        self.first_token = self.scheduled = -1.0
        self.num_output = self.cached = self.preemptions = self.failed = 0


class Replica:
    """One engine. load: tokens of its unfinished requests, as far as their steps have ended. adding_seconds: that
    arrivals take it before its next step. is_awake: a step of it is under way or due."""

    def __init__(self, options: SimulationOptions, cost: CostModel, observe: StepObserver | None) -> None:
        self.clock = LogicalClock()
        self.timeline = TimelineBuilder(options.timeline_points)
        self.executor = PredictingExecutor(options, cost, self.clock, self._note_step)
        self.core = build_core(options.engine_config(), self.executor, clock=self.clock)
        self.load = 0
        self.adding_seconds = 0.0
        self.is_awake = False
        self.num_requests = 0
        self.live: dict[str, _Live] = {}
        self.outputs: list[EngineCoreOutput] = []
        self._observe = observe

    def add(self, sim: SimRequest, request: Request) -> None:
        live = _Live(sim)
        for sample, request_id in enumerate((request.request_id, *request.unborn_ids)):
            self.live[request_id] = live
            self.executor.tokens[request_id] = [sim.token_id + sample]
        self.core.add_request(request)
        self.adding_seconds += self.executor.cost.add_seconds(request.num_prompt_tokens)
        self.load += request.num_tokens
        self.num_requests += 1

    @property
    def has_work(self) -> bool:
        return self.core.scheduler.has_unfinished_requests()

    def step(self) -> None:
        """Take in what arrived, and one step of the engine. Its outputs are there when the clock says so."""
        self.clock.now += self.adding_seconds
        self.adding_seconds = 0.0
        self.outputs = self.core.step().outputs

    def take_outputs(self) -> list[_Live]:
        """Account for the step that has just ended. Returns the requests that ended with it."""
        now, ended = self.clock.now, []
        self.load += len(self.outputs)
        for news in [n for n in self.outputs if n.times is not None or n.finish_reason is not None]:
            live = self.live[news.request_id]
            if news.times is not None and live.first_token < 0:
                live.first_token = now
                live.scheduled = now if news.times[1] is None else news.times[1]
            if news.finish_reason is not None and self._end(news, live):
                ended.append(live)
        self.outputs = []
        return ended

    def _end(self, news: EngineCoreOutput, live: _Live) -> bool:
        """One sample has ended. Whether it was the request's last."""
        del self.live[news.request_id], self.executor.tokens[news.request_id]
        live.left -= 1
        live.preemptions += news.num_preemptions
        live.cached = max(live.cached, news.num_cached_tokens)
        live.failed |= news.finish_reason == "error"
        live.num_output += live.request.output_len
        if live.left == 0:
            self.load -= live.request.num_prompt_tokens + live.num_output
        return live.left == 0

    def _note_step(self, plan: SchedulerOutput, load: StepLoad, seconds: float) -> None:
        scheduler, decode = self.core.scheduler, len(load.starts)
        self.timeline.add(
            self.clock.now - seconds, seconds, len(scheduler.running), len(scheduler.waiting), scheduler.kv.usage,
            load.num_tokens - decode, decode, len(plan.preempted_req_ids),
        )  # fmt: skip
        if self._observe is not None:
            self._observe(plan, load, seconds)

    def result(self) -> ReplicaResult:
        counters, stats = self.executor.counters, self.core.scheduler.stats()
        return ReplicaResult(
            num_requests=self.num_requests,
            num_steps=counters.steps,
            num_request_steps=counters.request_steps,
            num_tokens=counters.tokens,
            num_prefill_tokens=counters.prefill_tokens,
            busy_seconds=counters.busy_seconds,
            num_preemptions=stats.num_preemptions,
            num_recomputed_tokens=counters.recomputed_tokens,
            prefix_cache_queries=stats.prefix_cache_queries,
            prefix_cache_hits=stats.prefix_cache_hits,
            max_kv_cache_usage=self.timeline.max_kv_cache_usage,
            timeline=self.timeline.timeline(),
            step_records=tuple(self.core.trace.records),
        )


class Simulation:
    """One run. `run()` once."""

    def __init__(
        self,
        options: SimulationOptions,
        workload: Workload,
        cost: CostModel,
        progress: Progress | None = None,
        observe: StepObserver | None = None,
    ) -> None:
        if workload.num_requests < 1:
            raise ConfigError(f"num_requests: there is nothing to simulate, the workload has {workload.num_requests}")
        self.options = options
        self.workload = workload
        self.cost = cost
        self.latency = options.request_latency_ms / 1e3
        self.source = workload.start()
        self.router = make_router(options)
        self.replicas = [Replica(options, cost, observe) for _ in range(options.num_replicas)]
        self.rows = RequestRows()
        self._tenants = {name: place for place, name in enumerate(workload.tenants)}
        self._progress = progress
        self._due: list[tuple[float, int]] = []
        """(end of its step, or when it wakes up; replica) of all that have work."""

    def run(self) -> SimulationResult:
        while True:
            end = self._due[0][0] if self._due else float("inf")
            if self.source.next_time() + self.latency <= end:
                if not self._arrive():
                    break
            else:
                self._end_of_step()
        assert len(self.rows) == self.workload.num_requests, "a request was lost"
        return self._result()

    # -- events ------------------------------------------------------------------------------------------

    def _arrive(self) -> bool:
        """The next arrival. False when there is none, ever."""
        time = self.source.next_time() + self.latency
        if time == float("inf"):
            return False
        sim = self.source.pop()
        request = self._request(sim)
        place = self.router.choose(request, self.replicas) if len(self.replicas) > 1 else 0
        replica = self.replicas[place]
        if not replica.is_awake:
            replica.is_awake = True
            replica.clock.now = time
            heapq.heappush(self._due, (time, place))
        replica.add(sim, request)
        return True

    def _end_of_step(self) -> None:
        """A replica's step has ended (or it wakes up): take what it made, admit what arrives now, begin the next."""
        now, place = self._due[0]
        replica = self.replicas[place]
        if replica.outputs:
            for live in replica.take_outputs():
                self._finish(live, place, now)
            if self.source.next_time() + self.latency <= now:
                return  # whoever arrives at this very moment is in time for the next step
        if replica.has_work:
            replica.step()
            heapq.heapreplace(self._due, (replica.clock.now, place))
        else:
            replica.is_awake = False
            heapq.heappop(self._due)

    def _finish(self, live: _Live, place: int, now: float) -> None:
        sim = live.request
        self.rows.add(
            (sim.arrival, live.scheduled, live.first_token, now),
            (
                sim.index, sim.num_prompt_tokens, live.num_output, live.cached, live.preemptions,
                self._tenants[sim.tenant], place, live.failed,
            ),
        )  # fmt: skip
        self.source.finished(sim, now)
        done = len(self.rows)
        if self._progress is not None and (done % PROGRESS_EVERY == 0 or done == self.workload.num_requests):
            self._progress(done, self.workload.num_requests)

    # -- requests ----------------------------------------------------------------------------------------

    def _request(self, sim: SimRequest) -> Request:
        """The engine's request. Raises `InvalidParameterError` for one that could not be served to its end."""
        length = sim.num_prompt_tokens + sim.output_len
        self._require_fit(sim, length)
        request_id = str(sim.index)
        return Request(
            request_id,
            sim.prompt_token_ids(),
            _sampling_params(sim.output_len, sim.num_samples),
            arrival_time=sim.arrival,
            priority=sim.priority,
            max_model_len=self.options.max_model_len,
            child_ids=[f"{request_id}/{sample}" for sample in range(1, sim.num_samples)],
            tenant=Tenant(sim.tenant, sim.user),
        )

    def _require_fit(self, sim: SimRequest, length: int) -> None:
        limit, parts = self.options.max_model_len, f"{sim.num_prompt_tokens} + {sim.output_len} = {length} tokens"
        if limit is not None and length > limit:
            raise InvalidParameterError(
                "max_model_len", f"request {sim.index} has {parts} of prompt and output, but the context is {limit}"
            )
        kv = self.replicas[0].core.scheduler.kv
        if not kv.can_ever_fit(length - 1):  # the last token is never written
            raise InvalidParameterError(
                "num_gpu_blocks",
                f"request {sim.index} has {parts} of prompt and output and needs {kv.num_blocks_for(length - 1)} KV "
                f"cache blocks of {kv.block_size} tokens, but the whole pool has {kv.block_pool.num_usable_blocks}",
            )

    # -- the end -----------------------------------------------------------------------------------------

    def _result(self) -> SimulationResult:
        table, itl = self.rows.table(), LatencyHistogram()
        for replica in self.replicas:
            replica.core.scheduler.check_integrity()
            itl.merge(replica.executor.gaps.histogram)
        return SimulationResult(
            options=self.options,
            requests=table,
            replicas=tuple(replica.result() for replica in self.replicas),
            itl=itl,
            tenants=tuple(self._tenants),
            duration=float(table.finish.max() - table.arrival.min()),
            description={"workload": self.workload.describe(), "cost": self.cost.describe()},
        )


@functools.lru_cache(maxsize=4096)
def _sampling_params(output_len: int, num_samples: int) -> SamplingParams:
    return SamplingParams(max_tokens=output_len, n=num_samples, ignore_eos=True, detokenize=False)
