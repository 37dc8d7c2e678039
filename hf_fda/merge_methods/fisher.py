"""Fisher merging: a mean of the models in which each entry counts as much as its model's answers depend on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_fda.merge_methods.config import WeightedConfig, option
from hf_fda.merge_methods.linear import LinearConfig
from hf_fda.merge_methods.looking import RowsConfig
from hf_fda.merge_methods.registry import register_config
from hf_fda.merge_methods.regmean import refuse_negative
from hf_fda.tensors import total, weighted


@dataclass(frozen=True, kw_only=True)
class FisherConfig(WeightedConfig, RowsConfig):
    """Options of `fisher`."""

    name: ClassVar[str] = "fisher"
    summary: ClassVar[str] = "mean of the models, entry by entry weighted by their diagonal Fisher information"
    paper: ClassVar[str] = "Merging models with Fisher-weighted averaging, arXiv 2111.09832"

    samples: int | None = option(
        None,
        "answers that are drawn for each row from the model's own predictions; none: the exact expectation where a row "
        "has few labels (up to 10, or flags or values), else one",
        minimum=1,
    )
    normalize: bool = option(
        True, "divide each source's Fisher information by its norm over all that is merged, so that none drowns others"
    )
    floor: float = option(
        1e-6,
        "the least Fisher information that an entry has; where all have less the mean of the sources is taken",
        minimum=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_negative(self)

    def mean(self) -> LinearConfig:
        """What merges a tensor without Fisher information."""
        return LinearConfig(weights=self.weights)


@dataclass(frozen=True, kw_only=True)
class SettledFisher(FisherConfig):
    """The Fisher-weighted mean of one tensor whose Fisher information is known.

    `read` gives, for some of the tensor's flattened entries, those of the K sources' Fisher information; `entries` says
    which are merged, None all.
    """

    read: Any = None
    entries: slice | None = None

    def at(self, entries: slice) -> SettledFisher:
        """As `MethodConfig.at`."""
        return dataclasses.replace(self, entries=entries)

    def merge(self, base: Tensor, tasks: Sequence[Tensor], generator: torch.Generator | None = None) -> Tensor:
        """As `MethodConfig.merge`, of flat tensors."""
        entries = self.entries if self.entries is not None else slice(0, base.numel())
        return fisher(tasks, [own.to(base.device, base.dtype) for own in self.read(entries)], self)


def fisher(tasks: Sequence[Tensor], fishers: Sequence[Tensor], config: FisherConfig) -> Tensor:
    """``sum_i w_i F_i tau_i / sum_i w_i F_i``, entry by entry (paper, Equation 4, on task vectors).

    No F_i is less than `floor`. Written as a deviation from the weighted mean, which is what comes out where all F_i
    are equal or zero, and so gives equal sources back.

    Args:
        tasks: K task tensors of one shape.
        fishers: K tensors of that shape, at least zero.
        config: the options; `weights` in the order of `tasks`.
    """
    weights, shares = config.weight_of_each(len(tasks)), config.shares(len(tasks))
    mean = total(weighted(tasks, shares)) if len(tasks) > 1 else tasks[0]
    factors = [own.clamp_min(config.floor) * weight for own, weight in zip(fishers, weights, strict=True)]
    whole = total(factors)
    moved = total(factor * (task - mean) for factor, task in zip(factors, tasks, strict=True))
    return mean + moved / torch.where(whole > 0, whole, 1)


register_config(FisherConfig)
