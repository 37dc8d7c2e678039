"""DELLA: drop entries at random, the smaller ones of a row more often, then merge what is left by sign, or sum it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hf_fda.errors import InputError
from hf_fda.merge_methods.combining import ElectedConfig, SummedConfig, elected, summed
from hf_fda.merge_methods.config import Scope, TaskVectorConfig, option
from hf_fda.merge_methods.per_source import PerSource, pairs
from hf_fda.merge_methods.registry import register
from hf_fda.tensors import of_same_sum


@dataclass(frozen=True, kw_only=True)
class MagPruneConfig(TaskVectorConfig):
    """Options of both.

    Raises:
        InputError: when a probability that follows from `density` and `epsilon` is none.
    """

    paper: ClassVar[str] = "DELLA-Merging, arXiv 2406.11617"
    scope: ClassVar[Scope] = "tensor"
    random: ClassVar[bool] = True

    density: PerSource = option(1.0, "mean probability to keep an entry", minimum=0, maximum=1, per_source=True)
    epsilon: PerSource = option(
        0.15, "how much more often the largest entry of a row is kept than on the mean", minimum=0, per_source=True
    )
    rescale: bool = option(True, "enlarge what is kept, to make up for what is dropped")
    rescale_by: Literal["sum", "probability"] = option(
        "sum", "enlarge until a tensor's magnitudes add up to what they did, or divide each entry by its probability"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for density, epsilon in pairs(self.density, self.epsilon):
            if 0 < density < 1 and not epsilon < min(density, 1 - density):
                raise InputError(
                    f"method '{self.name}': density {density} and epsilon {epsilon} give probabilities outside 0 to 1; "
                    f"epsilon must be less than {min(density, 1 - density):.3g}"
                )

    def pruned(self, tasks: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
        """The task tensors after MagPrune.

        Args:
            tasks: K task tensors of one shape.
            generator: draws the entries that stay, on the CPU.
        """
        count = len(tasks)
        settings = zip(tasks, self.of_each("density", count), self.of_each("epsilon", count), strict=True)
        return [self._prune(task, density, epsilon, generator) for task, density, epsilon in settings]

    def _prune(self, task: Tensor, density: float, epsilon: float, generator: torch.Generator) -> Tensor:
        if density in (0.0, 1.0):
            return task * density
        chances = keep_probabilities(task, density, epsilon)
        drawn = torch.rand(task.shape, generator=generator).to(task.device)
        kept = task * (drawn < chances)
        if not self.rescale:
            return kept
        return of_same_sum(kept, task) if self.rescale_by == "sum" else kept / chances


@dataclass(frozen=True, kw_only=True)
class DELLAConfig(MagPruneConfig, ElectedConfig):
    """Options of `della`."""

    name: ClassVar[str] = "della"
    summary: ClassVar[str] = "task vectors thinned at random by magnitude (DELLA), then merged by elected sign"


@dataclass(frozen=True, kw_only=True)
class DELLALinearConfig(MagPruneConfig, SummedConfig):
    """Options of `della_linear`."""

    name: ClassVar[str] = "della_linear"
    summary: ClassVar[str] = "sum of task vectors thinned at random by magnitude (DELLA)"


def keep_probabilities(task: Tensor, density: float, epsilon: float) -> Tensor:
    """``density - epsilon`` for the smallest entry of a row to ``density + epsilon`` for the largest, evenly by rank.

    Args:
        task: any shape; a row is what the first dimension counts, a vector is one row.
        density: the mean of each row's probabilities.
        epsilon: how far they go from it.

    Returns:
        the probability of each entry.
    """
    rows = task.abs().flatten(1) if task.ndim > 1 else task.abs().reshape(1, -1)
    ranks = rows.argsort(dim=1).argsort(dim=1).to(task.dtype)
    last = rows.shape[1] - 1
    place = ranks / last if last > 0 else torch.full_like(ranks, 0.5)
    return (density - epsilon + 2 * epsilon * place).reshape(task.shape)


@register(DELLAConfig)
def della(base: Tensor, tasks: Sequence[Tensor], config: DELLAConfig, generator: torch.Generator) -> Tensor:
    """``lambda * sum_i w_i t_i [sign(w_i t_i) = s] / sum_i w_i [sign(w_i t_i) = s]``, t_i the pruned tau_i, s the
    elected sign of ``w_i t_i``, entry by entry.

    Args:
        base: theta_0, any shape (unused).
        tasks: K task tensors of that shape.
        config: the options; what is per source in the order of `tasks`.
        generator: draws the entries that stay, on the CPU.
    """
    return elected(config.pruned(tasks, generator), config)


@register(DELLALinearConfig)
def della_linear(
    base: Tensor, tasks: Sequence[Tensor], config: DELLALinearConfig, generator: torch.Generator
) -> Tensor:
    """``lambda * sum_i w_i t_i`` with t_i the pruned tau_i, divided by ``sum_i w_i`` with `normalize`.

    Args:
        base: theta_0, any shape (unused).
        tasks: K task tensors of that shape.
        config: the options; what is per source in the order of `tasks`.
        generator: draws the entries that stay, on the CPU.
    """
    return summed(config.pruned(tasks, generator), config)
