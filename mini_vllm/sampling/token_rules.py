"""Which tokens a row may sample, and which it prefers: allowed ids, bad words, min_tokens and logit_bias.

All rows' rules of a kind lie end to end in one array, put together when a row comes or goes, so that a step is one
scatter a kind and costs as much as there are rules, nothing where there are none.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mini_vllm.exceptions import InvalidParameterError
from mini_vllm.sampling.history import History, Int64, StepRows
from mini_vllm.sampling_params import SamplingParams

Columns = tuple[npt.NDArray[Any], ...]


class RowEntries:
    """Entries (the same columns for all) of the rows that have any."""

    def __init__(self) -> None:
        self._of_row: dict[int, Columns] = {}
        self._flat: tuple[Int64, Columns] | None = None

    def __bool__(self) -> bool:
        return bool(self._of_row)

    def set(self, row: int, *columns: npt.NDArray[Any]) -> None:
        if len(columns[0]):
            self._of_row[row] = columns
            self._flat = None

    def remove(self, row: int) -> None:
        if self._of_row.pop(row, None) is not None:
            self._flat = None

    def move(self, source: int, destination: int) -> None:
        if source in self._of_row:
            self._of_row[destination] = self._of_row.pop(source)
            self._flat = None

    def clear(self) -> None:
        self._of_row, self._flat = {}, None

    def flat(self) -> tuple[Int64, Columns]:
        """(the row of every entry, its columns)."""
        if self._flat is None:
            rows = np.fromiter(self._of_row, dtype=np.int64, count=len(self._of_row))
            lengths = [len(columns[0]) for columns in self._of_row.values()]
            columns = zip(*self._of_row.values(), strict=True)
            self._flat = np.repeat(rows, lengths), tuple(_end_to_end(parts) for parts in columns)
        return self._flat

    def in_step(self, step: StepRows) -> tuple[Int64, Int64, Columns]:
        """(logits row, row, columns) of the entries whose row samples."""
        rows, columns = self.flat()
        at, samples = step.locate(rows)
        return at, rows[samples], tuple(column[samples] for column in columns)


class TokenRules:
    """The rules of every row, applied in vLLM's order: allowed ids, bad words, min_tokens, logit_bias."""

    def __init__(self, history: History, vocab_size: int) -> None:
        self._history = history
        self._vocab_size = vocab_size
        self._allowed, self._banned, self._stops, self._bias = (RowEntries() for _ in range(4))
        self._phrases = RowEntries()
        self._kinds = (self._allowed, self._banned, self._phrases, self._stops, self._bias)

    def __bool__(self) -> bool:
        return any(self._kinds)

    # -- rows come and go --------------------------------------------------------------------------------------

    def add(
        self, row: int, params: SamplingParams, stop_ids: Sequence[int] = (), bad_words: Sequence[Sequence[int]] = ()
    ) -> None:
        """Raises `InvalidParameterError` for ids that the model does not have; nothing is kept then.

        stop_ids: banned until `min_tokens`. bad_words: sequences of ids of which none may be completed.
        """
        if params.allowed_token_ids is not None:
            self._allowed.set(row, self._ids("allowed_token_ids", params.allowed_token_ids))
        if params.logit_bias:
            bias = np.fromiter(params.logit_bias.values(), dtype=np.float32, count=len(params.logit_bias))
            self._bias.set(row, self._ids("logit_bias", list(params.logit_bias)), bias)
        if params.min_tokens:
            known = [token_id for token_id in stop_ids if token_id < self._vocab_size]
            self._stops.set(row, np.array(known, dtype=np.int64), np.full(len(known), params.min_tokens))
        single = [words[0] for words in bad_words if len(words) == 1]
        self._banned.set(row, self._ids("bad_words", single))
        self._set_phrases(row, [words for words in bad_words if len(words) > 1])

    def _set_phrases(self, row: int, phrases: list[Sequence[int]]) -> None:
        """Columns: the last id of each phrase, those before it (aligned right, padded with -1), how many these are."""
        if not phrases:
            return
        longest = max(map(len, phrases)) - 1
        begins = np.full((len(phrases), longest), -1, dtype=np.int64)
        for begin, phrase in zip(begins, phrases, strict=True):
            begin[longest - len(phrase) + 1 :] = phrase[:-1]
        ends = self._ids("bad_words", [phrase[-1] for phrase in phrases])
        self._phrases.set(row, ends, begins, np.array([len(phrase) - 1 for phrase in phrases]))

    def _ids(self, field: str, token_ids: Sequence[int]) -> Int64:
        ids = np.array(token_ids, dtype=np.int64)
        if len(ids) and ids.max() >= self._vocab_size:
            raise InvalidParameterError(
                field, f"token id {ids.max()} is out of range: the model's vocabulary has ids 0 to "
                f"{self._vocab_size - 1}",
            )  # fmt: skip
        return ids

    def remove(self, row: int) -> None:
        for entries in self._kinds:
            entries.remove(row)

    def move(self, source: int, destination: int) -> None:
        for entries in self._kinds:
            entries.move(source, destination)

    # -- logits ------------------------------------------------------------------------------------------------

    def apply(self, logits: torch.Tensor, step: StepRows) -> torch.Tensor:
        """Change in place the logits of the rows of `step` that have rules."""
        if self._allowed:
            self._apply_allowed(logits, step)
        if self._banned:
            at, _, (ids,) = self._banned.in_step(step)
            _ban(logits, at, ids)
        if self._phrases:
            self._apply_phrases(logits, step)
        if self._stops:
            self._apply_stops(logits, step)
        if self._bias:
            at, _, (ids, bias) = self._bias.in_step(step)
            index = _index(logits, at, ids)
            logits[index] += _to(bias, logits.device)  # no id occurs twice in a row
        return logits

    def _apply_allowed(self, logits: torch.Tensor, step: StepRows) -> None:
        at, _, (ids,) = self._allowed.in_step(step)
        index = _index(logits, at, ids)
        allowed = logits[index]
        logits[_to(np.unique(at), logits.device)] = -torch.inf
        logits[index] = allowed

    def _apply_phrases(self, logits: torch.Tensor, step: StepRows) -> None:
        """Ban the last id of every phrase whose others are the newest output tokens."""
        at, rows, (ends, begins, lengths) = self._phrases.in_step(step)
        columns = self._history.num_tokens[rows, None] + np.arange(-begins.shape[1], 0)
        newest = self._history.token_ids[rows[:, None], columns.clip(min=0)]
        matches = ((newest == begins) | (begins < 0)).all(axis=1) & (self._history.num_outputs(rows) >= lengths)
        if matches.any():
            _ban(logits, at[matches], ends[matches])

    def _apply_stops(self, logits: torch.Tensor, step: StepRows) -> None:
        """Ban what would end the rows that are too short; when all are long enough there is nothing left to do."""
        rows, (_, least) = self._stops.flat()
        if (self._history.num_outputs(rows) >= least).all():
            self._stops.clear()
            return
        at, rows, (ids, least) = self._stops.in_step(step)
        is_short = self._history.num_outputs(rows) < least
        _ban(logits, at[is_short], ids[is_short])


def _end_to_end(parts: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """One array; those of two dimensions are made equally wide, with -1 on the left."""
    if parts[0].ndim == 2:
        width = max(part.shape[1] for part in parts)
        parts = [np.pad(part, ((0, 0), (width - part.shape[1], 0)), constant_values=-1) for part in parts]
    return np.concatenate(parts)


def _ban(logits: torch.Tensor, at: Int64, ids: npt.NDArray[np.generic]) -> None:
    logits[_index(logits, at, ids)] = -torch.inf


def _index(logits: torch.Tensor, at: Int64, ids: npt.NDArray[np.generic]) -> tuple[torch.Tensor, torch.Tensor]:
    return _to(at, logits.device), _to(ids, logits.device)


def _to(array: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)
