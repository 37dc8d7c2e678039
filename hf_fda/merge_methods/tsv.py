"""TSV-M: keep each task's leading singular directions and make them orthogonal to the other tasks'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_fda.lowrank import LowRank
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
    """``lambda * sum_i w_i U'_i diag(s_i) V'_i``, of a matrix; of anything else ``lambda / K * sum_i w_i tau_i``.

    U' and V' are the nearest orthonormal matrices to the tasks' concatenated leading singular directions
    (`orthogonalised`), of which a task of weight zero has none.

    Args:
        base: theta_0, (d_out, d_in) or another shape (unused).
        tasks: K task tensors of that shape.
        config: the options; `weights` in the order of `tasks`.
    """
    if base.ndim != 2:
        return config.scaling * mean(weighted(tasks, config.source_weights()))
    factors = config.weight_of_each(len(tasks))
    counted = [task if factor else torch.zeros_like(task) for task, factor in zip(tasks, factors, strict=True)]
    parts = orthogonalised(counted, base.shape, config.rank_fraction)
    left = torch.cat([part.left * factor for part, factor in zip(parts, factors, strict=True)], dim=1)
    return config.scaling * left @ torch.cat([part.right for part in parts], dim=0)


def orthogonalised(tasks: Sequence[Tensor], shape: Sequence[int], rank_fraction: float | None = None) -> list[LowRank]:
    """The tasks' leading singular directions, made orthogonal to each other's, each with its own singular values.

    Each task gives its top ``max(1, floor(r / K))`` singular triplets, r = min(d_out, d_in) (paper, Algorithm 1), or as
    many as its rank has, where that is less.

    Args:
        tasks: K task matrices, (d_out, d_in) or between bases of fewer directions.
        shape: (d_out, d_in).
        rank_fraction: the fraction of r that each task keeps; None: 1 / K.

    Returns:
        K products ``U'_i diag(s_i) @ V'_i`` of rank k_i; those of all tasks lie in orthogonal directions.
    """
    kept = max(1, int(min(shape) * (1 / len(tasks) if rank_fraction is None else rank_fraction) + 1e-9))
    parts = [svd(task) for task in tasks]
    counts = [min(kept, numerical_rank(values, shape)) for _, values, _ in parts]
    u = torch.cat([part[0][:, :count] for part, count in zip(parts, counts, strict=True)], dim=1)
    vh = torch.cat([part[2][:count] for part, count in zip(parts, counts, strict=True)], dim=0)
    if any(counts):
        u, vh = nearest_orthonormal(u), nearest_orthonormal(vh)
    values = [part[1][:count] for part, count in zip(parts, counts, strict=True)]
    return [
        LowRank(left * value, right, tuple(tasks[0].shape))
        for left, value, right in zip(u.split(counts, dim=1), values, vh.split(counts, dim=0), strict=True)
    ]
