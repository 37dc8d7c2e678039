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
    tiny, eps = torch.finfo(first.dtype).tiny, torch.finfo(first.dtype).eps
    units = [vector / vector.norm(dim=-1, keepdim=True).clamp_min(tiny) for vector in (first, second)]
    cosine = (units[0] * units[1]).sum(dim=-1, keepdim=True).clamp(-1, 1)
    straight = cosine.abs() >= (1 - 8 * eps if straight_from is None else straight_from)
    angle = torch.acos(torch.where(straight, 0.0, cosine))
    one = torch.where(straight, 1 - t, torch.sin((1 - t) * angle) / torch.sin(angle))
    other = torch.where(straight, t, torch.sin(t * angle) / torch.sin(angle))
    return one * first + other * second
