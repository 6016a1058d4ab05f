"""Plans as text: a table for people, JSON and CSV for programs, several set-ups beside each other.

Numbers for people carry binary units for memory and as many digits as mean something; JSON and CSV hold the raw ones.
"""

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from mini_vllm.simulator.planner.plan import Line, Plan, Value

_SI = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))


def shown(value: Value, unit: str) -> str:
    """A value as a person reads it."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if unit == "B":
        return _binary(value)
    if unit in ("FLOP/s", "B/s"):
        return _decimal(value, unit)
    if unit == "s":
        return _seconds(value)
    text = f"{value:,}" if isinstance(value, int) else _digits(value)
    if unit in ("x", "%"):
        return f"{value:,.2f}{unit}" if unit == "x" else f"{_digits(value)} %"
    return f"{text} {unit}".rstrip()


def _digits(value: float) -> str:
    """Four significant digits, never an exponent for what people can read."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _binary(value: float) -> str:
    for power, name in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if abs(value) >= 1 << power:
            return f"{value / (1 << power):,.2f} {name}"
    return f"{value:,.0f} B"


def _decimal(value: float, unit: str) -> str:
    for size, prefix in _SI:
        if value >= size:
            return f"{value / size:,.4g} {prefix}{unit}"
    return f"{value:,.4g} {unit}"


def _seconds(value: float) -> str:
    if value >= 1:
        return f"{value:,.3g} s"
    return f"{value * 1e3:.4g} ms" if value >= 1e-3 else f"{value * 1e6:.4g} us"


# --- table ---------------------------------------------------------------------------------------------------


def table(plans: Sequence[Plan], explain: bool = False) -> str:
    """One column a plan. explain: the formula behind each value (of the last plan where there are several)."""
    columns = [[plan.title for plan in plans]] + [_values(plans, key) for _, key, _ in _rows(plans)]
    widths = [max(len(row[i]) for row in columns) for i in range(len(plans))] if len(plans) > 1 else [12]
    label_width = max(len(label) for _, _, label in _rows(plans)) + 4
    out = _head(plans, widths, label_width)
    last = ""
    for section, key, label in _rows(plans):
        if section != last:
            out += ["", section]
            last = section
        cells = "  ".join(text.rjust(width) for text, width in zip(_values(plans, key), widths, strict=True))
        formula = _formula(plans, key) if explain else ""
        out.append(f"  {label:<{label_width}}{cells}" + (f"   = {formula}" if formula else ""))
    return "\n".join(out)


def _head(plans: Sequence[Plan], widths: Sequence[int], label_width: int) -> list[str]:
    if len(plans) == 1:
        return [plans[0].title]
    titles = "  ".join(plan.title.rjust(width) for plan, width in zip(plans, widths, strict=True))
    return [" " * (label_width + 2) + titles]


def _rows(plans: Sequence[Plan]) -> list[tuple[str, str, str]]:
    """(section, key, label) of every line of any plan, in order. Sections that all have go by the key alone."""
    rows: dict[str, tuple[str, str, str]] = {}
    order: dict[str, list[str]] = {}
    for plan in plans:
        for section in plan.sections:
            keys = order.setdefault(section.key, [])
            for line in section.lines:
                rows.setdefault(line.key, (_title(plans, section.key, section.title), line.key, line.label))
                if line.key not in keys:
                    keys.append(line.key)
    return [rows[key] for keys in order.values() for key in keys]


def _title(plans: Sequence[Plan], key: str, title: str) -> str:
    """A section's title, with all its variants when set-ups differ in it."""
    titles = [section.title for plan in plans for section in plan.sections if section.key == key]
    return " | ".join(dict.fromkeys(titles)) if len(plans) > 1 else title


def _line(plan: Plan, key: str) -> Line | None:
    return next((line for line in plan.lines() if line.key == key), None)


def _values(plans: Sequence[Plan], key: str) -> list[str]:
    lines = [_line(plan, key) for plan in plans]
    return ["-" if line is None else shown(line.value, line.unit) for line in lines]


def _formula(plans: Sequence[Plan], key: str) -> str:
    """One formula, or one for each set-up where they differ."""
    found = [line.formula for plan in plans if (line := _line(plan, key)) is not None]
    return " | ".join(dict.fromkeys(text for text in found if text))


# --- for programs --------------------------------------------------------------------------------------------


def as_json(plans: Sequence[Plan], explain: bool = False) -> str:
    """An object for one plan, a list of them for several."""
    values: list[Any] = [plan.as_dict(explain) for plan in plans]
    return json.dumps(values[0] if len(values) == 1 else values, indent=2)


def as_csv(plans: Sequence[Plan], explain: bool = False) -> str:
    """One row a value: plan, section, key, value, unit (and formula)."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["plan", "section", "key", "value", "unit"] + (["formula"] if explain else []))
    for plan in plans:
        for section in plan.sections:
            for line in section.lines:
                row = [plan.title, section.key, line.key, "" if line.value is None else line.value, line.unit]
                writer.writerow(row + ([line.formula] if explain else []))
    return out.getvalue().rstrip("\n")


def render(plans: Sequence[Plan], form: str = "table", explain: bool = False) -> str:
    """form: 'table', 'json' or 'csv'."""
    return {"table": table, "json": as_json, "csv": as_csv}[form](plans, explain)
