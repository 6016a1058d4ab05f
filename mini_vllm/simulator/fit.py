"""From measured steps to a `FittedCost`.

The fit minimises relative errors, since a step of a thousand tokens would otherwise drown those of one, with Huber's
weights (1964) against steps that were interrupted by something else. Coefficients are not negative: a step that reads
more cannot get faster. With so few features that is solved exactly, by trying every subset of them.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mini_vllm.exceptions import ConfigError
from mini_vllm.simulator.cost import FEATURES, FittedCost, StepLoad, features_of

Sample = tuple[StepLoad, float]
"""(what a step computed, seconds it took)."""

LEAST_SAMPLES = 2 * len(FEATURES)
_REWEIGHTINGS = 20
_HUBER = 2.0
"""Residuals beyond this many times the median one count less."""


def fit_cost(samples: Sequence[Sample], about: dict[str, Any] | None = None) -> FittedCost:
    """The cost that describes these steps best. Raises `ConfigError` for too few, or for ones without a duration."""
    if len(samples) < LEAST_SAMPLES:
        raise ConfigError(f"calibrate: {len(samples)} steps were measured, at least {LEAST_SAMPLES} are needed")
    features = np.array([features_of(load) for load, _ in samples], dtype=np.float64)
    seconds = np.array([taken for _, taken in samples], dtype=np.float64)
    if not (seconds > 0).all():
        raise ConfigError("calibrate: a step took no time at all, so no relative error can be computed")
    relative = features / seconds[:, None]
    weights = np.ones(len(samples))
    for _ in range(_REWEIGHTINGS):
        root = np.sqrt(weights)
        coefficients = nonnegative_least_squares(relative * root[:, None], root)
        residuals = np.abs(relative @ coefficients - 1.0)
        limit = _HUBER * max(float(np.median(residuals)), 1e-9)
        weights = np.minimum(1.0, limit / np.maximum(residuals, limit))
    return FittedCost(tuple(coefficients.tolist()), _quality(features @ coefficients, seconds), about or {})


def _quality(predicted: NDArray[np.float64], seconds: NDArray[np.float64]) -> dict[str, float]:
    errors = np.abs(predicted / seconds - 1.0)
    return {
        "num_steps": float(len(seconds)),
        "median_relative_error": float(np.median(errors)),
        "p90_relative_error": float(np.percentile(errors, 90)),
        "total_seconds": float(seconds.sum()),
        "total_relative_error": float(predicted.sum() / seconds.sum() - 1.0),
    }


def nonnegative_least_squares(matrix: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """The x >= 0 with the smallest |matrix x - target|: the best of all subsets of columns whose free solution is so.

    matrix: [samples, columns], with few columns: there are 2^columns subsets.
    """
    columns = matrix.shape[1]
    scale = np.linalg.norm(matrix, axis=0)
    scale[scale == 0] = 1.0
    scaled = matrix / scale
    best, best_error = np.zeros(columns), float(target @ target)
    for size in range(1, columns + 1):
        for chosen in map(list, combinations(range(columns), size)):
            x = np.linalg.lstsq(scaled[:, chosen], target, rcond=None)[0]
            error = float(np.sum((scaled[:, chosen] @ x - target) ** 2))
            if (x >= 0).all() and error < best_error:
                best, best_error = np.zeros(columns), error
                best[chosen] = x / scale[chosen]
    return best
