"""Pictures of a fragmentation run, as SVG and PNG. Needs matplotlib (`pip install mini-vllm[plots]`)."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mini_vllm.exceptions import ConfigError
from mini_vllm.simulator.external_fragmentation import ExternalFragmentation
from mini_vllm.simulator.fragmentation import FragmentationResult, SweepPoint, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"naive": "#c8553d", "paged": "#2d6a8e", "shared": "#5a9367"}
LABELS = {"naive": "contiguous rows", "paged": "paged", "shared": "paged, shared prefixes"}
_LAYOUT = [["used"] * 2 + ["logical"] * 2 + ["running"] * 2, ["sweep"] * 3 + ["external"] * 3]


def plot_fragmentation(result: FragmentationResult, folder: str | Path, name: str = "fragmentation") -> list[Path]:
    """Write `folder`/`name`.svg and .png; returns their paths. Raises `ConfigError` without matplotlib."""
    figure = _figure()
    axes = figure.subplot_mosaic(_LAYOUT)
    lines = {mode: timeline.used_share for mode, timeline in result.timelines.items()}
    _lines(axes["used"], lines, "share of the pool taken (used / total)")
    lines = {mode: _held(timeline) for mode, timeline in result.timelines.items()}
    _lines(axes["logical"], lines, "tokens held per place taken (logical / reserved)")
    axes["logical"].axhline(1, color="0.6", lw=0.8, ls=":")
    lines = {mode: np.asarray(timeline.running) for mode, timeline in result.timelines.items()}
    _lines(axes["running"], lines, "sequences running at once")
    axes["running"].legend(fontsize=8, frameon=False, loc="upper right")
    _sweep(axes["sweep"], result.sweep)
    _external(axes["external"], result.external)
    options = result.options
    places = f"room for {options.kv_cache_tokens:,} tokens, blocks of {options.block_size}"
    figure.suptitle(f"{options.num_sequences:,} sequences, {places}", fontsize=12)
    return _save(figure, Path(folder), name)


def _figure() -> Any:
    """A figure of its own: no global state of pyplot, no display."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("plot: needs matplotlib; pip install 'mini-vllm[plots]'") from error
    return Figure(figsize=(13, 7), layout="constrained")


def _save(figure: Any, folder: Path, name: str) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.svg", folder / f"{name}.png"]
    for path in paths:
        figure.savefig(path, dpi=80, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths


def _held(timeline: Timeline) -> np.ndarray:
    """Tokens per place; nothing where nobody runs."""
    return np.where(np.asarray(timeline.running) > 0, timeline.logical_share, np.nan)


def _plain(axis: "Axes", title: str, xlabel: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(xlabel)
    axis.spines[["top", "right"]].set_visible(False)


def _lines(axis: "Axes", lines: dict[str, np.ndarray], title: str) -> None:
    for mode, values in lines.items():
        axis.plot(values, color=COLOURS[mode], lw=1.4, label=LABELS[mode])
    axis.set_ylim(0, None)
    _plain(axis, title, "step")


def _sweep(axis: "Axes", points: tuple[SweepPoint, ...]) -> None:
    sizes, wastes = [str(point.block_size) for point in points], [100 * point.waste for point in points]
    bars = axis.bar(sizes, wastes, color=COLOURS["paged"], width=0.6)
    labels = [f"{100 * point.waste:.1f} %\n{point.blocks_per_sequence:,.0f} blocks" for point in points]
    axis.bar_label(bars, labels, fontsize=8, padding=2)
    axis.margins(y=0.25)
    axis.set_ylabel("% of places taken")
    _plain(axis, "empty places, and blocks in a table, by block size", "tokens in a block")


def _external(axis: "Axes", found: ExternalFragmentation) -> None:
    """Memory as two strips: the holes between reservations, and where the pool put what did not fit there."""
    for start, length in found.arena:
        axis.barh(1, length, left=start, color=COLOURS["naive"], edgecolor="white")
    for places, colour in ((found.pool, COLOURS["paged"]), (found.request_blocks, COLOURS["shared"])):
        axis.barh(0, found.block_size, left=list(places), color=colour, edgecolor="white")
    for row in (0, 1):
        axis.barh(row, found.num_places, color="none", edgecolor="0.6", lw=0.8)
    axis.set_yticks([0, 1], ["paged", "contiguous"])
    axis.set_ylim(-0.7, 1.9)
    refused = f"{found.free_places} free, largest hole {found.largest_hole}: {found.request} tokens do not fit"
    axis.text(0, 1.5, refused, fontsize=8)
    axis.text(0, -0.6, f"the same {found.request} tokens (green) in any free blocks", fontsize=8)
    _plain(axis, "external fragmentation", "place in memory, in tokens")
    axis.spines["left"].set_visible(False)
