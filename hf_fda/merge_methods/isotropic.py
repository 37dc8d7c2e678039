"""Iso-C: flatten the spectrum of the summed task matrices, so that no task's directions drown another's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_fda.merge_methods.config import TaskVectorConfig
from hf_fda.merge_methods.registry import register
from hf_fda.tensors import mean, svd, total, weighted


@dataclass(frozen=True, kw_only=True)
class IsotropicConfig(TaskVectorConfig):
    """Options of `isotropic`."""

    name: ClassVar[str] = "isotropic"
    summary: ClassVar[str] = "summed task matrices with all singular values set to their mean (Iso-C)"
    paper: ClassVar[str] = "No task left behind: isotropic model merging, arXiv 2502.04959"
    elementwise: ClassVar[bool] = False


@register(IsotropicConfig)
def isotropic(base: Tensor, tasks: Sequence[Tensor], config: IsotropicConfig) -> Tensor:
    """``lambda * mean(s) * U Vh`` where ``U diag(s) Vh = sum_i tau_i`` (paper, Algorithm 1). Vectors are averaged.

    Args:
        base: theta_0, (d_out, d_in) or another shape (unused).
        tasks: K task tensors of that shape.
        config: the options; `weights` in the order of `tasks`.
    """
    tasks = weighted(tasks, config.source_weights())
    if base.ndim != 2:
        return config.scaling * mean(tasks)
    u, s, vh = svd(total(tasks))
    return config.scaling * s.mean() * (u @ vh)
