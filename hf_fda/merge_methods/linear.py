"""Linear: the weighted mean of the models themselves (a model soup)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_fda.errors import InputError
from hf_fda.merge_methods.config import MethodConfig, option
from hf_fda.merge_methods.registry import register
from hf_fda.tensors import total, weighted


@dataclass(frozen=True, kw_only=True)
class LinearConfig(MethodConfig):
    """Options of `linear`."""

    name: ClassVar[str] = "linear"
    summary: ClassVar[str] = "weighted mean of the models"
    paper: ClassVar[str] = "Model soups, arXiv 2203.05482"

    weights: tuple[float, ...] | dict[str, float] | None = option(
        None, "a factor for each source: a list in the order of the sources, or by source name"
    )
    normalize: bool = option(True, "divide by the sum of the weights")

    def __post_init__(self) -> None:
        super().__post_init__()
        values = self.weights.values() if isinstance(self.weights, dict) else self.weights
        if values and self.normalize and sum(values) == 0:
            raise InputError("linear: the weights sum to zero; pass normalize=False or other weights")

    def coefficients(self, count: int) -> tuple[float, ...]:
        """``w_i / sum_i w_i``, or ``w_i`` without `normalize`.

        Raises:
            InputError: when the weights are still given by source name.
        """
        if isinstance(self.weights, dict):
            raise InputError("linear: weights by name need the names of the sources")
        weights = (1.0,) * count if self.weights is None else self.weights
        return tuple(weight / sum(weights) for weight in weights) if self.normalize else weights


@register(LinearConfig)
def linear(base: Tensor, tasks: Sequence[Tensor], config: LinearConfig) -> Tensor:
    """``sum_i w_i theta_i / sum_i w_i``, written as a task tensor. Without `normalize`: ``sum_i w_i tau_i``.

    Args:
        base: theta_0, any shape (unused: a weighted mean of models is one of task tensors).
        tasks: K task tensors of that shape.
        config: the options; `weights` in the order of `tasks`.

    Raises:
        InputError: when the weights are still given by source name.
    """
    if isinstance(config.weights, dict):
        raise InputError("linear: weights by name need the names of the sources")
    weights = (1.0,) * len(tasks) if config.weights is None else config.weights
    merged = total(weighted(tasks, weights))
    return merged / sum(weights) if config.normalize else merged
