"""The client of an engine in a process of its own, and of the processes that take its place when it dies.

See `engine_process.py` for one process. Here is what outlives it: the arguments it is started with, and the
decision whether to start another.
"""

import dataclasses
import time
from collections import deque
from typing import Any

import msgspec

from mini_vllm.engine.arg_utils import EngineArgs
from mini_vllm.engine.process.engine_process import EngineProcess
from mini_vllm.engine.process.messages import (
    AddRequests,
    EngineCoreRequest,
    EngineInfo,
    FromEngine,
    ToEngine,
    TokenizerFacts,
    encode,
)
from mini_vllm.exceptions import ConfigError, InvalidParameterError
from mini_vllm.logger import init_logger
from mini_vllm.text.tokenizer import Tokenizer

logger = init_logger(__name__)

DEFAULT_WATCHDOG_TIMEOUT = 300.0
MAX_CRASHES, CRASH_WINDOW_SECONDS = 3, 300.0
"""So many crashes within so many seconds, and the engine is not started again."""


class ProcessCoreClient:
    """An `AsyncCoreClient` whose core is in another process. restarts: start another when it dies.

    The process starts at once, and imports meanwhile; its engine starts when the tokenizer is known.
    """

    info: EngineInfo

    def __init__(self, args: EngineArgs, watchdog_timeout: float, restarts: bool) -> None:
        self._engine_args = portable_args(args)
        self._watchdog_timeout = watchdog_timeout
        self._restarts = restarts
        self._crashes: deque[float] = deque(maxlen=MAX_CRASHES)
        self._is_shut_down = False
        self._process = EngineProcess(self._engine_args, watchdog_timeout)
        self._tokenizer: TokenizerFacts

    async def start_engine(self, tokenizer: Tokenizer) -> None:
        """Return once the engine is ready. Raises what kept it from starting; the process is gone then."""
        self._tokenizer = TokenizerFacts(tokenizer.name_or_path, tokenizer.vocab_size)
        try:
            self.info = await self._process.start_engine(self._tokenizer)
        except BaseException:
            self.shutdown()
            raise

    @property
    def pid(self) -> int:
        """Of the process that serves now."""
        return self._process.pid

    def send(self, message: ToEngine) -> None:
        try:
            self._process.send(message)
        except (TypeError, ValueError, OverflowError) as error:
            if isinstance(message, AddRequests):
                raise why_not_sendable(message.requests) from error
            raise

    async def receive(self) -> FromEngine:
        return await self._process.receive()

    def may_restart(self) -> bool:
        """Asked once for each death: whether another process may take the place of the one that died."""
        if not self._restarts or self._is_shut_down:
            return False
        now = time.monotonic()
        self._crashes.append(now)
        if len(self._crashes) == MAX_CRASHES and now - self._crashes[0] < CRASH_WINDOW_SECONDS:
            logger.error("the engine died %d times within %.0f s and is given up", MAX_CRASHES, CRASH_WINDOW_SECONDS)
            return False
        return True

    async def restart(self) -> None:
        """Start another process with the same arguments and wait until it is ready."""
        logger.warning("starting the engine again")
        self._process.shutdown()
        self._process = EngineProcess(self._engine_args, self._watchdog_timeout)
        self.info = await self._process.start_engine(self._tokenizer)

    def shutdown(self) -> None:
        self._is_shut_down = True
        self._process.shutdown()


def portable_args(args: EngineArgs) -> dict[str, Any]:
    """The arguments as they are sent. Raises `ConfigError` for what exists in this process only."""
    if any(not isinstance(item, str) for item in args.logits_processors):
        raise ConfigError(
            "logits_processors: the engine runs in another process, which takes no classes; name them module:Class"
        )
    return {field.name: getattr(args, field.name) for field in dataclasses.fields(args)}


def why_not_sendable(requests: list[EngineCoreRequest]) -> InvalidParameterError:
    """The error that names the field of the first request that cannot be encoded."""
    for request in requests:
        if request.sampling_params.logits_processors:
            return InvalidParameterError(
                "logits_processors", "callables cannot be sent to the engine, which runs in another process"
            )
        params = vars(request.sampling_params)
        for name, value in (*params.items(), *msgspec.structs.asdict(request).items()):
            try:
                encode(value)
            except (TypeError, ValueError, OverflowError) as error:
                return InvalidParameterError(name, f"cannot be sent to the engine: {error}")
    return InvalidParameterError("request", "cannot be sent to the engine")
