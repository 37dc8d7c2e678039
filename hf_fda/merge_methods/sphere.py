"""Points on a sphere between others: what the spherical methods share."""

from __future__ import annotations

import torch
from torch import Tensor


def between(first: Tensor, second: Tensor, t: float, straight_from: float | None = None) -> Tensor:
    """The point at `t` on the arc from one vector to another, along the last dimension.

    ``(sin((1 - t) a) first + sin(t a) second) / sin(a)``, a the angle between them. A vector of zeros counts as
    orthogonal to all.

    Args:
        first: (..., n).
        second: (..., n).
        t: 0 is the first, 1 the second.
        straight_from: from this |cosine| on the straight line is taken; None: where rounding hides the angle.

    Returns:
        (..., n).
    """
    tiny = torch.finfo(first.dtype).tiny
    units = [vector / vector.norm(dim=-1, keepdim=True).clamp_min(tiny) for vector in (first, second)]
    one, other = arc((units[0] * units[1]).sum(dim=-1, keepdim=True), t, straight_from)
    return one * first + other * second


def arc(cosine: Tensor, t: float, straight_from: float | None = None) -> tuple[Tensor, Tensor]:
    """The factors of two vectors in the point at `t` on the arc between them.

    Args:
        cosine: of the angle between them, any shape.
        t: 0 is the first, 1 the second.
        straight_from: as of `between`.
    """
    cosine, eps = cosine.clamp(-1, 1), torch.finfo(cosine.dtype).eps
    straight = cosine.abs() >= (1 - 8 * eps if straight_from is None else straight_from)
    angle = torch.acos(torch.where(straight, 0.0, cosine))
    one = torch.where(straight, 1 - t, torch.sin((1 - t) * angle) / torch.sin(angle))
    other = torch.where(straight, t, torch.sin(t * angle) / torch.sin(angle))
    return one, other


def cosine_of(products: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The cosine between two vectors, of one of zeros 0.

    Args:
        products: (M, M) inner products of M vectors.
        first: (M,), factors of these in the one vector.
        second: (M,), in the other.
    """
    norms = (first @ products @ first).clamp_min(0).sqrt() * (second @ products @ second).clamp_min(0).sqrt()
    return torch.where(norms > 0, (first @ products @ second) / norms.clamp_min(torch.finfo(norms.dtype).tiny), 0.0)
