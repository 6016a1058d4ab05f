"""An executor without a device: it takes plans, lets simulated time pass, and says which tokens came out.

What it needs to know of a request is little, since the plan says the rest: whether it is still in the middle of its
prompt (then it samples nothing), and which token it makes. A step in which everybody decodes is answered with the same
object as the one before, so its cost is that of comparing two lists of names.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mini_vllm.core.interfaces import KVCacheConfig, KVCacheGroup, KVCacheSpec
from mini_vllm.core.scheduler_output import ModelRunnerOutput, SchedulerOutput
from mini_vllm.simulator.cost import CostModel, StepLoad
from mini_vllm.simulator.options import SimulationOptions
from mini_vllm.simulator.results import LatencyHistogram

UNLIMITED = 2**62


class LogicalClock:
    """Simulated seconds. Moves only when told to."""

    __slots__ = ("now",)

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class StepCounters:
    """Sums over all steps of one replica. recomputed_tokens: computed before, and lost to a preemption."""

    steps: int = 0
    request_steps: int = 0
    tokens: int = 0
    prefill_tokens: int = 0
    recomputed_tokens: int = 0
    busy_seconds: float = 0.0


StepObserver = Callable[[SchedulerOutput, StepLoad, float], None]
"""Told of a plan, its load and the seconds it took, when they have passed."""


class TokenGaps:
    """Inter-token latencies, from who got a token in each step.

    Whoever also had one in the step before has waited as long as the steps are apart: one entry for all of them. Only
    those who missed a step (preempted, or no budget left) are remembered one by one.
    """

    def __init__(self) -> None:
        self.histogram = LatencyHistogram()
        self._last: list[str] = []
        self._last_time = 0.0
        self._missed: dict[str, float] = {}

    def same(self, now: float) -> None:
        """The same requests as in the last step got a token each."""
        if self._last:
            self.histogram.add(now - self._last_time, len(self._last))
        self._last_time = now

    def step(self, req_ids: list[str], ended: list[str], now: float) -> None:
        """These got a token each; `ended` will get none any more."""
        before, current = set(self._last), set(req_ids)
        both = len(before & current)
        if both:
            self.histogram.add(now - self._last_time, both)
        for request_id in before - current:
            self._missed[request_id] = self._last_time
        for request_id in ended:
            self._missed.pop(request_id, None)
        if self._missed:
            for request_id in current & self._missed.keys():
                self.histogram.add(now - self._missed.pop(request_id))
        self._last, self._last_time = req_ids, now


@dataclass
class PredictingExecutor:
    """One replica's device. tokens: what each request generates; its owner adds and removes them."""

    options: SimulationOptions
    cost: CostModel
    clock: LogicalClock
    observe: StepObserver | None = None
    tokens: dict[str, list[int]] = field(default_factory=dict)
    gaps: TokenGaps = field(default_factory=TokenGaps)
    counters: StepCounters = field(default_factory=StepCounters)

    def __post_init__(self) -> None:
        self._in_prompt: dict[str, int] = {}
        """Tokens left before it samples, of those whose last chunk did not."""
        self._left_when_lost: dict[str, int] = {}
        """The same for those that were preempted, when they were."""
        self._result = ModelRunnerOutput()

    # -- the executor's interface ------------------------------------------------------------------------

    @property
    def max_model_len(self) -> int:
        return self.options.max_model_len or UNLIMITED

    def kv_cache_config(self) -> KVCacheConfig:
        spec = KVCacheSpec(self.options.block_size, 1, "float32")
        groups = tuple(KVCacheGroup((f"group{i}",), spec) for i in range(self.options.num_kv_groups))
        return KVCacheConfig(self.options.num_gpu_blocks, groups)

    def execute_model(self, plan: SchedulerOutput) -> ModelRunnerOutput:
        self._note_departures(plan)
        req_ids = list(plan.num_scheduled_tokens)
        if not (plan.new_reqs or self._in_prompt or plan.forks) and req_ids == self._result.req_ids:
            load = StepLoad(plan.cached_reqs.num_computed_tokens, (), len(req_ids), len(req_ids))
            self._pass(plan, load)
            self.gaps.same(self.clock.now)
            return self._result
        load, sampling = self._load_of(plan, req_ids)
        self._pass(plan, load)
        self.gaps.step(sampling, plan.finished_req_ids, self.clock.now)
        self._result = ModelRunnerOutput(sampling, [self.tokens[request_id] for request_id in sampling])
        return self._result

    def sample_tokens(self, grammar_output: Any = None) -> ModelRunnerOutput:
        raise AssertionError("execute_model() has answered already")

    def collective_rpc(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        raise NotImplementedError(f"a simulated device has no worker to call {method!r} of")

    def shutdown(self) -> None:
        pass

    # -- one step ----------------------------------------------------------------------------------------

    def _pass(self, plan: SchedulerOutput, load: StepLoad) -> None:
        seconds = self.cost.step_seconds(load)
        self.clock.now += seconds
        if not load.num_tokens:
            return
        counters = self.counters
        counters.steps += 1
        counters.request_steps += load.num_requests
        counters.tokens += load.num_tokens
        counters.prefill_tokens += load.num_tokens - len(load.starts)
        counters.busy_seconds += seconds
        if self.observe is not None:
            self.observe(plan, load, seconds)

    def _load_of(self, plan: SchedulerOutput, req_ids: list[str]) -> tuple[StepLoad, list[str]]:
        """What a step with prompts in it computes, and who samples: all that do not stop inside their prompt."""
        scheduled, cached, in_prompt = plan.num_scheduled_tokens, plan.cached_reqs, self._in_prompt
        rows = zip(cached.req_ids, cached.num_computed_tokens, strict=True)
        starts = cached.num_computed_tokens
        chunks: list[tuple[int, int]] = []
        if in_prompt:
            starts = []
            for request_id, start in rows:
                left = in_prompt.pop(request_id, 1)
                _note_chunk(start, self._advance(request_id, left, scheduled), starts, chunks)
        elif plan.new_reqs:
            starts = list(starts)  # a new request may have a single token to compute
        for new in plan.new_reqs:
            left = len(new.token_ids) - new.num_computed_tokens
            self._note_return(new.req_id, left)
            _note_chunk(new.num_computed_tokens, self._advance(new.req_id, left, scheduled), starts, chunks)
        sampling = [request_id for request_id in req_ids if request_id not in in_prompt] if in_prompt else req_ids
        num_sampled = len(sampling)
        if plan.forks:
            sampling = sampling + [child for children in plan.forks.values() for child in children]
        return StepLoad(starts, chunks, plan.total_num_scheduled_tokens, num_sampled), sampling

    def _advance(self, request_id: str, left: int, scheduled: Mapping[str, int]) -> int:
        """The tokens it was given; remembers those left before it samples."""
        count = scheduled[request_id]
        if left > count:
            self._in_prompt[request_id] = left - count
        return count

    # -- preemption --------------------------------------------------------------------------------------

    def _note_departures(self, plan: SchedulerOutput) -> None:
        for request_id in plan.preempted_req_ids:
            self._left_when_lost[request_id] = self._in_prompt.pop(request_id, 1)
        for request_id in plan.finished_req_ids:
            self._left_when_lost.pop(request_id, None)

    def _note_return(self, request_id: str, left: int) -> None:
        """Back after a preemption, or new. What is left now and was not left then is computed again."""
        before = self._left_when_lost.pop(request_id, None)
        if before is not None:
            self.counters.recomputed_tokens += max(left - before, 0)


def _note_chunk(start: int, count: int, starts: list[int], chunks: list[tuple[int, int]]) -> None:
    if count == 1:
        starts.append(start)
    else:
        chunks.append((start, count))
