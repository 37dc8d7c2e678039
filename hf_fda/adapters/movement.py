"""What the sources of a merge may change of each tensor, and how thinly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hf_fda.adapters.checkpoint import AdapterCheckpoint, adapter_of
from hf_fda.blocks import Unit
from hf_fda.checkpoint.alignment import AlignedSource
from hf_fda.inputs import Inputs


@dataclass(frozen=True)
class Movement:
    """The changes of a merge, by the base's names of tensors.

    `unseen` are the tensors of units that sources without weights have: adaptation to their anchors may change them in
    every direction.
    """

    inputs: Inputs
    unseen: frozenset[str]

    @classmethod
    def of(cls, inputs: Inputs, units: Sequence[Unit]) -> Movement:
        """The changes of a merge of these units."""
        without = [source for source in inputs.sources if source.weights is None]
        names = (name for unit in units if any(source.has(unit) for source in without) for name in unit.tensors)
        return cls(inputs, frozenset(names))

    def sources(self, name: str) -> list[AlignedSource]:
        """The sources with weights that may change a tensor."""
        return [source for source in self.inputs.moving if source.may_move(name)]

    def any(self, name: str) -> bool:
        """Whether a tensor may change."""
        return name in self.unseen or bool(self.sources(name))

    def limit(self, name: str) -> int:
        """The sum of the ranks of what the sources do to a tensor; its own where one of them is dense."""
        full = full_rank(self.inputs.base.shape(name))
        ranks = [source.rank(name) for source in self.sources(name)]
        if name in self.unseen or None in ranks:
            return full
        return min(sum(rank for rank in ranks if rank is not None), full)

    def thin(self, name: str) -> bool:
        """Whether every change of a tensor is by thin factors."""
        return name not in self.unseen and all(source.rank(name) is not None for source in self.sources(name))

    def tuned(self, name: str) -> bool:
        """Whether anything but adapters changes a tensor."""
        return name in self.unseen or any(adapter_of(source.checkpoint) is None for source in self.sources(name))

    def replaced(self, name: str) -> bool:
        """Whether every source that changes a tensor is an adapter that brings it whole."""
        return name not in self.unseen and all(
            isinstance(source.checkpoint, AdapterCheckpoint) and source.checkpoint.replaces(source.tensor_of[name])
            for source in self.sources(name)
        )


def full_rank(shape: tuple[int, ...]) -> int:
    """The rank that a tensor's factors never exceed; of a stack, that of each of its matrices.

    >>> full_rank((4, 3, 2))
    2
    """
    return min(shape[-2:]) if len(shape) == 3 else min(shape[0], torch.Size(shape[1:]).numel())
