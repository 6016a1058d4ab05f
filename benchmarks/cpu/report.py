"""From the record of a comparison to its tables. Everything here can be made again from the JSON."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.cpu.worker_protocol import split_width

OURS = "mini_vllm"
CLASSES = {
    "16 bits": ("bf16",),
    "32 bits": ("f32",),
    "8 bits": ("int8", "int8-weights", "q8_0"),
    "4 bits": ("int4", "int4-head", "q4_0"),
}
"""Widths that are compared with each other. The head has 8 bits in int4 and q4_0, 4 in int4-head."""

Record = Mapping[str, Any]
"""What was measured of one model."""


def width_of(entrant: str) -> str:
    return entrant.split(" ", 1)[1]


def class_of(width: str) -> str:
    """Raises ValueError for a width that nobody has."""
    for name, widths in CLASSES.items():
        if split_width(width)[0] in widths:
            return name
    raise ValueError(f"{width} is no width")


def is_ours(entrant: str) -> bool:
    return entrant.startswith(f"{OURS} ")


def by_round(record: Record, task: str, entrant: str) -> dict[int, float]:
    """Tokens a second of every round that has a figure."""
    chosen = (s for s in record["slices"] if s["task"] == task and s["entrant"] == entrant and "figure" in s)
    return {s["round"]: s["figure"] for s in chosen}


def figures(record: Record, task: str, entrant: str) -> list[float]:
    return list(by_round(record, task, entrant).values())


def ratios(record: Record, task: str, ours: str, peer: str) -> list[float]:
    """Ours over the peer's, round by round: both saw the machine in the same state."""
    mine, theirs = by_round(record, task, ours), by_round(record, task, peer)
    return [mine[number] / theirs[number] for number in sorted(mine.keys() & theirs.keys())]


def best_peer(record: Record, task: str, ours: str) -> str | None:
    """The fastest other engine with weights of the same class."""
    wanted = class_of(width_of(ours))
    rivals = [e for e in record["entrants"] if not is_ours(e) and class_of(width_of(e)) == wanted]
    measured = {e: statistics.median(found) for e in rivals if (found := figures(record, task, e))}
    return max(measured, key=lambda e: measured[e], default=None)


# --- text -----------------------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> str:
    """'12.3 (11.9 to 12.8)': median and extremes; or a dash."""
    if not values:
        return "-"
    middle = short(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} ({short(min(values))} to {short(max(values))})"


def short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def reached(record: Record, task: str, entrant: str) -> str:
    """'81 % of bandwidth, 9.1 GB/s' or '60 % of arithmetic, 75 GFLOP/s'."""
    floor, found = record["floors"].get(f"{task}|{entrant}"), figures(record, task, entrant)
    if floor is None or not found:
        return "-"
    share = statistics.median(found) / floor["tokens_per_second"]
    what, unit = ("bytes", "GB/s") if floor["bound_by"] == "bandwidth" else ("flops", "GFLOP/s")
    rate = short(share * floor["tokens_per_second"] / floor["counted"] * floor[what] / 1e9)
    return f"{share:.0%} of {floor['bound_by']}, {rate} {unit}"


def text_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Aligned Markdown."""
    table = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in table
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


# --- tables ---------------------------------------------------------------------------------------------------


def main_table(record: Record, tasks: Sequence[str]) -> list[str]:
    """A row for each task and width of ours, beside the best peer of that class."""
    rows = []
    for task in tasks:
        for ours in filter(is_ours, record["entrants"]):
            if not figures(record, task, ours):
                continue
            peer = best_peer(record, task, ours)
            theirs = spread(figures(record, task, peer)) if peer else "-"
            paired = spread(ratios(record, task, ours, peer)) if peer else "-"
            mine = spread(figures(record, task, ours))
            rows.append([task, width_of(ours), mine, theirs, peer or "-", paired, reached(record, task, ours)])
    return text_table(["tokens/s", "width", "mini_vllm", "best peer", "which", "ratio", "of the floor"], rows)


def engines_table(record: Record, tasks: Sequence[str]) -> list[str]:
    """Every entrant, every task, and the CPUs it kept busy."""
    rows = []
    for entrant in record["entrants"]:
        cells = [spread(figures(record, task, entrant)) for task in tasks]
        cpus = [s["cpus"] for s in record["slices"] if s["entrant"] == entrant and "cpus" in s]
        same = "/".join(map(str, record["entrants"][entrant].get("same_first_tokens", ["-"])))
        rows.append([entrant, *cells, short(statistics.median(cpus)) if cpus else "-", same])
    return text_table(["tokens/s", *tasks, "CPUs", "same"], rows)


def growth_table(models: Mapping[str, Record], task: str) -> list[str]:
    """How a decoded token's time grows with the model: milliseconds, and GB/s of weights and cache."""
    entrants = list(dict.fromkeys(e for record in models.values() for e in record["entrants"]))
    rows = []
    for entrant in entrants:
        cells = []
        for record in models.values():
            found, floor = figures(record, task, entrant), record["floors"].get(f"{task}|{entrant}")
            if not found or floor is None:
                cells.append("-")
                continue
            rate = statistics.median(found)
            cells.append(f"{1e3 / rate:.3g} ms, {short(floor['bytes'] / floor['counted'] * rate / 1e9)} GB/s")
        rows.append([entrant, *cells])
    return text_table([f"{task}: a token", *models], rows)


def text_of(report: Mapping[str, Any]) -> str:
    """All of it, for a terminal."""
    lines = [f"{report['date']}, {report['environment']['cpu'].get('model')}, {report['threads']} threads"]
    lines.append("tokens a second: median (lowest to highest round); ratio: round by round, ours over the best peer")
    models = report["models"]
    for name, record in models.items():
        lines += ["", *_model_lines(name, record)]
    decoding = [task for task in _main_tasks(next(iter(models.values()))) if task.startswith("decode")]
    if len(models) > 1 and decoding:
        lines += ["", *growth_table(models, decoding[0])]
    lines += [f"absent: {engine}: {why}" for engine, why in report["absent"].items()]
    return "\n".join(lines)


def _main_tasks(record: Record) -> list[str]:
    return [task["name"] for task in record["tasks"] if not task["sweep"]]


def _model_lines(name: str, record: Record) -> list[str]:
    memory = spread([probe["memory_gb_s"] for probe in record["probes"]])
    peaks = ", ".join(
        f"{kind} {short(record['ceilings'][f'{kind}_gflop_s'])}" for kind in ("float32", "bfloat16", "int8")
    )
    read = record["ceilings"]["read_gb_s"]
    lines = [
        f"{name}: rounds {record['rounds']}; memory {memory} GB/s, weights read at up to {short(read)} GB/s; "
        f"products {peaks} GFLOP/s",
        "",
    ]
    tasks = _main_tasks(record)
    points = [task["name"] for task in record["tasks"] if task["sweep"]]
    lines += [*main_table(record, tasks), "", *engines_table(record, tasks)]
    if points:
        lines += ["", *engines_table(record, points)]
    return lines + [f"failed: {entrant}: {why}" for entrant, why in record["failures"].items()]
