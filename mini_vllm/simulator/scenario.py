"""Everything one simulated run depends on, with any part of it replaced by name.

A `Scenario` is what sweeps and capacity searches turn their knobs on: `with_values({"rate": 8, "max_num_seqs": 64})`
changes the workload, the engine's arguments, or the planner's set-up behind them, whichever has a field of that name.
It is plain data, so that it can be sent to other processes.
"""

import dataclasses
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mini_vllm.exceptions import ConfigError
from mini_vllm.simulator.capacity import Capacity, Probe, find_capacity
from mini_vllm.simulator.constraints import Constraint, broken
from mini_vllm.simulator.cost import CostModel, RooflineCost
from mini_vllm.simulator.driver import simulate
from mini_vllm.simulator.options import SimulationOptions, sized_for
from mini_vllm.simulator.planner.hardware import hardware_preset
from mini_vllm.simulator.planner.options import PlanOptions
from mini_vllm.simulator.planner.setup import Setup
from mini_vllm.simulator.results import SLO, SimulationResult
from mini_vllm.simulator.sweep import Metrics, Value, Values
from mini_vllm.simulator.workload import WorkloadOptions, make_workload

_NOT_THE_ENGINES = {"timeline_points", "step_records"}
"""Fields that say what is kept of a run, not what is run."""

ALIASES = {"num_users": "users", "replicas": "num_replicas", "request_rate": "rate", "num_prompts": "num_requests"}

Attempted = Callable[[Probe], None]


@dataclass(frozen=True)
class Scenario:
    """cost: None is the roofline of `setup`. setup: None when the pool is given by `options` alone; otherwise the
    engine arguments that the planner knows are its own, and the pool is what it has room for."""

    workload: WorkloadOptions
    options: SimulationOptions = field(default_factory=SimulationOptions)
    cost: CostModel | None = None
    setup: Setup | None = None
    slo: SLO | None = None

    def __post_init__(self) -> None:
        if self.cost is None and self.setup is None:
            raise ConfigError("scenario: needs a cost model, or a set-up of the planner to take one from")

    # -- running -----------------------------------------------------------------------------------------

    @property
    def engine_options(self) -> SimulationOptions:
        return self.options if self.setup is None else sized_for(self.setup, self.options)

    @property
    def cost_model(self) -> CostModel:
        if self.cost is not None:
            return self.cost
        assert self.setup is not None
        return RooflineCost.from_setup(self.setup)

    def run(self, progress: Callable[[int, int], None] | None = None) -> SimulationResult:
        return simulate(self.engine_options, make_workload(self.workload), self.cost_model, progress=progress)

    def __call__(self, values: Values) -> Metrics:
        """The figures of a run with these values: what `run_sweep` calls for each point."""
        return self.with_values(values).run().metrics(self.slo)

    # -- changing ----------------------------------------------------------------------------------------

    def with_values(self, values: Values) -> "Scenario":
        """Raises `ConfigError` for a name that nothing here has, and for a value of the wrong kind."""
        parts: dict[str, dict[str, Any]] = {"workload": {}, "options": {}, "plan": {}, "slo": {}}
        changed = self
        for given, value in values.items():
            name = ALIASES.get(given, given)
            if name == "gpu":
                changed = changed._on(value)
                continue
            part = self._part_with(name, given)
            name = "num_gpu_blocks_override" if part == "plan" and name == "num_gpu_blocks" else name
            parts[part][name] = fitting(_KINDS[part], name, value)
        return changed._replaced(parts)

    def check_names(self, names: Iterable[str]) -> None:
        """Raises `ConfigError` for a name that nothing here has, before anything is run."""
        for given in names:
            if given != "gpu":
                self._part_with(ALIASES.get(given, given), given)

    def _part_with(self, name: str, given: str) -> str:
        if name in _fields(WorkloadOptions):
            return "workload"
        if self.setup is not None and (name in _fields(PlanOptions) or name == "num_gpu_blocks"):
            return "plan"
        if name in _fields(SimulationOptions) - _NOT_THE_ENGINES:
            return "options"
        if name in _fields(SLO):
            return "slo"
        names = sorted(_fields(WorkloadOptions) | (_fields(SimulationOptions) - _NOT_THE_ENGINES))
        more = "" if self.setup is None else ", gpu or an argument of the planner"
        raise ConfigError(f"sweep: nothing is called {given!r}; it can be {', '.join(names)}{more}")

    def _on(self, machine: Value) -> "Scenario":
        if self.setup is None or self.cost is not None:
            raise ConfigError("gpu: only has a meaning where memory and cost come from the planner")
        return replace(self, setup=replace(self.setup, hardware=hardware_preset(str(machine))))

    def _replaced(self, parts: Mapping[str, Mapping[str, Any]]) -> "Scenario":
        changes: dict[str, Any] = {}
        if parts["workload"]:
            changes["workload"] = replace(self.workload, **parts["workload"])
        if parts["options"]:
            changes["options"] = replace(self.options, **parts["options"])
        if parts["slo"]:
            changes["slo"] = replace(self.slo or SLO(), **parts["slo"])
        if parts["plan"] and self.setup is not None:
            changes["setup"] = replace(self.setup, options=replace(self.setup.options, **parts["plan"]))
        return replace(self, **changes)

    # -- searching ---------------------------------------------------------------------------------------

    def capacity(
        self,
        limits: Sequence[Constraint],
        load: str = "rate",
        lowest: float = 0.1,
        highest: float | None = None,
        *,
        tolerance: float = 0.02,
        attempted: Attempted | None = None,
    ) -> Capacity:
        """The largest load that keeps the limits. Raises `ConfigError` when not even `lowest` does.

        attempted: told of every load that was tried.
        """
        if not limits:
            raise ConfigError("capacity: needs at least one limit, such as p99_ttft_ms<=500")
        whole = ALIASES.get(load, load) == "users"

        def attempt(value: float) -> Probe:
            metrics = self({load: int(value) if whole else value})
            why = broken(limits, metrics)
            probe = Probe(value, not why, why, metrics)
            if attempted is not None:
                attempted(probe)
            return probe

        return find_capacity(attempt, lowest, highest, tolerance=tolerance, whole=whole)


def slo_limits(slo: SLO, percentile: str = "p99") -> list[Constraint]:
    """An SLO as limits on one percentile of each latency."""
    return [Constraint(f"{percentile}_{name}", "<=", value) for name, value in vars(slo).items() if value is not None]


# --- values by name --------------------------------------------------------------------------------------------

_KINDS: dict[str, type] = {
    "workload": WorkloadOptions, "options": SimulationOptions, "plan": PlanOptions, "slo": SLO,
}  # fmt: skip


def _fields(kind: type) -> set[str]:
    return {item.name for item in dataclasses.fields(kind)}


def fitting(kind: type, name: str, value: Value) -> Value:
    """`value` as the field of that dataclass holds it. Raises `ConfigError` for what it cannot."""
    hint = typing.get_type_hints(kind)[name]
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = set(typing.get_args(hint)) if union else {hint}
    if isinstance(value, bool):
        if bool in kinds:
            return value
    elif isinstance(value, int | float):
        if type(value) in kinds:
            return value
        if float in kinds:
            return float(value)
        if int in kinds and value == int(value):
            return int(value)
        if str in kinds:
            return str(value)
    elif str in kinds or typing.get_origin(hint) is typing.Literal:
        return value
    wanted = " or ".join(sorted(getattr(k, "__name__", str(k)) for k in kinds - {type(None)}))
    raise ConfigError(f"{name}: must be {wanted}, got {value!r}")
