"""Model Breadcrumbs: of each task vector drop the smallest entries and the very largest, then sum, or merge by sign."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_fda.merge_methods.combining import ElectedConfig, SummedConfig, elected, summed
from hf_fda.merge_methods.config import Scope, TaskVectorConfig, option
from hf_fda.merge_methods.per_source import PerSource
from hf_fda.merge_methods.registry import register
from hf_fda.tensors import of_same_sum, trim


@dataclass(frozen=True, kw_only=True)
class MaskedConfig(TaskVectorConfig):
    """Options of both."""

    paper: ClassVar[str] = "Model Breadcrumbs, arXiv 2312.06795"
    scope: ClassVar[Scope] = "tensor"

    density: PerSource = option(
        1.0, "fraction of each tensor's entries to keep; 1 keeps outliers too", minimum=0, maximum=1, per_source=True
    )
    gamma: PerSource = option(
        0.01, "fraction of each tensor's entries, the very largest, to drop", minimum=0, maximum=1, per_source=True
    )
    rescale: bool = option(False, "enlarge what is kept until its magnitudes add up to those of the whole tensor")

    def masked(self, tasks: Sequence[Tensor]) -> list[Tensor]:
        """The task tensors without their smallest and their very largest entries.

        Args:
            tasks: K task tensors of one shape.
        """
        count = len(tasks)
        kept = [
            trim(task, density, gamma)
            for task, density, gamma in zip(
                tasks, self.of_each("density", count), self.of_each("gamma", count), strict=True
            )
        ]
        return [of_same_sum(*pair) for pair in zip(kept, tasks, strict=True)] if self.rescale else kept


@dataclass(frozen=True, kw_only=True)
class BreadcrumbsConfig(MaskedConfig, SummedConfig):
    """Options of `breadcrumbs`."""

    name: ClassVar[str] = "breadcrumbs"
    summary: ClassVar[str] = "sum of task vectors without their smallest and very largest entries"


@dataclass(frozen=True, kw_only=True)
class BreadcrumbsTIESConfig(MaskedConfig, ElectedConfig):
    """Options of `breadcrumbs_ties`."""

    name: ClassVar[str] = "breadcrumbs_ties"
    summary: ClassVar[str] = "task vectors masked as by breadcrumbs, then merged by elected sign (TIES)"

    normalize: bool = option(False, "divide by the weights of the sources that agree, else only sum")


@register(BreadcrumbsConfig)
def breadcrumbs(base: Tensor, tasks: Sequence[Tensor], config: BreadcrumbsConfig) -> Tensor:
    """``lambda * sum_i w_i m_i tau_i``, divided by ``sum_i w_i`` with `normalize`. The mask m_i leaves out the `gamma`
    largest entries of a tensor, and as many of the smallest as make `density` of them stay.

    Args:
        base: theta_0, any shape (unused).
        tasks: K task tensors of that shape.
        config: the options; what is per source in the order of `tasks`.
    """
    return summed(config.masked(tasks), config)


@register(BreadcrumbsTIESConfig)
def breadcrumbs_ties(base: Tensor, tasks: Sequence[Tensor], config: BreadcrumbsTIESConfig) -> Tensor:
    """As `breadcrumbs`, but only entries that agree with the elected sign count.

    Args:
        base: theta_0, any shape (unused).
        tasks: K task tensors of that shape.
        config: the options; what is per source in the order of `tasks`.
    """
    return elected(config.masked(tasks), config)
