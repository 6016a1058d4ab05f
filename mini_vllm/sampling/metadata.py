"""What the sampler is told about each draw: parallel arrays, on the host.

They are views of (or gathers from) the worker's persistent columns, so making one costs nothing per request.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mini_vllm.sampling.draws import uniforms_of
from mini_vllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    import torch

Edit = Callable[["torch.Tensor"], "torch.Tensor"]
"""Takes the logits of all rows `[R, V]`, which it may change in place, and returns them."""
Uniforms = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float64]]
"""From draw numbers (indices into the arrays of the metadata) to one uniform number each."""


@dataclass(frozen=True)
class SamplingMetadata:
    """One entry a draw: a token to be chosen. `all_greedy` lets the sampler skip everything but the argmax.

    temperature: 0 where the draw is greedy. top_k: 0 or less is off. top_p: 1 is off. min_p: 0 is off.
    uniforms: the random numbers of draws, asked for those only that are not greedy.
    logits_row: the row of logits each draw is made from; None when it is the draw's own number. Several draws from one
        row are the first tokens of several samples of one prompt.
    edit: masks, biases, processors and penalties, before anything is chosen; None when no row has any.
    rescale: processors that cannot change the argmax, after the temperature; None when there are none.
    """

    temperature: npt.NDArray[np.float32]
    top_k: npt.NDArray[np.int64]
    top_p: npt.NDArray[np.float64]
    min_p: npt.NDArray[np.float64]
    uniforms: Uniforms
    all_greedy: bool
    logits_row: npt.NDArray[np.int64] | None = None
    edit: Edit | None = None
    rescale: Edit | None = None

    @classmethod
    def from_params(
        cls, params: Sequence[SamplingParams], seeds: Sequence[int], draw_index: Sequence[int]
    ) -> "SamplingMetadata":
        """For callers without persistent columns, of what needs no history. `seeds` are any 64-bit integers."""
        temperature = np.array([0.0 if p.is_greedy else p.temperature for p in params], dtype=np.float32)
        return cls(
            temperature=temperature,
            top_k=np.array([p.top_k for p in params], dtype=np.int64),
            top_p=np.array([p.top_p for p in params], dtype=np.float64),
            min_p=np.array([p.min_p for p in params], dtype=np.float64),
            uniforms=uniforms_of(
                np.array([seed_key(seed) for seed in seeds], dtype=np.uint64), np.array(draw_index, dtype=np.int64)
            ),
            all_greedy=not bool(temperature.any()),
        )


def seed_key(seed: int, sample_index: int = 0) -> int:
    """The key of a request's random numbers: a signed 64-bit seed as the unsigned number it stands for.

    Further samples of a prompt get keys far from it: SplitMix64 (Steele, Lea, Flood 2014) of the seed, `sample_index`
    steps on.
    """
    key = seed & _MASK
    if sample_index == 0:
        return key
    key = (key + sample_index * 0x9E3779B97F4A7C15) & _MASK
    key = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    key = ((key ^ (key >> 27)) * 0x94D049BB133111EB) & _MASK
    return key ^ (key >> 31)


_MASK = 0xFFFF_FFFF_FFFF_FFFF


NOTHING_BUT_GREEDY = SamplingMetadata(
    temperature=np.zeros(0, dtype=np.float32),
    top_k=np.zeros(0, dtype=np.int64),
    top_p=np.zeros(0),
    min_p=np.zeros(0),
    uniforms=uniforms_of(np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64)),
    all_greedy=True,
)
"""For any number of rows of which none asks for anything: no column is read then."""
