"""DARE: drop random entries of each task vector, enlarge the rest by as much, then sum them or merge them by sign."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hf_fda.merge_methods.config import TaskVectorConfig, option
from hf_fda.merge_methods.registry import register
from hf_fda.tensors import agreeing_mean, drop, total, weighted


@dataclass(frozen=True, kw_only=True)
class DARELinearConfig(TaskVectorConfig):
    """Options of `dare_linear`."""

    name: ClassVar[str] = "dare_linear"
    summary: ClassVar[str] = "sum of task vectors thinned at random (DARE)"
    paper: ClassVar[str] = "Language models are Super Mario, arXiv 2311.03099"
    random: ClassVar[bool] = True

    density: float = option(1.0, "probability to keep an entry; kept ones are divided by it", minimum=0, maximum=1)


@dataclass(frozen=True, kw_only=True)
class DARETIESConfig(DARELinearConfig):
    """Options of `dare_ties`."""

    name: ClassVar[str] = "dare_ties"
    summary: ClassVar[str] = "task vectors thinned at random (DARE), then merged by elected sign (TIES)"

    majority_sign_method: Literal["total", "frequency"] = option(
        "total", "the elected sign is that of the sum of the entries, or of most of them"
    )
    normalize: bool = option(False, "divide by the weights of the sources that agree, else only sum")


@register(DARELinearConfig)
def dare_linear(base: Tensor, tasks: Sequence[Tensor], config: DARELinearConfig, generator: torch.Generator) -> Tensor:
    """``lambda * sum_i w_i m_i tau_i / density`` with m_i ~ Bernoulli(density), entry by entry (paper, Section 3).

    Args:
        base: theta_0, any shape (unused).
        tasks: K task tensors of that shape.
        config: the options; `weights` in the order of `tasks`.
        generator: draws the entries that stay, on the CPU.
    """
    kept = [drop(task, config.density, generator) for task in tasks]
    return config.scaling * total(weighted(kept, config.source_weights()))


@register(DARETIESConfig)
def dare_ties(base: Tensor, tasks: Sequence[Tensor], config: DARETIESConfig, generator: torch.Generator) -> Tensor:
    """As `dare_linear`, but only entries that agree with the elected sign count.

    Args:
        base: theta_0, any shape (unused).
        tasks: K task tensors of that shape.
        config: the options; `weights` in the order of `tasks`.
        generator: draws the entries that stay, on the CPU.
    """
    kept = [drop(task, config.density, generator) for task in tasks]
    weights = config.weight_of_each(len(tasks))
    method, normalize = config.majority_sign_method, config.normalize
    return config.scaling * agreeing_mean(weighted(kept, weights), weights, method, normalize)
