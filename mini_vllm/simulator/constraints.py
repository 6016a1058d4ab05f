"""Limits on the figures of a run, and the choice of the best run that keeps them all.

A limit is written as people say it, `p99_ttft_ms<=500`. The best of several runs is never the least bad one: where
nothing keeps every limit, that is an error which says how near the best came.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mini_vllm.exceptions import ConfigError

_FORM = re.compile(r"\s*([a-z]\w*)\s*(<=|>=|<|>)\s*([-+.\deE]+)\s*")
_HOLDS: dict[str, Callable[[float, float], bool]] = {
    "<=": lambda value, limit: value <= limit,
    "<": lambda value, limit: value < limit,
    ">=": lambda value, limit: value >= limit,
    ">": lambda value, limit: value > limit,
}


@dataclass(frozen=True)
class Constraint:
    metric: str
    relation: str
    limit: float

    def __str__(self) -> str:
        return f"{self.metric}{self.relation}{self.limit:g}"

    def value_in(self, metrics: Mapping[str, Any]) -> float:
        """Raises `ConfigError` for a figure the run does not have."""
        if self.metric not in metrics:
            raise ConfigError(f"constraint {self}: a run has no figure {self.metric!r}{_nearest(self.metric, metrics)}")
        value = metrics[self.metric]
        return math.nan if value is None else float(value)

    def miss(self, metrics: Mapping[str, Any]) -> float:
        """By which share of the limit it is missed; 0 when kept, infinite when there is no figure at all."""
        value = self.value_in(metrics)
        if _HOLDS[self.relation](value, self.limit):
            return 0.0
        if math.isnan(value):
            return math.inf
        return max(abs(value - self.limit) / abs(self.limit) if self.limit else abs(value), 1e-12)

    def explain(self, metrics: Mapping[str, Any]) -> str:
        """'p99_ttft_ms 812 is not <= 500 (62.4 % off)'."""
        miss = self.miss(metrics)
        if math.isinf(miss):
            return f"{self.metric} has no value, so not {self.relation} {self.limit:g}"
        value = self.value_in(metrics)
        off = f"{100 * miss:,.0f}" if miss >= 1 else f"{100 * miss:.3g}"
        return f"{self.metric} {value:.5g} is not {self.relation} {self.limit:g} ({off} % off)"


def parse_constraint(text: str) -> Constraint:
    """From `NAME<=VALUE` with any of <=, <, >=, >. Raises `ConfigError`."""
    match = _FORM.fullmatch(text)
    if not match:
        raise ConfigError(f"constraint: must look like p99_ttft_ms<=500, got {text!r}")
    name, relation, limit = match.groups()
    try:
        value = float(limit)
    except ValueError:
        raise ConfigError(f"constraint {text!r}: {limit!r} is not a number") from None
    if not math.isfinite(value):
        raise ConfigError(f"constraint {text!r}: the limit must be finite")
    return Constraint(name, relation, value)


def broken(constraints: Sequence[Constraint], metrics: Mapping[str, Any]) -> str:
    """What is not kept, with figures; empty when everything is."""
    return "; ".join(constraint.explain(metrics) for constraint in constraints if constraint.miss(metrics) > 0)


def best_within(
    runs: Sequence[Mapping[str, Any]],
    constraints: Sequence[Constraint],
    maximise: str = "",
    minimise: str = "",
    tie: str = "",
    names: Sequence[str] = (),
) -> int:
    """Position of the run with the most of `maximise` (or least of `minimise`) among those that keep every limit.

    tie: figure whose smaller value decides between equals. names: of the runs, for the message. Raises `ConfigError`
    when none qualifies.
    """
    if bool(maximise) == bool(minimise):
        raise ConfigError("grid search: needs either a figure to maximise or one to minimise")
    kept = [i for i, run in enumerate(runs) if not broken(constraints, run)]
    goal = Constraint(maximise or minimise, ">=", 0)
    kept = [i for i in kept if not math.isnan(goal.value_in(runs[i]))]
    if not kept:
        raise ConfigError(_nothing_qualifies(runs, constraints, names))
    sign = -1 if maximise else 1
    second = Constraint(tie or goal.metric, ">=", 0)
    return min(kept, key=lambda i: (sign * goal.value_in(runs[i]), second.value_in(runs[i]) if tie else 0))


def _nothing_qualifies(
    runs: Sequence[Mapping[str, Any]], constraints: Sequence[Constraint], names: Sequence[str]
) -> str:
    if not runs:
        return "grid search: there is no run to choose from"
    misses = [max((c.miss(run) for c in constraints), default=math.inf) for run in runs]
    nearest = min(range(len(runs)), key=misses.__getitem__)
    limits = ", ".join(str(constraint) for constraint in constraints)
    where = names[nearest] if names else f"run {nearest}"
    why = broken(constraints, runs[nearest])
    return f"grid search: none of {len(runs)} runs keeps {limits}; the nearest is {where}: {why}"


def _nearest(name: str, metrics: Mapping[str, Any]) -> str:
    words = set(name.split("_"))
    alike = sorted(metrics, key=lambda key: -len(words & set(key.split("_"))))[:3]
    return f"; it has {', '.join(alike)}, ..." if alike else ""
