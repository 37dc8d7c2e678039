"""The sources' task vectors of one tensor, held so that a merge and its derivative need no temporaries of its size.

All forms do two things: add ``sum_t gamma_t tau_t`` to a tensor in place, and give the inner products of a gradient
with every tau_t.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from hf_fda.lowrank import LowRank

PIECE = 1 << 20
"""Entries of a rounded tensor that are widened at a time."""


class TaskTensors(Protocol):
    """Task vectors of m sources for one tensor."""

    def add_to(self, value: Tensor, coefficients: Tensor) -> None:
        """Add their sum, weighted by `coefficients` (m,), to a contiguous tensor."""
        ...

    def products(self, gradient: Tensor) -> Tensor:
        """Their inner products with a contiguous gradient, (m,)."""
        ...


class Dense:
    """Task vectors in memory.

    Args:
        stacked: (m, n), one flattened task vector a row.
    """

    def __init__(self, stacked: Tensor) -> None:
        self.stacked = stacked

    def add_to(self, value: Tensor, coefficients: Tensor) -> None:
        """As `TaskTensors.add_to`."""
        flat = value.view(-1)
        for piece in self._pieces(value.dtype):
            flat[piece].addmv_(self.stacked[:, piece].to(value.dtype).mT, coefficients)

    def products(self, gradient: Tensor) -> Tensor:
        """As `TaskTensors.products`."""
        flat = gradient.view(-1)
        parts = [self.stacked[:, piece].to(flat.dtype) @ flat[piece] for piece in self._pieces(flat.dtype)]
        return torch.stack(parts).sum(0)

    def _pieces(self, dtype: torch.dtype) -> list[slice]:
        size = self.stacked.shape[1]
        step = size if self.stacked.dtype == dtype else PIECE
        return [slice(start, min(start + step, size)) for start in range(0, size, step)]


class Thin:
    """Task vectors that are products of thin factors, which are never multiplied out.

    Args:
        factors: of each source.
    """

    def __init__(self, factors: Sequence[LowRank]) -> None:
        self.factors = list(factors)

    def add_to(self, value: Tensor, coefficients: Tensor) -> None:
        """As `TaskTensors.add_to`."""
        for own, coefficient in zip(self.factors, coefficients, strict=True):
            matrices = value.view(-1, own.left.shape[-2], own.right.shape[-1])
            matrices.baddbmm_(_stack(own.left * coefficient), _stack(own.right))

    def products(self, gradient: Tensor) -> Tensor:
        """As `TaskTensors.products`: ``<G, L R> = sum((L^T G) * R)``."""
        found = []
        for own in self.factors:
            matrices = gradient.view(-1, own.left.shape[-2], own.right.shape[-1])
            found.append(torch.sum((_stack(own.left).mT @ matrices) * _stack(own.right)))
        return torch.stack(found)


class Stored:
    """Task vectors that are read at each use.

    Args:
        read: gives them one after the other, of the tensor's shape, in the type of what they are used with.
    """

    def __init__(self, read: Callable[[], Iterator[Tensor]]) -> None:
        self.read = read

    def add_to(self, value: Tensor, coefficients: Tensor) -> None:
        """As `TaskTensors.add_to`."""
        for task, coefficient in zip(self.read(), coefficients.tolist(), strict=True):
            value.add_(task, alpha=coefficient)

    def products(self, gradient: Tensor) -> Tensor:
        """As `TaskTensors.products`."""
        return torch.stack([task.flatten() @ gradient.view(-1) for task in self.read()])


def _stack(matrix: Tensor) -> Tensor:
    """A matrix as a stack of one; a stack as it is."""
    return matrix.reshape(-1, *matrix.shape[-2:])
