"""TSV-M: keep each task's leading singular directions and make them orthogonal to the other tasks'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_fda.merge_methods.config import Scope, TaskVectorConfig, option
from hf_fda.merge_methods.registry import register
from hf_fda.tensors import mean, nearest_orthonormal, numerical_rank, svd, weighted


@dataclass(frozen=True, kw_only=True)
class TSVConfig(TaskVectorConfig):
    """Options of `tsv`."""

    name: ClassVar[str] = "tsv"
    summary: ClassVar[str] = "orthogonalised leading singular directions of every task (TSV-M)"
    paper: ClassVar[str] = "Task Singular Vectors, arXiv 2412.00081"
    scope: ClassVar[Scope] = "matrix"
    rotates: ClassVar[bool] = True

    rank_fraction: float | None = option(
        None,
        "fraction of a matrix's singular directions that each task keeps; none: 1 / K",
        minimum=0,
        maximum=1,
    )


@register(TSVConfig)
def tsv(base: Tensor, tasks: Sequence[Tensor], config: TSVConfig) -> Tensor:
    """``lambda * U' diag(s) V'``: U' and V' are the nearest orthonormal matrices to the tasks' concatenated ones.

    Each task gives its top ``max(1, floor(r / K))`` singular triplets, r = min(d_out, d_in) (paper, Algorithm 1), or as
    many as its rank has, where that is less. Anything but a matrix is averaged.

    Args:
        base: theta_0, (d_out, d_in) or another shape (unused).
        tasks: K task tensors of that shape.
        config: the options; `weights` in the order of `tasks`.
    """
    tasks = weighted(tasks, config.source_weights())
    if base.ndim != 2:
        return config.scaling * mean(tasks)
    full = min(base.shape)
    kept = max(1, int(full * (1 / len(tasks) if config.rank_fraction is None else config.rank_fraction) + 1e-9))
    parts = [svd(task) for task in tasks]
    kept_of = [min(kept, numerical_rank(part[1], base.shape)) for part in parts]
    if not any(kept_of):
        return torch.zeros_like(tasks[0])
    u = torch.cat([part[0][:, :count] for part, count in zip(parts, kept_of, strict=True)], dim=1)
    s = torch.cat([part[1][:count] for part, count in zip(parts, kept_of, strict=True)])
    vh = torch.cat([part[2][:count] for part, count in zip(parts, kept_of, strict=True)], dim=0)
    return config.scaling * (nearest_orthonormal(u) * s) @ nearest_orthonormal(vh)
