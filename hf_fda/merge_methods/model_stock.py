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
from hf_fda.merge_methods.spanning import spanned
from hf_fda.merge_methods.sphere import cosine_of
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

    @property
    def spans(self) -> bool:
        """As `MethodConfig.spans`."""
        return not self.filter_wise

    def combination(self, products: Tensor) -> Tensor:
        """As `MethodConfig.combination`."""
        count = len(products) - 1
        tasks = torch.eye(count + 1, dtype=products.dtype)[1:]
        pairs = [cosine_of(products, first, second) for first, second in combinations(tasks, 2)]
        return shortening(mean(pairs).clamp(-1, 1), count) * mean(list(tasks))


@register(ModelStockConfig)
def model_stock(base: Tensor, tasks: Sequence[Tensor], config: ModelStockConfig) -> Tensor:
    """``t * mean_i tau_i`` with ``t = K c / (1 + (K - 1) c)`` and c the mean cosine of all pairs of task tensors.

    Where t is infinite the base stays as it is.

    Args:
        base: theta_0, any shape (unused).
        tasks: K task tensors of that shape.
        config: the options.
    """
    if not config.filter_wise:
        return spanned(base, tasks, config)
    shape = base.shape
    rows = [task.reshape(-1, shape[-1]) if shape else task.reshape(1, -1) for task in tasks]
    units = [own / own.norm(dim=1, keepdim=True).clamp_min(torch.finfo(own.dtype).tiny) for own in rows]
    pairs = [(first * second).sum(dim=1, keepdim=True).clamp(-1, 1) for first, second in combinations(units, 2)]
    return (shortening(mean(pairs), len(tasks)) * mean(rows)).reshape(shape)


def shortening(cosine: Tensor, count: int) -> Tensor:
    """``K c / (1 + (K - 1) c)``; 0 where that is infinite.

    Args:
        cosine: c, any shape.
        count: K, the number of sources.
    """
    below = 1 + (count - 1) * cosine
    finite = below.abs() >= 1e-6
    return torch.where(finite, count * cosine / torch.where(finite, below, 1.0), 0.0)
