"""Multi-SLERP: a mean direction of task vectors on the sphere, with their mean length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_fda.merge_methods.config import Scope, WeightedConfig, option
from hf_fda.merge_methods.registry import register
from hf_fda.tensors import total, weighted


@dataclass(frozen=True, kw_only=True)
class MultiSlerpConfig(WeightedConfig):
    """Options of `multislerp`."""

    name: ClassVar[str] = "multislerp"
    summary: ClassVar[str] = "task vectors' mean direction on the sphere, with their mean length"
    paper: ClassVar[str] = "goddard.blog/posts/multislerp-wow-what-a-cool-idea"
    scope: ClassVar[Scope] = "tensor"

    normalize_weights: bool = option(True, "divide the weights by their sum")
    eps: float = option(1e-8, "lengths below this have no direction", minimum=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalize_weights:
            self.refuse_zero_sum("pass normalize_weights=False or other weights")


@register(MultiSlerpConfig)
def multislerp(base: Tensor, tasks: Sequence[Tensor], config: MultiSlerpConfig) -> Tensor:
    """``(sum_i w_i |tau_i|) * m / |m|`` with ``m = sum_i w_i tau_i / |tau_i|``.

    As published, a step in the tangent space at m follows; the weighted sum of the tangents there is zero, so that m is
    where it ends. Directions that cancel out have no mean on the sphere: then it is ``sum_i w_i tau_i``.

    Args:
        base: theta_0, any shape (unused).
        tasks: K task tensors of that shape.
        config: the options; `weights` in the order of `tasks`.
    """
    count = len(tasks)
    if count == 1:
        return tasks[0].clone()
    weights = config.shares(count) if config.normalize_weights else config.weight_of_each(count)
    lengths = [task.norm() for task in tasks]
    units = [task / (length + config.eps) for task, length in zip(tasks, lengths, strict=True)]
    direction = total(weighted(units, weights))
    norm, length = direction.norm(), total(weighted(lengths, weights))
    if not float(norm) > config.eps:
        return total(weighted(tasks, weights))
    return length * (direction / norm)
