"""Landscapes as charts: the mean loss with models and paths on it, and small ones of each task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hf_fda.analysis.charts import WIDTH, Chart
from hf_fda.analysis.landscapes import Landscape
from hf_fda.drawing import COLOURS, MARKERS, legend, legend_height, scale

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEVELS = 14
HIGHEST = 0.8
"""Share of the grid that has a colour of its own; the heights above it have one together, so that the valley shows."""

SURFACE = "cividis_r"
INK = ("#000000", "#CC79A7", "#0072B2", "#D55E00")
"""Colours of paths."""

X_LABEL = "along the first task vector (norm of parameters)"
Y_LABEL = "orthogonal to it (norm of parameters)"


def landscape_chart(name: str, title: str, caption: str, seen: Landscape, unit: str) -> Chart:
    """The mean loss over a plane, with models and paths.

    Args:
        name: of the files.
        title: above it.
        caption: what is seen, in words.
        seen: what was measured.
        unit: of the losses.
    """

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        surface = _surface(axes, seen, seen.mean)
        _models(axes, seen)
        axes.set(xlabel=X_LABEL, ylabel=Y_LABEL, title=title)
        _bar(figure, axes, surface, f"mean {unit}")
        legend(figure, axes)

    size = WIDTH, 4.2 + legend_height([*seen.points, *seen.paths], WIDTH)
    return Chart(name, title, caption, COLUMNS, _rows(seen), paint, size)


COLUMNS = ("what", "x", "y", "distance from the plane", "loss")


def tasks_chart(name: str, title: str, caption: str, seen: Landscape, unit: str) -> Chart:
    """The loss of each task over a plane, each with a scale of its own; arguments as `landscape_chart`.

    The axes are those of the large chart and have short names here; the caption says which, and the unit.
    """
    count = len(seen.losses)
    columns = min(2, count)
    rows = math.ceil(count / columns)

    def paint(figure: Figure) -> None:
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
        for place, (axes, (task, grid)) in enumerate(zip(panels, seen.losses.items(), strict=False)):
            surface = _surface(axes, seen, grid)
            _models(axes, seen, small=True)
            axes.set(title=task, xlabel="along" if place + columns >= count else "")
            axes.tick_params(labelbottom=place + columns >= count)
            _bar(figure, axes, surface, "loss")
        for axes in panels[::columns]:
            axes.set_ylabel("orthogonal")
        for axes in panels[count:]:
            axes.set_visible(False)
        figure.suptitle(title, size=10.5)
        legend(figure, panels[0])

    extra = legend_height([*seen.points, *seen.paths], 6.0)
    found = [
        (task, x, y, 0.0, grid[row][column])
        for task, grid in seen.losses.items()
        for row, y in enumerate(seen.y)
        for column, x in enumerate(seen.x)
    ]
    caption = f"{caption} The axes are {X_LABEL} and {Y_LABEL}; the loss is {unit}."
    return Chart(name, title, caption, ("task", *COLUMNS[1:]), tuple(found), paint, (6.0, 0.9 + 2.3 * rows + extra))


def _surface(axes: Any, seen: Landscape, grid: Sequence[Sequence[float]]) -> Any:
    """Coloured heights with lines between them."""
    import numpy as np

    values = np.ma.masked_invalid(np.array(grid, dtype=float))
    low, high = float(values.min()), float(np.quantile(values.compressed(), HIGHEST))
    levels = np.linspace(low, high if high > low else low + 1e-9, LEVELS)
    axes.grid(False)
    axes.contour(seen.x, seen.y, values, levels=levels, colors="#444444", linewidths=0.4)
    return axes.contourf(seen.x, seen.y, values, levels=levels, cmap=SURFACE, extend="max")


def _bar(figure: Figure, axes: Any, surface: Any, label: str) -> None:
    """The scale of heights, with few and short numbers."""
    scale(figure, surface, axes, label, ticks=surface.levels[::3], format="%.3g")


def _models(axes: Any, seen: Landscape, small: bool = False) -> None:
    """Models as marks with a white rim, paths as lines through small ones."""
    size = 6.5 if small else 9
    for number, (name, path) in enumerate(seen.paths.items()):
        x, y = [own.x for own in path], [own.y for own in path]
        axes.plot(x, y, "-", color="white", linewidth=3.4)
        axes.plot(x, y, "o-", color=INK[number % len(INK)], markersize=size / 2.5, linewidth=1.5, label=name)
    for number, (name, own) in enumerate(seen.points.items()):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        rim = {"markeredgecolor": "white", "markeredgewidth": 1.2}
        axes.plot([own.x], [own.y], marker, color=colour, markersize=size, label=name, linestyle="none", **rim)


def _rows(seen: Landscape) -> tuple[tuple[Any, ...], ...]:
    mean = seen.mean
    rows: list[tuple[Any, ...]] = [
        ("grid", x, y, 0.0, mean[row][column]) for row, y in enumerate(seen.y) for column, x in enumerate(seen.x)
    ]
    rows += [(name, own.x, own.y, own.off, "") for name, own in seen.points.items()]
    rows += [(name, own.x, own.y, own.off, "") for name, path in seen.paths.items() for own in path]
    return tuple(rows)
