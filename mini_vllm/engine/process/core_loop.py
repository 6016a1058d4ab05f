"""The loop of an engine that runs beside its shell, be it in a thread or in a process of its own.

`CoreLoop` is handed the core, a way to receive and a way to send. Between two steps it takes every message that is
there, so that an abort acts before the next step; while there is nothing to do it waits for one.
"""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from mini_vllm.core.scheduler_output import EngineCoreOutput, EngineCoreOutputs
from mini_vllm.engine.core import EngineCore
from mini_vllm.engine.process.messages import (
    AbortRequests,
    AddRequests,
    Ended,
    EngineCoreRequest,
    ErrorReport,
    FromEngine,
    News,
    Shutdown,
    StopRequests,
    ToEngine,
    UtilityCall,
    UtilityResult,
    encode,
)
from mini_vllm.logger import init_logger

logger = init_logger(__name__)


class Inbox(Protocol):
    """Where the shell's messages arrive."""

    def receive(self, block: bool) -> Iterable[ToEngine]:
        """All that are there, in order; with `block` at least one, however long that takes."""


class CoreLoop:
    """Steps `core` while it has work, and does what the messages of `inbox` say. send: must not block."""

    def __init__(self, core: EngineCore, inbox: Inbox, send: Callable[[FromEngine], None]) -> None:
        self.core = core
        self.inbox = inbox
        self.send = send
        self._running = True

    def run(self) -> None:
        """Until a `Shutdown` arrives. What a step raises beyond its requests' own errors is raised."""
        while self._running:
            for message in self.inbox.receive(block=not self.core.has_work()):
                self._take(message)
            if self._running and self.core.has_work():
                self.send(News(self.core.step()))

    def _take(self, message: ToEngine) -> None:
        match message:
            case AddRequests():
                self._add(message.requests)
            case AbortRequests():
                self.core.abort_requests(message.request_ids)
                self.send(Ended(message.request_ids))
            case StopRequests():
                self.core.stop_requests(message.request_ids)
                self.send(Ended(message.request_ids))
            case UtilityCall():
                self.send(self._answer(message))
            case Shutdown():
                self._running = False

    def _add(self, requests: Iterable[EngineCoreRequest]) -> None:
        """What the core refuses fails alone. The shell has checked the same before, so it rarely does."""
        refused = []
        for item in requests:
            try:
                self.core.add_request(item.to_request())
            except Exception as error:
                logger.warning("request %r is refused: %s", item.request_id, error)
                message = f"the engine refused the request: {error}"
                refused += [
                    EngineCoreOutput(core_id, finish_reason="error", error=message)
                    for core_id in (item.request_id, *item.child_ids)
                ]
        if refused:
            self.send(News(EngineCoreOutputs(refused, self.core.scheduler.stats(), self.core.clock())))

    def _answer(self, call: UtilityCall) -> UtilityResult:
        try:
            return UtilityResult(call.call_id, encode(UTILITIES[call.method](self.core, *call.args)))
        except Exception as error:
            return UtilityResult(call.call_id, error=ErrorReport.of(error))


UTILITIES: dict[str, Callable[..., Any]] = {
    "reset_prefix_cache": EngineCore.reset_prefix_cache,
    "stats": lambda core: core.scheduler.stats(),
    "step_records": lambda core, n: core.trace.last(n),
    "waiting_reasons": lambda core: core.scheduler.waiting_reasons(),
    "check_integrity": lambda core: core.scheduler.check_integrity(),
}
"""What a shell may call by name between two steps."""
