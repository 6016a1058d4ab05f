"""The loop everything runs on: schedule, execute, update.

`EngineCore` knows neither text nor tensors. It is handed a scheduler and an executor, takes validated
`Request`s, and each `step()` reports what happened to them. The offline API, the server, the toy
engine and the simulator differ only in their executor and in the shell around this class.

With `async_scheduling` a step is planned while the one before it computes; see docs/architecture.md.
"""

import logging
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from mini_vllm.core.scheduler import Scheduler
from mini_vllm.core.scheduler_output import EngineCoreOutputs, ModelRunnerOutput, SchedulerOutput
from mini_vllm.engine.trace import StepTrace
from mini_vllm.exceptions import EngineDeadError, InvalidParameterError, PromptTooLongError
from mini_vllm.executor.base import Executor
from mini_vllm.executor.plan_thread import PlanThread, run_plan
from mini_vllm.logger import init_logger
from mini_vllm.request import Request, RequestStatus

logger = init_logger(__name__)

MAX_EMPTY_FAILURES = 3


@dataclass(slots=True)
class StepInFlight:
    """A plan that was handed on, and what is known of it meanwhile. start: when planning it began."""

    plan: SchedulerOutput
    result: "Future[ModelRunnerOutput]"
    start: float
    preempted: list[str]


class EngineCore:
    """Scheduler and executor in one loop, with a record of every step.

    clock: seconds, the scheduler's own (a simulator supplies another), so that all times of a request can be compared.
    trace_capacity: step records kept; 0 keeps none. trace_detailed: each says why every waiting request waits.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        *,
        trace_capacity: int = 256,
        trace_detailed: bool = False,
    ) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.clock = scheduler.clock
        self.trace = StepTrace(trace_capacity, trace_detailed)
        self.applied_step_id = -1
        """Of the plan whose results were applied last."""
        self._num_empty_failures = 0
        self._plan_thread = PlanThread()
        self._in_flight: deque[StepInFlight] = deque()
        self._last_end = 0.0

    def add_request(self, request: Request) -> None:
        """Queue a request, or raise before anything is queued if it can never run."""
        if request.num_prompt_tokens == 0:
            raise InvalidParameterError("prompt", "must have at least one token")
        for request_id in (request.request_id, *request.unborn_ids):
            if self.scheduler.is_in_use(request_id):
                raise InvalidParameterError("request_id", f"{request_id!r} is already in use")
        self._require_fit(request)
        self.scheduler.add_request(request)

    def _require_fit(self, request: Request) -> None:
        length, limit = request.num_prompt_tokens, request.max_model_len
        if limit is not None and length >= limit:
            raise PromptTooLongError(
                "prompt",
                f"This model's maximum context length is {limit} tokens. However, the prompt has {length} tokens, "
                "and at least one must be left for the output.",
            )
        kv = self.scheduler.kv
        if not kv.can_ever_fit(length):
            raise PromptTooLongError(
                "prompt",
                f"{length} tokens need {kv.num_blocks_for(length)} KV cache blocks of {kv.block_size} tokens, but the "
                f"whole pool has {kv.block_pool.num_usable_blocks}; give the cache more memory or shorten the prompt.",
            )

    def abort_requests(self, request_ids: Iterable[str]) -> list[Request]:
        """End requests in whatever state they are; unknown and finished ids are ignored. Returns those ended."""
        return self.scheduler.finish_requests(request_ids, RequestStatus.FINISHED_ABORTED)

    def stop_requests(self, request_ids: Iterable[str]) -> list[Request]:
        """End requests whose text reached a stop string, as if by a stop token. Returns those ended."""
        return self.scheduler.finish_requests(request_ids, RequestStatus.FINISHED_STOPPED)

    def has_unfinished_requests(self) -> bool:
        return self.scheduler.has_unfinished_requests()

    def reset_prefix_cache(self) -> None:
        self.scheduler.kv.reset_prefix_cache()

    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._in_flight) or self.scheduler.has_work()

    def step(self) -> EngineCoreOutputs:
        """Advance every request the budget allows for, and report one step; idle when there is nothing to do."""
        if self.scheduler.config.async_scheduling:
            return self._overlapped_step()
        start = self.clock()
        plan = self.scheduler.schedule()
        return self._apply(plan, self._execute(plan), start, self.scheduler.newly_preempted)

    def _apply(
        self, plan: SchedulerOutput, result: ModelRunnerOutput, start: float, preempted: Sequence[str]
    ) -> EngineCoreOutputs:
        """What came of a plan becomes news and a record."""
        outputs = self.scheduler.update_from_output(plan, result)
        self.applied_step_id = plan.step_id
        stats = self.scheduler.stats()
        stats.num_scheduled_tokens = plan.total_num_scheduled_tokens
        end = self.clock()
        if self.trace.capacity:
            self.trace.add(self.scheduler, plan, outputs, start, end, preempted)
            if logger.isEnabledFor(logging.DEBUG):
                logger.debug("%s", self.trace.records[-1])
        return EngineCoreOutputs(outputs, stats, timestamp=end)

    def _execute(self, plan: SchedulerOutput) -> ModelRunnerOutput:
        """Run the plan. A step that raises fails its own requests only; an interrupt loses nothing."""
        if not _says_something(plan):
            return ModelRunnerOutput()
        try:
            result = run_plan(self.executor, plan)
            self._num_empty_failures = 0
            return result
        except Exception as error:
            return self._failed(plan, error)
        except BaseException:
            self.scheduler.undo_step(plan)
            raise

    def _failed(self, plan: SchedulerOutput, error: Exception) -> ModelRunnerOutput:
        self.scheduler.repeat_departures(plan)
        self._require_working_executor(plan, error)
        logger.error(
            "step %d failed; its %d requests end with an error", plan.step_id, len(plan.epochs), exc_info=error
        )
        message = f"the step failed: {type(error).__name__}: {error}"
        return ModelRunnerOutput(errors=dict.fromkeys(plan.num_scheduled_tokens, message))

    def run_unplanned(self, plan: SchedulerOutput) -> None:
        """Run a plan that the scheduler does not know of, in the thread that runs the others."""
        if self.scheduler.config.async_scheduling:
            self._plan_thread.submit(self.executor, plan, None).result()
        else:
            run_plan(self.executor, plan)

    # -- one step planned while another computes -----------------------------------------------------------------

    def _overlapped_step(self) -> EngineCoreOutputs:
        """Plan one step further than what computes now, then wait for that and apply it.

        On return at most one step is in flight; what the shell does with the news goes on beside it.
        """
        idle_plan = None
        if not self._in_flight:
            idle_plan = self._start_step()
        if len(self._in_flight) == 1 and self._may_plan_ahead(self._in_flight[0].plan):
            self._start_step()
        if idle_plan is not None:
            return self._apply(idle_plan, ModelRunnerOutput(), self.clock(), ())
        return self._finish_oldest()

    def _may_plan_ahead(self, computing: SchedulerOutput) -> bool:
        """Not before children are born: they part with the blocks that their parent has just then."""
        return not computing.forks and self.scheduler.may_plan_ahead()

    def _start_step(self) -> SchedulerOutput | None:
        """Make a plan and hand it to the thread that runs them. Returns the plan if there is nothing in it to run."""
        start = self.clock()
        plan = self.scheduler.schedule()
        if not _says_something(plan):
            return plan
        try:
            before = self._in_flight[-1].result if self._in_flight else None
            result = self._plan_thread.submit(self.executor, plan, before)
            self._in_flight.append(StepInFlight(plan, result, start, self.scheduler.newly_preempted))
        except BaseException:
            self.scheduler.undo_step(plan)
            raise
        return None

    def _finish_oldest(self) -> EngineCoreOutputs:
        """Wait for the step that computes, and apply what came of it. An interrupt meanwhile leaves it in flight."""
        step = self._in_flight[0]
        error = step.result.exception()
        self._in_flight.popleft()
        if error is not None and not isinstance(error, Exception):  # an interrupt that the executor raised
            self._undo_in_flight()
            self.scheduler.undo_step(step.plan)
            raise error
        start = max(step.start, self._last_end)
        if error is None:
            self._num_empty_failures = 0
            result = step.result.result()
        else:
            result = self._failed(step.plan, error)
        news = self._apply(step.plan, result, start, step.preempted)
        self._last_end = news.timestamp
        if error is not None:
            self._undo_in_flight()
        elif result.errors:
            for ahead in self._in_flight:
                self.scheduler.redo_readers(ahead.plan)
        return news

    def _undo_in_flight(self) -> None:
        """Steps planned upon one that failed were not begun."""
        while self._in_flight:
            ahead = self._in_flight.pop()
            ahead.result.exception()
            self.scheduler.undo_step(ahead.plan)

    def _require_working_executor(self, plan: SchedulerOutput, error: Exception) -> None:
        """Raise `EngineDeadError` when the executor fails, again and again, at plans that compute nothing: no request
        is to blame for that, and repeating it would go on for ever."""
        self._num_empty_failures = 0 if plan.num_scheduled_tokens else self._num_empty_failures + 1
        if self._num_empty_failures == MAX_EMPTY_FAILURES:
            raise EngineDeadError(f"the executor does not work any more: {type(error).__name__}: {error}") from error

    def shutdown(self) -> None:
        """Wait for the step that computes, and give back what the executor holds."""
        self._plan_thread.shutdown()
        self._in_flight.clear()
        self.executor.shutdown()


def _says_something(plan: SchedulerOutput) -> bool:
    """Whether a worker has to see the plan."""
    return bool(plan.num_scheduled_tokens or plan.finished_req_ids or plan.preempted_req_ids or plan.block_copies)
