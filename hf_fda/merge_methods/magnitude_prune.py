"""Magnitude pruning: the sum of task vectors of which only the largest entries stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_fda.merge_methods.config import Scope, TaskVectorConfig, Trim, option, trim_option
from hf_fda.merge_methods.per_source import PerSource
from hf_fda.merge_methods.registry import register
from hf_fda.tensors import total, trim, weighted


@dataclass(frozen=True, kw_only=True)
class MagnitudePruneConfig(TaskVectorConfig):
    """Options of `magnitude_prune`."""

    name: ClassVar[str] = "magnitude_prune"
    summary: ClassVar[str] = "sum of the largest entries of every task vector"
    paper: ClassVar[str] = "PEFT's combination of that name; trimmed as in TIES-Merging, arXiv 2306.01708"
    scope: ClassVar[Scope] = "tensor"
    trims: ClassVar[bool] = True

    density: PerSource = option(
        1.0, "fraction of each tensor's entries to keep, the largest", minimum=0, maximum=1, per_source=True
    )
    trim: Trim = trim_option()


@register(MagnitudePruneConfig)
def magnitude_prune(base: Tensor, tasks: Sequence[Tensor], config: MagnitudePruneConfig) -> Tensor:
    """``lambda * sum_i w_i trim(tau_i)``.

    Args:
        base: theta_0, any shape (unused).
        tasks: K task tensors of that shape.
        config: the options; `weights` in the order of `tasks`.
    """
    densities = config.of_each("density", len(tasks))
    trimmed = [trim(task, density) for task, density in zip(tasks, densities, strict=True)]
    return config.scaling * total(weighted(trimmed, config.source_weights()))
