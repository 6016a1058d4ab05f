"""Small workloads and costs for tests of the simulator."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mini_vllm.simulator.cost import StepLoad
from mini_vllm.simulator.workload import Run, SimRequest


class UnitCost:
    """Every step takes a second, so that simulated time counts steps."""

    def step_seconds(self, load: StepLoad) -> float:
        return 1.0

    def add_seconds(self, num_prompt_tokens: int) -> float:
        return 0.0

    def describe(self) -> dict[str, Any]:
        return {"cost_model": "unit"}


@dataclass(frozen=True)
class Listed:
    """A workload that is written out: (arrival, prompt runs, output length) of each request, in order of arrival."""

    rows: Sequence[tuple[float, tuple[Run, ...], int]]
    priorities: Sequence[int] = ()

    @property
    def num_requests(self) -> int:
        return len(self.rows)

    @property
    def tenants(self) -> Sequence[str]:
        return [""]

    def describe(self) -> dict[str, Any]:
        return {"rows": len(self.rows)}

    def start(self) -> "ListedSource":
        return ListedSource(self)

    def request(self, index: int) -> SimRequest:
        arrival, runs, output_len = self.rows[index]
        priority = self.priorities[index] if self.priorities else 0
        return SimRequest(index, arrival, runs, output_len, 10_000 + index, priority=priority)


class ListedSource:
    def __init__(self, workload: Listed) -> None:
        self.workload = workload
        self.position = 0
        self.finishes: list[tuple[int, float]] = []

    def next_time(self) -> float:
        rows = self.workload.rows
        return rows[self.position][0] if self.position < len(rows) else math.inf

    def pop(self) -> SimRequest:
        self.position += 1
        return self.workload.request(self.position - 1)

    def finished(self, request: SimRequest, time: float) -> None:
        self.finishes.append((request.index, time))


def own(*lengths: int, first: int = 1) -> list[tuple[Run, ...]]:
    """Prompts of these lengths that share nothing."""
    return [((first + place, length),) for place, length in enumerate(lengths)]
