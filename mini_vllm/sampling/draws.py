"""Uniform numbers by (seed, draw index), some of them computed ahead.

A draw is a function of its seed and its number (`sampling.philox`), so numbers may be computed before they are
needed, and in bulk: one call for the next draws of many rows takes little longer than a call for one draw each.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from mini_vllm.sampling import philox

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]
_NOT_YET = -(2**62)


def uniforms_of(seed: npt.NDArray[np.uint64], draw_index: Int64) -> Callable[[Int64], Float64]:
    """Draw number `draw_index[i]` of `seed[i]`, for the numbers i that are asked for."""
    return lambda numbers: philox.uniform(seed[numbers], draw_index[numbers])


class DrawsAhead:
    """The next `DEPTH` uniform numbers of every row of a batch.

    seed: `[max_rows]` uint64, owned by the caller, who calls `forget` or `move` when a row changes hands.
    """

    DEPTH = 32

    def __init__(self, seed: npt.NDArray[np.uint64]) -> None:
        self._seed = seed
        self._values = np.zeros((len(seed), self.DEPTH))
        self._first: Int64 = np.full(len(seed), _NOT_YET, dtype=np.int64)

    def forget(self, row: int) -> None:
        self._first[row] = _NOT_YET

    def move(self, source: int, destination: int) -> None:
        self._first[destination] = self._first[source]
        self._values[destination] = self._values[source]

    def take(self, rows: Int64, draw_index: Int64) -> Float64:
        """Draw number `draw_index[i]` of row `rows[i]`."""
        column = draw_index - self._first[rows]
        if ((column < 0) | (column >= self.DEPTH)).any():
            # Those that will run out soon as well, or every step would have somebody to compute numbers for.
            due = (column < 0) | (column >= self.DEPTH // 2)
            self._fill(rows[due], draw_index[due])
            column = draw_index - self._first[rows]
        taken: Float64 = self._values[rows, column]
        return taken

    def _fill(self, rows: Int64, first: Int64) -> None:
        index = first[:, None] + np.arange(self.DEPTH)
        seeds = np.repeat(self._seed[rows], self.DEPTH)
        self._values[rows] = philox.uniform(seeds, index.reshape(-1)).reshape(index.shape)
        self._first[rows] = first
