"""One look for every picture: palette, lines, axes with units, and how figures are made and saved.

The colours are those of Okabe and Ito, told apart with every common colour blindness; what matters is told by shape or
text as well. Settings are applied while a picture is drawn and saved, and are the caller's own again afterwards.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

from mini_vllm.exceptions import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PURPLE, YELLOW, GREY = "#56B4E9", "#CC79A7", "#F0E442", "#666666"
CYCLE = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY)
LINES = ("-", "--", "-.", ":")
WIDTH, HEIGHT = 7.2, 4.0
"""Inches of a picture with one panel."""

_SETTINGS: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"],
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.fonttype": "none",
    "svg.hashsalt": "mini-vllm",
}


@dataclass(frozen=True)
class Picture:
    """name: of its files. reading: one sentence on how to read it."""

    name: str
    title: str
    reading: str
    figure: "Figure"

    def save(self, folder: str | Path, formats: Sequence[str] = ("svg", "png")) -> list[Path]:
        """Write `folder`/name.svg and .png, the same bytes for the same picture. Returns their paths."""
        import matplotlib

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{self.name}.{kind}" for kind in formats]
        with matplotlib.rc_context(_SETTINGS):
            for path in paths:
                metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
                self.figure.savefig(path, dpi=120, metadata=metadata)
        return paths


def drawn(function: Callable[P, Picture]) -> Callable[P, Picture]:
    """Decorator: draw in this style, leaving the caller's settings as they were. `ConfigError` without matplotlib."""

    @functools.wraps(function)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Picture:
        require_matplotlib()
        import matplotlib

        with matplotlib.rc_context(_SETTINGS):
            return function(*args, **kwargs)

    return styled


def require_matplotlib() -> None:
    """Raise `ConfigError`, naming what to install, when pictures cannot be drawn."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ConfigError("plots: need matplotlib; pip install 'mini-vllm[plots]'") from error


def panels(rows: int = 1, columns: int = 1, *, height: float | None = None, **kwargs: Any) -> tuple["Figure", Any]:
    """A figure that no global state knows of, and its axes (one, or an array of them)."""
    from matplotlib.figure import Figure

    tall = height if height is not None else HEIGHT if rows == 1 else 2.1 * rows + 0.4
    figure = Figure(figsize=(WIDTH if columns == 1 else 4.5 * columns, tall), layout="constrained")
    return figure, figure.subplots(rows, columns, **kwargs)


# --- axes --------------------------------------------------------------------------------------------------------


def label(axis: "Axes", x: str = "", y: str = "", title: str = "") -> None:
    if x:
        axis.set_xlabel(x)
    if y:
        axis.set_ylabel(y)
    if title:
        axis.set_title(title)


def log_y(axis: "Axes") -> None:
    """A logarithmic y axis in ms, where there is something to show on one."""
    if axis.dataLim.y1 > 0:
        axis.set_yscale("log")
    milliseconds(axis.yaxis)


def legend(axis: "Axes", **kwargs: Any) -> None:
    """Of what has a name on this axis; none where nothing has."""
    handles, names = axis.get_legend_handles_labels()
    if handles:
        axis.legend(handles, names, **kwargs)


def from_zero(axis: "Axes", headroom: float = 1.08) -> None:
    """The y axis from 0 to a little above the highest value drawn."""
    top = axis.dataLim.y1
    axis.set_ylim(0, top * headroom if top > 0 else 1)


def milliseconds(axis: Any) -> None:
    """Ticks of an axis in ms, as people say them: 5 ms, 2 s. To be called after what it shows was drawn."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if axis.get_scale() == "log":
        low, high = axis.get_view_interval()
        decades = math.log10(high / low) if high > low > 0 else 1.0
        digits = (1, 2, 3, 4, 6, 8) if decades < 0.8 else (1, 2, 5) if decades < 2.5 else (1,)
        axis.set_major_locator(LogLocator(subs=digits, numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: say_ms(value)))
    axis.set_minor_formatter(NullFormatter())


def say_ms(value: float) -> str:
    if abs(value) >= 1000:
        return f"{value / 1000:,.4g} s"
    return f"{value:.3g} ms" if abs(value) >= 1 or value == 0 else f"{value * 1000:.3g} µs"


def percent(axis: Any, decimals: int = 0) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0, decimals=decimals))


def thousands(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def counts(axis: Any) -> None:
    """Ticks at whole numbers only: there are no halves of what is counted."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    thousands(axis)


def load_scale(axis: "Axes", loads: Sequence[float], wide: float = 100) -> None:
    """A logarithmic x axis for loads spread over more than a factor of `wide`, with ticks at loads themselves."""
    from matplotlib.ticker import FixedLocator, NullLocator

    thousands(axis.xaxis)
    if min(loads) > 0 and max(loads) / min(loads) > wide:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(FixedLocator(_apart(sorted(set(loads)))))
        axis.xaxis.set_minor_locator(NullLocator())
        thousands(axis.xaxis)


def _apart(loads: Sequence[float]) -> list[float]:
    """Those far enough from the one before for their labels to have room."""
    gap = math.log(loads[-1] / loads[0]) / 14
    kept = [loads[0]]
    for load in loads[1:]:
        if math.log(load / kept[-1]) >= gap:
            kept.append(load)
    return kept


def mark(axis: "Axes", x: float, text: str, colour: str = GREY) -> None:
    """A dashed line at x, with its name at the top, on the side that has room."""
    axis.axvline(x, color=colour, ls="--", lw=1.2, zorder=1)
    low, high = axis.get_xlim()
    share = axis.transLimits.transform(axis.transScale.transform((x, 1)))[0] if high > low else 0
    side, gap = ("right", -5) if share > 0.6 else ("left", 5)
    axis.annotate(
        text, (x, 1), xycoords=("data", "axes fraction"), xytext=(gap, -4), textcoords="offset points",
        ha=side, va="top", fontsize=9, color=colour,
    )  # fmt: skip


def limit(axis: "Axes", y: float, text: str, colour: str = RED, side: str = "right") -> None:
    """A dotted line at y, named at one of its ends."""
    axis.axhline(y, color=colour, ls=":", lw=1.3, zorder=1)
    x, gap = (1, -2) if side == "right" else (0, 4)
    axis.annotate(
        text, (x, y), xycoords=("axes fraction", "data"), xytext=(gap, 3), textcoords="offset points",
        ha=side, va="bottom", fontsize=9, color=colour,
    )  # fmt: skip
