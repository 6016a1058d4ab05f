"""What a server may ask of an asynchronous engine, and what it gets: the seam between the API and `AsyncLLM`.

The handlers of every API are written against `EngineClient`; the tests hand them one whose core runs in the same
process, the server one whose core runs in its own.
"""

from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from mini_vllm.core.scheduler_output import SchedulerStats
from mini_vllm.engine.input_processor import InputProcessor, PromptType, TokenizedPrompt
from mini_vllm.engine.trace import StepRecord
from mini_vllm.outputs import BeamSearchOutput, RequestOutput
from mini_vllm.request import Tenant
from mini_vllm.sampling_params import BeamSearchParams, SamplingParams
from mini_vllm.text.tokenizer import Tokenizer

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class NewRequest:
    """One request whose prompt is tokenised. params: not resolved yet (see `InputProcessor.resolve_params`).

    trace_headers: `traceparent` and the like, for the spans of this request.
    """

    request_id: str
    prompt: TokenizedPrompt
    params: SamplingParams
    priority: int = 0
    cache_salt: str | None = None
    tenant: Tenant = Tenant()  # noqa: RUF009 (frozen)
    arrival_time: float | None = None
    trace_headers: Mapping[str, str] | None = None


class RequestStream(Protocol):
    """The outputs of one request, by its `output_kind`, until one says `finished`.

    With DELTA, outputs that nobody took yet are merged into one, so that a slow reader costs no memory.
    Iterating raises `RequestError` when the request failed alone, `EngineDeadError` when the engine died.
    """

    @property
    def request_id(self) -> str: ...

    def __aiter__(self) -> AsyncIterator[RequestOutput]: ...

    async def __anext__(self) -> RequestOutput: ...

    async def aclose(self) -> None:
        """Abort the request unless it is finished. May be called twice."""


class EngineClient(Protocol):
    """An engine that serves many callers on one event loop."""

    input_processor: InputProcessor

    @property
    def max_model_len(self) -> int:
        """Tokens a request may hold, prompt and output together."""

    def get_tokenizer(self) -> Tokenizer: ...

    def get_default_sampling_params(self) -> SamplingParams: ...

    async def tokenize(self, prompts: Sequence[PromptType], add_special_tokens: bool = True) -> list[TokenizedPrompt]:
        """Encode and check prompts, off the event loop and within the time limit for work on text."""

    async def run_text_work(self, work: Callable[[], T]) -> T:
        """Run `work` (a chat template, say) off the event loop and within the same limit."""

    async def add_requests(self, requests: Sequence[NewRequest]) -> list[RequestStream]:
        """Queue all of these or, when this raises, none: `InvalidParameterError`, `OverloadedError`,
        `EngineDeadError`."""

    async def beam_search(
        self,
        prompt: TokenizedPrompt,
        params: BeamSearchParams,
        request_id: str,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        tenant: Tenant = Tenant(),  # noqa: B008 (frozen)
    ) -> BeamSearchOutput:
        """The likeliest continuations of a prompt, best first. Raises as `add_requests` does, and `RequestError`."""

    async def abort(self, request_ids: str | Iterable[str]) -> None:
        """End requests in whatever state they are; their streams end with finish_reason 'abort'."""

    async def check_health(self) -> None:
        """Raise `EngineDeadError` unless the engine serves requests."""

    @property
    def is_running(self) -> bool: ...

    @property
    def num_unfinished_requests(self) -> int: ...

    async def stats(self) -> SchedulerStats: ...

    async def step_records(self, n: int | None = None) -> list[StepRecord]: ...

    async def waiting_reasons(self) -> dict[str, str]: ...

    async def reset_prefix_cache(self) -> None: ...

    async def check_integrity(self) -> None:
        """Raise AssertionError if the idle core has lost a block or a request."""
