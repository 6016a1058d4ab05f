"""Where a curve bends, and which points no other point beats: the arithmetic behind every sweep's answer.

Plain numbers in, positions out; nothing here knows what a load or a latency is. Knees are found as in Satopaa et al.,
"Finding a 'Kneedle' in a Haystack" (2011), without its smoothing: scale both axes to [0, 1] and take the point that is
farthest from the straight line between the ends of the part with one bend. That is a property of the curve as swept, so
it moves with the range: sweep from light load to past saturation.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mini_vllm.exceptions import ConfigError

Shape = Literal["rising", "saturating"]

LEAST_DISTANCE = 0.1
"""Of the scaled curve from its chord, below which it counts as straight."""


@dataclass(frozen=True)
class Knee:
    """A position on a curve. distance: from the chord, 0 (straight) to 1 (a right angle)."""

    index: int
    x: float
    y: float
    distance: float


def find_knee(
    x: Sequence[float], y: Sequence[float], shape: Shape = "rising", least: float = LEAST_DISTANCE
) -> Knee | None:
    """The point of maximum distance below ("rising", latency against load) or above ("saturating") the chord.

    rising: flat first, then steep. saturating: steep first, then flat. What comes after the steepest segment of a
    rising curve is left out, as is what comes before that of a saturating one: far past saturation, the waits of a
    finite run level off again, and that bend is not the one that is meant. None when the curve never leaves its chord
    by `least`, on that side: a straight line has no knee. Raises `ConfigError` for under three points, values that are
    not finite, or an x that does not rise.
    """
    _check_curve(x, y)
    begin, end = _one_bend(x, y, shape)
    part_x, part_y = x[begin:end], y[begin:end]
    span = max(part_y) - min(part_y)
    if len(part_x) < 3 or span == 0:
        return None
    sign = 1.0 if shape == "rising" else -1.0
    distances = [sign * (line - b) / span for line, b in zip(_chord(part_x, part_y), part_y, strict=True)]
    index = max(range(len(part_x)), key=distances.__getitem__)
    if distances[index] < least:
        return None
    return Knee(begin + index, part_x[index], part_y[index], distances[index])


def _one_bend(x: Sequence[float], y: Sequence[float], shape: Shape) -> tuple[int, int]:
    """The part of the curve up to its steepest segment ("rising"), or from it on ("saturating")."""
    slopes = [(y[i + 1] - y[i]) / (x[i + 1] - x[i]) for i in range(len(x) - 1)]
    if shape == "saturating":
        return slopes.index(max(slopes)), len(x)
    return 0, len(slopes) + 1 - slopes[::-1].index(max(slopes))


def _chord(x: Sequence[float], y: Sequence[float]) -> list[float]:
    """The straight line between the ends, at each x."""
    slope = (y[-1] - y[0]) / (x[-1] - x[0])
    return [y[0] + slope * (value - x[0]) for value in x]


def _check_curve(x: Sequence[float], y: Sequence[float]) -> None:
    if len(x) != len(y):
        raise ConfigError(f"knee: {len(x)} loads but {len(y)} values")
    if len(x) < 3:
        raise ConfigError(f"knee: a bend needs at least 3 points, got {len(x)}")
    if not all(math.isfinite(value) for value in (*x, *y)):
        raise ConfigError("knee: every load and value must be finite")
    if any(later <= earlier for earlier, later in itertools.pairwise(x)):
        raise ConfigError(f"knee: loads must rise, got {list(x)}")


def first_below(values: Sequence[float], least: float) -> int | None:
    """Position of the first value under `least`; None when all reach it. The knee by attainment of an SLO."""
    return next((index for index, value in enumerate(values) if value < least), None)


def pareto_front(gains: Sequence[float], costs: Sequence[float]) -> list[int]:
    """Positions that no other point beats (at least as much gain for at most the cost, and one of them better).

    By rising cost. Points that are equal in both are all kept. O(n log n).
    """
    if len(gains) != len(costs):
        raise ConfigError(f"pareto: {len(gains)} gains but {len(costs)} costs")
    if any(math.isnan(value) for value in (*gains, *costs)):
        raise ConfigError("pareto: every gain and cost must be a number")
    order = sorted(range(len(gains)), key=lambda i: (costs[i], -gains[i]))
    front: list[int] = []
    for index in order:
        if not front or gains[index] > gains[front[-1]] or _same(gains, costs, index, front[-1]):
            front.append(index)
    return front


def _same(gains: Sequence[float], costs: Sequence[float], a: int, b: int) -> bool:
    return gains[a] == gains[b] and costs[a] == costs[b]
