"""A recorded trace as a workload: when requests came, how long they were, and what they shared.

The traces are those `mini-vllm serve --record-trace` writes, and the public Mooncake ones. Equal `hash_ids` become
equal tokens, so the simulated prefix cache finds what the real one would have found, down to the trace's block size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mini_vllm.engine.request_trace import TracedRequest, read_request_trace
from mini_vllm.exceptions import ConfigError
from mini_vllm.simulator.workload import SHARED_IDS, Run, SimRequest


@dataclass(frozen=True)
class TraceWorkload:
    """speed: 2 sends everything in half the time. The first request arrives at 0."""

    requests: Sequence[TracedRequest]
    speed: float = 1.0
    path: str = ""

    @classmethod
    def from_file(cls, path: str, speed: float = 1.0, limit: int | None = None) -> "TraceWorkload":
        """The first `limit` requests of a file, all when None. Raises `ConfigError`, also for an empty trace."""
        requests = read_request_trace(path)
        if not requests:
            raise ConfigError(f"trace: {path} has no requests (0 lines), so there is nothing to replay")
        return cls(requests[:limit], speed, str(path))

    @property
    def num_requests(self) -> int:
        return len(self.requests)

    @property
    def tenants(self) -> Sequence[str]:
        return [_tenant(number) for number in sorted({request.tenant for request in self.requests})]

    def describe(self) -> dict[str, Any]:
        return {"trace": self.path, "trace_speed": self.speed, "num_requests": self.num_requests}

    def start(self) -> "TraceSource":
        return TraceSource(self)


def _tenant(number: int) -> str:
    return f"tenant{number}"


class TraceSource:
    """Hands out the requests of a trace; nothing waits for a finish."""

    def __init__(self, workload: TraceWorkload) -> None:
        self._requests = workload.requests
        self._begin = workload.requests[0].timestamp
        self._seconds = 1e-3 / workload.speed
        self._position = 0
        self._next_id = 0
        self._shared: dict[int, int] = {}

    def next_time(self) -> float:
        if self._position == len(self._requests):
            return math.inf
        return (self._requests[self._position].timestamp - self._begin) * self._seconds

    def pop(self) -> SimRequest:
        """A request that ended before its first token is given one token: the engine always makes one."""
        time, traced, index = self.next_time(), self._requests[self._position], self._position
        self._position += 1
        token_id, self._next_id = self._next_id, self._next_id + traced.n
        return SimRequest(
            index,
            time,
            self._runs(traced),
            max(1, round(traced.output_length / traced.n)),
            token_id,
            _tenant(traced.tenant),
            f"user{traced.user}",
            traced.priority,
            traced.n,
        )

    def _runs(self, traced: TracedRequest) -> tuple[Run, ...]:
        size, last = traced.block_size, len(traced.hash_ids) - 1
        tail = traced.input_length - last * size
        ids = [SHARED_IDS + self._shared.setdefault(number, len(self._shared)) for number in traced.hash_ids]
        return tuple((token_id, tail if place == last else size) for place, token_id in enumerate(ids))

    def finished(self, request: SimRequest, time: float) -> None:
        pass
