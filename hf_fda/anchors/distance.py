"""How far apart two outputs of a block are: one number, small when they agree."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_fda.merge_methods.fda import Distance

TINY = 1e-16
"""Least squared norm of an output that the cosine divides by."""


def distance(kind: Distance, output: Tensor, target: Tensor) -> Tensor:
    """Mean over anchors of the distance of the flattened outputs.

    "cosine": one minus the cosine similarity; "mse": mean squared difference; "mae": mean absolute difference
    (FDA, Section 3.2; its similarity is minus this, up to a constant).

    Args:
        kind: which distance.
        output: (n, T, d).
        target: (n, T, d).

    Returns:
        a scalar.
    """
    if kind == "cosine":
        a, b = output.flatten(1), target.flatten(1)
        squares = [torch.linalg.vecdot(one, one).clamp_min(TINY) for one in (a, b)]
        return (1 - torch.linalg.vecdot(a, b) * (squares[0].rsqrt() * squares[1].rsqrt())).mean()
    if kind == "mse":
        return (output - target).square().mean()
    return (output - target).abs().mean()
