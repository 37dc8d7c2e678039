"""KnOTS: bring the task matrices into one basis by a joint singular value decomposition, and merge them there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_fda.merge_methods.config import Scope
from hf_fda.merge_methods.registry import register
from hf_fda.merge_methods.ties import ElectionConfig
from hf_fda.tensors import agreeing_mean, mean, numerical_rank, svd, weighted


@dataclass(frozen=True, kw_only=True)
class KnOTSConfig(ElectionConfig):
    """Options of `knots`."""

    name: ClassVar[str] = "knots"
    summary: ClassVar[str] = "TIES of the parts that task matrices have in a shared basis (KnOTS)"
    paper: ClassVar[str] = "Model merging with SVD to tie the KnOTS, arXiv 2410.19735"
    scope: ClassVar[Scope] = "matrix"


@register(KnOTSConfig)
def knots(base: Tensor, tasks: Sequence[Tensor], config: KnOTSConfig) -> Tensor:
    """``U diag(s) ties(V_1, ..., V_K)`` where ``U diag(s) [V_1 ... V_K] = [w_1 tau_1 ... w_K tau_K]``, the task
    matrices beside each other (paper, Section 4). Anything but a matrix is averaged.

    Args:
        base: theta_0, (d_out, d_in) or another shape (unused).
        tasks: K task tensors of that shape.
        config: the options, as of `ties`; `weights` in the order of `tasks`.
    """
    weights = config.weight_of_each(len(tasks))
    own = weighted(tasks, weights)
    if base.ndim != 2:
        return config.scaling * mean(own)
    u, s, vh = svd(torch.cat(own, dim=1))
    rank = numerical_rank(s, (base.shape[0], base.shape[1] * len(tasks)))
    if not rank:
        return torch.zeros_like(tasks[0])
    parts = config.trimmed(vh[:rank].split(base.shape[1], dim=1))
    merged = agreeing_mean(parts, weights, config.majority_sign_method, config.normalize)
    return config.scaling * (u[:, :rank] * s[:rank]) @ merged
