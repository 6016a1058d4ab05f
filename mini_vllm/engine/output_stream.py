"""What one caller reads: a slot that holds at most one output, however far its reader is behind.

`OutputStream` is filled by the output task of `AsyncLLM` and emptied by one reader on the same event loop. Deltas that
nobody took yet are merged, other outputs replace the one before, so that a slow reader holds up nobody and costs no
memory beyond its own answer.
"""

import asyncio
from collections.abc import Callable

from mini_vllm.exceptions import RequestError
from mini_vllm.outputs import CompletionOutput, RequestOutput


class OutputStream:
    """The outputs of one request until one says `finished`. See `protocol.RequestStream`.

    merges: whether outputs are deltas. on_close: called with the request's id when the reader leaves before the end.
    """

    def __init__(self, request_id: str, merges: bool, on_close: Callable[[str], None]) -> None:
        self._request_id = request_id
        self._merges = merges
        self._on_close = on_close
        self._output: RequestOutput | None = None
        self._error: BaseException | None = None
        self._ended = False  # nothing more will be put
        self._reader: asyncio.Future[None] | None = None

    @property
    def request_id(self) -> str:
        return self._request_id

    @property
    def ended(self) -> bool:
        """Whether the engine is done with it; the reader may have something left to take."""
        return self._ended

    # -- the engine's side ------------------------------------------------------------------------------------

    def put(self, output: RequestOutput) -> None:
        """Hand over an output. A request that failed ends the stream with `RequestError` instead."""
        if output.finished and output.error is not None:
            self.fail(RequestError(output.error))
            return
        waiting = self._output
        self._output = output if waiting is None or not self._merges else merge(waiting, output)
        self._ended = output.finished
        self._wake()

    def fail(self, error: BaseException) -> None:
        """End the stream with `error`, after what is in the slot. Ignored once it has ended."""
        if not self._ended:
            self._error, self._ended = error, True
            self._wake()

    def _wake(self) -> None:
        reader = self._reader
        if reader is not None:
            self._reader = None
            if not reader.done():  # it is when its task was cancelled
                reader.set_result(None)

    # -- the reader's side ------------------------------------------------------------------------------------

    def __aiter__(self) -> "OutputStream":
        return self

    async def __anext__(self) -> RequestOutput:
        while self._output is None:
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            if self._ended:
                raise StopAsyncIteration
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        output, self._output = self._output, None
        return output

    async def aclose(self) -> None:
        """Abort the request unless it is finished. May be called twice."""
        self.close()

    def close(self) -> None:
        self._output = self._error = None
        if not self._ended:
            self._ended = True
            self._on_close(self._request_id)
        self._wake()


def merge(earlier: RequestOutput, later: RequestOutput) -> RequestOutput:
    """Two deltas as one, in the objects of the earlier, which nobody has seen yet."""
    known = {completion.index: completion for completion in earlier.outputs}
    for completion in later.outputs:
        if completion.index in known:
            _extend(known[completion.index], completion)
        else:
            earlier.outputs.append(completion)
    if len(earlier.outputs) > len(known):
        earlier.outputs.sort(key=lambda completion: completion.index)
    if later.prompt_logprobs is not None:
        earlier.prompt_logprobs = later.prompt_logprobs
    earlier.finished, earlier.error = later.finished, later.error
    earlier.metrics, earlier.num_cached_tokens = later.metrics, later.num_cached_tokens
    return earlier


def _extend(earlier: CompletionOutput, later: CompletionOutput) -> None:
    earlier.text += later.text
    earlier.token_ids += later.token_ids
    if earlier.logprobs is not None and later.logprobs is not None:
        earlier.logprobs += later.logprobs
    earlier.cumulative_logprob = later.cumulative_logprob
    earlier.finish_reason, earlier.stop_reason = later.finish_reason, later.stop_reason
