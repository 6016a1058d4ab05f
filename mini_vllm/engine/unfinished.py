"""Every request that was queued and has not ended, from the news of the core to the stream of its reader.

`UnfinishedRequests` belongs to one `AsyncLLM` and never waits but to let others have a turn. It promises that whatever
ends a request (its end, its reader, an abort, an error, the death of the engine) leaves nothing of it behind, and that
an id may be used again at once.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence

from mini_vllm.core.scheduler_output import EngineCoreOutput, EngineCoreOutputs
from mini_vllm.engine.admission import Admission
from mini_vllm.engine.metrics.stats import IterationStats, StatLoggerBase, record_all
from mini_vllm.engine.output_processor import OutputProcessor
from mini_vllm.engine.output_stream import OutputStream
from mini_vllm.engine.process.async_core_client import AsyncCoreClient
from mini_vllm.engine.process.messages import AbortRequests, Ended, StopRequests
from mini_vllm.engine.protocol import NewRequest
from mini_vllm.exceptions import EngineDeadError, RequestError
from mini_vllm.logger import init_logger
from mini_vllm.outputs import RequestOutput
from mini_vllm.request import Request
from mini_vllm.sampling_params import RequestOutputKind

logger = init_logger(__name__)

CHUNK = 128
"""Sequences whose news are processed before the event loop gets a turn."""


class UnfinishedRequests:
    """streams: by request id. idle: set while nothing is unfinished. leaving: ids of the core's requests that it was
    told to end and has not yet said to have ended, each as often as it was told."""

    def __init__(
        self,
        client: AsyncCoreClient,
        output_processor: OutputProcessor,
        admission: Admission,
        stat_loggers: Sequence[StatLoggerBase],
    ) -> None:
        self.client = client
        self.output_processor = output_processor
        self.admission = admission
        self.stat_loggers = stat_loggers
        self.streams: dict[str, OutputStream] = {}
        self.leaving: Counter[str] = Counter()
        self.idle = asyncio.Event()
        self.idle.set()

    # -- beginning --------------------------------------------------------------------------------------------

    def admit(self, sizes: Mapping[str, int]) -> None:
        """Count requests, by tokens of their prompts; see `Admission.admit`."""
        self.admission.admit(sizes)
        if sizes:
            self.idle.clear()

    def open_stream(self, request: Request, new: NewRequest) -> OutputStream:
        """The stream of a request that was sent to the core."""
        self.output_processor.add_request(request, new.prompt.text, new.trace_headers)
        merges = request.sampling_params.output_kind is RequestOutputKind.DELTA
        stream = self.streams[request.request_id] = OutputStream(request.request_id, merges, self._leave)
        return stream

    # -- news of the core -------------------------------------------------------------------------------------

    async def take(self, news: EngineCoreOutputs) -> None:
        """One step. Between two parts of a big one, and after it, everyone else on the loop gets a turn."""
        now = news.timestamp or time.monotonic()
        iteration = IterationStats(now)
        for start in range(0, len(news.outputs), CHUNK):
            if start:
                await asyncio.sleep(0)
            self._process(news.outputs[start : start + CHUNK], now, iteration)
        record_all(self.stat_loggers, news.stats, iteration)  # before callers wake, so that they see themselves counted
        await asyncio.sleep(0)

    def _process(self, part: Sequence[EngineCoreOutput], now: float, iteration: IterationStats) -> None:
        if self.leaving:  # a request that was added since may have the id of one that is leaving
            part = [item for item in part if item.request_id not in self.leaving]
        try:
            for output in self.output_processor.process(part, now, iteration):
                self._deliver(output)
            self._send_end(StopRequests(self.output_processor.take_stopped()))
        except Exception as error:
            self._give_up([item.request_id for item in part], error)

    def _deliver(self, output: RequestOutput) -> None:
        stream = self.streams.get(output.request_id)
        if stream is not None:
            stream.put(output)
        if output.finished:
            self.forget(output.request_id)

    # -- ends -------------------------------------------------------------------------------------------------

    def forget(self, request_id: str) -> None:
        """It has ended, or was never begun."""
        self.streams.pop(request_id, None)
        self.admission.release(request_id)
        if not self.admission.num_reqs:
            self.idle.set()

    def abort(self, request_ids: Sequence[str]) -> None:
        """End requests in whatever state they are; their streams end with finish_reason 'abort'."""
        for output in self._end(request_ids):
            self._deliver(output)

    def _leave(self, request_id: str) -> None:
        """A reader has left its stream before the end."""
        self.streams.pop(request_id, None)
        self.abort([request_id])

    def _end(self, request_ids: Sequence[str], **why: str) -> list[RequestOutput]:
        """End requests here and in the core; their last outputs. why: see `OutputProcessor.abort`."""
        self._send_end(AbortRequests(self.output_processor.core_ids(request_ids)))
        now = time.monotonic()
        iteration = IterationStats(now)
        try:
            outputs = self.output_processor.abort(request_ids, now, iteration, **why)
        except Exception as error:
            self._give_up(self.output_processor.core_ids(request_ids), error)
            return []
        if outputs:
            record_all(self.stat_loggers, None, iteration)
        return outputs

    def _send_end(self, message: AbortRequests | StopRequests) -> None:
        if message.request_ids:
            self.leaving.update(message.request_ids)
            self.client.send(message)

    def take_ended(self, message: Ended) -> None:
        """The core's answer to what `_send_end` sent."""
        self.leaving -= Counter(message.request_ids)

    def _give_up(self, core_ids: Sequence[str], error: Exception) -> None:
        """The news of these sequences of the core could not be processed: their requests end, and with them those
        that are done but whose output has not reached the stream."""
        logger.error("the news of %d sequences could not be processed; they end", len(core_ids), exc_info=error)
        lost = set(self.streams).difference(self.output_processor.unfinished_request_ids())
        broken = [*self.output_processor.requests_of(core_ids), *lost]
        self._fail(broken, f"the output could not be processed: {type(error).__name__}: {error}", core_ids)

    def _fail(self, request_ids: Sequence[str], why: str, core_ids: Sequence[str] = ()) -> None:
        """End requests whose output can no longer be told. core_ids: of more that the core may still run."""
        running = dict.fromkeys((*core_ids, *self.output_processor.core_ids(request_ids)))
        for request_id in request_ids:
            self.output_processor.forget(request_id)
            if (stream := self.streams.get(request_id)) is not None:
                stream.fail(RequestError(why))
            self.forget(request_id)
        self._send_end(AbortRequests(list(running)))

    def fail_unfinished(self, why: str) -> None:
        """News was lost, and nobody knows whose."""
        self._fail(list({*self.streams, *self.output_processor.unfinished_request_ids()}), why)

    def fail_all(self, why: str) -> None:
        """The engine is gone, and everything it knew with it."""
        streams = list(self.streams.values())
        self._end(self.output_processor.unfinished_request_ids(), finish_reason="error", error=why)
        for stream in streams:
            stream.fail(EngineDeadError(why))
            self.forget(stream.request_id)
        self.leaving.clear()
