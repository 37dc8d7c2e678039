"""The plane through three models, and where others lie on it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from hf_fda.errors import InputError

FLAT = 1e-6
"""Sine of the angle between two directions below which they are one line."""


@dataclass(frozen=True)
class Projected:
    """A model on a plane: its coordinates, and its distance from the plane itself, all in units of parameters."""

    x: float
    y: float
    off: float


@dataclass(frozen=True)
class Plane:
    """The plane through a base and two other models, in orthonormal coordinates with the base at (0, 0).

    With the task vectors u of the first model and v of the second, the first axis is ``u / |u|`` and the second the
    part of v that is orthogonal to it, by its length: the first model lies at (`length`, 0), the second at (`along`,
    `height`). Distances on the plane are those of the parameters.
    """

    length: float
    along: float
    height: float

    @property
    def points(self) -> dict[str, tuple[float, float]]:
        """Where the base and both models are."""
        return {"base": (0.0, 0.0), "first": (self.length, 0.0), "second": (self.along, self.height)}

    def weights(self, x: float, y: float) -> tuple[float, float]:
        """(a, b) of the point ``theta_0 + a u + b v`` at some coordinates."""
        b = y / self.height
        return (x - b * self.along) / self.length, b

    def project(self, first: float, second: float, squared: float) -> Projected:
        """A task vector w on the plane.

        Args:
            first: <w, u>.
            second: <w, v>.
            squared: <w, w>.
        """
        x = first / self.length
        y = (second - self.along * x) / self.height
        return Projected(x, y, math.sqrt(max(0.0, squared - x**2 - y**2)))


def plane(products: Tensor) -> Plane:
    """The plane that two task vectors span.

    >>> import torch
    >>> plane(torch.tensor([[4.0, 2.0], [2.0, 10.0]])).points
    {'base': (0.0, 0.0), 'first': (2.0, 0.0), 'second': (1.0, 3.0)}

    Args:
        products: (2, 2) of both with each other, as `similarities.gram` gives them.

    Raises:
        InputError: when they are not finite, or lie on one line with the base.
    """
    (uu, uv), (_, vv) = products.double().tolist()
    if not all(map(math.isfinite, (uu, uv, vv))):
        raise InputError("the models are not all finite numbers, so that there is no plane through them")
    square = uu * vv - uv**2
    if uu <= 0 or vv <= 0 or square <= FLAT**2 * uu * vv:
        raise InputError("base and both models lie on one line, so that there is no plane through them; give another")
    length = math.sqrt(uu)
    return Plane(length, uv / length, math.sqrt(square) / length)
