"""ACE-Merging: the least-squares merge of linear layers, with input covariances estimated from the task matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_fda.merge_methods.config import Scope, TaskVectorConfig, option
from hf_fda.merge_methods.registry import register
from hf_fda.tensors import mean, svd, total, weighted

NOTHING = 1e-12
"""Added to squared norms before they divide or go into a logarithm."""


@dataclass(frozen=True, kw_only=True)
class ACEConfig(TaskVectorConfig):
    """Options of `ace`."""

    name: ClassVar[str] = "ace"
    summary: ClassVar[str] = "least squares with covariances from the task matrices themselves (ACE-Merging)"
    paper: ClassVar[str] = "ACE-Merging, arXiv 2603.02945"
    scope: ClassVar[Scope] = "matrix"

    epsilon: float = option(1e-2, "added to the diagonal of each task's covariance", minimum=0)
    heterogeneity: float = option(
        0.3, "from this spread of the tasks' sizes on they are normalised, and the spectrum is refined", minimum=0
    )
    rank_fraction: float = option(
        0.3, "fraction of a matrix's singular directions that the refinement adds", minimum=0, maximum=1
    )


@register(ACEConfig)
def ace(base: Tensor, tasks: Sequence[Tensor], config: ACEConfig) -> Tensor:
    """``lambda * (sum_i tau_i S_i) (sum_i S_i + 1 c^T)^-1`` with ``S_i = tau_i^T tau_i + epsilon``, the rows of tau_i
    centred, and c the mean row of ``sum_i tau_i^T tau_i``.

    Tasks of very different size (``var / mean^2`` of the logarithms of ``|tau_i|^2`` is large) get covariances of trace
    one, and the leading directions of what these leave out, at their mean singular value, are added. Formulas and
    defaults are those of the authors' implementation. A task matrix of zeros takes no part. Anything but a matrix of
    several rows is averaged.

    Args:
        base: theta_0, (d_out, d_in) or another shape (unused).
        tasks: K task tensors of that shape.
        config: the options; `weights` in the order of `tasks`.
    """
    tasks = weighted(tasks, config.source_weights())
    if base.ndim != 2 or base.shape[0] == 1:
        return config.scaling * mean(tasks)
    moving = [task.double() for task in tasks if bool(task.any())]
    if not moving:
        return torch.zeros_like(tasks[0])
    sizes = torch.stack([task.square().sum() for task in moving])
    apart = _spread(sizes) > config.heterogeneity
    return (config.scaling * _solve(moving, sizes, apart, config)).to(tasks[0].dtype)


def _spread(sizes: Tensor) -> float:
    """The heterogeneity of tasks: variance over squared mean of the logarithms of their squared norms (K,)."""
    logarithms = (sizes + NOTHING).log()
    return float(logarithms.var() / (logarithms.mean().square() + NOTHING)) if len(sizes) > 1 else 0.0


def _solve(tasks: Sequence[Tensor], sizes: Tensor, apart: bool, config: ACEConfig) -> Tensor:
    """The merged task matrix, with trace-one covariances and the refinement where tasks are `apart`."""
    centred = [task - task.mean(dim=0, keepdim=True) for task in tasks]
    grams = [task.mT @ task for task in centred]
    traces = [gram.trace() + NOTHING if apart else 1.0 for gram in grams]
    grams = [gram / trace for gram, trace in zip(grams, traces, strict=True)]
    unit = torch.eye(grams[0].shape[0], dtype=grams[0].dtype, device=grams[0].device)
    covariances = [gram + unit * (config.epsilon / trace) for gram, trace in zip(grams, traces, strict=True)]
    together = total(covariances)
    prior = total(grams).mean(dim=0, keepdim=True) / (sizes.mean() + NOTHING if apart else 1.0)
    target = total([task @ own for task, own in zip(centred, covariances, strict=True)])
    merged = _divide(target, together + prior)
    if not apart:
        return merged
    middle = together / len(tasks)
    left_out = total([task @ (own - middle) for task, own in zip(tasks, grams, strict=True)])
    u, s, vh = svd(merged + left_out)
    kept = int(len(s) * config.rank_fraction)
    return merged + s[:kept].mean() * (u[:, :kept] @ vh[:kept]) if kept else merged


def _divide(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right^-1``, by the pseudo-inverse where there is no inverse."""
    found, failed = torch.linalg.solve_ex(right, left, left=False)
    return left @ torch.linalg.pinv(right) if bool(failed) or not bool(found.isfinite().all()) else found
