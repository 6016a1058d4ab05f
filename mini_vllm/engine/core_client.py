"""How a shell reaches the core: by messages that are typed already, so that the core can move to its own process.

A shell (`LLMEngine`) is handed an `EngineCoreClient` and never touches the scheduler. `InprocClient` calls the core
directly; each `get_output()` runs one step.
"""

from collections.abc import Iterable
from typing import Protocol

from mini_vllm.core.scheduler_output import EngineCoreOutputs, SchedulerStats
from mini_vllm.engine.core import EngineCore
from mini_vllm.engine.trace import StepRecord
from mini_vllm.request import Request


class EngineCoreClient(Protocol):
    """What a shell may ask of the core."""

    def add_request(self, request: Request) -> None:
        """Queue a request. Raises `InvalidParameterError` if it can never run."""

    def abort_requests(self, request_ids: Iterable[str]) -> None:
        """End requests in whatever state they are; ids that are not there are ignored."""

    def stop_requests(self, request_ids: Iterable[str]) -> None:
        """End requests whose text reached a stop string; ids that are not there are ignored."""

    def get_output(self) -> EngineCoreOutputs:
        """What the next step did."""

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix."""

    def now(self) -> float:
        """Seconds on the core's clock, on which arrival times are."""

    def stats(self) -> SchedulerStats:
        """Gauges and counters as of now."""

    def step_records(self, n: int | None = None) -> list[StepRecord]:
        """The newest `n` step records (all that are kept when None), oldest first."""

    def waiting_reasons(self) -> dict[str, str]:
        """Why each waiting request waits, by id."""

    def shutdown(self) -> None:
        """Stop and give back the device's memory."""


class InprocClient:
    """The core in this very process and thread."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core

    def add_request(self, request: Request) -> None:
        self.core.add_request(request)

    def abort_requests(self, request_ids: Iterable[str]) -> None:
        self.core.abort_requests(request_ids)

    def stop_requests(self, request_ids: Iterable[str]) -> None:
        self.core.stop_requests(request_ids)

    def get_output(self) -> EngineCoreOutputs:
        return self.core.step()

    def reset_prefix_cache(self) -> None:
        self.core.reset_prefix_cache()

    def now(self) -> float:
        return self.core.clock()

    def stats(self) -> SchedulerStats:
        return self.core.scheduler.stats()

    def step_records(self, n: int | None = None) -> list[StepRecord]:
        return self.core.trace.last(n)

    def waiting_reasons(self) -> dict[str, str]:
        return self.core.scheduler.waiting_reasons()

    def shutdown(self) -> None:
        self.core.shutdown()
