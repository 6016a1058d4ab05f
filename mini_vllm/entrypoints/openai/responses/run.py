"""One response while it is generated: the engine's outputs become its text, its states and its events."""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable, Iterator

from mini_vllm.engine.protocol import RequestStream
from mini_vllm.entrypoints.openai.bodies import ChatLogprob
from mini_vllm.entrypoints.openai.responses.events import EventWriter
from mini_vllm.entrypoints.openai.responses.objects import (
    InputTokensDetails,
    OutputMessage,
    OutputText,
    OutputTokensDetails,
    ResponseObject,
    ResponseUsage,
)
from mini_vllm.entrypoints.openai.responses.store import ResponseStore, StoredResponse
from mini_vllm.entrypoints.server.encoding import encode
from mini_vllm.entrypoints.server.errors import api_error_from, is_explained
from mini_vllm.exceptions import OverloadedError
from mini_vllm.logger import init_logger
from mini_vllm.outputs import RequestOutput

logger = init_logger(__name__)

LogprobsOf = Callable[[RequestOutput], list[ChatLogprob]]
"""From an output to the log-probabilities of its tokens as they are shown; [] when nobody asked."""


class Generation:
    """Fills `response` from `stream`. One of `run` and `frames` is called, once.

    on_end: called when the response has entered its final state, before a client hears of it.
    """

    def __init__(
        self,
        response: ResponseObject,
        stream: RequestStream,
        logprobs_of: LogprobsOf,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self.response = response
        self.on_end = on_end
        self._stream = stream
        self._logprobs_of = logprobs_of
        self._item = OutputMessage(id=f"msg_{secrets.token_hex(16)}")
        self._texts: list[str] = []
        self._logprobs: list[ChatLogprob] = []
        self._num_output_tokens = 0
        self._last: RequestOutput | None = None
        self._finish_reason: str | None = None

    async def run(self) -> None:
        """Generate all of it. Raises what goes wrong."""
        try:
            async for output in self._stream:
                self._take(output)
        finally:
            await self._stream.aclose()
        self._end()

    async def frames(self) -> AsyncGenerator[bytes, None]:
        """Generate, event by event. What goes wrong is the last event."""
        writer = EventWriter(self.response, self._item.id)
        yield writer.state("created")
        yield writer.state(self.response.status)
        waiting: list[ChatLogprob] = []  # log-probabilities of tokens whose text is not known yet
        try:
            async for output in self._stream:
                if self._last is None:
                    for frame in self._begin(writer):
                        yield frame
                text, logprobs = self._take(output)
                waiting += logprobs
                if text or (waiting and output.finished):
                    yield writer.delta(text, waiting)
                    waiting = []
            self._end()
        except Exception as error:
            self._fail(error)
        finally:
            await self._stream.aclose()
        if self.response.status != "failed":
            for frame in writer.item_closing(self._item):
                yield frame
        yield writer.state(self.response.status)

    def _begin(self, writer: EventWriter) -> Iterator[bytes]:
        if self.response.status == "queued":
            self.response.status = "in_progress"
            yield writer.state("in_progress")
        yield from writer.item_opening(self._item)

    def _take(self, output: RequestOutput) -> tuple[str, list[ChatLogprob]]:
        """Add an output to what there is; its own text and log-probabilities."""
        completion, self._last = output.outputs[0], output
        logprobs = self._logprobs_of(output)
        self._texts.append(completion.text)
        self._logprobs += logprobs
        self._num_output_tokens += len(completion.token_ids)
        self._finish_reason = completion.finish_reason
        return completion.text, logprobs

    def _end(self) -> None:
        if self._finish_reason not in ("stop", "length"):
            raise OverloadedError("the request was aborted: the server is shutting down", "shutting_down")
        self._finish("completed" if self._finish_reason == "stop" else "incomplete")

    def cancel(self) -> None:
        """Enter the state 'cancelled' with what there is."""
        self._finish("cancelled")

    def _fail(self, error: Exception) -> None:
        if not is_explained(error):
            logger.exception("response %s failed", self.response.id)
        self._write_item()
        self.response.fail(api_error_from(error).message, self._usage())
        self.on_end()

    def _finish(self, status: str) -> None:
        self._write_item()
        self.response.finish(status, self._usage())
        self.on_end()

    def _write_item(self) -> None:
        if self._last is not None:
            self._item.content = [OutputText(text="".join(self._texts), logprobs=self._logprobs)]
            self.response.output = [self._item]

    def _usage(self) -> ResponseUsage | None:
        if self._last is None:
            return None
        num_input, num_output = len(self._last.prompt_token_ids), self._num_output_tokens
        details = InputTokensDetails(self._last.num_cached_tokens)
        return ResponseUsage(num_input, details, num_output, OutputTokensDetails(), num_input + num_output)


async def run_in_background(generation: Generation, record: StoredResponse, store: ResponseStore) -> None:
    """Generate for whoever comes to ask; every change of state is in the record at once. Cancelling ends it so."""
    response = generation.response
    generation.on_end = lambda: _show(response, record, store)
    has_begun = False
    try:
        async for frame in generation.frames():
            if record.events is not None:
                record.events.append(frame)
                store.charge(record)
            if not has_begun and response.status == "in_progress":
                has_begun = True
                _show(response, record, store)
    except asyncio.CancelledError:
        generation.cancel()
    finally:
        if record.events is not None:
            record.events.end()


def _show(response: ResponseObject, record: StoredResponse, store: ResponseStore) -> None:
    record.body = encode(response)
    record.item_ids = (*record.item_ids, *(item.id for item in response.output))
    store.note_change(record)
