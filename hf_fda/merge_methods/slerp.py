"""SLERP: spherical interpolation between two models, each tensor as one vector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_fda.merge_methods.config import MethodConfig, Scope, option
from hf_fda.merge_methods.registry import register
from hf_fda.merge_methods.spanning import spanned
from hf_fda.merge_methods.sphere import arc, cosine_of

STRAIGHT_FROM = 0.9995
"""Tensors whose cosine has this magnitude or more are interpolated on the straight line between them."""


@dataclass(frozen=True, kw_only=True)
class SlerpConfig(MethodConfig):
    """Options of `slerp`."""

    name: ClassVar[str] = "slerp"
    summary: ClassVar[str] = "spherical interpolation from the base to one source, or from one source to another"
    paper: ClassVar[str] = "Animating rotation with quaternion curves, SIGGRAPH 1985"
    scope: ClassVar[Scope] = "tensor"
    max_sources: ClassVar[int | None] = 2

    t: float = option(0.5, "where to go: 0 is the base, or the first of two sources; 1 the source, or the second")

    @property
    def spans(self) -> bool:
        """As `MethodConfig.spans`."""
        return True

    def combination(self, products: Tensor) -> Tensor:
        """As `MethodConfig.combination`."""
        models = torch.eye(len(products), dtype=products.dtype)
        models[:, 0] = 1  # theta_i = theta_0 + tau_i
        first, second = models[-2:]
        one, other = arc(cosine_of(products, first, second), self.t, STRAIGHT_FROM)
        return one * first + other * second - models[0]


@register(SlerpConfig)
def slerp(base: Tensor, tasks: Sequence[Tensor], config: SlerpConfig) -> Tensor:
    """``(sin((1 - t) a) theta_A + sin(t a) theta_B) / sin(a) - theta_0``, a the angle between theta_A and theta_B: base
    and source, or two sources. Models that point the same way (or opposite ones) are interpolated on a straight line.

    Args:
        base: theta_0, any shape.
        tasks: one or two task tensors of that shape.
        config: the options.
    """
    return spanned(base, tasks, config)
