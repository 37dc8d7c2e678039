"""Losses over a plane of models."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from hf_fda.analysis.planes import Plane, Projected
from hf_fda.errors import InputError


@dataclass(frozen=True)
class Landscape:
    """Losses on a grid over a plane: by task (rows by `y`, columns by `x`), and the models that lie on it.

    `points` are the models by name, `paths` those that a trajectory went through. A loss that is not finite is kept as
    it is: a model far from all that were trained may have one.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]
    losses: Mapping[str, tuple[tuple[float, ...], ...]]
    points: Mapping[str, Projected]
    paths: Mapping[str, tuple[Projected, ...]] = field(default_factory=dict)

    @property
    def mean(self) -> tuple[tuple[float, ...], ...]:
        """The mean over the tasks at every point."""
        grids = list(self.losses.values())
        return tuple(
            tuple(sum(grid[row][column] for grid in grids) / len(grids) for column in range(len(self.x)))
            for row in range(len(self.y))
        )

    @property
    def lowest(self) -> tuple[float, float, float]:
        """(x, y) and value of the lowest mean loss on the grid.

        Raises:
            InputError: when no loss is finite.
        """
        mean = self.mean
        found = [
            (mean[row][column], x, y)
            for row, y in enumerate(self.y)
            for column, x in enumerate(self.x)
            if math.isfinite(mean[row][column])
        ]
        if not found:
            raise InputError("no loss on the grid is finite; check the models and the rows")
        value, x, y = min(found)
        return x, y, value


def landscape(
    of: Plane,
    x: Sequence[float],
    y: Sequence[float],
    loss: Callable[[float, float], Mapping[str, float]],
    points: Mapping[str, Projected],
    paths: Mapping[str, Sequence[Projected]] | None = None,
) -> Landscape:
    """Measure losses on a grid.

    Args:
        of: the plane.
        x: coordinates of the columns, rising.
        y: those of the rows, rising.
        loss: by task, of the model ``theta_0 + a u + b v``, from (a, b); called once for each point.
        points: models to show, by name.
        paths: trajectories to show, by name.

    Raises:
        InputError: when the grid is empty or not finite.
    """
    if not x or not y or not all(map(math.isfinite, (*x, *y))):
        raise InputError("a grid needs finite coordinates, one at least on each axis")
    rows = [[loss(*of.weights(column, row)) for column in x] for row in y]
    losses = {task: tuple(tuple(own[task] for own in row) for row in rows) for task in rows[0][0]}
    return Landscape(
        tuple(x), tuple(y), losses, dict(points), {name: tuple(path) for name, path in (paths or {}).items()}
    )


def axis(values: Sequence[float], count: int, margin: float = 0.3) -> tuple[float, ...]:
    """Evenly spaced coordinates that hold some values and a margin on both sides.

    >>> axis([0.0, 1.0], 3, margin=0.5)
    (-0.5, 0.5, 1.5)

    Args:
        values: what shall lie inside.
        count: of coordinates, two at least.
        margin: on each side, as a share of the values' range.

    Raises:
        InputError: when `count` is too small.
    """
    if count < 2:
        raise InputError(f"a grid of {count} has no steps; choose 2 at least")
    low, high = min(values), max(values)
    wide = (high - low) or max(abs(high), 1.0)
    start, end = low - margin * wide, high + margin * wide
    return tuple(start + (end - start) * number / (count - 1) for number in range(count))
