"""DARE: drop random entries of each task vector, enlarge the rest by as much, then sum them or merge them by sign."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_fda.merge_methods.combining import ElectedConfig, SummedConfig, elected, summed
from hf_fda.merge_methods.config import TaskVectorConfig, option
from hf_fda.merge_methods.per_source import PerSource
from hf_fda.merge_methods.registry import register
from hf_fda.tensors import drop


@dataclass(frozen=True, kw_only=True)
class DroppedConfig(TaskVectorConfig):
    """Options of both."""

    paper: ClassVar[str] = "Language models are Super Mario, arXiv 2311.03099"
    random: ClassVar[bool] = True

    density: PerSource = option(1.0, "probability to keep an entry", minimum=0, maximum=1, per_source=True)
    rescale: bool = option(True, "divide what is kept by that probability")

    def dropped(self, tasks: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
        """``m_i tau_i / density_i`` with m_i ~ Bernoulli(density_i), entry by entry (paper, Section 3).

        Args:
            tasks: K task tensors of one shape.
            generator: draws the entries that stay, on the CPU.
        """
        densities = self.of_each("density", len(tasks))
        return [drop(task, density, generator, self.rescale) for task, density in zip(tasks, densities, strict=True)]


@dataclass(frozen=True, kw_only=True)
class DARELinearConfig(DroppedConfig, SummedConfig):
    """Options of `dare_linear`."""

    name: ClassVar[str] = "dare_linear"
    summary: ClassVar[str] = "sum of task vectors thinned at random (DARE)"


@dataclass(frozen=True, kw_only=True)
class DARETIESConfig(DroppedConfig, ElectedConfig):
    """Options of `dare_ties`."""

    name: ClassVar[str] = "dare_ties"
    summary: ClassVar[str] = "task vectors thinned at random (DARE), then merged by elected sign (TIES)"

    normalize: bool = option(False, "divide by the weights of the sources that agree, else only sum")


@register(DARELinearConfig)
def dare_linear(base: Tensor, tasks: Sequence[Tensor], config: DARELinearConfig, generator: torch.Generator) -> Tensor:
    """``lambda * sum_i w_i m_i tau_i / density_i``, divided by ``sum_i w_i`` with `normalize`.

    Args:
        base: theta_0, any shape (unused).
        tasks: K task tensors of that shape.
        config: the options; `weights` in the order of `tasks`.
        generator: draws the entries that stay, on the CPU.
    """
    return summed(config.dropped(tasks, generator), config)


@register(DARETIESConfig)
def dare_ties(base: Tensor, tasks: Sequence[Tensor], config: DARETIESConfig, generator: torch.Generator) -> Tensor:
    """As `dare_linear`, but only entries that agree with the elected sign count.

    Args:
        base: theta_0, any shape (unused).
        tasks: K task tensors of that shape.
        config: the options; `weights` in the order of `tasks`.
        generator: draws the entries that stay, on the CPU.
    """
    return elected(config.dropped(tasks, generator), config)
