"""One device in this very process: the executor that calls its worker directly."""

from typing import Any

from mini_vllm.config import EngineConfig
from mini_vllm.core.interfaces import KVCacheConfig
from mini_vllm.core.scheduler_output import ModelRunnerOutput, SchedulerOutput
from mini_vllm.worker.kv_cache import KVCacheDemand, plan_kv_cache
from mini_vllm.worker.model_runner import ModelRunner


class UniProcExecutor:
    """Loads the model, sizes the KV cache, allocates it, and then runs plans. See `executor.base.Executor`.

    Raises `CheckpointError` and `UnsupportedModelError` for the checkpoint, `KVCacheTooSmallError` when not one
    request of `max_model_len` tokens fits, `ConfigError` for a device that is not there.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.runner: ModelRunner | None = ModelRunner(config)
        try:
            self._start(self.runner, config)
        except BaseException:
            self.runner.release()  # whoever keeps the error keeps the runner; the weights need not stay with it
            raise

    def _start(self, runner: ModelRunner, config: EngineConfig) -> None:
        runner.load_model()
        demand = KVCacheDemand(
            max_num_seqs=config.scheduler.max_num_seqs,
            max_model_len=config.model.max_model_len,
            model_limit=config.model.hf_config.default_max_model_len,
        )
        self._kv_cache_config, self.max_model_len = plan_kv_cache(
            config.cache,
            runner.get_kv_cache_groups(),
            demand,
            available_bytes=runner.available_kv_cache_bytes,
            default_limit_bytes=runner.platform.default_kv_cache_limit_bytes,
        )
        runner.initialize_kv_cache(self._kv_cache_config, self.max_model_len)

    def kv_cache_config(self) -> KVCacheConfig:
        """The pool that was allocated."""
        return self._kv_cache_config

    def execute_model(self, plan: SchedulerOutput) -> ModelRunnerOutput | None:
        """Obey a plan; None when `sample_tokens` is to follow."""
        return self._worker().execute_model(plan)

    def sample_tokens(self, grammar_output: Any = None) -> ModelRunnerOutput:
        """Finish the step that `execute_model` left open."""
        return self._worker().sample_tokens(grammar_output)

    def collective_rpc(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        """Call `method` of the only worker. Raises AttributeError if it has none of that name."""
        return [getattr(self._worker(), method)(*args, **kwargs)]

    def shutdown(self) -> None:
        """Let go of weights and KV cache; calling it twice is harmless."""
        self.runner = None

    def _worker(self) -> ModelRunner:
        if self.runner is None:
            raise RuntimeError("the executor was shut down")
        return self.runner
