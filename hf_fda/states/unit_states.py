"""What one unit of a model is called with on the rows of a task, without what rows are filled up with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from hf_fda.blocks.capture import UnitCall


@dataclass(frozen=True)
class Ragged:
    """Vectors at the positions of n rows of different lengths, of which only the real ones are kept.

    `values` are (N + 1, d): those at the real positions, row by row, and a last one of zeros. `places` are (n, T),
    numbers of `values`, N where a position is not real.
    """

    values: Tensor
    places: Tensor

    @classmethod
    def of(cls, real_values: Tensor, real: Tensor) -> Ragged:
        """From the values at the real positions.

        Args:
            real_values: (N, d), row by row.
            real: (n, T), true where a position is real; N in all.
        """
        places = torch.full(real.shape, len(real_values), device=real.device)
        places[real] = torch.arange(len(real_values), device=real.device)
        return cls(torch.cat([real_values, real_values.new_zeros(1, real_values.shape[-1])]), places)

    @classmethod
    def whole(cls, values: Tensor) -> Ragged:
        """From rows (n, T, d) whose positions are all real."""
        return cls.of(values.reshape(-1, values.shape[-1]), values.new_ones(values.shape[:2], dtype=torch.bool))

    def __len__(self) -> int:
        return len(self.places)

    @property
    def real(self) -> Tensor:
        """(n, T), true where a position is real."""
        return self.places != self.count

    @property
    def count(self) -> int:
        """N, the number of real positions."""
        return len(self.values) - 1

    @cached_property
    def lengths(self) -> Tensor:
        """(n,) on the CPU: how many positions of each row there are up to its last real one."""
        numbers = torch.arange(1, self.places.shape[1] + 1, device=self.places.device)
        return (self.real * numbers).amax(1).cpu()

    def at(self, rows: Tensor, positions: int | None = None) -> Tensor:
        """Some rows (b, T, d) in single precision, zero where a position is not real.

        Args:
            rows: (b,) numbers.
            positions: only so many; all T if None.
        """
        return self.values[self.places[rows, :positions]].float()

    def real_at(self, rows: Tensor, positions: int | None = None) -> Tensor:
        """Which positions of some rows are real, as `at`."""
        return self.places[rows, :positions] != self.count

    def only(self, chosen: Tensor) -> Ragged:
        """The vectors at those of the real positions that are chosen, (n, T)."""
        kept = self.real & chosen.to(self.places.device)
        return Ragged.of(self.values[self.places[kept]], kept)

    def to(self, device: torch.device) -> Ragged:
        """The same on a device."""
        return Ragged(self.values.to(device), self.places.to(device))


@dataclass(frozen=True)
class UnitStates:
    """The hidden states that a unit takes on n rows, in half precision, and the call that belongs to them.

    `call` has the other arguments; of those that belong to rows there are n.
    """

    inputs: Ragged
    call: UnitCall

    def __len__(self) -> int:
        return len(self.inputs)

    def to(self, device: torch.device) -> UnitStates:
        """The same on a device."""
        leaves, tree = tree_flatten(self.call.arguments)
        there = [held(leaf).to(device).expand(leaf.shape) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        call = dataclasses.replace(self.call, arguments=tree_unflatten(there, tree))
        return UnitStates(self.inputs.to(device), call)

    @classmethod
    def together(cls, parts: Sequence[UnitStates]) -> UnitStates:
        """Several parts of the rows of one task, filled up to the same length, one after the other."""
        values = torch.cat([part.inputs.values[:-1] for part in parts])
        real = torch.cat([part.inputs.real for part in parts])
        flat = [tree_flatten(part.call.arguments) for part in parts]
        first, tree = flat[0]
        leaves = [
            stacked([leaves[number] for leaves, _ in flat]) if batched else leaf
            for number, (leaf, batched) in enumerate(zip(first, parts[0].call.batched, strict=True))
        ]
        call = dataclasses.replace(parts[0].call, arguments=tree_unflatten(leaves, tree))
        return cls(Ragged.of(values, real), call)


def halved(tensor: Tensor) -> Tensor:
    """A tensor in half precision: float16, or bfloat16 where a value is too large for it."""
    half = tensor.to(torch.float16)
    return half if bool(half.isfinite().all()) else tensor.to(torch.bfloat16)


def compact(tensor: Tensor) -> Tensor:
    """An equal tensor that holds a value once where it is the same along a whole dimension, but for the first.

    >>> compact(torch.ones(2, 3, 4)).stride()
    (1, 0, 0)
    """
    kept = tensor
    for dimension in range(1, tensor.ndim):
        one = kept.narrow(dimension, 0, 1)
        if kept.shape[dimension] > 1 and bool((kept == one).all()):
            kept = one
    return kept.contiguous().expand(tensor.shape)


def held(tensor: Tensor) -> Tensor:
    """What `compact` holds of a tensor."""
    return _narrowed(tensor, [d for d in range(1, tensor.ndim) if tensor.stride(d) == 0])


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors one after the other in the first dimension; what all hold once stays so."""
    shape = tensors[0].shape[1:]
    once = [d for d in range(1, len(shape) + 1) if all(own.stride(d) == 0 for own in tensors)]
    whole = torch.cat([_narrowed(own, once) for own in tensors])
    return whole.expand(len(whole), *shape)


def _narrowed(tensor: Tensor, dimensions: Iterable[int]) -> Tensor:
    for dimension in dimensions:
        tensor = tensor.narrow(dimension, 0, 1)
    return tensor
