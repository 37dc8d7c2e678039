"""NuSLERP: spherical interpolation by weights, between two task vectors or from the base to one source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_fda.merge_methods.config import Scope, WeightedConfig, option
from hf_fda.merge_methods.registry import register
from hf_fda.merge_methods.spanning import spanned
from hf_fda.merge_methods.sphere import arc, between, cosine_of


@dataclass(frozen=True, kw_only=True)
class NuSlerpConfig(WeightedConfig):
    """Options of `nuslerp`."""

    name: ClassVar[str] = "nuslerp"
    summary: ClassVar[str] = "spherical interpolation of two task vectors, or from the base to one source, by weights"
    paper: ClassVar[str] = "mergekit's method of that name, arXiv 2403.13257"
    scope: ClassVar[Scope] = "tensor"
    max_sources: ClassVar[int | None] = 2

    nuslerp_flatten: bool = option(True, "one angle for a whole tensor, else one along each line of it")
    nuslerp_row_wise: bool = option(
        False, "without nuslerp_flatten: lines along the first dimension of a tensor, else along the last"
    )

    @property
    def spans(self) -> bool:
        """As `MethodConfig.spans`."""
        return self.nuslerp_flatten

    def combination(self, products: Tensor) -> Tensor:
        """As `MethodConfig.combination`."""
        count = len(products) - 1
        first, second, start = torch.zeros(3, count + 1, dtype=products.dtype)
        if count == 2:
            first[1] = second[2] = 1
        else:
            first[0] = second[0] = second[1] = start[0] = 1
        one, other = arc(cosine_of(products, first, second), self.place(count))
        return one * first + other * second - start

    def place(self, count: int) -> float:
        """Where to go: 0 is the base or the first of two sources, 1 the source or the second.

        Args:
            count: K, 1 or 2 sources. A single source weighs ``w`` against the base's ``1 - w``.
        """
        if self.weights is None:
            return 0.5
        weights = self.of_each("weights", count)
        if count == 1:
            return weights[0]
        return weights[1] / sum(weights) if abs(sum(weights)) >= 1e-6 else 0.5


@register(NuSlerpConfig)
def nuslerp(base: Tensor, tasks: Sequence[Tensor], config: NuSlerpConfig) -> Tensor:
    """The point at ``t = w_2 / (w_1 + w_2)`` on the arc from tau_1 to tau_2; of one source that at ``t = w_1`` on the
    arc from theta_0 to theta_1, less theta_0.

    Args:
        base: theta_0, any shape.
        tasks: one or two task tensors of that shape.
        config: the options; `weights` in the order of `tasks`.
    """
    place, shape = config.place(len(tasks)), base.shape
    if config.nuslerp_flatten or not shape:
        return spanned(base, tasks, config)
    ends = list(tasks) if len(tasks) == 2 else [base, base + tasks[0]]
    if config.nuslerp_row_wise:
        merged = between(ends[0].transpose(0, -1), ends[1].transpose(0, -1), place).transpose(0, -1)
    else:
        merged = between(ends[0], ends[1], place)
    return merged if len(tasks) == 2 else merged - base
