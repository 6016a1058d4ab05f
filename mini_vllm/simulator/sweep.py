"""The same run again and again with other values: a grid of engine arguments and loads, spread over processes.

An axis is written as `NAME=v1,v2,...`; several axes make every combination, the last one turning fastest. Points are
independent, and each is a function of its values alone, so the result does not depend on how many processes worked on
it or in which order. A point that cannot be (a pool without room for one request, say) keeps its error in its row.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

from mini_vllm.exceptions import ConfigError, MiniVLLMError
from mini_vllm.simulator.constraints import Constraint, best_within
from mini_vllm.simulator.curves import find_knee, first_below

Value = int | float | str | bool
Values = Mapping[str, Value]
Metrics = Mapping[str, Any]
Attempt = Callable[[dict[str, Value]], Metrics]
"""From the values of one point to the figures of its run. Must be picklable to be spread over processes."""

LOADS = {"rate": "requests per second", "users": "users"}
"""Axes that are loads, and their units."""

MAX_POINTS = 10_000


@dataclass(frozen=True)
class Axis:
    """One argument and the values it takes, in the order they were given."""

    name: str
    values: tuple[Value, ...]

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ConfigError(f"sweep: {self.name!r} is not the name of an argument")
        if not self.values:
            raise ConfigError(f"sweep: {self.name} has no values")
        if len(set(self.values)) < len(self.values):
            raise ConfigError(f"sweep: {self.name} has a value twice in {', '.join(map(str, self.values))}")

    @property
    def is_numeric(self) -> bool:
        return all(isinstance(value, int | float) and not isinstance(value, bool) for value in self.values)


def parse_axis(text: str) -> Axis:
    """From `NAME=v1,v2,...`. Values that look like numbers are; `true` and `false` are truths; dashes are underscores.

    Values with commas of their own are separated by semicolons: `prompt_len=uniform:1,9;512`.
    """
    name, equals, rest = text.partition("=")
    if not equals:
        raise ConfigError(f"sweep: must look like NAME=v1,v2,..., got {text!r}")
    parts = [part.strip() for part in rest.split(";" if ";" in rest else ",")]
    if not all(parts):
        raise ConfigError(f"sweep: a value is empty in {text!r}")
    return Axis(name.strip().lstrip("-").replace("-", "_"), tuple(parse_value(part) for part in parts))


def parse_value(text: str) -> Value:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


@dataclass(frozen=True)
class SweepPoint:
    """One combination. metrics: of its run; empty when `error` says why there is none."""

    values: Values
    metrics: Metrics
    error: str = ""

    @property
    def name(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.values.items())


@dataclass(frozen=True)
class SweepResult:
    """Every point, in the order of the grid."""

    axes: tuple[Axis, ...]
    points: tuple[SweepPoint, ...]

    @property
    def done(self) -> tuple[SweepPoint, ...]:
        """Those that ran."""
        return tuple(point for point in self.points if not point.error)

    def column(self, name: str) -> list[Any]:
        """A value or a figure of every point that ran. Raises `ConfigError` when there is none of that name."""
        if not any(name in point.values or name in point.metrics for point in self.done):
            raise ConfigError(f"sweep: no value and no figure is called {name!r}")
        return [point.values.get(name, point.metrics.get(name)) for point in self.done]

    def along(self, name: str, fixed: Values | None = None) -> list[SweepPoint]:
        """The points that ran whose other axes have the values in `fixed`, by rising value of `name`."""
        wanted = (fixed or {}).items()
        chosen = [point for point in self.done if all(point.values[key] == value for key, value in wanted)]
        return sorted(chosen, key=lambda point: float(point.values[name]))

    def series(self, name: str) -> "list[tuple[str, list[SweepPoint]]]":
        """One list of points by rising `name` for every combination of the other axes, with what tells it apart."""
        groups: dict[str, list[SweepPoint]] = {}
        for point in self.done:
            others = ", ".join(f"{key}={value}" for key, value in point.values.items() if key != name)
            groups.setdefault(others, []).append(point)
        return [(others, sorted(points, key=lambda p: float(p.values[name]))) for others, points in groups.items()]

    def knees(self, figure: str = "p99_ttft_ms") -> list[str]:
        """Where `figure` bends along every load that was swept, in words."""
        found, unit = [], " ms" if figure.endswith("_ms") else ""
        for name in [axis.name for axis in self.axes if axis.name in LOADS and len(axis.values) >= 3]:
            for others, points in self.series(name):
                pairs = [(float(p.values[name]), p.metrics[figure]) for p in points if p.metrics[figure] is not None]
                knee = find_knee([x for x, _ in pairs], [y for _, y in pairs]) if len(pairs) >= 3 else None
                where = f"at {name}={knee.x:g}, where it is {knee.y:,.4g}{unit}" if knee else "not among these loads"
                found.append(f"knee of {figure}{f' with {others}' if others else ''}: {where}")
        return found

    def attainments(self, share: float = 0.99) -> list[str]:
        """Up to which load `share` of the requests keep the SLO, in words; nothing where there was no SLO."""
        found = []
        for name in [axis.name for axis in self.axes if axis.name in LOADS and len(axis.values) >= 2]:
            for others, points in self.series(name):
                kept = [p.metrics["slo_attainment"] for p in points if p.metrics.get("slo_attainment") is not None]
                if len(kept) < len(points):
                    continue
                broken = first_below(kept, share)
                loads = [f"{name}={point.values[name]:g}" for point in points]
                edge = f"from {loads[broken]} on not" if broken is not None else f"still at {loads[-1]}"
                found.append(f"{100 * share:g} % keep the SLO{f' with {others}' if others else ''}: {edge}")
        return found

    def best(
        self, constraints: Sequence[Constraint] = (), *, maximise: str = "", minimise: str = "", tie: str = ""
    ) -> SweepPoint:
        """Of those that keep every limit. Raises `ConfigError`, saying how near the best came, when none does."""
        done = self.done
        names = [point.name for point in done]
        figures = [point.metrics for point in done]
        return done[best_within(figures, constraints, maximise, minimise, tie, names)]

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        points = [{"values": dict(p.values), "metrics": dict(p.metrics), "error": p.error or None} for p in self.points]
        return {"axes": {axis.name: list(axis.values) for axis in self.axes}, "points": points}


def grid(axes: Sequence[Axis]) -> list[dict[str, Value]]:
    """Every combination. Raises `ConfigError` for none, for a name twice, and for more than `MAX_POINTS`."""
    names = [axis.name for axis in axes]
    if not axes:
        raise ConfigError("sweep: needs at least one axis, such as rate=1,2,4")
    if len(set(names)) < len(names):
        raise ConfigError(f"sweep: an axis is there twice in {', '.join(names)}")
    count = 1
    for axis in axes:
        count *= len(axis.values)
    if count > MAX_POINTS:
        sizes = " x ".join(str(len(axis.values)) for axis in axes)
        raise ConfigError(f"sweep: {sizes} = {count:,} points, more than {MAX_POINTS:,}")
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*(axis.values for axis in axes))]


def run_sweep(
    attempt: Attempt,
    axes: Sequence[Axis],
    *,
    processes: int = 1,
    progress: Callable[[SweepPoint], None] | None = None,
) -> SweepResult:
    """Try every combination.

    processes: that work at once; with more than 1, `attempt` and what it holds must be picklable, and a script must
    guard its entry point, as for any use of multiprocessing. progress: called after each point, in order of finishing.
    Raises `ConfigError` when not a single point can be, with the first one's reason.
    """
    if processes < 1:
        raise ConfigError(f"processes: must be at least 1, got {processes}")
    wanted = grid(axes)
    found: dict[int, SweepPoint] = {}
    for number, point in _run(attempt, wanted, min(processes, len(wanted))):
        found[number] = point
        if progress is not None:
            progress(point)
    result = SweepResult(tuple(axes), tuple(found[number] for number in range(len(wanted))))
    if not result.done:
        raise ConfigError(f"sweep: none of {len(wanted)} points can be; {result.points[0].name}: {found[0].error}")
    return result


def _run(attempt: Attempt, wanted: list[dict[str, Value]], processes: int) -> Iterator[tuple[int, SweepPoint]]:
    if processes == 1:
        for number, values in enumerate(wanted):
            yield number, _attempt(attempt, values)
        return
    # fresh interpreters: a fork would copy whatever threads and progress bars the caller has
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        numbers: dict[Future[SweepPoint], int] = {}
        try:
            for number, values in enumerate(wanted):
                numbers[pool.submit(_attempt, attempt, values)] = number
            for future in as_completed(numbers):
                yield numbers[future], future.result()
        except BrokenProcessPool as error:
            raise ConfigError(
                "processes: one ended abruptly (out of memory?); a script that sweeps with several must guard its "
                "entry point with `if __name__ == '__main__':`, or use processes=1"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _attempt(attempt: Attempt, values: dict[str, Value]) -> SweepPoint:
    try:
        return SweepPoint(values, attempt(dict(values)))
    except MiniVLLMError as error:
        return SweepPoint(values, {}, str(error))
