"""The thread that runs plans, one after the other, while the core makes the next one.

`PlanThread` is handed an executor and leaves it as it is. A plan begins when the one before it has returned, so that
buffers are never shared by two steps; kernels release the interpreter's lock, so that planning goes on beside them.
"""

from concurrent.futures import Future, ThreadPoolExecutor

from mini_vllm.core.scheduler_output import ModelRunnerOutput, SchedulerOutput
from mini_vllm.executor.base import Executor


class PlanNotRunError(Exception):
    """The plan was never begun, because the one it was made upon failed."""


class PlanThread:
    """One thread, started by the first plan."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mini_vllm-plans")

    def submit(
        self, executor: Executor, plan: SchedulerOutput, before: "Future[ModelRunnerOutput] | None"
    ) -> "Future[ModelRunnerOutput]":
        """Run `plan` when its turn comes. before: the plan whose results were not known when this one was made; if that
        one fails, this one is not begun and the future raises `PlanNotRunError`."""
        return self._thread.submit(_run_after, before, executor, plan)

    def shutdown(self) -> None:
        """Wait for the plan that is running; those behind it are cancelled."""
        self._thread.shutdown(wait=True, cancel_futures=True)


def _run_after(
    before: "Future[ModelRunnerOutput] | None", executor: Executor, plan: SchedulerOutput
) -> ModelRunnerOutput:
    if before is not None and before.exception() is not None:  # it has ended: there is one thread
        raise PlanNotRunError(f"step {plan.step_id} was planned upon one that failed")
    return run_plan(executor, plan)


def run_plan(executor: Executor, plan: SchedulerOutput) -> ModelRunnerOutput:
    """Both halves of a step, waiting for whatever the executor defers."""
    result = _resolve(executor.execute_model(plan))
    if result is None:
        result = _resolve(executor.sample_tokens(None))
    assert result is not None, "sample_tokens() returned nothing"
    return result


def _resolve(result: "ModelRunnerOutput | Future[ModelRunnerOutput] | None") -> ModelRunnerOutput | None:
    return result.result() if isinstance(result, Future) else result
