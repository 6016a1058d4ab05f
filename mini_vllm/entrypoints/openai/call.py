"""One request on its way to the engine and back: who asks, under which id, and that nothing of it stays behind."""

import asyncio
import hashlib
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import lru_cache

from starlette.requests import Request
from starlette.responses import Response

from mini_vllm import __version__
from mini_vllm.engine.input_processor import TokenizedPrompt
from mini_vllm.engine.output_stream import merge
from mini_vllm.engine.protocol import EngineClient, NewRequest, RequestStream
from mini_vllm.entrypoints.openai.bodies import PromptTokensDetails, Usage
from mini_vllm.entrypoints.openai.sampling_request import SamplingRequest
from mini_vllm.entrypoints.server.context import RequestContext, context_of
from mini_vllm.entrypoints.server.disconnect import cancel_all, run_until_disconnect
from mini_vllm.entrypoints.server.errors import ApiError
from mini_vllm.entrypoints.server.state import ServerState, state_of
from mini_vllm.entrypoints.server.streaming import sse_response
from mini_vllm.outputs import RequestOutput
from mini_vllm.sampling_params import SamplingParams

Prompts = Sequence[TokenizedPrompt]
_News = tuple[int, RequestOutput | Exception | None]
"""From the stream of this number: an output, its failure, or its end."""


def served_model(state: ServerState, name: str | None) -> str:
    """The name to answer under. Raises the 404 that clients know."""
    if name is None:
        return state.model_name
    if name not in state.model_names:
        raise model_not_found(state, name)
    return name


def model_not_found(state: ServerState, name: str) -> ApiError:
    known = ", ".join(state.model_names)
    return ApiError(
        404,
        f"The model `{name[:200]}` does not exist. Valid aliases: {known}.",
        param="model",
        code="model_not_found",
    )


@dataclass(frozen=True)
class Call:
    """A request for a completion or a chat. id: of the answer; see `engine_id`."""

    request: Request
    body: SamplingRequest
    state: ServerState
    context: RequestContext
    id: str
    model: str
    created: int

    @classmethod
    def begin(cls, request: Request, body: SamplingRequest, prefix: str) -> "Call":
        """Raises `ApiError` for a model that is not served."""
        state = state_of(request)
        model = served_model(state, body.model)
        name = prefix + (body.request_id or secrets.token_hex(16))
        return cls(request, body, state, context_of(request), name, model, int(time.time()))

    @property
    def engine(self) -> EngineClient:
        return self.state.engine

    @property
    def fingerprint(self) -> str:
        """Changes when the same request may get another answer."""
        engine = self.engine
        return _fingerprint(
            self.state.model_root, engine.max_model_len, engine.get_default_sampling_params(), self.state.chat_template
        )

    def engine_id(self, suffix: str = "") -> str:
        """The id of what the engine runs: the answer's own. The same one chosen under two API keys is two."""
        scope = f"/{self.context.owner}" if self.body.request_id and self.context.owner else ""
        return self.id + suffix + scope

    async def submit(self, prompts: Prompts, params: Sequence[SamplingParams]) -> list[RequestStream]:
        """Queue one request a prompt, all or none."""
        body, context = self.body, self.context
        salt = context.cache_salt(body.cache_salt)
        return await self.engine.add_requests(
            [
                NewRequest(
                    request_id=self.engine_id("" if len(prompts) == 1 else f"-{i}"),
                    prompt=prompt,
                    params=one,
                    priority=body.priority or 0,
                    cache_salt=salt,
                    tenant=context.tenant(body.user),
                    arrival_time=context.arrival_time,
                    trace_headers=context.trace_headers,
                )
                for i, (prompt, one) in enumerate(zip(prompts, params, strict=True))
            ]
        )

    def stream(self, events: AsyncGenerator[bytes, None], streams: Sequence[RequestStream]) -> Response:
        """The answer as events."""
        return sse_response(events, keep_alive=self.state.args.sse_keep_alive_interval, closing=streams)

    async def finish(self, streams: Sequence[RequestStream]) -> list[RequestOutput]:
        """The last output of each. Whatever happens, nothing goes on afterwards."""
        async with closing_all(streams):
            return await run_until_disconnect(self.request, _last_outputs(streams))


@lru_cache(maxsize=16)
def _fingerprint(*config: object) -> str:
    return f"mini-vllm-{__version__}-{hashlib.sha256(repr(config).encode()).hexdigest()[:8]}"


@asynccontextmanager
async def closing_all(streams: Sequence[RequestStream]) -> AsyncIterator[None]:
    try:
        yield
    finally:
        for stream in streams:
            await stream.aclose()


async def _last_outputs(streams: Sequence[RequestStream]) -> list[RequestOutput]:
    return [await _last_output(stream) for stream in streams]


async def _last_output(stream: RequestStream) -> RequestOutput:
    last = None
    async for output in stream:
        last = output
    assert last is not None
    return last


# -- outputs of several streams ---------------------------------------------------------------------------------


async def outputs_of(
    streams: Sequence[RequestStream], interval: int | None
) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """The outputs of all streams as they come, with the number of the stream. interval: tokens an output has at least,
    the first and the last excepted."""
    sources = [_paced(stream, interval) if interval else stream for stream in streams]
    if len(sources) == 1:
        async for output in sources[0]:
            yield 0, output
        return
    queue: asyncio.Queue[_News] = asyncio.Queue(maxsize=len(sources))
    tasks = [asyncio.create_task(_pump(i, source, queue)) for i, source in enumerate(sources)]
    try:
        num_open = len(tasks)
        while num_open:
            index, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield index, item
    finally:
        await cancel_all(*tasks)


async def _pump(index: int, source: AsyncIterator[RequestOutput], queue: "asyncio.Queue[_News]") -> None:
    """One task a prompt. It waits for room in the queue, and meanwhile the stream merges."""
    try:
        async for output in source:
            await queue.put((index, output))
    except Exception as error:
        await queue.put((index, error))
    else:
        await queue.put((index, None))


async def _paced(stream: RequestStream, interval: int) -> AsyncGenerator[RequestOutput, None]:
    held: RequestOutput | None = None
    is_first = True
    async for output in stream:
        held = output if held is None else merge(held, output)
        if is_first or held.finished or max(len(choice.token_ids) for choice in held.outputs) >= interval:
            yield held
            held, is_first = None, False


# -- usage ------------------------------------------------------------------------------------------------------


class UsageCounter:
    """Counts the same whether an answer is streamed or not."""

    def __init__(self, prompts: Prompts) -> None:
        self.num_prompt_tokens = [len(prompt.token_ids) for prompt in prompts]
        self.num_output_tokens = 0
        self._num_cached = [0] * len(prompts)

    def note_cached(self, index: int, num_cached_tokens: int) -> None:
        """Of the prompt `index`."""
        self._num_cached[index] = num_cached_tokens

    def total(self) -> Usage:
        num_prompt = sum(self.num_prompt_tokens)
        details = PromptTokensDetails(sum(self._num_cached))
        return Usage(num_prompt, num_prompt + self.num_output_tokens, self.num_output_tokens, details, None)
