"""The synchronous shell: text in, `RequestOutput`s out, one step at a time.

`LLMEngine` joins the input processor, the core and the output processor; it holds no request state of its own.
`LLM` and the command line are built on it; the asynchronous shell has the same parts.
"""

from collections.abc import Iterable

from mini_vllm.config import EngineConfig
from mini_vllm.core.scheduler_output import SchedulerStats
from mini_vllm.engine.arg_utils import EngineArgs
from mini_vllm.engine.builder import plan_input_processor, start_core
from mini_vllm.engine.core_client import EngineCoreClient, InprocClient
from mini_vllm.engine.input_processor import InputProcessor, PromptType, TokenizedPrompt
from mini_vllm.engine.metrics.stats import IterationStats, StatLoggerBase
from mini_vllm.engine.metrics.stats_logger import StatLogger
from mini_vllm.engine.output_processor import OutputProcessor
from mini_vllm.engine.trace import StepRecord
from mini_vllm.exceptions import InvalidParameterError
from mini_vllm.logger import init_logger
from mini_vllm.outputs import RequestOutput
from mini_vllm.request import Tenant
from mini_vllm.sampling_params import SamplingParams
from mini_vllm.text.tokenizer import Tokenizer

logger = init_logger(__name__)


class LLMEngine:
    """Serves requests when `step()` is called.

    engine_core: how the core is reached. config: None for engines that are put together by hand.
    log_stats: write a line on throughput and cache use to the log every 10 seconds of stepping.
    """

    def __init__(
        self,
        engine_core: EngineCoreClient,
        input_processor: InputProcessor,
        output_processor: OutputProcessor,
        *,
        config: EngineConfig | None = None,
        log_stats: bool = False,
    ) -> None:
        self.engine_core = engine_core
        self.input_processor = input_processor
        self.output_processor = output_processor
        self.config = config
        self.stat_logger: StatLoggerBase | None = StatLogger(engine_core.now()) if log_stats else None

    @classmethod
    def from_engine_args(cls, args: EngineArgs) -> "LLMEngine":
        """Read the checkpoint, size the KV cache, and return an engine that is ready.

        Raises `ConfigError`, `CheckpointError`, `UnsupportedModelError` or `KVCacheTooSmallError`.
        """
        tokenizer = args.load_tokenizer()
        config = args.create_engine_config(tokenizer)
        make_input_processor = plan_input_processor(args, tokenizer, config.model.hf_config)
        core = start_core(config)
        return cls(
            InprocClient(core),
            make_input_processor(max_model_len=core.executor.max_model_len, clock=core.clock),
            OutputProcessor(tokenizer),
            config=config,
            log_stats=not args.disable_log_stats,
        )

    # -- requests ---------------------------------------------------------------------------------------------

    def add_request(
        self,
        request_id: str,
        prompt: PromptType | TokenizedPrompt,
        params: SamplingParams | None = None,
        arrival_time: float | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        tenant: Tenant = Tenant(),  # noqa: B008 (frozen)
    ) -> None:
        """Check and queue one request; nothing is queued if this raises `InvalidParameterError`.

        params: None takes the model's own defaults. arrival_time: seconds on the engine's clock; None is now.
        priority: a lower number goes first under scheduling_policy='priority'.
        cache_salt: prefixes are shared only among requests with the same salt.
        tenant: who shares the engine with others under scheduling_policy='fair'.
        """
        self._require_new_id(request_id)
        params = self.input_processor.resolve_params(params)
        if not isinstance(prompt, TokenizedPrompt):
            prompt = self.input_processor.tokenize([prompt])[0]
        request = self.input_processor.make_request(
            request_id,
            prompt,
            params,
            arrival_time=arrival_time,
            priority=priority,
            cache_salt=cache_salt,
            tenant=tenant,
        )
        for child_id in request.unborn_ids:
            self._require_unused(child_id)
        self.output_processor.add_request(request, prompt.text)
        try:
            self.engine_core.add_request(request)
        except BaseException:
            self.output_processor.forget(request_id)
            raise

    def _require_new_id(self, request_id: str) -> None:
        if not isinstance(request_id, str) or not request_id:
            raise InvalidParameterError("request_id", f"must be a string that is not empty, got {request_id!r}")
        self._require_unused(request_id)

    def _require_unused(self, request_id: str) -> None:
        if request_id in self.output_processor:
            raise InvalidParameterError("request_id", f"{request_id!r} is already in use by an unfinished request")

    def abort_request(self, request_ids: str | Iterable[str]) -> list[RequestOutput]:
        """End requests in whatever state they are; returns their last outputs (finish_reason 'abort'). Ids that are
        unknown or finished are ignored."""
        ids = [request_ids] if isinstance(request_ids, str) else list(request_ids)
        self.engine_core.abort_requests(self.output_processor.core_ids(ids))
        now = self.engine_core.now()
        iteration = None if self.stat_logger is None else IterationStats(now)
        outputs = self.output_processor.abort(ids, now, iteration)
        if self.stat_logger is not None and iteration is not None:
            self.stat_logger.record(None, iteration)
        return outputs

    def step(self) -> list[RequestOutput]:
        """Advance every running request; returns what is new, by each request's `output_kind`."""
        news = self.engine_core.get_output()
        now = news.timestamp or self.engine_core.now()
        iteration = None if self.stat_logger is None else IterationStats(now)
        outputs = self.output_processor.process(news.outputs, now, iteration)
        if stopped := self.output_processor.take_stopped():
            self.engine_core.stop_requests(stopped)
        if self.stat_logger is not None and iteration is not None:
            self.stat_logger.record(news.stats, iteration)
        return outputs

    def has_unfinished_requests(self) -> bool:
        return self.output_processor.has_unfinished_requests()

    def get_num_unfinished_requests(self) -> int:
        return self.output_processor.num_unfinished_requests

    # -- looking in and after ---------------------------------------------------------------------------------

    def get_tokenizer(self) -> Tokenizer:
        return self.input_processor.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What a request without parameters gets, from the model's generation_config.json."""
        return self.input_processor.default_sampling_params

    @property
    def max_model_len(self) -> int:
        """Tokens a request may hold, prompt and output together."""
        return self.input_processor.max_model_len

    @property
    def stats(self) -> SchedulerStats:
        """Gauges and counters as of now: requests, KV cache use, preemptions, prefix cache."""
        return self.engine_core.stats()

    def step_records(self, n: int | None = None) -> list[StepRecord]:
        """What the last `n` steps did, oldest first: who ran, who was preempted, who ended, why the rest waited."""
        return self.engine_core.step_records(n)

    def waiting_reasons(self) -> dict[str, str]:
        """Why each waiting request waits, by id."""
        return self.engine_core.waiting_reasons()

    def reset_prefix_cache(self) -> bool:
        """Forget every cached prefix. True when done (it always is)."""
        self.engine_core.reset_prefix_cache()
        return True

    def shutdown(self) -> None:
        """Give back the device's memory; the engine cannot be used afterwards."""
        self.engine_core.shutdown()
