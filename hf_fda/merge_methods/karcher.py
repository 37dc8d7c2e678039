"""Karcher mean: the point of a sphere from which the squared angles to all models add up to least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_fda.merge_methods.config import Scope, WeightedConfig, option
from hf_fda.merge_methods.registry import register
from hf_fda.tensors import total


@dataclass(frozen=True, kw_only=True)
class KarcherConfig(WeightedConfig):
    """Options of `karcher`."""

    name: ClassVar[str] = "karcher"
    summary: ClassVar[str] = "Karcher (Riemannian) mean of the models on the sphere, with their mean length"
    paper: ClassVar[str] = "LLM merging on the Fisher-Rao manifold, arXiv 2603.04972"
    scope: ClassVar[Scope] = "tensor"

    max_iter: int = option(10, "steps towards the mean", minimum=0)
    tol: float = option(1e-5, "angle in radians below which a step is no step", minimum=0)

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
    if len(tasks) == 1:
        return tasks[0].clone()
    shares = config.shares(len(tasks))
    units, own, length = [], [], base.new_zeros(())
    for task, share in zip(tasks, shares, strict=True):
        model = (base + task).flatten()
        norm = model.norm()
        length = length + share * norm
        if norm > 0:
            units.append(model / norm)
            own.append(share)
    if not sum(own):
        return -base
    mean = _descend(units, [share / sum(own) for share in own], config.max_iter, config.tol)
    return (length * mean).view_as(base) - base


def _descend(units: Sequence[Tensor], shares: Sequence[float], steps: int, tolerance: float) -> Tensor:
    """The weighted Karcher mean of unit vectors."""
    mean = total(share * unit for share, unit in zip(shares, units, strict=True))
    mean = mean / mean.norm() if mean.norm() >= tolerance else units[0]
    for _ in range(steps):
        step = total(share * _logarithm(mean, unit, tolerance) for share, unit in zip(shares, units, strict=True))
        angle = step.norm()
        if angle < tolerance:
            break
        mean = torch.cos(angle) * mean + torch.sin(angle) * (step / angle)
        mean = mean / mean.norm()
    return mean


def _logarithm(mean: Tensor, unit: Tensor, tolerance: float) -> Tensor:
    """The tangent at `mean` that leads to `unit`, as long as the angle between them."""
    cosine = torch.dot(mean, unit)
    tangent = unit - cosine * mean
    sine = tangent.norm()
    angle = torch.atan2(sine, cosine)
    return tangent * (angle / sine) if angle >= tolerance and sine > 0 else torch.zeros_like(mean)
