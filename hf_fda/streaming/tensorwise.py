"""Parameter-space methods on one tensor of a model: what each role of a tensor means to them, and in which parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_fda.checkpoint.layout import Role
from hf_fda.lowrank import LowRank, add
from hf_fda.merge_methods import MethodConfig

PART = 2**21
"""Entries of a large tensor that are read at a time."""

BLOCK = 2**17
"""Entries that are computed at a time: few enough to stay in a core's cache, and enough that threads seldom wait for
each other. Random numbers are drawn block by block, so that another number means others."""


def parts_of(count: int, size: int = PART) -> list[slice]:
    """So many entries in parts.

    >>> parts_of(5, 2)
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def parts_in(region: slice) -> list[slice]:
    """A region of a tensor's entries in parts.

    >>> parts_in(slice(3, 5))
    [slice(3, 5, None)]
    """
    return [slice(region.start + own.start, region.start + own.stop) for own in parts_of(region.stop - region.start)]


def by_entry(config: MethodConfig, role: Role) -> bool:
    """Whether each entry of a tensor is merged on its own: always by elementwise methods, and by matrix methods for
    what is no linear weight (a lookup table, a bias, a convolution), of which they take the mean."""
    return config.works_on == "entry" or (config.works_on == "matrix" and role in ("embedding", "other"))


def apply_method(
    config: MethodConfig, base: Tensor, tasks: Sequence[Tensor], role: Role, generator: torch.Generator | None = None
) -> Tensor:
    """A method's merged task tensor for one model tensor, handed over the way matrix methods mean it.

    A linear weight goes as (d_out, d_in), a transposed one is turned, a stack of weights goes one by one, and what is
    merged entry by entry goes flat, so that no spectrum is made of it.
    """
    if by_entry(config, role):
        return config.merge(base.flatten(), [task.flatten() for task in tasks], generator).view_as(base)
    if role == "conv1d":
        return config.merge(base.mT, [task.mT for task in tasks], generator).mT
    if role == "stack":
        parts = [config.merge(base[i], [task[i] for task in tasks], generator) for i in range(len(base))]
        return torch.stack(parts)
    return config.merge(base, tasks, generator)


def apply_to_factors(
    config: MethodConfig, shape: tuple[int, ...], tasks: Sequence[LowRank | None], role: Role
) -> LowRank | None:
    """A method's merged task tensor from thin task vectors, without any dense one; None where that cannot be done.

    Linear combinations put the factors beside each other. Methods that do not depend on the bases merge the small
    cores between orthonormal bases of all that the task vectors span.

    Args:
        config: the method.
        shape: of the tensor.
        tasks: K task vectors; None for one that is zero. One at least is not.
        role: of the tensor.
    """
    there = [task for task in tasks if task is not None]
    factors = config.coefficients(len(tasks))
    if factors is not None:
        pairs = zip(tasks, factors, strict=True)
        return add([task.scaled(factor) for task, factor in pairs if task is not None])
    if not config.rotates or role not in ("linear", "conv1d") or sum(task.rank for task in there) >= min(shape):
        return None
    beside = add(there)
    left, right = (torch.linalg.qr(part)[0] for part in (beside.left, beside.right.mT))
    nothing = left.new_zeros(left.shape[1], right.shape[1])
    cores = [nothing if task is None else (left.mT @ task.left) @ (task.right @ right) for task in tasks]
    if role == "conv1d":
        core = config.merge(torch.empty(shape[::-1], device="meta"), [core.mT for core in cores]).mT
    else:
        core = config.merge(torch.empty(shape, device="meta"), cores)
    return LowRank(left @ core, right.mT, shape)
