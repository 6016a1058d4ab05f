"""Figures with their spread, and tables of them."""

import statistics
from collections.abc import Sequence
from typing import Any


def spread_of(values: Sequence[float]) -> dict[str, Any]:
    """The median of repetitions, between which values it lies, and all of them in order."""
    rounded = [float(f"{value:.5g}") for value in values]
    return {
        "median": float(f"{statistics.median(values):.5g}"),
        "min": min(rounded),
        "max": max(rounded),
        "values": rounded,
    }


def shown(figure: dict[str, Any] | None, digits: int = 1) -> str:
    """`12.3 (11.9-13.0)`; a dash where there is none."""
    if figure is None:
        return "-"
    low, high = f"{figure['min']:.{digits}f}", f"{figure['max']:.{digits}f}"
    middle = f"{figure['median']:.{digits}f}"
    return middle if low == high == middle else f"{middle} ({low}-{high})"


def table(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text in columns, the first one to the left."""
    widths = [max(len(row[i]) for row in [headers, *rows]) for i in range(len(headers))]
    lines = [title]
    for row in [headers, *rows]:
        cells = [row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
