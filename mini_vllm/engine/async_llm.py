"""The asynchronous shell: many callers on one event loop, one core beside it.

`AsyncLLM` is what the server serves from (see `engine/protocol.py`). It is handed a client of the core and the two
halves that know text. One task takes the core's messages and fills the streams of the callers. Adding and aborting
never wait, so that there is no moment at which a request could be lost between two states.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from mini_vllm.core.scheduler_output import SchedulerStats
from mini_vllm.engine.admission import Admission
from mini_vllm.engine.arg_utils import EngineArgs
from mini_vllm.engine.beam_search import BeamSearch, drive_beam_search
from mini_vllm.engine.builder import read_text_half
from mini_vllm.engine.input_processor import InputProcessor, PromptType, TokenizedPrompt
from mini_vllm.engine.intake import Intake
from mini_vllm.engine.metrics.stats import StatLoggerBase
from mini_vllm.engine.metrics.tracing import RequestTracer
from mini_vllm.engine.output_processor import OutputProcessor
from mini_vllm.engine.process.async_core_client import AsyncCoreClient, ThreadCoreClient
from mini_vllm.engine.process.messages import (
    AddRequests,
    Ended,
    EngineCoreRequest,
    News,
    UtilityResult,
)
from mini_vllm.engine.process.mp_client import DEFAULT_WATCHDOG_TIMEOUT, ProcessCoreClient
from mini_vllm.engine.process.utility_calls import UtilityCalls
from mini_vllm.engine.protocol import NewRequest, RequestStream
from mini_vllm.engine.request_trace import RequestTraceRecorder
from mini_vllm.engine.text_pool import DEFAULT_TIMEOUT, TextPool
from mini_vllm.engine.trace import StepRecord
from mini_vllm.engine.unfinished import UnfinishedRequests
from mini_vllm.exceptions import EngineDeadError, InvalidParameterError, OverloadedError
from mini_vllm.logger import init_logger
from mini_vllm.outputs import BeamSearchOutput, RequestOutput
from mini_vllm.request import Tenant
from mini_vllm.sampling_params import BeamSearchParams, SamplingParams
from mini_vllm.text.tokenizer import Tokenizer

logger = init_logger(__name__)

T = TypeVar("T")


class AsyncLLM:
    """Serves requests of many tasks of one event loop. Made by `from_engine_args`, ended by `shutdown`."""

    def __init__(
        self,
        client: AsyncCoreClient,
        input_processor: InputProcessor,
        output_processor: OutputProcessor,
        *,
        admission: Admission | None = None,
        text_pool: TextPool | None = None,
        stat_loggers: Sequence[StatLoggerBase] = (),
    ) -> None:
        self.client = client
        self.input_processor = input_processor
        self.output_processor = output_processor
        self.stat_loggers = stat_loggers
        self._unfinished = UnfinishedRequests(client, output_processor, admission or Admission(), stat_loggers)
        self._intake = Intake(input_processor, output_processor, client.info.max_request_tokens)
        self._text_pool = text_pool or TextPool()
        self._calls = UtilityCalls(client.send)
        self._down: str | None = None  # why no engine serves just now
        self._dead_error: EngineDeadError | None = None  # why none ever will again
        self._restart_seconds = 1.0
        self._is_draining = False
        self._dead = asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._run())

    @classmethod
    async def from_engine_args(
        cls,
        args: EngineArgs,
        *,
        in_process: bool = False,
        stat_loggers: Sequence[StatLoggerBase] = (),
        stream_interval: int = 1,
        max_num_queued_reqs: int | None = None,
        max_num_queued_tokens: int | None = None,
        text_timeout: float = DEFAULT_TIMEOUT,
        watchdog_timeout: float = DEFAULT_WATCHDOG_TIMEOUT,
        restart: bool = False,
        trace_recorder: RequestTraceRecorder | None = None,
        tracer: RequestTracer | None = None,
    ) -> "AsyncLLM":
        """Start an engine and wait until it is ready. Raises `ConfigError`, `CheckpointError` and their like.

        in_process: run the core in a thread of this process instead of in one of its own.
        stream_interval: tokens between two outputs of a sequence; its first token and its end come at once.
        max_num_queued_reqs, max_num_queued_tokens: see `Admission`. text_timeout: see `TextPool`.
        watchdog_timeout: seconds of silence after which the engine process is taken for hung and killed.
        restart: start another engine process when it dies. trace_recorder, tracer: see `OutputProcessor`.
        """
        admission = Admission(max_num_queued_reqs, max_num_queued_tokens)
        limits = {
            "stream_interval": stream_interval,
            "text_timeout": text_timeout,
            "watchdog_timeout": watchdog_timeout,
        }
        for name, value in limits.items():
            if not value > 0:
                raise InvalidParameterError(name, f"must be more than 0, got {value!r}")
        # A process of its own imports torch while the tokenizer is read here.
        process = None if in_process else ProcessCoreClient(args, watchdog_timeout, restart)
        try:
            tokenizer, make_input_processor = await asyncio.to_thread(read_text_half, args)
            client: AsyncCoreClient
            if process is None:
                client = await ThreadCoreClient.start(args, tokenizer)
            else:
                await process.start_engine(tokenizer)
                client = process
        except BaseException:
            if process is not None:
                process.shutdown()
            raise
        return cls(
            client,
            make_input_processor(max_model_len=client.info.max_model_len, clock=time.monotonic),
            OutputProcessor(tokenizer, tracer, stream_interval, trace_recorder),
            admission=admission,
            text_pool=TextPool(text_timeout),
            stat_loggers=stat_loggers,
        )

    # -- work on text -----------------------------------------------------------------------------------------

    async def tokenize(self, prompts: Sequence[PromptType], add_special_tokens: bool = True) -> list[TokenizedPrompt]:
        return await self.run_text_work(lambda: self.input_processor.tokenize(prompts, add_special_tokens))

    async def run_text_work(self, work: Callable[[], T]) -> T:
        try:
            return await self._text_pool.run(work)
        except OverloadedError as error:
            self._count_rejection(error)
            raise

    # -- requests ---------------------------------------------------------------------------------------------

    async def add_requests(self, requests: Sequence[NewRequest]) -> list[RequestStream]:
        self._require_alive()
        self._require_open()
        return self._add(requests)

    def _add(self, requests: Sequence[NewRequest], within: str | None = None) -> list[RequestStream]:
        """Queue all or none. within: the id of a search that was admitted as one request, with all its beams."""
        made = self._intake.make_requests(requests)
        if within is None:
            self._admit({request.request_id: request.num_prompt_tokens for request in made})
        try:
            self.client.send(AddRequests([EngineCoreRequest.of(request) for request in made]))
        except InvalidParameterError:
            for request in made:
                self._unfinished.forget(request.request_id)
            raise
        return [self._unfinished.open_stream(request, new) for request, new in zip(made, requests, strict=True)]

    def _admit(self, sizes: Mapping[str, int]) -> None:
        """sizes: tokens of the prompt by request id."""
        try:
            self._unfinished.admit(sizes)
        except OverloadedError as error:
            self._count_rejection(error)
            raise

    def _require_open(self) -> None:
        """Unless requests are taken just now."""
        if self._is_draining:
            error = OverloadedError("the engine is shutting down", "shutting_down")
        elif self._down is not None:
            seconds = math.ceil(self._restart_seconds)
            error = OverloadedError(f"the engine is being started again: {self._down}", "engine_restarting", seconds)
        else:
            return
        self._count_rejection(error)
        raise error

    def _require_alive(self) -> None:
        if self._dead_error is not None:
            raise EngineDeadError(str(self._dead_error))

    def _count_rejection(self, error: OverloadedError) -> None:
        for stat_logger in self.stat_loggers:
            stat_logger.record_rejection(error.reason)

    async def generate(
        self,
        prompt: PromptType | TokenizedPrompt,
        params: SamplingParams | None,
        request_id: str,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        tenant: Tenant = Tenant(),  # noqa: B008 (frozen)
    ) -> AsyncGenerator[RequestOutput, None]:
        """The outputs of one prompt, by `params.output_kind`. A generator that is closed, or whose task is cancelled,
        aborts its request. params: None takes the model's own defaults."""
        if not isinstance(prompt, TokenizedPrompt):
            prompt = (await self.tokenize([prompt]))[0]
        params = self.get_default_sampling_params() if params is None else params
        options: dict[str, Any] = {"priority": priority, "cache_salt": cache_salt, "tenant": tenant}
        (stream,) = await self.add_requests(
            [NewRequest(request_id=request_id, prompt=prompt, params=params, **options)]
        )
        try:
            async for output in stream:
                yield output
        finally:
            await stream.aclose()

    async def beam_search(
        self,
        prompt: PromptType | TokenizedPrompt,
        params: BeamSearchParams,
        request_id: str,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        tenant: Tenant = Tenant(),  # noqa: B008 (frozen)
    ) -> BeamSearchOutput:
        """The likeliest continuations of one prompt, best first; see `LLM.beam_search`. A search counts as one request,
        however many beams it has. Cancellation aborts what runs of it."""
        if not isinstance(prompt, TokenizedPrompt):
            prompt = (await self.tokenize([prompt]))[0]
        self._require_alive()
        self._require_open()
        search = BeamSearch(self.input_processor, [prompt], params)
        options: dict[str, Any] = {"priority": priority, "cache_salt": cache_salt, "tenant": tenant}
        request = NewRequest(request_id=request_id, prompt=prompt, params=search.step_params, **options)
        self._admit({request_id: len(prompt.token_ids)})
        try:
            await drive_beam_search(search, request, lambda beams: self._add(beams, within=request_id))
        finally:
            self._unfinished.forget(request_id)
        return search.outputs()[0]

    async def abort(self, request_ids: str | Iterable[str]) -> None:
        self._unfinished.abort([request_ids] if isinstance(request_ids, str) else list(request_ids))

    # -- the core's messages ----------------------------------------------------------------------------------

    async def _run(self) -> None:
        """The output task: serve until the engine is dead for good."""
        while True:
            try:
                await self._take_messages()
            except EngineDeadError as error:
                self._lose_engine(str(error))
                if not await self._revive():
                    self._die(error)
                    return
            except Exception as error:
                logger.exception("a message of the engine could not be taken; all unfinished requests end")
                why = f"a message of the engine was lost: {type(error).__name__}: {error}"
                self._unfinished.fail_unfinished(why)
                self._calls.fail(why)

    async def _take_messages(self) -> None:
        while True:
            message = await self.client.receive()
            if isinstance(message, News):
                await self._unfinished.take(message.outputs)
            elif isinstance(message, UtilityResult):
                self._calls.settle(message)
            elif isinstance(message, Ended):
                self._unfinished.take_ended(message)

    def _lose_engine(self, why: str) -> None:
        self._down = why
        self._unfinished.fail_all(why)
        self._calls.fail(why)

    async def _revive(self) -> bool:
        """Start the engine again as often as the client is willing to. Whether it serves."""
        while not self._is_draining and self.client.may_restart():
            start = time.monotonic()
            try:
                await self.client.restart()
            except Exception as error:
                logger.error("the engine could not be started again: %s", error)
                continue
            self._restart_seconds = time.monotonic() - start
            self._intake.max_request_tokens = self.client.info.max_request_tokens
            self.input_processor.max_model_len = self.client.info.max_model_len
            self._down = None
            return True
        return False

    def _die(self, error: EngineDeadError) -> None:
        self._dead_error = error
        self._dead.set()

    # -- looking in -------------------------------------------------------------------------------------------

    @property
    def max_model_len(self) -> int:
        return self.input_processor.max_model_len

    def get_tokenizer(self) -> Tokenizer:
        return self.input_processor.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        return self.input_processor.default_sampling_params

    async def check_health(self) -> None:
        if self._down is not None:
            raise EngineDeadError(self._down)

    @property
    def is_running(self) -> bool:
        return self._down is None

    @property
    def dead_error(self) -> EngineDeadError | None:
        """Why the engine is dead for good; None while it is not."""
        return self._dead_error

    async def wait_dead(self) -> None:
        """Until the engine is dead for good, or shut down."""
        await self._dead.wait()

    @property
    def num_unfinished_requests(self) -> int:
        return self._unfinished.admission.num_reqs

    async def stats(self) -> SchedulerStats:
        return await self._call(SchedulerStats, "stats")

    async def step_records(self, n: int | None = None) -> list[StepRecord]:
        return await self._call(list[StepRecord], "step_records", n)

    async def waiting_reasons(self) -> dict[str, str]:
        return await self._call(dict[str, str], "waiting_reasons")

    async def reset_prefix_cache(self) -> None:
        await self._call(type(None), "reset_prefix_cache")

    async def check_integrity(self) -> None:
        await self._call(type(None), "check_integrity")

    async def _call(self, result_type: type[T], method: str, *args: Any) -> T:
        await self.check_health()
        return await self._calls.call(result_type, method, *args)

    # -- the end ----------------------------------------------------------------------------------------------

    async def drain(self, timeout: float) -> None:
        """Take no more requests, wait for the others, and abort what is left after `timeout` seconds."""
        self._is_draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._unfinished.idle.wait(), timeout)
        await self.abort(list(self._unfinished.streams))

    def shutdown(self) -> None:
        """Stop the engine at once; whoever still waits gets `EngineDeadError`. May be called twice."""
        self._task.cancel()
        self.client.shutdown()
        self._text_pool.shutdown()
        if self._dead_error is None:
            self._lose_engine("the engine was shut down")
            self._die(EngineDeadError("the engine was shut down"))
