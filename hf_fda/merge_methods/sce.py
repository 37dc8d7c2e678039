"""SCE: select the entries on which sources differ most, calculate each source's weight, erase minority signs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_fda.merge_methods.config import MethodConfig, Scope, option
from hf_fda.merge_methods.registry import register
from hf_fda.tensors import agreement, mean, sum_where, total


@dataclass(frozen=True, kw_only=True)
class SCEConfig(MethodConfig):
    """Options of `sce`."""

    name: ClassVar[str] = "sce"
    summary: ClassVar[str] = "mean of the entries that agree in sign, weighted by the sources' squared sizes (SCE)"
    paper: ClassVar[str] = "FuseChat, arXiv 2408.07990"
    scope: ClassVar[Scope] = "tensor"

    select_topk: float = option(
        1.0, "fraction of the entries that differ at all to keep, those of largest variance", minimum=0, maximum=1
    )
    scaling: float = option(1.0, "lambda: factor of the merged task vector")


@register(SCEConfig)
def sce(base: Tensor, tasks: Sequence[Tensor], config: SCEConfig) -> Tensor:
    """``lambda * sum_i w_i t_i [sign(t_i) = s] / sum_i w_i [sign(t_i) = s]`` with t_i the selected entries of tau_i, s
    the sign of their sum, and w_i the mean square of t_i.

    Args:
        base: theta_0, any shape (unused).
        tasks: K task tensors of that shape.
        config: the options.
    """
    selected = tasks if config.select_topk == 1 else _select(tasks, config.select_topk)
    sizes = torch.stack([task.square().mean() for task in selected])
    weights = (sizes / sizes.sum() if bool(sizes.any()) else torch.ones_like(sizes)).unbind()
    shares = [task * weight for task, weight in zip(selected, weights, strict=True)]
    return config.scaling * sum_where(shares, weights, agreement(selected, "total"), normalize=True)


def _select(tasks: Sequence[Tensor], fraction: float) -> list[Tensor]:
    """The task tensors where their variance over the sources is largest, zeros elsewhere."""
    centre = mean(tasks)
    variance = total([(task - centre).square() for task in tasks]).flatten()
    kept = int(fraction * int(variance.count_nonzero()))
    chosen = torch.zeros_like(variance)
    chosen[variance.topk(kept, sorted=False).indices] = 1
    return [task * chosen.view_as(task) for task in tasks]
