"""The loop everything runs on: schedule, execute, update.

`EngineCore` knows neither text nor tensors. It is handed a scheduler and an executor, takes validated
`Request`s, and each `step()` reports what happened to them. The offline API, the server, the toy
engine and the simulator differ only in their executor and in the shell around this class.
"""

import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future

from mini_vllm.core.scheduler import Scheduler
from mini_vllm.core.scheduler_output import EngineCoreOutputs, ModelRunnerOutput, SchedulerOutput
from mini_vllm.engine.trace import StepTrace, record_step
from mini_vllm.exceptions import InvalidParameterError, PromptTooLongError
from mini_vllm.executor.base import Executor
from mini_vllm.logger import init_logger
from mini_vllm.request import Request, RequestStatus

logger = init_logger(__name__)


class EngineCore:
    """Scheduler and executor in one loop, with a record of every step.

    clock: seconds, injected so that a simulator can supply its own.
    trace_capacity: step records kept; 0 keeps none.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        *,
        clock: Callable[[], float] = time.monotonic,
        trace_capacity: int = 256,
    ) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.clock = clock
        self.trace = StepTrace(trace_capacity)

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
        if self.trace.capacity:
            self.trace.records.append(record_step(self.scheduler, plan, outputs, start, self.clock()))
            if logger.isEnabledFor(logging.DEBUG):
                logger.debug("%s", self.trace.records[-1])
        return EngineCoreOutputs(outputs, stats)

    def _execute(self, plan: SchedulerOutput) -> ModelRunnerOutput:
        """Run the plan. A step that raises fails its own requests only; an interrupt loses nothing."""
        if not (plan.num_scheduled_tokens or plan.finished_req_ids or plan.preempted_req_ids or plan.block_copies):
            return ModelRunnerOutput()
        try:
            result = _resolve(self.executor.execute_model(plan))
            if result is None:
                result = _resolve(self.executor.sample_tokens(None))
            assert result is not None, "sample_tokens() returned nothing"
            return result
        except Exception as error:
            self.scheduler.repeat_departures(plan)
            logger.exception("step %d failed; its %d requests end with an error", plan.step_id, len(plan.epochs))
            message = f"the step failed: {type(error).__name__}: {error}"
            return ModelRunnerOutput(errors=dict.fromkeys(plan.num_scheduled_tokens, message))
        except BaseException:
            self.scheduler.undo_step(plan)
            raise

    def shutdown(self) -> None:
        self.executor.shutdown()


def _resolve(result: "ModelRunnerOutput | Future[ModelRunnerOutput] | None") -> ModelRunnerOutput | None:
    return result.result() if isinstance(result, Future) else result
