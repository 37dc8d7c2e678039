"""TIES: trim each task vector, elect a sign for every entry, and average the entries that agree with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from hf_fda.merge_methods.config import Scope, TaskVectorConfig, Trim, option, trim_option
from hf_fda.merge_methods.registry import register
from hf_fda.tensors import agreeing_mean, trim, weighted


@dataclass(frozen=True, kw_only=True)
class ElectionConfig(TaskVectorConfig):
    """Options of methods that trim, elect a sign and average what agrees."""

    density: float = option(1.0, "fraction of each tensor's entries to keep, the largest", minimum=0, maximum=1)
    majority_sign_method: Literal["total", "frequency"] = option(
        "total", "the elected sign is that of the sum of the entries, or of most of them"
    )
    normalize: bool = option(True, "divide by the weights of the sources that agree, else only sum")


@dataclass(frozen=True, kw_only=True)
class TIESConfig(ElectionConfig):
    """Options of `ties`."""

    name: ClassVar[str] = "ties"
    summary: ClassVar[str] = "mean of the largest entries that agree with an elected sign (TIES)"
    paper: ClassVar[str] = "TIES-Merging, arXiv 2306.01708"
    scope: ClassVar[Scope] = "tensor"
    trims: ClassVar[bool] = True

    trim: Trim = trim_option()


@register(TIESConfig)
def ties(base: Tensor, tasks: Sequence[Tensor], config: TIESConfig) -> Tensor:
    """``lambda * sum_i w_i t_i [sign(t_i) = s] / sum_i w_i [sign(t_i) = s]`` with t_i the trimmed tau_i and s the
    elected sign of ``w_i t_i``, entry by entry (paper, Algorithm 1; trimmed by tensor, as mergekit and PEFT do).

    Args:
        base: theta_0, any shape (unused).
        tasks: K task tensors of that shape.
        config: the options; `weights` in the order of `tasks`.
    """
    trimmed = [trim(task, config.density) for task in tasks]
    weights = config.weight_of_each(len(tasks))
    method, normalize = config.majority_sign_method, config.normalize
    return config.scaling * agreeing_mean(weighted(trimmed, weights), weights, method, normalize)
