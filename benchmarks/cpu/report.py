"""From the record of a comparison to its table and its plots. Everything here can be made again from the JSON."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

OURS = "mini_vllm"
CLASSES = {
    "16 or 32 bit": ("bf16", "f32", "f16", "bf16-eager"),
    "8 bit": ("int8", "int8-weights", "q8_0", "int8-eager"),
    "4 bit, 8-bit head": ("int4", "q4_0"),
    "4 bit, 4-bit head": ("int4-head",),
}
"""Widths that are compared with each other. OpenVINO's int4 keeps its embedding and head in 8 bits."""

Record = Mapping[str, Any]


def figures(record: Record, task: str, entrant: str) -> list[float]:
    """Tokens a second of every round that has one, in order."""
    return [s["figure"] for s in record["slices"] if (s["task"], s["entrant"]) == (task, entrant) and s.get("figure")]


def ratios(record: Record, task: str, ours: str, peer: str) -> list[float]:
    """Ours over the peer's, round by round: both saw the machine in the same state."""

    def by_round(entrant: str) -> dict[int, float]:
        chosen = (s for s in record["slices"] if (s["task"], s["entrant"]) == (task, entrant) and s.get("figure"))
        return {s["round"]: s["figure"] for s in chosen}

    mine, theirs = by_round(ours), by_round(peer)
    return [mine[r] / theirs[r] for r in sorted(mine.keys() & theirs.keys())]


def class_of(entrant: str) -> str | None:
    width = entrant.split(" ", 1)[1]
    return next((name for name, widths in CLASSES.items() if width in widths), None)


def spread(values: Sequence[float]) -> str:
    """'12.3 (11.9 to 12.8)', or a dash."""
    if not values:
        return "-"
    return f"{_short(statistics.median(values))} ({_short(min(values))} to {_short(max(values))})"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def best_peer(record: Record, task: str, ours: str) -> str | None:
    """The fastest other engine with weights of the same class (for 4-bit heads: of any 4 bits)."""
    wanted = class_of(ours)
    classes = {wanted} if wanted != "4 bit, 4-bit head" else {"4 bit, 8-bit head", wanted}
    rivals = [e for e in record["entrants"] if not e.startswith(f"{OURS} ") and class_of(e) in classes]
    measured = {e: statistics.median(found) for e in rivals if (found := figures(record, task, e))}
    return max(measured, key=lambda e: measured[e], default=None)


def table(record: Record, tasks: Iterable[str]) -> list[str]:
    """Markdown: a row for each task and width of ours, beside the best peer of that class."""
    lines = [
        "| task, tokens/s | mini_vllm | | best peer | which | ratio, paired | reached |",
        "|---|---|---:|---:|---|---:|---|",
    ]
    for task in tasks:
        for ours in (e for e in record["entrants"] if e.startswith(f"{OURS} ")):
            mine = figures(record, task, ours)
            if not mine:
                continue
            peer = best_peer(record, task, ours)
            theirs = figures(record, task, peer) if peer else []
            paired = ratios(record, task, ours, peer) if peer else []
            lines.append(
                f"| {task} | {ours.split(' ', 1)[1]} | {spread(mine)} | {spread(theirs)} | {peer or '-'} | "
                f"{spread(paired)} | {reached(record, task, ours, mine)} |"
            )
    return lines


def reached(record: Record, task: str, ours: str, mine: Sequence[float]) -> str:
    """Share of the machine: bandwidth for one stream of decoding, arithmetic for prefill."""
    floor = record["floors"].get(f"{task}|{ours}")
    if floor is None or not mine:
        return ""
    share = statistics.median(mine) / floor["tokens_per_second"]
    return f"{share:.0%} of {floor['what']}"


def peers_table(record: Record, tasks: Sequence[str]) -> list[str]:
    """Markdown: every entrant, every task."""
    lines = [f"| tokens/s | {' | '.join(tasks)} |", "|---|" + "---:|" * len(tasks)]
    for entrant in record["entrants"]:
        cells = [spread(figures(record, task, entrant)) for task in tasks]
        if any(cell != "-" for cell in cells):
            lines.append(f"| {entrant} | {' | '.join(cells)} |")
    return lines


def sweep_points(record: Record, kind: str, entrant: str) -> tuple[list[int], list[float]]:
    """(batch or context, median tokens a second)."""
    names = [t for t in record["tasks"] if t.startswith(f"{kind} ")]
    points = [(int(t.split()[1]), found) for t in names if (found := figures(record, t, entrant))]
    return [x for x, _ in points], [statistics.median(found) for _, found in points]


def plot(record: Record, file: Path) -> list[Path]:
    """Tokens a second against batch and against context, one line an entrant; PNG and SVG. Nothing without sweeps."""
    if not any(t.startswith(("batch ", "context ")) for t in record["tasks"]):
        return []
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), constrained_layout=True)
    for ax, kind in zip(axes, ("batch", "context"), strict=True):
        for number, entrant in enumerate(record["entrants"]):
            x, y = sweep_points(record, kind, entrant)
            if x:
                style = "-o" if entrant.startswith(OURS) else "--s"
                ax.plot(x, y, style, label=entrant, color=f"C{number}", markersize=4)
        ax.set(xscale="log", yscale="log", xlabel={"batch": "streams", "context": "tokens of context"}[kind])
        ax.set_ylabel("generated tokens a second, all streams")
        ax.grid(alpha=0.3, which="both")
    axes[0].legend(fontsize=8)
    figure.suptitle(f"{record['model']}, {record['threads']} threads, {record['environment']['cpu'].get('model', '')}")
    files = [file.with_suffix(suffix) for suffix in (".png", ".svg")]
    for path in files:
        figure.savefig(path, dpi=140)
    plt.close(figure)
    return files
