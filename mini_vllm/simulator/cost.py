"""How long a step takes, predicted from what the plan has it compute.

A cost model is anything with `step_seconds(load)`. Two are here: the planner's roofline, and two constants; the one in
`fitted.py` was fitted to measured steps. All are pure functions of the load, so a simulation repeats exactly.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from mini_vllm.bench.cost import attended_keys, attended_pairs
from mini_vllm.exceptions import ConfigError
from mini_vllm.simulator.planner.parallel import tp_comm_seconds_per_step
from mini_vllm.simulator.planner.roofline import StepModel
from mini_vllm.simulator.planner.setup import Setup


@dataclass(slots=True)
class StepLoad:
    """What one step computes. starts: tokens computed before, of every request that computes one token now.

    chunks: (tokens computed before, tokens now) of the other requests. num_tokens: of all. num_sampled: requests that
    get a token out of it. Nothing here may be changed: the lists belong to the plan.
    """

    starts: Sequence[int]
    chunks: Sequence[tuple[int, int]]
    num_tokens: int
    num_sampled: int

    @classmethod
    def of(cls, chunks: Sequence[tuple[int, int]], num_sampled: int | None = None) -> "StepLoad":
        """From (tokens before, tokens now) of every request. num_sampled: None is all of them."""
        starts = [start for start, count in chunks if count == 1]
        longer = [chunk for chunk in chunks if chunk[1] != 1]
        total = sum(count for _, count in chunks)
        return cls(starts, longer, total, len(chunks) if num_sampled is None else num_sampled)

    @property
    def num_requests(self) -> int:
        return len(self.starts) + len(self.chunks)

    @property
    def context_tokens(self) -> int:
        """Keys read: all that these requests hold after the step."""
        return sum(self.starts) + len(self.starts) + sum(start + count for start, count in self.chunks)

    @property
    def prefill_pairs(self) -> int:
        """(query, key) pairs of the chunks. A single token's pairs are its context."""
        return sum(attended_pairs(start, count) for start, count in self.chunks)


class CostModel(Protocol):
    """Predicts steps."""

    def step_seconds(self, load: StepLoad) -> float:
        """Seconds; 0 for a step that computes nothing."""

    def add_seconds(self, num_prompt_tokens: int) -> float:
        """Seconds that adding such a request keeps the engine from its next step."""

    def describe(self) -> dict[str, Any]:
        """For people and for JSON."""


# --- two constants --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TwoConstantCost:
    """`fixed_seconds` a step and `per_token_seconds` for each token in it. Raises `ConfigError`."""

    fixed_seconds: float
    per_token_seconds: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value < math.inf:
                raise ConfigError(f"{name}: must be at least 0, got {value!r}")
        if self.fixed_seconds + self.per_token_seconds == 0:
            raise ConfigError("fixed_seconds, per_token_seconds: steps that take no time have no throughput")

    def step_seconds(self, load: StepLoad) -> float:
        return self.fixed_seconds + load.num_tokens * self.per_token_seconds if load.num_tokens else 0.0

    def add_seconds(self, num_prompt_tokens: int) -> float:
        return 0.0

    def describe(self) -> dict[str, Any]:
        return {"cost_model": "two-constant", **vars(self)}


# --- roofline -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RooflineCost:
    """The planner's `StepModel`, summed up so that a step of hundreds of requests costs a few additions.

    communication: seconds of a step of that many tokens, not overlapped, added on top.
    """

    model: StepModel
    communicates: bool = False
    _kinds: tuple["_LayerCost", ...] = field(init=False, repr=False)
    _bandwidth: float = field(init=False, repr=False)
    _peak: float = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_kinds", tuple(_layer_costs(self.model)))
        object.__setattr__(self, "_bandwidth", self.model.bandwidth)
        object.__setattr__(self, "_peak", self.model.peak)

    @classmethod
    def from_setup(cls, setup: Setup) -> "RooflineCost":
        """Of the planner's set-up, the communication of tensor parallelism included. Raises `ConfigError`."""
        if setup.options.pipeline_parallel_size > 1:
            raise ConfigError(
                f"pipeline_parallel_size: {setup.options.pipeline_parallel_size} stages are not simulated, only 1"
            )
        return cls(setup.steps, communicates=True)

    def step_seconds(self, load: StepLoad) -> float:
        tokens = load.num_tokens
        if tokens == 0:
            return 0.0
        model, geometry = self.model, self.model.model
        num_bytes = model.weight_bytes_read(tokens)
        sampled = load.num_sampled * geometry.output_parameters
        flops = 2.0 * (tokens * geometry.matmul_parameters_per_token + sampled)
        for kind in self._kinds:
            keys, pairs = _attention_of(load, kind.window)
            num_bytes += kind.bytes_per_key * (keys + tokens) + kind.bytes_per_request * load.num_requests
            flops += kind.flops_per_pair * pairs
        seconds = max(num_bytes / self._bandwidth, flops / self._peak) + model.overhead_seconds
        return seconds + self._communication_seconds(tokens)

    def add_seconds(self, num_prompt_tokens: int) -> float:
        return 0.0

    def _communication_seconds(self, num_tokens: int) -> float:
        ranks = self.model.tensor_parallel_size
        if not self.communicates or ranks == 1:
            return 0.0
        geometry, link = self.model.model, self.model.hardware.link
        return tp_comm_seconds_per_step(
            geometry.num_layers, num_tokens, geometry.hidden_size, ranks, link.bytes_per_second, link.latency_seconds
        )

    def describe(self) -> dict[str, Any]:
        model = self.model
        return {
            "cost_model": "roofline",
            "model": model.model.name,
            "hardware": model.hardware.name,
            "dtype": model.dtype,
            "efficiency": model.efficiency,
            "overhead_seconds": model.overhead_seconds,
            "tensor_parallel_size": model.tensor_parallel_size,
        }


@dataclass(frozen=True)
class _LayerCost:
    """All layers of one kind together."""

    window: int | None
    bytes_per_key: float
    bytes_per_request: float
    flops_per_pair: float


def _layer_costs(model: StepModel) -> list[_LayerCost]:
    """`StepModel._attention`, per key, request and pair."""
    size, costs = model.model.kv_dtype_bytes(model.kv_dtype), []
    for kind in model.model.kv_layers:
        if kind.kind == "mamba":
            costs.append(_LayerCost(None, 0.0, kind.num_layers * 2 * kind.state_elements * size, 0.0))
            continue
        copies = model.tensor_parallel_size if kind.replicated else 1
        width = model.model.num_heads * (kind.elements_per_token if kind.replicated else model.model.head_dim)
        moved = kind.num_layers * copies * kind.elements_per_token * size
        costs.append(_LayerCost(kind.window, moved, 0.0, kind.num_layers * 4.0 * width))
    return costs


def _attention_of(load: StepLoad, window: int | None) -> tuple[int, int]:
    """(keys read, query-key pairs) of all requests in a layer that looks back `window` tokens."""
    if window is None:
        single = sum(load.starts) + len(load.starts)
    else:
        single = int(np.minimum(np.asarray(load.starts, dtype=np.int64) + 1, window).sum())
    keys = pairs = single
    for start, count in load.chunks:
        keys += attended_keys(start, count, window)
        pairs += attended_pairs(start, count, window)
    return keys, pairs
