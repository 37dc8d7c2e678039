"""How far a merge moved each block, and what that bought."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from hf_fda.analysis.similarities import PIECE
from hf_fda.errors import InputError


@dataclass(frozen=True)
class Move:
    """How far a block moved: the norm of merged minus base, and that of the base, over all its tensors."""

    norm: float
    base: float

    @property
    def relative(self) -> float:
        """The move as a share of the base's norm; infinite where the base is zero and it moved."""
        if self.base == 0:
            return math.inf if self.norm else 0.0
        return self.norm / self.base


@dataclass(frozen=True)
class Bought:
    """What a block's move bought: the loss by task of the merge, and of the merge with this block as in the base."""

    merged: Mapping[str, float]
    restored: Mapping[str, float]

    @property
    def gain(self) -> Mapping[str, float]:
        """By how much the loss of each task is lower because the block moved; negative where the move harmed it."""
        return {task: self.restored[task] - own for task, own in self.merged.items()}

    @property
    def mean(self) -> float:
        """The mean gain over the tasks."""
        return sum(self.gain.values()) / len(self.gain)


def move(pairs: Iterable[Sequence[Tensor]]) -> Move:
    """How far tensors moved, in float64; one pair is in memory at a time.

    >>> import torch
    >>> move([(torch.tensor([3.0]), torch.tensor([3.0])), (torch.tensor([4.0]), torch.tensor([1.0]))])
    Move(norm=3.0, base=5.0)

    Args:
        pairs: of each tensor the base's and the merged one, in shapes alike.

    Raises:
        InputError: when there is none, or an entry is not finite.
    """
    moved, whole, seen = 0.0, 0.0, False
    for base, merged in pairs:
        pieces = zip(*(own.detach().flatten().split(PIECE) for own in (base, merged)), strict=True)
        for before, after in ((one.double().cpu(), other.double().cpu()) for one, other in pieces):
            moved += float((after - before).square().sum())
            whole += float(before.square().sum())
        seen = True
    if not seen:
        raise InputError("the block has no tensors to compare")
    if not math.isfinite(moved + whole):
        raise InputError("base or merged weights are not all finite numbers; check both for infinities or NaN")
    return Move(math.sqrt(moved), math.sqrt(whole))
