"""Linear: the weighted mean of the models themselves (a model soup)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_fda.merge_methods.config import WeightedConfig, option
from hf_fda.merge_methods.registry import register
from hf_fda.tensors import total, weighted


@dataclass(frozen=True, kw_only=True)
class LinearConfig(WeightedConfig):
    """Options of `linear`."""

    name: ClassVar[str] = "linear"
    summary: ClassVar[str] = "weighted mean of the models"
    paper: ClassVar[str] = "Model soups, arXiv 2203.05482"

    normalize: bool = option(True, "divide by the sum of the weights")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalize:
            self.refuse_zero_sum("pass normalize=False or other weights")

    def coefficients(self, count: int) -> tuple[float, ...]:
        """``w_i / sum_i w_i``, or ``w_i`` without `normalize`."""
        return self.shares(count) if self.normalize else self.weight_of_each(count)


@register(LinearConfig)
def linear(base: Tensor, tasks: Sequence[Tensor], config: LinearConfig) -> Tensor:
    """``sum_i w_i theta_i / sum_i w_i``, written as a task tensor. Without `normalize`: ``sum_i w_i tau_i``.

    Args:
        base: theta_0, any shape (unused: a weighted mean of models is one of task tensors).
        tasks: K task tensors of that shape.
        config: the options; `weights` in the order of `tasks`.
    """
    weights = config.weight_of_each(len(tasks))
    merged = total(weighted(tasks, weights))
    return merged / sum(weights) if config.normalize else merged
