"""What the sampler is told about each row: parallel arrays, on the host.

They are views of (or gathers from) the worker's persistent columns, so making one costs nothing per request.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mini_vllm.sampling_params import SamplingParams


@dataclass(frozen=True)
class SamplingMetadata:
    """One entry a row of logits. `all_greedy` lets the sampler skip everything but the argmax.

    temperature: 0 where the row is greedy. top_k: 0 or less is off. top_p: 1 is off.
    seed: key of the row's random numbers. draw_index: output tokens the request has so far.
    """

    temperature: npt.NDArray[np.float32]
    top_k: npt.NDArray[np.int64]
    top_p: npt.NDArray[np.float64]
    seed: npt.NDArray[np.uint64]
    draw_index: npt.NDArray[np.int64]
    all_greedy: bool

    @classmethod
    def from_params(
        cls, params: Sequence[SamplingParams], seeds: Sequence[int], draw_index: Sequence[int]
    ) -> "SamplingMetadata":
        """For callers without persistent columns. `seeds` are any 64-bit integers, signed or not."""
        temperature = np.array([0.0 if p.is_greedy else p.temperature for p in params], dtype=np.float32)
        return cls(
            temperature=temperature,
            top_k=np.array([p.top_k for p in params], dtype=np.int64),
            top_p=np.array([p.top_p for p in params], dtype=np.float64),
            seed=np.array([seed_key(seed) for seed in seeds], dtype=np.uint64),
            draw_index=np.array(draw_index, dtype=np.int64),
            all_greedy=not bool(temperature.any()),
        )


def seed_key(seed: int) -> int:
    """A signed 64-bit seed as the unsigned key it stands for."""
    return seed & 0xFFFF_FFFF_FFFF_FFFF
