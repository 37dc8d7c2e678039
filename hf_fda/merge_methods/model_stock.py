"""Model Stock: how far to go from the base to the mean of the sources follows from the angle between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

import torch
from torch import Tensor

from hf_fda.merge_methods.config import MethodConfig, Scope, option
from hf_fda.merge_methods.registry import register
from hf_fda.tensors import mean


@dataclass(frozen=True, kw_only=True)
class ModelStockConfig(MethodConfig):
    """Options of `model_stock`."""

    name: ClassVar[str] = "model_stock"
    summary: ClassVar[str] = "mean of the task vectors, shortened by the angle between them (Model Stock)"
    paper: ClassVar[str] = "Model Stock: all we need is just a few fine-tuned models, arXiv 2403.19522"
    scope: ClassVar[Scope] = "tensor"
    min_sources: ClassVar[int] = 2

    filter_wise: bool = option(False, "one angle for each row of a tensor, else one for the tensor")


@register(ModelStockConfig)
def model_stock(base: Tensor, tasks: Sequence[Tensor], config: ModelStockConfig) -> Tensor:
    """``t * mean_i tau_i`` with ``t = K c / (1 + (K - 1) c)`` and c the mean cosine of all pairs of task tensors.

    Where t is infinite the base stays as it is.

    Args:
        base: theta_0, any shape (unused).
        tasks: K task tensors of that shape.
        config: the options.
    """
    shape = base.shape
    rows = [task.reshape(-1, shape[-1]) if config.filter_wise and shape else task.reshape(1, -1) for task in tasks]
    units = [own / own.norm(dim=1, keepdim=True).clamp_min(torch.finfo(own.dtype).tiny) for own in rows]
    pairs = [(first * second).sum(dim=1, keepdim=True).clamp(-1, 1) for first, second in combinations(units, 2)]
    cosine, count = mean(pairs), len(tasks)
    below = 1 + (count - 1) * cosine
    finite = below.abs() >= 1e-6
    ratio = torch.where(finite, count * cosine / torch.where(finite, below, 1.0), 0.0)
    return (ratio * mean(rows)).reshape(shape)
