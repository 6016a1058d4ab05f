"""Repetition, presence and frequency penalties: what each row has seen, kept from step to step.

A penalty changes the logits of the tokens a row has seen and of no others, so what is kept is a list of those, each
once, with how often it is in the output. A step reads and writes some hundred logits a row, not the vocabulary, and
one token a row is added to the lists. Nothing is allocated before a row asks for a penalty.

Repetition: Keskar et al., "CTRL" (2019), section 4.1; prompt and output count. Presence and frequency: the output.
"""

import numpy as np
import numpy.typing as npt
import torch

from mini_vllm.sampling.history import History, Int64, StepRows
from mini_vllm.sampling_params import SamplingParams

_FIRST_WIDTH = 64
Float32 = npt.NDArray[np.float32]


class Penalties:
    """One list a row: `ids[row, :num_seen[row]]` and their `counts` in the output.

    Behind the end of a list stand copies of its first entry, so that all lists may be read as equally long: the copies
    are given the same new logit as the first, and writing it twice changes nothing.
    """

    def __init__(self, history: History) -> None:
        self._history = history
        self._active: dict[int, None] = {}
        self._rows: Int64 | None = None
        self._is_allocated = False

    def _allocate(self) -> None:
        rows = len(self._history.num_tokens)
        self.ids = np.zeros((rows, _FIRST_WIDTH), dtype=np.int64)
        self.counts: Float32 = np.zeros((rows, _FIRST_WIDTH), dtype=np.float32)
        self.num_seen: Int64 = np.zeros(rows, dtype=np.int64)
        self._is_active = np.zeros(rows, dtype=np.bool_)
        self._strengths: Float32 = np.zeros((rows, 3), dtype=np.float32)
        self._is_allocated = True

    def __bool__(self) -> bool:
        return bool(self._active)

    # -- rows come, grow and go --------------------------------------------------------------------------------

    def add(self, row: int, params: SamplingParams) -> None:
        """Take a row in with all the tokens it has: prompt, and output if it is resumed."""
        if not params.has_penalties:
            return
        if not self._is_allocated:
            self._allocate()
        tokens, start = self._history.token_ids[row], int(self._history.num_prompt_tokens[row])
        outputs, counts = np.unique(tokens[start : int(self._history.num_tokens[row])], return_counts=True)
        ids = np.union1d(tokens[:start], outputs) if params.repetition_penalty != 1.0 else outputs
        self._reserve(len(ids))
        self.ids[row], self.counts[row] = ids[0] if len(ids) else 0, 0
        self.ids[row, : len(ids)] = ids
        self.counts[row, np.searchsorted(ids, outputs)] = counts
        self.num_seen[row] = len(ids)
        self._strengths[row] = params.repetition_penalty, params.frequency_penalty, params.presence_penalty
        self._activate(row)
        self._copy_first(np.array([row]))

    def remove(self, row: int) -> None:
        if row in self._active:
            del self._active[row]
            self._is_active[row] = False
            self._rows = None

    def move(self, source: int, destination: int) -> None:
        """The row that was `source` is now `destination`, which is free."""
        if source not in self._active:
            return
        for column in (self.ids, self.counts, self.num_seen, self._strengths):
            column[destination] = column[source]
        self.remove(source)
        self._activate(destination)

    def append(self, rows: Int64, token_ids: Int64) -> None:
        """One more output token for each of `rows`."""
        if not self._active:
            return
        mine = self._is_active[rows]
        rows, token_ids = rows[mine], token_ids[mine]
        if not len(rows):
            return
        seen = self.num_seen[rows]
        self._reserve(int(seen.max()) + 1)
        is_it = self.ids[rows, : max(1, int(seen.max()))] == token_ids[:, None]
        slot = is_it.argmax(axis=1)
        is_new = ~is_it[np.arange(len(rows)), slot] | (seen == 0)
        slot[is_new] = seen[is_new]
        self.ids[rows, slot] = token_ids
        self.counts[rows, slot] = np.where(is_new, 0, self.counts[rows, slot]) + 1
        self.num_seen[rows] += is_new
        if not slot.all():
            self._copy_first(rows[slot == 0])

    def _activate(self, row: int) -> None:
        self._active[row] = None
        self._is_active[row] = True
        self._rows = None

    def _reserve(self, width: int) -> None:
        """Room for lists of `width` entries, doubled when it runs out."""
        have = self.ids.shape[1]
        if width <= have:
            return
        more = max(width, 2 * have) - have
        self.ids = np.concatenate((self.ids, np.repeat(self.ids[:, :1], more, axis=1)), axis=1)
        self.counts = np.concatenate((self.counts, np.repeat(self.counts[:, :1], more, axis=1)), axis=1)

    def _copy_first(self, rows: Int64) -> None:
        """Bring what stands behind the ends of the lists up to date."""
        behind = np.arange(self.ids.shape[1]) >= self.num_seen[rows, None]
        self.ids[rows] = np.where(behind, self.ids[rows, :1], self.ids[rows])
        self.counts[rows] = np.where(behind, self.counts[rows, :1], self.counts[rows])

    # -- logits ------------------------------------------------------------------------------------------------

    def apply(self, logits: torch.Tensor, step: StepRows) -> torch.Tensor:
        """Penalise in place the rows of `step` that ask for it."""
        if self._rows is None:
            self._rows = np.array(sorted(self._active), dtype=np.int64)
        rows = self._rows[self.num_seen[self._rows] > 0]
        at, samples = step.locate(rows)
        rows = rows[samples]
        if not len(rows):
            return logits
        width = int(self.num_seen[rows].max())
        device = logits.device
        index = (_to(at[:, None], device), _to(self.ids[rows, :width], device))
        logits[index] = _penalised(logits[index], _to(self.counts[rows, :width], device), self._strengths[rows])
        return logits


def _penalised(values: torch.Tensor, counts: torch.Tensor, strengths: Float32) -> torch.Tensor:
    """New logits `[P, W]` of tokens seen. strengths: `[P, 3]` repetition, frequency, presence."""
    repetition, frequency, presence = (_to(column, values.device).unsqueeze(1) for column in strengths.T.copy())
    if (strengths[:, 0] != 1.0).any():
        values = torch.where(values > 0, values / repetition, values * repetition)
    if strengths[:, 1:].any():
        values = values - frequency * counts - presence * (counts > 0)
    return values


def _to(array: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)
