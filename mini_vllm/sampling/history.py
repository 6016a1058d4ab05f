"""What the sampler's memory of rows reads of them: the worker's own arrays, never a copy."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class History:
    """token_ids: `[max_rows, max_model_len]` int32, of which `num_tokens[row]` are known, prompt first."""

    token_ids: npt.NDArray[np.int32]
    num_tokens: Int64
    num_prompt_tokens: Int64

    def outputs(self, row: int) -> list[int]:
        """The output tokens of a row."""
        tokens: list[int] = self.token_ids[row, self.num_prompt_tokens[row] : self.num_tokens[row]].tolist()
        return tokens

    def num_outputs(self, rows: Int64) -> Int64:
        return self.num_tokens[rows] - self.num_prompt_tokens[rows]


class StepRows:
    """Which rows of the batch a step samples, and where their logits are.

    rows: `[R]` row numbers, ascending; row i of the logits belongs to `rows[i]`.
    """

    def __init__(self, rows: Int64, num_rows: int) -> None:
        self.rows = rows
        self.num_rows = num_rows
        self.is_whole = len(rows) == num_rows
        self._position: Int64 | None = None

    def locate(self, rows: Int64) -> tuple[Int64, slice | npt.NDArray[np.bool_]]:
        """(the logits row of each of `rows` that samples, which of `rows` those are)."""
        if self.is_whole:
            return rows, slice(None)
        if self._position is None:
            self._position = np.full(self.num_rows, -1, dtype=np.int64)
            self._position[self.rows] = np.arange(len(self.rows))
        position = self._position[rows]
        samples = position >= 0
        return position[samples], samples
