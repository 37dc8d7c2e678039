"""Karcher mean: the point of a sphere from which the squared angles to all models add up to least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_fda.merge_methods.config import Scope, WeightedConfig, option
from hf_fda.merge_methods.registry import register
from hf_fda.merge_methods.spanning import spanned


@dataclass(frozen=True, kw_only=True)
class KarcherConfig(WeightedConfig):
    """Options of `karcher`."""

    name: ClassVar[str] = "karcher"
    summary: ClassVar[str] = "Karcher (Riemannian) mean of the models on the sphere, with their mean length"
    paper: ClassVar[str] = "LLM merging on the Fisher-Rao manifold, arXiv 2603.04972"
    scope: ClassVar[Scope] = "tensor"

    max_iter: int = option(10, "steps towards the mean", minimum=0)
    tol: float = option(1e-5, "angle in radians below which a step is no step", minimum=0)

    @property
    def spans(self) -> bool:
        """As `MethodConfig.spans`."""
        return True

    def combination(self, products: Tensor) -> Tensor:
        """As `MethodConfig.combination`."""
        count = len(products) - 1
        found = torch.eye(count + 1, dtype=products.dtype)
        if count == 1:
            return found[1]
        models = found[1:] + found[0]
        shares = products.new_tensor(self.shares(count))
        norms = ((models @ products) * models).sum(1).clamp_min(0).sqrt()
        there = norms > 0
        if not float(shares[there].sum()):
            return -found[0]
        units, own = models[there] / norms[there, None], shares[there] / shares[there].sum()
        mean = _descend(units, own, products, self.max_iter, self.tol)
        return (shares @ norms) * mean - found[0]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_zero_sum("pass other weights")


@register(KarcherConfig)
def karcher(base: Tensor, tasks: Sequence[Tensor], config: KarcherConfig) -> Tensor:
    """``(sum_i w_i |theta_i|) * m - theta_0`` with m the unit vector of least ``sum_i w_i angle(m, theta_i)^2``, the
    weights divided by their sum.

    From the normalised mean direction it goes along the mean of the logarithms of all directions until that is shorter
    than `tol`. A model of zeros has no direction; only its length counts.

    Args:
        base: theta_0, any shape.
        tasks: K task tensors of that shape.
        config: the options; `weights` in the order of `tasks`.
    """
    return spanned(base, tasks, config)


def _descend(units: Tensor, shares: Tensor, products: Tensor, steps: int, tolerance: float) -> Tensor:
    """The weighted Karcher mean of unit vectors in the span of some others.

    Args:
        units: (K, M), factors of the others in each.
        shares: (K,), that add up to one.
        products: (M, M), inner products of the others.
        steps: towards the mean, at most.
        tolerance: angle in radians below which a step is none.
    """

    def norm(vector: Tensor) -> Tensor:
        return (vector @ products @ vector).clamp_min(0).sqrt()

    mean = shares @ units
    mean = mean / norm(mean) if norm(mean) >= tolerance else units[0]
    for _ in range(steps):
        step = torch.zeros_like(mean)
        for share, unit in zip(shares, units, strict=True):
            cosine = unit @ products @ mean
            tangent = unit - cosine * mean  # at the mean, towards the unit vector
            sine = norm(tangent)
            angle = torch.atan2(sine, cosine)
            if angle >= tolerance and sine > 0:
                step = step + share * tangent * (angle / sine)
        length = norm(step)
        if length < tolerance:
            break
        mean = torch.cos(length) * mean + torch.sin(length) * (step / length)
        mean = mean / norm(mean)
    return mean
