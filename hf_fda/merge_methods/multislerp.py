"""Multi-SLERP: a mean direction of task vectors on the sphere, with their mean length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_fda.merge_methods.config import Scope, WeightedConfig, option
from hf_fda.merge_methods.registry import register
from hf_fda.merge_methods.spanning import spanned


@dataclass(frozen=True, kw_only=True)
class MultiSlerpConfig(WeightedConfig):
    """Options of `multislerp`."""

    name: ClassVar[str] = "multislerp"
    summary: ClassVar[str] = "task vectors' mean direction on the sphere, with their mean length"
    paper: ClassVar[str] = "goddard.blog/posts/multislerp-wow-what-a-cool-idea"
    scope: ClassVar[Scope] = "tensor"

    normalize_weights: bool = option(True, "divide the weights by their sum")
    eps: float = option(1e-8, "lengths below this have no direction", minimum=0)

    @property
    def spans(self) -> bool:
        """As `MethodConfig.spans`."""
        return True

    def combination(self, products: Tensor) -> Tensor:
        """As `MethodConfig.combination`."""
        count = len(products) - 1
        found = torch.zeros(count + 1, dtype=products.dtype)
        if count == 1:
            found[1] = 1
            return found
        shares = self.shares(count) if self.normalize_weights else self.weight_of_each(count)
        weights, lengths = products.new_tensor(shares), products.diagonal()[1:].clamp_min(0).sqrt()
        found[1:] = weights / (lengths + self.eps)  # m
        norm = (found @ products @ found).clamp_min(0).sqrt()
        # Of directions that cancel out rounding leaves a square of about this one's.
        left = 4 * math.sqrt(torch.finfo(products.dtype).eps) * float(weights.abs().sum())
        if not float(norm) > max(self.eps, left):
            found[1:] = weights
            return found
        return found * (weights @ lengths) / norm

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalize_weights:
            self.refuse_zero_sum("pass normalize_weights=False or other weights")


@register(MultiSlerpConfig)
def multislerp(base: Tensor, tasks: Sequence[Tensor], config: MultiSlerpConfig) -> Tensor:
    """``(sum_i w_i |tau_i|) * m / |m|`` with ``m = sum_i w_i tau_i / |tau_i|``.

    As published, a step in the tangent space at m follows; the weighted sum of the tangents there is zero, so that m is
    where it ends. Directions that cancel out have no mean on the sphere: then it is ``sum_i w_i tau_i``.

    Args:
        base: theta_0, any shape (unused).
        tasks: K task tensors of that shape.
        config: the options; `weights` in the order of `tasks`.
    """
    return spanned(base, tasks, config)
