"""What an analysis shows: charts of lines and of tables of numbers, each with the numbers that it is drawn from."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fda.drawing import (
    COLOURS,
    DASHES,
    MARKERS,
    ORDERED,
    PALEST,
    SHARES,
    SIGNED,
    Picture,
    legend,
    legend_height,
    ordered_colours,
    save,
    scale,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 5.2, 3.7
"""Of a chart in inches: so narrow that its words can still be read on a phone."""

CELLS = 80
"""Cells of a table of numbers in which the numbers themselves are written."""

Points = tuple[Sequence[float], Sequence[float]]
"""The x and the y of a line."""


@dataclass(frozen=True)
class Chart:
    """A picture to be drawn, and its numbers.

    `name` is that of its files, `title` and `caption` say what is seen; `columns` and `rows` are the numbers; `paint`
    draws it on an empty figure of `size` inches.
    """

    name: str
    title: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    paint: Callable[[Figure], None]
    size: tuple[float, float] = (WIDTH, HEIGHT)

    def write(self, folder: Path) -> Picture:
        """Write the picture and, beside it, its numbers as CSV."""
        with open(folder / f"{self.name}.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(self.columns)
            writer.writerows(self.rows)
        return save(self.paint, self.size, folder / self.name)


@dataclass(frozen=True)
class Axes:
    """The names of both axes, with units, and whether they are logarithmic."""

    x: str
    y: str
    log_x: bool = False
    log_y: bool = False


def lines(
    name: str,
    title: str,
    caption: str,
    axes: Axes,
    series: Mapping[str, Points],
    references: Mapping[str, Points] | None = None,
    order: str = "",
) -> Chart:
    """Lines over one axis.

    Args:
        name: of the files.
        title: above the chart.
        caption: what is seen, in words.
        axes: their names.
        series: points by the line's name.
        references: lines to compare with, drawn thin and grey.
        order: what the lines are an order of, as "block"; then colours follow it. Empty: each has a colour of its own.
    """
    dashed = references or {}

    def paint(figure: Figure) -> None:
        own = figure.subplots()
        colours = ordered_colours(len(series)) if order else [COLOURS[n % len(COLOURS)] for n in range(len(series))]
        for number, (label, (x, y)) in enumerate(series.items()):
            marker = MARKERS[number % len(MARKERS)] if not order and len(x) <= 40 else None
            dash = DASHES[number // len(COLOURS) % len(DASHES)] if not order else "-"
            own.plot(x, y, dash, color=colours[number], marker=marker, label=None if _many(order, series) else label)
        for number, (label, (x, y)) in enumerate(dashed.items()):
            own.plot(x, y, DASHES[1 + number % 3], color="#555555", linewidth=1.2, label=label)
        own.set(xlabel=axes.x, ylabel=axes.y, title=title)
        _scale(own, axes, series)
        if _many(order, series):
            _order_bar(figure, own, order, list(series))
        if len(series) + len(dashed) > 1:
            legend(figure, own)

    found = [(label, x, y) for label, points in {**series, **dashed}.items() for x, y in zip(*points, strict=True)]
    height = HEIGHT + legend_height([*([] if _many(order, series) else series), *dashed], WIDTH)
    return Chart(name, title, caption, ("line", axes.x, axes.y), tuple(found), paint, (WIDTH, height))


def _many(order: str, series: Mapping[str, Points]) -> bool:
    """Whether lines are too many to be named each; an order is then shown by a bar of its colours."""
    return bool(order) and len(series) > 6


def _scale(own: Any, axes: Axes, series: Mapping[str, Points]) -> None:
    from matplotlib.ticker import MaxNLocator

    if axes.log_x:
        own.set_xscale("log")
    elif all(float(x).is_integer() for xs, _ in series.values() for x in xs):
        own.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axes.log_y:
        own.set_yscale("log")


def _order_bar(figure: Figure, own: Any, order: str, names: Sequence[str]) -> None:
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    colours = matplotlib.colormaps[ORDERED]
    cut = LinearSegmentedColormap.from_list("cut", [colours(PALEST * number / 255) for number in range(256)])
    bar = figure.colorbar(ScalarMappable(Normalize(0, len(names) - 1), cut), ax=own, label=order)
    shown = sorted({round(number * (len(names) - 1) / 4) for number in range(5)})
    bar.set_ticks(shown, labels=[names[number] for number in shown])


def table(
    name: str,
    title: str,
    caption: str,
    axes: tuple[str, str, str],
    columns: Sequence[str],
    rows: Mapping[str, Sequence[float]],
    limit: float | None = None,
) -> Chart:
    """Numbers as coloured cells: around zero, or from zero on where none is below it and a limit is given.

    Args:
        name: of the files.
        title: above the chart.
        caption: what is seen, in words.
        axes: names of what runs down, of what runs across, and of the numbers with their unit.
        columns: names of the columns.
        rows: numbers by the row's name.
        limit: the number that has the strongest colour; None: the largest there is.
    """
    down, across, unit = axes
    values = [list(own) for own in rows.values()]
    finite = [abs(value) for own in values for value in own if math.isfinite(value)]
    shares = limit is not None and all(value >= 0 for own in values for value in own)
    strongest = limit or max(finite, default=0.0) or 1.0
    longest = max(map(len, rows), default=0)

    def paint(figure: Figure) -> None:
        own = figure.subplots()
        own.grid(False)
        colours, low = (SHARES, 0.0) if shares else (SIGNED, -strongest)
        image = own.imshow(values, cmap=colours, vmin=low, vmax=strongest, aspect="auto", interpolation="none")
        tilted = max(map(len, columns), default=0) * len(columns) > 36
        own.set_xticks(range(len(columns)), columns, rotation=45 if tilted else 0, ha="right" if tilted else "center")
        step = max(1, math.ceil(len(rows) / 40))
        own.set_yticks(range(0, len(rows), step), list(rows)[::step])
        own.set(xlabel=across, ylabel=down, title=title)
        if len(values) * len(columns) <= CELLS:
            for y, line in enumerate(values):
                for x, value in enumerate(line):
                    pale = abs(value) < 0.6 * strongest
                    text = f"{value:.2f}" if limit else short(value)
                    own.text(x, y, text, ha="center", va="center", color="black" if pale else "white", size=8)
        scale(figure, image, own, unit)

    found = tuple((row, column, value) for row, own in rows.items() for column, value in zip(columns, own, strict=True))
    height = 1.9 + 0.3 * min(len(rows), 40)
    return Chart(name, title, caption, (down, across, unit), found, paint, (max(WIDTH, 4.2 + 0.07 * longest), height))


def short(value: float) -> str:
    """A number in few digits.

    >>> short(0.1234), short(-12.3), short(0.00012)
    ('0.12', '-12', '0.0001')
    """
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}"
    digits = max(0, min(4, 1 - math.floor(math.log10(abs(value)))))
    return f"{value:.{digits}f}"
