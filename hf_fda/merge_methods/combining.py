"""The two ways to combine task vectors entry by entry that several methods share: add them up, or let signs vote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from hf_fda.merge_methods.config import TaskVectorConfig, option
from hf_fda.tensors import agreeing_mean, total, weighted


@dataclass(frozen=True, kw_only=True)
class SummedConfig(TaskVectorConfig):
    """Options of every method that adds task vectors up."""

    normalize: bool = option(False, "divide by the sum of the weights, else only sum")

    def factor(self, count: int) -> float:
        """What the weighted sum is multiplied with: ``lambda``, over ``sum_i w_i`` with `normalize`.

        Args:
            count: K, the number of sources.
        """
        whole = sum(self.weight_of_each(count)) if self.normalize else 1.0
        return self.scaling / whole if abs(whole) >= 1e-8 else self.scaling


@dataclass(frozen=True, kw_only=True)
class ElectedConfig(TaskVectorConfig):
    """Options of every method in which the signs of an entry vote, and only those that agree count."""

    majority_sign_method: Literal["total", "frequency"] = option(
        "total", "the elected sign is that of the sum of the entries, or of most of them"
    )
    normalize: bool = option(True, "divide by the weights of the sources that agree, else only sum")


def summed(tasks: Sequence[Tensor], config: SummedConfig) -> Tensor:
    """``lambda * sum_i w_i t_i``, divided by ``sum_i w_i`` with `normalize`.

    Args:
        tasks: K task tensors of one shape, thinned out or whole.
        config: the options; `weights` in the order of `tasks`.
    """
    return config.factor(len(tasks)) * total(weighted(tasks, config.source_weights()))


def elected(tasks: Sequence[Tensor], config: ElectedConfig) -> Tensor:
    """``lambda * sum_i w_i t_i [sign(w_i t_i) = s]`` with s the elected sign of ``w_i t_i``, entry by entry, divided by
    ``sum_i w_i [sign(w_i t_i) = s]`` with `normalize` (TIES, arXiv 2306.01708, Algorithm 1).

    Args:
        tasks: K task tensors of one shape, thinned out or whole.
        config: the options; `weights` in the order of `tasks`.
    """
    weights = config.weight_of_each(len(tasks))
    method, normalize = config.majority_sign_method, config.normalize
    return config.scaling * agreeing_mean(weighted(tasks, weights), weights, method, normalize)
