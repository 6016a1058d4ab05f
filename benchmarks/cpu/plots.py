"""Pictures of a comparison: tokens a second against batch and against context, a line for each engine and width."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.cpu.report import Record, class_of, figures, is_ours, width_of

AXES = {"batch": "streams at once", "context": "tokens of context, one stream"}
COLORS = {"mini_vllm": "C3", "llama_cpp": "C0", "openvino_genai": "C4", "vllm": "C2", "transformers": "C7"}


def sweep_points(record: Record, sweep: str, entrant: str) -> tuple[list[int], list[float]]:
    """(batch or context, median tokens a second)."""
    tasks = [task for task in record["tasks"] if task["sweep"] == sweep]
    points = [(task["at"], found) for task in tasks if (found := figures(record, task["name"], entrant))]
    return [x for x, _ in points], [statistics.median(found) for _, found in points]


def classes_with_sweeps(record: Record) -> list[str]:
    """Classes of widths in which something was swept."""
    drawn = [e for e in record["entrants"] if any(sweep_points(record, sweep, e)[0] for sweep in AXES)]
    return list(dict.fromkeys(class_of(width_of(entrant)) for entrant in drawn))


def plot_all(report: Mapping[str, Any], file: Path) -> list[Path]:
    """PNG and SVG beside `file` for each model with sweeps; none without them."""
    paths = []
    for name, record in report["models"].items():
        if classes := classes_with_sweeps(record):
            stem = file.with_name(f"{file.stem}-{name}")
            title = f"{name}, {report['threads']} threads, {report['environment']['cpu'].get('model')}"
            paths += plot(record, classes, title, stem)
    return paths


def plot(record: Record, classes: list[str], title: str, stem: Path) -> list[Path]:
    """A row of pictures for each sweep, a column for each class of widths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    size = (1 + 4.2 * len(classes), 7.6)
    figure, axes = plt.subplots(2, len(classes), figsize=size, squeeze=False, sharey="row", constrained_layout=True)
    for row, sweep in enumerate(AXES):
        for column, kind in enumerate(classes):
            _draw(axes[row][column], record, sweep, kind)
        axes[row][0].set_ylabel("generated tokens a second, all streams")
    figure.suptitle(title, fontsize=10)
    paths = [stem.with_name(stem.name + suffix) for suffix in (".png", ".svg")]
    for path in paths:
        figure.savefig(path, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
    return paths


def _draw(axis: Any, record: Record, sweep: str, kind: str) -> None:
    entrants = [e for e in record["entrants"] if class_of(width_of(e)) == kind]
    widths = list(dict.fromkeys(width_of(e) for e in entrants))
    ticks: set[int] = set()
    for entrant in entrants:
        x, y = sweep_points(record, sweep, entrant)
        if not x:
            continue
        engine, width = entrant.split(" ", 1)
        style = ("-", "--", ":", "-.")[widths.index(width) % 4]
        axis.plot(
            x, y, "o" + style, color=COLORS.get(engine), label=entrant, markersize=4, lw=2 if is_ours(entrant) else 1.2
        )
        ticks |= set(x)
    axis.set(xscale="log", yscale="log", xlabel=AXES[sweep], title=kind)
    axis.set_xticks(sorted(ticks), [str(tick) for tick in sorted(ticks)], minor=False)
    axis.set_xticks([], minor=True)
    axis.grid(alpha=0.3, which="both")
    if ticks:
        axis.legend(fontsize=7)
