"""A plan: sections of lines, each with a value, its unit and the formula it came from, numbers filled in.

`make_plan` is handed a model's geometry, a machine and options; which sections there are depends on the options. What
cannot be raises `ConfigError` before there is a plan.
"""

from dataclasses import dataclass
from typing import Any

from mini_vllm.simulator.planner.geometry import ModelGeometry
from mini_vllm.simulator.planner.hardware import Hardware
from mini_vllm.simulator.planner.options import PlanOptions
from mini_vllm.simulator.planner.setup import Setup

Value = float | int | str | None


@dataclass(frozen=True)
class Line:
    """One fact. key: its name in JSON and CSV. unit: 'B', 's', 'tok/s', '%' ... as `render` understands it."""

    key: str
    label: str
    value: Value
    unit: str = ""
    formula: str = ""


@dataclass(frozen=True)
class Section:
    key: str
    title: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Plan:
    title: str
    sections: tuple[Section, ...]
    setup: Setup

    def __getitem__(self, key: str) -> Value:
        """The value of a line, by its key."""
        for line in self.lines():
            if line.key == key:
                return line.value
        raise KeyError(key)

    def lines(self) -> list[Line]:
        return [line for section in self.sections for line in section.lines]

    def as_dict(self, explain: bool = False) -> dict[str, Any]:
        """Nested by section; with `explain`, each line with unit and formula."""

        def shown(line: Line) -> Any:
            return {"value": line.value, "unit": line.unit, "formula": line.formula} if explain else line.value

        sections = {section.key: {line.key: shown(line) for line in section.lines} for section in self.sections}
        return {"title": self.title, **sections}


def make_plan(model: ModelGeometry, hardware: Hardware, options: PlanOptions | None = None) -> Plan:
    """Raises `ConfigError` (`KVCacheTooSmallError`) with the arithmetic."""
    from mini_vllm.simulator.planner import sections, speed_sections  # both are written in terms of `Line`

    options = options or PlanOptions()
    if options.num_parameters is not None:
        model = model.with_parameters(options.num_parameters)
    setup = Setup(model, hardware, options)
    made = [sections.model_section(setup), sections.memory_section(setup), sections.concurrency_section(setup)]
    made += speed_sections.speed_sections(setup)
    optional = [
        (options.tensor_parallel_size > 1, sections.tensor_parallel_section),
        (options.pipeline_parallel_size > 1, sections.pipeline_section),
        (options.kv_transfer_gbps is not None, sections.disaggregation_section),
        (options.max_loras > 0, sections.lora_section),
        (options.num_speculative_tokens > 0, sections.speculation_section),
    ]
    made += [section(setup) for wanted, section in optional if wanted]
    return Plan(f"{model.name} on {_machine(setup)}", tuple(made), setup)


def _machine(setup: Setup) -> str:
    devices = setup.options.tensor_parallel_size * setup.options.pipeline_parallel_size
    return setup.hardware.name if devices == 1 else f"{devices} x {setup.hardware.name}"
