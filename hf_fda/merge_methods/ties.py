"""TIES: trim each task vector, elect a sign for every entry, and average the entries that agree with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_fda.errors import InputError
from hf_fda.merge_methods.combining import ElectedConfig, elected
from hf_fda.merge_methods.config import Scope, Trim, option, trim_option
from hf_fda.merge_methods.per_source import PerSource
from hf_fda.merge_methods.registry import register
from hf_fda.tensors import of_same_sum, trim


@dataclass(frozen=True, kw_only=True)
class ElectionConfig(ElectedConfig):
    """Options of methods that trim, elect a sign and average what agrees."""

    density: PerSource = option(
        1.0, "fraction of each tensor's entries to keep, the largest", minimum=0, maximum=1, per_source=True
    )
    rescale: bool = option(False, "enlarge what is kept until its magnitudes add up to those of the whole tensor")

    def trimmed(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The largest entries of each source's tensor, by its own density.

        Args:
            tensors: K tensors of one shape.
        """
        densities = self.of_each("density", len(tensors))
        kept = [trim(tensor, density) for tensor, density in zip(tensors, densities, strict=True)]
        return [of_same_sum(*pair) for pair in zip(kept, tensors, strict=True)] if self.rescale else kept


@dataclass(frozen=True, kw_only=True)
class TIESConfig(ElectionConfig):
    """Options of `ties`."""

    name: ClassVar[str] = "ties"
    summary: ClassVar[str] = "mean of the largest entries that agree with an elected sign (TIES)"
    paper: ClassVar[str] = "TIES-Merging, arXiv 2306.01708"
    scope: ClassVar[Scope] = "tensor"
    trims: ClassVar[bool] = True

    trim: Trim = trim_option()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trim == "global" and self.rescale:
            raise InputError("method 'ties': rescale is by tensor and trim='global' is not; choose one of the two")


@register(TIESConfig)
def ties(base: Tensor, tasks: Sequence[Tensor], config: TIESConfig) -> Tensor:
    """``lambda * sum_i w_i t_i [sign(w_i t_i) = s] / sum_i w_i [sign(w_i t_i) = s]`` with t_i the trimmed tau_i and s
    the elected sign of ``w_i t_i``, entry by entry (paper, Algorithm 1; trimmed by tensor, as mergekit and PEFT do).

    Args:
        base: theta_0, any shape (unused).
        tasks: K task tensors of that shape.
        config: the options; `weights` in the order of `tasks`.
    """
    return elected(config.trimmed(tasks), config)
