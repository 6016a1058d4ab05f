"""From measured steps to a `FittedCost`.

A regression on relative errors, since a step of a thousand tokens would otherwise drown those of one, with Huber's
weights (1964) against what does not fit in. Unknowns are the entries of both tables and the proportional costs, none
of them negative; a little weight on bends of the tables settles entries that the steps say nothing of.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mini_vllm.exceptions import ConfigError
from mini_vllm.simulator.cost import StepLoad
from mini_vllm.simulator.fitted import FittedCost

Sample = tuple[StepLoad, float]
"""(what a step computed, seconds it took)."""

Floats = NDArray[np.float64]

LEAST_SAMPLES = 10
DENSE_SIZES = 64
"""Up to this many tokens every size that was measured has an entry: few rows are where kernels change."""

SPACING = 1.15
"""Ratio of neighbouring entries above that."""

SAMPLE_SPACING = 1.3
_REWEIGHTINGS = 8
_HUBER = 2.0
"""Residuals beyond this many times the median one count less."""

_SMOOTHING = 0.1
"""What a bend of the size of a usual step weighs, where a relative error of 1 weighs 1."""


def fit_cost(
    samples: Sequence[Sample],
    about: dict[str, Any] | None = None,
    *,
    adding: tuple[float, float] = (0.0, 0.0),
    slowdown: float = 1.0,
    quality: dict[str, float] | None = None,
) -> FittedCost:
    """The cost that describes these steps best. Raises `ConfigError` for too few, or for ones without a duration.

    adding: seconds of adding a request, and of each token of its prompt. slowdown: as in the cost. quality: what else
    is to be kept there.
    """
    if len(samples) < LEAST_SAMPLES:
        raise ConfigError(f"calibrate: {len(samples)} steps were measured, at least {LEAST_SAMPLES} are needed")
    seconds = np.array([taken for _, taken in samples], dtype=np.float64)
    if not (seconds > 0).all():
        raise ConfigError("calibrate: a step took no time at all, so no relative error can be computed")
    loads = [load for load, _ in samples]
    tokens = entries_for((load.num_tokens for load in loads), DENSE_SIZES, SPACING)
    sampled = entries_for((load.num_sampled for load in loads if load.num_sampled > 1), 4, SAMPLE_SPACING)
    matrix = _design(loads, tokens, sampled)
    x = _robust(matrix, seconds, _bends(tokens, sampled, matrix.shape[1], float(np.median(seconds))))
    of_tokens, of_samples, rates = np.split(x, [len(tokens), len(tokens) + len(sampled)])
    key, chunk, pair = rates.tolist()
    return FittedCost(
        tuple(zip(tokens, of_tokens.tolist(), strict=True)),
        tuple(zip(sampled, of_samples.tolist(), strict=True)),
        key,
        chunk,
        pair,
        *adding,
        slowdown=slowdown,
        quality=_quality(matrix @ x, seconds) | (quality or {}),
        about=about or {},
    )


def entries_for(sizes: Iterable[int], dense: int, spacing: float) -> list[int]:
    """Which of the sizes get an entry: all up to `dense`, the last, and in between such that lie a ratio apart."""
    chosen: list[int] = []
    present = sorted(set(sizes))
    for size in present:
        if size <= dense or not chosen or size >= spacing * chosen[-1]:
            chosen.append(size)
    if chosen and chosen[-1] != present[-1]:
        chosen[-1:] = [present[-1]] if chosen[-1] > dense else [chosen[-1], present[-1]]
    return chosen


def _design(loads: Sequence[StepLoad], tokens: Sequence[int], sampled: Sequence[int]) -> Floats:
    """A row a step: its place in both tables, then keys, chunks and pairs."""
    rates = [(sum(load.starts) + len(load.starts), len(load.chunks), load.prefill_pairs) for load in loads]
    parts = [_places(np.array([load.num_tokens for load in loads]), tokens)]
    if sampled:  # the first column is that of one sample, which adds nothing
        parts.append(_places(np.array([max(load.num_sampled, 1) for load in loads]), [1, *sampled])[:, 1:])
    return np.hstack([*parts, np.array(rates, dtype=np.float64)])


def _places(values: NDArray[np.int64], entries: Sequence[int]) -> Floats:
    """Weights of the entries in what is read off for each value by linear interpolation: `[values, entries]`."""
    return np.stack([np.interp(values, entries, row) for row in np.eye(len(entries))], axis=1)


def _bends(tokens: Sequence[int], sampled: Sequence[int], columns: int, seconds: float) -> Floats:
    """A row an inner entry of a table: how far it lies off the line between its neighbours, in these seconds."""
    rows = []
    for first, sizes in ((0, tokens), (len(tokens), sampled)):
        for place in range(1, len(sizes) - 1):
            before, here, after = sizes[place - 1 : place + 2]
            row, share = np.zeros(columns), (here - before) / (after - before)
            row[first + place - 1 : first + place + 2] = (1 - share, -1.0, share)
            rows.append(_SMOOTHING / seconds * row)
    return np.array(rows).reshape(-1, columns)


def _robust(matrix: Floats, seconds: Floats, bends: Floats) -> Floats:
    """Iteratively reweighted least squares of relative errors."""
    relative, target = matrix / seconds[:, None], np.concatenate([np.ones(len(seconds)), np.zeros(len(bends))])
    weights = np.ones(len(seconds))
    for _ in range(_REWEIGHTINGS):
        root = np.sqrt(weights)
        whole = np.vstack([relative * root[:, None], bends])
        x = nonnegative_least_squares(whole, target * np.concatenate([root, np.ones(len(bends))]))
        residuals = np.abs(relative @ x - 1.0)
        limit = _HUBER * max(float(np.median(residuals)), 1e-9)
        weights = np.minimum(1.0, limit / np.maximum(residuals, limit))
    return x


def _quality(predicted: Floats, seconds: Floats) -> dict[str, float]:
    errors = np.abs(predicted / seconds - 1.0)
    return {
        "num_steps": float(len(seconds)),
        "median_relative_error": float(np.median(errors)),
        "p90_relative_error": float(np.percentile(errors, 90)),
        "total_seconds": float(seconds.sum()),
        "total_relative_error": float(predicted.sum() / seconds.sum() - 1.0),
    }


def nonnegative_least_squares(matrix: Floats, target: Floats) -> Floats:
    """The x >= 0 with the smallest |matrix x - target|, by the active sets of Lawson and Hanson (1974, chapter 23).

    matrix: [samples, columns].
    """
    scale = np.linalg.norm(matrix, axis=0)
    scale[scale == 0] = 1.0
    scaled = matrix / scale
    gram, towards = scaled.T @ scaled, scaled.T @ target
    x, free = np.zeros(len(scale)), np.zeros(len(scale), dtype=bool)
    for _ in range(10 * len(scale)):
        gradient = np.where(free, -np.inf, towards - gram @ x)
        if gradient.max(initial=-np.inf) <= 1e-10 * max(1.0, float(np.abs(towards).max())):
            break
        free[int(np.argmax(gradient))] = True
        x = _solve_free(gram, towards, x, free)
    solution: Floats = x / scale
    return solution


def _solve_free(gram: Floats, towards: Floats, x: Floats, free: NDArray[np.bool_]) -> Floats:
    """The best values of the free columns; those that would be negative are walked to 0 and freed no more."""
    while free.any():
        best = np.zeros_like(x)
        best[free] = np.linalg.lstsq(gram[np.ix_(free, free)], towards[free], rcond=None)[0]
        falling = free & (best <= 0)
        if not falling.any():
            return best
        step = float(np.min(x[falling] / np.maximum(x[falling] - best[falling], 1e-300)))
        x = x + step * (best - x)
        free &= ~(falling & (x <= 1e-14))
        x[~free] = 0.0
    return np.zeros_like(x)
