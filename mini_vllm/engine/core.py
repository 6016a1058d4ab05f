"""The loop everything runs on: schedule, execute, update.

`EngineCore` knows neither text nor tensors. It is handed a scheduler and an executor, takes validated
`Request`s, and each `step()` reports what happened to them. The offline API, the server, the toy
engine and the simulator differ only in their executor and in the shell around this class.
"""

import logging
from collections.abc import Iterable
from concurrent.futures import Future

from mini_vllm.core.scheduler import Scheduler
from mini_vllm.core.scheduler_output import EngineCoreOutputs, ModelRunnerOutput, SchedulerOutput
from mini_vllm.engine.trace import StepTrace
from mini_vllm.exceptions import EngineDeadError, InvalidParameterError, PromptTooLongError
from mini_vllm.executor.base import Executor
from mini_vllm.logger import init_logger
from mini_vllm.request import Request, RequestStatus

logger = init_logger(__name__)

MAX_EMPTY_FAILURES = 3


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
        self._num_empty_failures = 0

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

    def step(self) -> EngineCoreOutputs:
        """Advance every request the budget allows for; idle when there is nothing to do."""
        start = self.clock()
        plan = self.scheduler.schedule()
        result = self._execute(plan)
        outputs = self.scheduler.update_from_output(plan, result)
        stats = self.scheduler.stats()
        stats.num_scheduled_tokens = plan.total_num_scheduled_tokens
        end = self.clock()
        if self.trace.capacity:
            self.trace.add(self.scheduler, plan, outputs, start, end)
            if logger.isEnabledFor(logging.DEBUG):
                logger.debug("%s", self.trace.records[-1])
        return EngineCoreOutputs(outputs, stats, timestamp=end)

    def _execute(self, plan: SchedulerOutput) -> ModelRunnerOutput:
        """Run the plan. A step that raises fails its own requests only; an interrupt loses nothing."""
        if not (plan.num_scheduled_tokens or plan.finished_req_ids or plan.preempted_req_ids or plan.block_copies):
            return ModelRunnerOutput()
        try:
            result = _resolve(self.executor.execute_model(plan))
            if result is None:
                result = _resolve(self.executor.sample_tokens(None))
            assert result is not None, "sample_tokens() returned nothing"
            self._num_empty_failures = 0
            return result
        except Exception as error:
            self.scheduler.repeat_departures(plan)
            self._require_working_executor(plan, error)
            logger.exception("step %d failed; its %d requests end with an error", plan.step_id, len(plan.epochs))
            message = f"the step failed: {type(error).__name__}: {error}"
            return ModelRunnerOutput(errors=dict.fromkeys(plan.num_scheduled_tokens, message))
        except BaseException:
            self.scheduler.undo_step(plan)
            raise

    def _require_working_executor(self, plan: SchedulerOutput, error: Exception) -> None:
        """Raise `EngineDeadError` when the executor fails, again and again, at plans that compute nothing: no request
        is to blame for that, and repeating it would go on for ever."""
        self._num_empty_failures = 0 if plan.num_scheduled_tokens else self._num_empty_failures + 1
        if self._num_empty_failures == MAX_EMPTY_FAILURES:
            raise EngineDeadError(f"the executor does not work any more: {type(error).__name__}: {error}") from error

    def shutdown(self) -> None:
        self.executor.shutdown()


def _resolve(result: "ModelRunnerOutput | Future[ModelRunnerOutput] | None") -> ModelRunnerOutput | None:
    return result.result() if isinstance(result, Future) else result
