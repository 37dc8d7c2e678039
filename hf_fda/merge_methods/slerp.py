"""SLERP: spherical interpolation between two models, each tensor as one vector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_fda.merge_methods.config import MethodConfig, Scope, option
from hf_fda.merge_methods.registry import register
from hf_fda.merge_methods.sphere import between

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


@register(SlerpConfig)
def slerp(base: Tensor, tasks: Sequence[Tensor], config: SlerpConfig) -> Tensor:
    """``(sin((1 - t) a) theta_A + sin(t a) theta_B) / sin(a) - theta_0``, a the angle between theta_A and theta_B: base
    and source, or two sources. Models that point the same way (or opposite ones) are interpolated on a straight line.

    Args:
        base: theta_0, any shape.
        tasks: one or two task tensors of that shape.
        config: the options.
    """
    ends = [base, *(base + task for task in tasks)][-2:]
    merged = between(ends[0].flatten(), ends[1].flatten(), config.t, STRAIGHT_FROM)
    return merged.view_as(base) - base
