"""Arcee Fusion: the base takes over those entries of a source that matter most, by a threshold from their spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_fda.merge_methods.config import MethodConfig, Scope
from hf_fda.merge_methods.registry import register

FLOOR = 1e-8
"""Added to every probability."""

ENTRIES_AT_ONCE = 2**20
"""About how many entries of a tensor are looked at in float64 at a time."""


@dataclass(frozen=True, kw_only=True)
class ArceeFusionConfig(MethodConfig):
    """Options of `arcee_fusion`: none."""

    name: ClassVar[str] = "arcee_fusion"
    summary: ClassVar[str] = "the base, with one source's entries where difference times divergence stands out"
    paper: ClassVar[str] = "mergekit's method of that name, arXiv 2403.13257"
    scope: ClassVar[Scope] = "tensor"
    max_sources: ClassVar[int | None] = 1


@register(ArceeFusionConfig)
def arcee_fusion(base: Tensor, tasks: Sequence[Tensor], config: ArceeFusionConfig) -> Tensor:
    """``tau [s >= median(s) + 1.5 (q_3 - q_1)]`` with the importance
    ``s = |tau| KL(softmax(theta_1) | softmax(theta_0))``: the divergence is along the last dimension, the quartiles q_1
    and q_3 are those of s over the tensor.

    Args:
        base: theta_0, any shape.
        tasks: one task tensor of that shape.
        config: the options.
    """
    task = tasks[0]
    importance = task.abs() * divergence(base, base + task)
    scores, last = importance.flatten(), importance.numel() - 1
    low, middle, high = (scores.kthvalue(int(part * last) + 1).values for part in (0.25, 0.5, 0.75))
    return task * (importance >= middle + 1.5 * (high - low))


def divergence(base: Tensor, model: Tensor) -> Tensor:
    """``KL(softmax(model) | softmax(base))`` along the last dimension.

    In float64: between models that are near each other it is a small difference of large sums.

    Args:
        base: (..., n).
        model: (..., n).

    Returns:
        (..., 1), in the type of `base`.
    """
    width = base.shape[-1] if base.ndim else 1
    parts = []
    rows = max(1, ENTRIES_AT_ONCE // width)
    for own, other in zip(base.reshape(-1, width).split(rows), model.reshape(-1, width).split(rows), strict=True):
        q, p = (tensor.double().softmax(dim=-1) + FLOOR for tensor in (own, other))
        parts.append((p * (p / q).log()).sum(dim=-1, keepdim=True).to(base.dtype))
    return torch.cat(parts).reshape(*base.shape[:-1], 1) if base.ndim else torch.cat(parts).reshape(())
