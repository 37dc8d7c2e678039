"""How pictures are drawn: opaque, with strong colours that people who see few of them tell apart, as PNG and SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from hf_fda.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
"""Colours of lines, in their order (Okabe and Ito's, without the yellow that white paper swallows)."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")

ORDERED = "viridis"
"""Colours of what has an order, as depth or steps; without its palest end."""

PALEST = 0.88
SIGNED = "RdBu_r"
"""Colours of numbers around zero."""

SHARES = "Blues"
"""Colours of numbers from zero on."""

LETTERS, MARK = 15, 7
"""Letters of a legend in an inch, and those that the mark before each label takes the room of."""

LINE = 40
"""Letters in a line of the words beside a scale."""

STYLE: Any = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#d5d5d5",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.hashsalt": "hf_fda",
}


@dataclass(frozen=True)
class Picture:
    """The files of one picture."""

    png: Path
    svg: Path


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def require_plots() -> None:
    """Refuse to go on without matplotlib.

    Raises:
        InputError: with the line that installs it.
    """
    if not can_draw():
        raise InputError('an analysis is drawn with matplotlib: pip install "hf-fda[plots]"')


@contextmanager
def figure_of(size: tuple[float, float]) -> Iterator[Figure]:
    """An empty figure, in the style of all pictures while it is drawn and written.

    Args:
        size: width and height in inches.
    """
    import matplotlib

    with matplotlib.rc_context(STYLE):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        yield figure


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure; the same data gives the same bytes."""
    figure.savefig(path, format="png", dpi=150, metadata={"Software": None})


def save(paint: Callable[[Figure], None], size: tuple[float, float], path: Path) -> Picture:
    """Draw a figure and write it twice; the same data gives the same bytes.

    Args:
        paint: draws on an empty figure.
        size: width and height in inches.
        path: of the files, without their ending.
    """
    found = Picture(path.with_name(f"{path.name}.png"), path.with_name(f"{path.name}.svg"))
    with figure_of(size) as figure:
        paint(figure)
        save_png(figure, found.png)
        figure.savefig(found.svg, metadata={"Date": None, "Creator": None})
    return found


def scale(figure: Figure, surface: Any, axes: Any, label: str, **options: Any) -> Any:
    """The scale of colours beside a picture, its words in lines that are not longer than it."""
    return figure.colorbar(surface, ax=axes, label=fill(label, LINE), **options)


def ordered_colours(count: int) -> list[Any]:
    """So many colours of what has an order."""
    import matplotlib

    scale = matplotlib.colormaps[ORDERED]
    return [scale(PALEST * number / max(count - 1, 1)) for number in range(count)]


def legend_columns(labels: Sequence[str], width: float) -> int:
    """How many columns of a legend fit beside each other.

    Args:
        labels: its words.
        width: of the figure, in inches.
    """
    longest = max(map(len, labels), default=0)
    return max(1, min(3, len(labels), int(LETTERS * width) // (longest + MARK)))


def legend_height(labels: Sequence[str], width: float) -> float:
    """Inches that a legend takes below a chart, arguments as `legend_columns`."""
    return 0.22 * math.ceil(len(labels) / legend_columns(labels, width))


def legend(figure: Figure, axes: Any) -> None:
    """A legend below the axes, where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        columns = legend_columns(labels, figure.get_figwidth())
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)
