"""What is written down while a simulation runs: some numbers per finished request, and a timeline of bounded size."""

from array import array
from typing import Any

import numpy as np

from mini_vllm.simulator.results import TIMELINE_COLUMNS, RequestTable, Timeline

_FLOAT_COLUMNS = ("arrival", "scheduled", "first_token", "finish")
_INT_COLUMNS = (
    "index", "num_prompt_tokens", "num_output_tokens", "num_cached_tokens", "num_preemptions", "tenant", "replica",
    "failed",
)  # fmt: skip


class RequestRows:
    """Columns that grow by a row for each finished request: 96 bytes of it."""

    def __init__(self) -> None:
        self._floats = [array("d") for _ in _FLOAT_COLUMNS]
        self._ints = [array("q") for _ in _INT_COLUMNS]

    def __len__(self) -> int:
        return len(self._ints[0])

    def add(self, floats: tuple[float, ...], ints: tuple[int, ...]) -> None:
        """In the order of the columns above."""
        for column, value in zip(self._floats, floats, strict=True):
            column.append(value)
        for whole, number in zip(self._ints, ints, strict=True):
            whole.append(number)

    def table(self) -> RequestTable:
        columns: dict[str, Any] = {
            name: np.array(column) for name, column in zip(_FLOAT_COLUMNS, self._floats, strict=True)
        }
        for name, whole in zip(_INT_COLUMNS, self._ints, strict=True):
            columns[name] = np.array(whole, dtype=np.int64)
        return RequestTable(**columns)


class TimelineBuilder:
    """Bins of consecutive steps. When there are too many, neighbours are joined and bins hold twice as many steps."""

    def __init__(self, max_bins: int) -> None:
        self._max_bins = max(max_bins, 2)
        self._steps_per_bin = 1
        self._bins: list[list[float]] = []
        self._open: list[float] | None = None
        self.max_kv_cache_usage = 0.0

    def add(
        self,
        start: float,
        seconds: float,
        running: int,
        waiting: int,
        usage: float,
        prefill_tokens: int,
        decode_tokens: int,
        preemptions: int,
    ) -> None:
        """One step."""
        weight = seconds or 1e-12  # averages are over time; steps that take none still are steps
        step: list[float] = [
            start, weight, 1, running * weight, waiting * weight, waiting, usage * weight, usage, prefill_tokens,
            decode_tokens, preemptions,
        ]  # fmt: skip
        if usage > self.max_kv_cache_usage:
            self.max_kv_cache_usage = usage
        self._open = step if self._open is None else _joined(self._open, step)
        if self._open[2] >= self._steps_per_bin:
            self._bins.append(self._open)
            self._open = None
            if len(self._bins) == self._max_bins:
                self._halve()

    def _halve(self) -> None:
        pairs = zip(self._bins[::2], self._bins[1::2], strict=False)
        rest = self._bins[-1:] if len(self._bins) % 2 else []
        self._bins = [_joined(first, second) for first, second in pairs]
        self._open = rest[0] if rest else None
        self._steps_per_bin *= 2

    def timeline(self) -> Timeline:
        bins = self._bins + ([self._open] if self._open is not None else [])
        table = np.array(bins, dtype=np.float64).reshape(len(bins), len(TIMELINE_COLUMNS))
        columns = {name: table[:, place].copy() for place, name in enumerate(TIMELINE_COLUMNS)}
        for name in ("running", "waiting", "kv_cache_usage"):
            columns[name] /= columns["seconds"]
        return Timeline(**columns)


def _joined(first: list[float], second: list[float]) -> list[float]:
    """Sums, but for the start (the first one's) and the maxima. Averages are still multiplied with their time."""
    joined = [a + b for a, b in zip(first, second, strict=True)]
    joined[0] = first[0]
    joined[5], joined[7] = max(first[5], second[5]), max(first[7], second[7])
    return joined
