"""Where a plan runs, as a protocol: one device, many processes, the toy, a simulator.

`EngineCore` is handed an `Executor` and knows nothing below it. Nothing here imports torch.
"""

from concurrent.futures import Future
from typing import Any, Protocol

from mini_vllm.core.interfaces import KVCacheConfig
from mini_vllm.core.scheduler_output import ModelRunnerOutput, SchedulerOutput


class Executor(Protocol):
    """Runs plans. Built ready: when the constructor returns, weights are loaded and the KV cache is allocated.

    `execute_model` returns None when the step has rows to sample; `sample_tokens` must be called then. Either may
    return a future instead, so that the next step can be planned while this one computes. An exception means that
    the step as a whole failed and that the executor can take the next plan.
    """

    @property
    def max_model_len(self) -> int:
        """Tokens a request may hold, resolved: 'auto' has become what the model and the pool allow."""

    def kv_cache_config(self) -> KVCacheConfig:
        """The pool that was allocated: number of blocks, and the groups of layers that share a block table."""

    def execute_model(self, plan: SchedulerOutput) -> ModelRunnerOutput | Future[ModelRunnerOutput] | None:
        """Advance every request as the plan says."""

    def sample_tokens(self, grammar_output: Any = None) -> ModelRunnerOutput | Future[ModelRunnerOutput]:
        """Choose the next tokens of the step that `execute_model` left open."""

    def collective_rpc(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        """Call `method` of the worker on every rank; one result a rank."""

    def shutdown(self) -> None:
        """Give back the device's memory. The executor cannot be used afterwards."""
