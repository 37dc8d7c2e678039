"""How far apart two outputs of a block are: one number, small when they agree."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from hf_fda.merge_methods.fda import Distance


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
        return (1 - functional.cosine_similarity(output.flatten(1), target.flatten(1), dim=1)).mean()
    if kind == "mse":
        return (output - target).square().mean()
    return (output - target).abs().mean()
