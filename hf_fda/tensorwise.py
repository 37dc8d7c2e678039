"""Parameter-space methods on one tensor of a model: what each role of a tensor means to them, and in which parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_fda.checkpoint.layout import Role
from hf_fda.merge_methods import MethodConfig

PART = 2**20
"""Entries of a large tensor that are merged at a time where entries do not depend on each other."""


def by_entry(config: MethodConfig, role: Role) -> bool:
    """Whether each entry of a tensor is merged on its own: always by elementwise methods, and by matrix methods for
    what is no linear weight (a lookup table, a bias, a convolution), of which they take the mean."""
    return config.elementwise or role in ("embedding", "other")


def apply_method(config: MethodConfig, base: Tensor, tasks: Sequence[Tensor], role: Role) -> Tensor:
    """A method's merged task tensor for one model tensor, handed over the way matrix methods mean it.

    A linear weight goes as (d_out, d_in), a transposed one is turned, a stack of weights goes one by one, and what is
    merged entry by entry goes flat, so that no spectrum is made of it.
    """
    if by_entry(config, role):
        return config.merge(base.flatten(), [task.flatten() for task in tasks]).view_as(base)
    if role == "conv1d":
        return config.merge(base.mT, [task.mT for task in tasks]).mT
    if role == "stack":
        return torch.stack([config.merge(base[i], [task[i] for task in tasks]) for i in range(len(base))])
    return config.merge(base, tasks)
