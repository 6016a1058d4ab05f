"""The requests of `simulator_fidelity.py`: drawn once, then served by the engine and handed to the simulator."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mini_vllm.bench.datasets import random_tokens
from mini_vllm.simulator.arrivals import arrival_times
from mini_vllm.simulator.options import SimulationOptions
from mini_vllm.simulator.workload import SHARED_IDS, SimRequest


@dataclass(frozen=True)
class Shape:
    """What requests look like. prompt, output: lengths, uniform from..to; in fractions of the context.

    shared: tokens that the prompts of each of four groups begin with, as a fraction too. loads: of the capacity.
    pool: of the blocks that `max_num_seqs` requests of average length need at their end; None is all there is.
    """

    name: str
    prompt: tuple[float, float]
    output: tuple[float, float]
    loads: tuple[float, ...]
    shared: float = 0.0
    pool: float | None = None


SHAPES = (
    Shape("mixed", (1 / 64, 1 / 4), (1 / 64, 3 / 32), (0.4, 0.8, 1.3)),
    Shape("long prompts", (1 / 4, 5 / 8), (1 / 256, 1 / 32), (0.6,)),
    Shape("shared prefixes", (1 / 64, 1 / 16), (1 / 64, 3 / 32), (0.6,), shared=1 / 4),
    Shape("small pool", (1 / 64, 1 / 4), (1 / 16, 1 / 8), (0.9,), pool=1 / 16),
)
NUM_GROUPS = 4


@dataclass(frozen=True)
class Timed:
    """One request. arrival: seconds after the first."""

    arrival: float
    prompt: list[int]
    output_len: int


def make_requests(
    shape: Shape, count: int, rate: float | None, context: int, token_ids: Sequence[int], seed: int
) -> list[Timed]:
    """`count` requests at `rate` a second (Poisson), or all at once when None. The same arguments, the same list."""
    rng = random.Random(f"{shape.name} {rate is None} {seed}")
    kind = "at-once" if rate is None else "poisson"
    arrivals = arrival_times(kind, count, rate, 1.0, np.random.default_rng(rng.randrange(2**32))).tolist()
    groups = [random_tokens(rng, token_ids, round(shape.shared * context)) for _ in range(NUM_GROUPS)]
    prompts, outputs = length_range(shape.prompt, context), length_range(shape.output, context)
    return [
        Timed(
            arrival,
            rng.choice(groups) + random_tokens(rng, token_ids, rng.randint(*prompts)),
            rng.randint(*outputs),
        )
        for arrival in arrivals
    ]


def length_range(fractions: tuple[float, float], context: int) -> tuple[int, int]:
    """Whole tokens, at least 2: a single one has no TPOT."""
    low, high = (max(2, int(fraction * context)) for fraction in fractions)
    return low, high


@dataclass(frozen=True)
class Listed:
    """These very requests as a workload of the simulator: the same token ids, so the same prefixes are found."""

    requests: Sequence[Timed]
    name: str = ""
    tenants: tuple[str, ...] = ("",)

    @property
    def num_requests(self) -> int:
        return len(self.requests)

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "num_requests": self.num_requests}

    def start(self) -> "ListedSource":
        return ListedSource(self.requests)


class ListedSource:
    """Hands them out in order. What they generate is in no prompt."""

    def __init__(self, requests: Sequence[Timed]) -> None:
        self._requests = requests
        self._position = 0

    def next_time(self) -> float:
        return self._requests[self._position].arrival if self._position < len(self._requests) else math.inf

    def pop(self) -> SimRequest:
        index, self._position = self._position, self._position + 1
        timed = self._requests[index]
        runs = tuple((token_id, 1) for token_id in timed.prompt)
        return SimRequest(index, timed.arrival, runs, timed.output_len, SHARED_IDS + index)

    def finished(self, request: SimRequest, time: float) -> None:
        """Nothing waits for it."""


def small_pool(shape: Shape, options: SimulationOptions, context: int) -> int:
    """Blocks of a pool too small for a full batch, yet with room for any single request."""
    assert shape.pool is not None
    lengths = (*length_range(shape.prompt, context), *length_range(shape.output, context))
    wanted = shape.pool * options.max_num_seqs * sum(lengths) / 2 / options.block_size
    least = -(-context // options.block_size)
    return options.num_kv_groups * max(least, round(wanted)) + 1
