"""What the shell and the engine say to each other: the messages of `AsyncLLM`'s core, typed and plain.

The same objects go between threads as they are and between processes as msgpack. A request travels as an
`EngineCoreRequest`, from which the core makes its own `Request`.
"""

from typing import Any

import msgspec

from mini_vllm import exceptions
from mini_vllm.core.scheduler_output import EngineCoreOutputs
from mini_vllm.exceptions import EngineDeadError, InvalidParameterError, MiniVLLMError
from mini_vllm.request import Request, Tenant
from mini_vllm.sampling_params import SamplingParams


class EngineCoreRequest(msgspec.Struct, array_like=True):
    """Everything the core is told about a request. See `Request`."""

    request_id: str
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    eos_token_id: int | None
    arrival_time: float
    priority: int
    max_model_len: int | None
    cache_salt: str | None
    child_ids: tuple[str, ...]
    bad_words_token_ids: list[list[int]]
    tenant: tuple[str, str]

    @classmethod
    def of(cls, request: Request) -> "EngineCoreRequest":
        """The message for a request that no core has seen yet."""
        return cls(
            request.request_id,
            list(request.prompt_token_ids),
            request.sampling_params,
            request.eos_token_id,
            request.arrival_time,
            request.priority,
            request.max_model_len,
            request.cache_salt,
            request.unborn_ids,
            [list(ids) for ids in request.bad_words_token_ids],
            (request.tenant.name, request.tenant.user),
        )

    def to_request(self) -> Request:
        """The core's own record of it."""
        return Request(
            self.request_id,
            self.prompt_token_ids,
            self.sampling_params,
            eos_token_id=self.eos_token_id,
            arrival_time=self.arrival_time,
            priority=self.priority,
            max_model_len=self.max_model_len,
            cache_salt=self.cache_salt,
            child_ids=self.child_ids,
            bad_words_token_ids=self.bad_words_token_ids,
            tenant=Tenant(*self.tenant),
        )


# -- to the engine ---------------------------------------------------------------------------------------------


class AddRequests(msgspec.Struct, array_like=True, tag=0):
    """Queue these, in this order."""

    requests: list[EngineCoreRequest]


class AbortRequests(msgspec.Struct, array_like=True, tag=1):
    """End these in whatever state they are."""

    request_ids: list[str]


class StopRequests(msgspec.Struct, array_like=True, tag=2):
    """End these: their text has reached a stop string."""

    request_ids: list[str]


class UtilityCall(msgspec.Struct, array_like=True, tag=3):
    """Answer with a `UtilityResult` of the same `call_id`. See `core_loop.UTILITIES`."""

    call_id: int
    method: str
    args: list[Any] = []


class Shutdown(msgspec.Struct, array_like=True, tag=4):
    """Stop now, whatever is running."""


class TokenizerFacts(msgspec.Struct, frozen=True):
    """Where a tokenizer was read, and its highest id + 1."""

    name_or_path: str
    vocab_size: int


class Start(msgspec.Struct, array_like=True, tag=5):
    """The first message to a process: build an engine of these `EngineArgs`.

    heartbeat: seconds after which an idle engine says that it is alive.
    tokenizer: what the engine has to know of it; the text stays with the sender.
    """

    engine_args: dict[str, Any]
    heartbeat: float
    tokenizer: "TokenizerFacts"


ToEngine = AddRequests | AbortRequests | StopRequests | UtilityCall | Shutdown | Start


# -- from the engine -------------------------------------------------------------------------------------------


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine turned out to be.

    num_gpu_blocks: of the KV cache pool, the null block included.
    max_request_tokens: what a lone request can hold in it.
    """

    max_model_len: int
    num_gpu_blocks: int
    block_size: int
    max_request_tokens: int
    dtype: str
    device: str
    pid: int
    versions: dict[str, str] = {}


class ErrorReport(msgspec.Struct, frozen=True):
    """An exception of the engine. field: of an `InvalidParameterError`."""

    kind: str
    message: str
    field: str | None = None

    @classmethod
    def of(cls, error: BaseException) -> "ErrorReport":
        return cls(type(error).__name__, str(error), getattr(error, "field", None))

    def rebuild(self) -> Exception:
        """The same error where it is one of ours, else an `EngineDeadError` that names it."""
        kind = getattr(exceptions, self.kind, None)
        if not (isinstance(kind, type) and issubclass(kind, MiniVLLMError)):
            return EngineDeadError(f"{self.kind}: {self.message}")
        if issubclass(kind, InvalidParameterError):
            field = self.field or ""
            return kind(field, self.message.removeprefix(f"{field}: "))
        return kind(self.message)


class Ready(msgspec.Struct, array_like=True, tag=0):
    """The engine takes requests."""

    info: EngineInfo


class News(msgspec.Struct, array_like=True, tag=1):
    """What one step did."""

    outputs: EngineCoreOutputs


class UtilityResult(msgspec.Struct, array_like=True, tag=2):
    """The answer to a `UtilityCall`: msgpack (the core goes on changing the objects), or why there is none."""

    call_id: int
    result: bytes = b""
    error: ErrorReport | None = None


class Heartbeat(msgspec.Struct, array_like=True, tag=3):
    """The engine is idle and well."""


class Dying(msgspec.Struct, array_like=True, tag=4):
    """The last message of an engine that cannot go on, or could not start."""

    error: ErrorReport


class Ended(msgspec.Struct, array_like=True, tag=5):
    """The answer to `AbortRequests` and `StopRequests`: no news of these follow, unless they are added again."""

    request_ids: list[str]


FromEngine = Ready | News | UtilityResult | Heartbeat | Dying | Ended


# -- as bytes --------------------------------------------------------------------------------------------------

encode = msgspec.msgpack.Encoder().encode
"""Either kind of message as msgpack. A step's news take about 1 us a request to encode and decode as they are."""

decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
