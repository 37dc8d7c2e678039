"""Iso-C: flatten the spectrum of the summed task matrices, so that no task's directions drown another's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_fda.merge_methods.config import Scope, TaskVectorConfig
from hf_fda.merge_methods.registry import register
from hf_fda.tensors import mean, numerical_rank, svd, total, weighted


@dataclass(frozen=True, kw_only=True)
class IsotropicConfig(TaskVectorConfig):
    """Options of `isotropic`."""

    name: ClassVar[str] = "isotropic"
    summary: ClassVar[str] = "summed task matrices with all singular values set to their mean (Iso-C)"
    paper: ClassVar[str] = "No task left behind: isotropic model merging, arXiv 2502.04959"
    scope: ClassVar[Scope] = "matrix"
    rotates: ClassVar[bool] = True


@register(IsotropicConfig)
def isotropic(base: Tensor, tasks: Sequence[Tensor], config: IsotropicConfig) -> Tensor:
    """``lambda * mean(s) * U Vh`` where ``U diag(s) Vh = sum_i tau_i`` (paper, Algorithm 1). Vectors are averaged.

    Of a sum that lacks full rank (of a few thin adapters) only the directions that it has take part, in the mean too.

    Args:
        base: theta_0, (d_out, d_in) or another shape (unused).
        tasks: K task tensors of that shape.
        config: the options; `weights` in the order of `tasks`.
    """
    tasks = weighted(tasks, config.source_weights())
    if base.ndim != 2:
        return config.scaling * mean(tasks)
    u, s, vh = svd(total(tasks))
    rank = numerical_rank(s, base.shape)
    if not rank:
        return torch.zeros_like(tasks[0])
    return config.scaling * s[:rank].mean() * (u[:, :rank] @ vh[:rank])
