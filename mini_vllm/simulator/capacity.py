"""How much load can be taken before a limit is broken: doubling, then bisection, then a check that the answer holds.

`find_capacity` is handed a function that tries one load, so it serves the simulator, a running server or a formula
alike. Bisection alone trusts that a limit once broken stays broken. Runs of random arrivals need not be that tidy, so
further loads between the ends are tried, and the answer is the largest load with nothing but kept limits below it.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mini_vllm.exceptions import ConfigError

MAX_DOUBLINGS = 40


@dataclass(frozen=True)
class Probe:
    """One load that was tried. why: the broken limits with their figures; empty when all were kept."""

    load: float
    ok: bool
    why: str = ""
    metrics: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Capacity:
    """load: the largest that keeps the limits, within `tolerance` of the smallest known not to (`broken_at`).

    broken_at: None when every load up to `highest` keeps them. monotone: no load that was tried keeps the limits above
    one that breaks them.
    """

    load: float
    broken_at: float | None
    tolerance: float
    monotone: bool
    probes: tuple[Probe, ...]

    @property
    def probe(self) -> Probe:
        return next(probe for probe in self.probes if probe.load == self.load)


def find_capacity(
    attempt: Callable[[float], Probe],
    lowest: float,
    highest: float | None = None,
    *,
    tolerance: float = 0.02,
    whole: bool = False,
    checks: int = 3,
) -> Capacity:
    """The largest load in [lowest, highest] that keeps the limits.

    highest: None doubles from `lowest` until they break. tolerance: relative width of the last bracket. whole: loads
    are counts. checks: loads tried afterwards between the smallest and the answer. Raises `ConfigError`, with what
    was missed by how much, when even `lowest` does not keep the limits.
    """
    _check_range(lowest, highest, tolerance, whole)
    search = _Search(attempt, tolerance, whole)
    first = search.at(lowest)
    if not first.ok:
        raise ConfigError(f"capacity: even the smallest load, {lowest:g}, does not keep the limits: {first.why}")
    low, high = search.bracket(lowest, highest)
    if high is not None:
        low, high = search.bisect(low, high)
    low, high = search.verify(lowest, low, high, checks)
    return Capacity(low, high, tolerance, search.monotone, tuple(sorted(search.probes.values(), key=lambda p: p.load)))


def _check_range(lowest: float, highest: float | None, tolerance: float, whole: bool) -> None:
    if not (math.isfinite(lowest) and lowest > 0):
        raise ConfigError(f"lowest: must be above 0, got {lowest!r}")
    if highest is not None and not (math.isfinite(highest) and highest >= lowest):
        raise ConfigError(f"highest: must be at least lowest ({lowest:g}), got {highest!r}")
    if not 0 < tolerance < 1:
        raise ConfigError(f"tolerance: must be between 0 and 1, got {tolerance!r}")
    if whole and (lowest != int(lowest) or (highest is not None and highest != int(highest))):
        raise ConfigError(f"lowest, highest: must be whole numbers, got {lowest!r} and {highest!r}")


class _Search:
    """The loads tried so far; each is tried once."""

    def __init__(self, attempt: Callable[[float], Probe], tolerance: float, whole: bool) -> None:
        self.attempt = attempt
        self.tolerance = tolerance
        self.whole = whole
        self.probes: dict[float, Probe] = {}

    def at(self, load: float) -> Probe:
        if load not in self.probes:
            self.probes[load] = self.attempt(load)
        return self.probes[load]

    @property
    def monotone(self) -> bool:
        verdicts = [probe.ok for _, probe in sorted(self.probes.items())]
        return verdicts == sorted(verdicts, reverse=True)

    def bracket(self, lowest: float, highest: float | None) -> tuple[float, float | None]:
        """A load that keeps the limits and a larger one that does not."""
        if highest is not None:
            return (highest, None) if self.at(highest).ok else (lowest, highest)
        load = lowest
        for _ in range(MAX_DOUBLINGS):
            if not self.at(load * 2).ok:
                return load, load * 2
            load *= 2
        raise ConfigError(f"capacity: no limit is broken even at {load:g}; give a highest load, or tighter limits")

    def bisect(self, low: float, high: float) -> tuple[float, float]:
        while (high - low) > self.tolerance * high and not (self.whole and high - low <= 1):
            middle = (low + high) // 2 if self.whole else (low + high) / 2
            low, high = (middle, high) if self.at(middle).ok else (low, middle)
        return low, high

    def verify(self, lowest: float, low: float, high: float | None, checks: int) -> tuple[float, float | None]:
        """Fall back below the first load in between that breaks the limits, as often as one is found."""
        while True:
            for step in range(1, checks + 1):
                self.at(self._rounded(lowest + (low - lowest) * step / (checks + 1)))
            broken = [load for load, probe in self.probes.items() if not probe.ok and load < low]
            if not broken:
                return low, high
            high = min(broken)
            low = max(load for load in self.probes if load < high)
            low, high = self.bisect(low, high)

    def _rounded(self, load: float) -> float:
        return float(round(load)) if self.whole else load
