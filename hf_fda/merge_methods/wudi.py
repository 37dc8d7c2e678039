"""WUDI: the task matrix that interferes least with every task, found without data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hf_fda.merge_methods.config import Scope, TaskVectorConfig, option
from hf_fda.merge_methods.registry import register
from hf_fda.tensors import mean, pseudo_inverse_right, total, weighted


@dataclass(frozen=True, kw_only=True)
class WUDIConfig(TaskVectorConfig):
    """Options of `wudi`."""

    name: ClassVar[str] = "wudi"
    summary: ClassVar[str] = "task matrix of least interference with every task's own rows (WUDI)"
    paper: ClassVar[str] = "Whoever started the interference should end it, arXiv 2503.08099"
    scope: ClassVar[Scope] = "matrix"

    solver: Literal["iterative", "closed_form"] = option(
        "iterative", "Adam as published, or the exact least-squares solution"
    )
    steps: int = option(300, "Adam steps of the iterative solver", minimum=0)
    learning_rate: float = option(1e-5, "Adam step size of the iterative solver", minimum=0)


@register(WUDIConfig)
def wudi(base: Tensor, tasks: Sequence[Tensor], config: WUDIConfig) -> Tensor:
    """``lambda * argmin_tau sum_i |(tau - tau_i) tau_i^T|^2 / |tau_i|^2`` (paper, Equation 12).

    With ``C_i = tau_i^T tau_i / |tau_i|^2`` the minimum is ``(sum_i tau_i C_i) (sum_i C_i)^+``; the iterative
    solver goes there from ``sum_i tau_i`` by Adam. Anything but a matrix is averaged.

    Args:
        base: theta_0, (d_out, d_in) or another shape (unused).
        tasks: K task tensors of that shape.
        config: the options; `weights` in the order of `tasks`.
    """
    tasks = weighted(tasks, config.source_weights())
    if base.ndim != 2:
        return config.scaling * mean(tasks)
    work = tasks[0].dtype
    if config.solver == "closed_form":
        tasks = [task.double() for task in tasks]
    grams = [task.mT @ task / task.square().sum().clamp_min(torch.finfo(task.dtype).tiny) for task in tasks]
    gram = total(grams)
    target = total([task @ own for task, own in zip(tasks, grams, strict=True)])
    if config.solver == "closed_form":
        return config.scaling * pseudo_inverse_right(target, gram).to(work)
    return config.scaling * _descend(total(tasks), target, gram, config.steps, config.learning_rate)


def _descend(start: Tensor, target: Tensor, gram: Tensor, steps: int, learning_rate: float) -> Tensor:
    """Adam on the quadratic whose gradient at tau is ``2 (tau gram - target)``."""
    tau = torch.nn.Parameter(start)
    optimizer = torch.optim.Adam([tau], lr=learning_rate)
    with torch.no_grad():
        for _ in range(steps):
            tau.grad = 2 * (tau @ gram - target)
            optimizer.step()
    return tau.detach()
