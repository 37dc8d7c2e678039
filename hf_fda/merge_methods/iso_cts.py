"""Iso-CTS: flatten the spectrum of directions that tasks share together with those that each has for itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_fda.merge_methods.config import Scope, TaskVectorConfig, option
from hf_fda.merge_methods.registry import register
from hf_fda.tensors import mean, nearest_orthonormal, numerical_rank, svd, total, weighted


@dataclass(frozen=True, kw_only=True)
class IsoCTSConfig(TaskVectorConfig):
    """Options of `iso_cts`."""

    name: ClassVar[str] = "iso_cts"
    summary: ClassVar[str] = "directions that tasks share and each one's own, their singular values at their mean"
    paper: ClassVar[str] = "No task left behind: isotropic model merging, arXiv 2502.04959"
    scope: ClassVar[Scope] = "matrix"
    rotates: ClassVar[bool] = True

    common_space_fraction: float = option(
        0.8, "fraction of a matrix's singular directions that tasks share", minimum=0, maximum=1
    )


@register(IsoCTSConfig)
def iso_cts(base: Tensor, tasks: Sequence[Tensor], config: IsoCTSConfig) -> Tensor:
    """``lambda * mean(s) * U' V'``: U' and V' are the nearest orthonormal matrices to the concatenated directions, the
    leading ones of ``sum_i tau_i`` and of what each task has outside of these, s their singular values (paper,
    Algorithm 2). Anything but a matrix is averaged.

    Only directions that are there take part, in the mean too: of a few thin adapters those may be few.

    Args:
        base: theta_0, (d_out, d_in) or another shape (unused).
        tasks: K task tensors of that shape.
        config: the options; `weights` in the order of `tasks`.
    """
    tasks = weighted(tasks, config.source_weights())
    if base.ndim != 2:
        return config.scaling * mean(tasks)
    common, each = shared_out(min(base.shape), len(tasks), config.common_space_fraction)
    shared = _leading(total(tasks), common, base.shape)
    own = [_leading(task - shared[0] @ (shared[0].mT @ task), each, base.shape, task) for task in tasks]
    parts = [part for part in (*own, shared) if len(part[1])]
    if not parts:
        return torch.zeros_like(tasks[0])
    u, s, vh = (torch.cat([part[place] for part in parts], dim=dim) for place, dim in ((0, 1), (1, 0), (2, 0)))
    return config.scaling * s.mean() * (nearest_orthonormal(u) @ nearest_orthonormal(vh))


def shared_out(directions: int, count: int, fraction: float) -> tuple[int, int]:
    """How many directions are common, and how many each task has for itself; together all that there are.

    Args:
        directions: min(d_out, d_in).
        count: K, the number of tasks.
        fraction: of the directions that are common, about.

    >>> shared_out(64, 3, 0.8)
    (52, 4)
    """
    each = min(round((directions - int(directions * fraction)) / count), directions // count)
    return directions - each * count, each


def _leading(
    matrix: Tensor, count: int, shape: Sequence[int], whole: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triplets of a matrix, no more than stand above the rounding of what it is a part of."""
    u, s, vh = svd(matrix)
    kept = min(count, numerical_rank(s, shape))
    if whole is not None:
        floor = torch.linalg.matrix_norm(whole) * torch.finfo(s.dtype).eps * max(shape)
        kept = min(kept, int((s > floor).sum()))
    return u[:, :kept], s[:kept], vh[:kept]
