"""How an asynchronous shell reaches the core, and the client whose core runs in a thread of this process.

A client only carries messages: `AsyncLLM` decides what they mean. The client of an engine process is in
`engine/process/mp_client.py`.
"""

import asyncio
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol

from mini_vllm.engine.arg_utils import EngineArgs
from mini_vllm.engine.builder import describe_core, start_core
from mini_vllm.engine.core import EngineCore
from mini_vllm.engine.process.core_loop import CoreLoop
from mini_vllm.engine.process.messages import EngineInfo, FromEngine, Shutdown, ToEngine
from mini_vllm.engine.process.warm_up import warm_up
from mini_vllm.exceptions import EngineDeadError
from mini_vllm.logger import init_logger
from mini_vllm.text.tokenizer import Tokenizer

logger = init_logger(__name__)

CoreBuilder = Callable[[], tuple[EngineCore, EngineInfo]]
"""Makes a core, and what is to be known of it."""


class AsyncCoreClient(Protocol):
    """Messages to one engine and from it. To be used from one event loop.

    info: what the engine said of itself when it was ready.
    """

    info: EngineInfo

    def send(self, message: ToEngine) -> None:
        """Send without waiting. A message to an engine that is dead is dropped: `receive` tells. Raises
        `InvalidParameterError` for requests that cannot travel to this engine."""

    async def receive(self) -> FromEngine:
        """The engine's next message. Raises `EngineDeadError` once it is dead and everything it said was taken."""

    def may_restart(self) -> bool:
        """Asked once for each death: whether `restart()` may bring the engine back."""

    async def restart(self) -> None:
        """Start the engine anew and wait until it is ready. Raises what kept it from starting."""

    def shutdown(self) -> None:
        """Stop the engine and give everything back. May be called twice."""


class ThreadCoreClient:
    """The core in a thread of this process, built there by `build`."""

    info: EngineInfo

    def __init__(self, build: CoreBuilder) -> None:
        self._build = build
        self._inbox = _ThreadInbox()
        self._arrived: deque[FromEngine | EngineDeadError] = deque()
        self._wakeup = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[EngineInfo] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, name="mini_vllm::EngineCore", daemon=True)

    @classmethod
    async def start(cls, args: EngineArgs, tokenizer: Tokenizer) -> "ThreadCoreClient":
        """A core for these arguments, warmed up."""

        def build() -> tuple[EngineCore, EngineInfo]:
            config = args.create_engine_config(tokenizer)
            core = start_core(config)
            warm_up(core)
            return core, describe_core(core, config)

        return await cls.start_with(build)

    @classmethod
    async def start_with(cls, build: CoreBuilder) -> "ThreadCoreClient":
        """Return once the core is ready. Raises what `build` raises."""
        client = cls(build)
        client._thread.start()
        try:
            client.info = await client._ready
        except BaseException:
            client.shutdown()
            raise
        return client

    # -- the thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            core, info = self._build()
        except BaseException as error:
            self._call(self._settle, error)
            return
        self._call(self._settle, info)
        try:
            CoreLoop(core, self._inbox, self._deliver).run()
            self._deliver(EngineDeadError("the engine was shut down"))
        except Exception as error:
            logger.exception("the engine core died")
            self._deliver(EngineDeadError(f"the engine died: {type(error).__name__}: {error}"))
        finally:
            core.shutdown()

    def _deliver(self, message: FromEngine | EngineDeadError) -> None:
        self._arrived.append(message)
        self._call(self._wakeup.set)

    def _call(self, callback: Callable[..., object], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:  # the loop is closed: nobody listens any more
            self._inbox.put(Shutdown())

    def _settle(self, result: EngineInfo | BaseException) -> None:
        if self._ready.done():
            return
        if isinstance(result, BaseException):
            self._ready.set_exception(result)
        else:
            self._ready.set_result(result)

    # -- the event loop ---------------------------------------------------------------------------------------

    def send(self, message: ToEngine) -> None:
        self._inbox.put(message)

    async def receive(self) -> FromEngine:
        while not self._arrived:
            self._wakeup.clear()
            await self._wakeup.wait()
        message = self._arrived[0]
        if isinstance(message, EngineDeadError):  # stays, for whoever asks again
            raise message
        return self._arrived.popleft()  # type: ignore[return-value]

    def may_restart(self) -> bool:
        return False

    async def restart(self) -> None:
        raise EngineDeadError("an engine in this process is not restarted")

    def shutdown(self) -> None:
        self._inbox.put(Shutdown())
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join()


class _ThreadInbox:
    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
        self.put = self._queue.put

    def receive(self, block: bool) -> Iterable[ToEngine]:
        messages = [self._queue.get()] if block else []
        while not self._queue.empty():
            messages.append(self._queue.get())
        return messages
