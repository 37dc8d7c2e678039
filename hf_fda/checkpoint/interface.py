"""What a merge needs of a checkpoint, whatever it is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor
from transformers import PretrainedConfig

from hf_fda.checkpoint.layout import ModelLayout
from hf_fda.checkpoint.location import Location
from hf_fda.lowrank import LowRank


class Checkpoint(Protocol):
    """What a merge needs of a base or a source."""

    id: str
    commit: str | None
    layout: ModelLayout
    names: tuple[str, ...]
    """In-memory names of the tensors that it really holds, in the model's order."""
    location: Location | None

    @property
    def unexpected(self) -> Sequence[str]:
        """Names in the files that the model has no place for."""
        ...

    @property
    def missing(self) -> tuple[str, ...]:
        """Names that the model has but the checkpoint does not hold."""
        ...

    @property
    def config(self) -> PretrainedConfig:
        """The model's configuration."""
        ...

    @property
    def origins(self) -> tuple[Checkpoint, ...]:
        """The checkpoints that have files, or a model in memory, of which this one is made; mostly itself."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """The stored type of a tensor."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor in memory layout."""
        ...

    def read(self, name: str, part: slice | None = None) -> Tensor:
        """One tensor on the CPU, in its stored type and memory layout; the caller may change it.

        With `part`, only these of its flattened entries, as a flat tensor.
        """
        ...

    def in_parts(self, name: str) -> bool:
        """Whether parts of a tensor, or of its task vector, are read without all of it; several threads may do that."""
        ...

    @property
    def stored(self) -> bool:
        """Whether task vectors are differences of what is read."""
        ...

    @property
    def disk_order(self) -> Sequence[str]:
        """The names in the order in which their tensors are best read."""
        ...

    def task(self, name: str, base: Tensor, part: slice | None = None) -> Tensor:
        """The task vector of one tensor.

        Args:
            name: the tensor.
            base: the base's tensor (or only `part` of its flattened entries), which is not changed.
            part: as in `read`.

        Returns:
            the difference from the base, on its device, in its type.
        """
        ...

    def may_move(self, name: str) -> bool:
        """Whether a tensor may differ from the base's; told without reading it."""
        ...

    def factors(self, name: str) -> LowRank | None:
        """A tensor's task vector as thin factors; None where it is not known as such."""
        ...

    def rank(self, name: str) -> int | None:
        """The rank of these factors, told without reading anything."""
        ...

    def fingerprint(self) -> str:
        """A hash that changes when the weights do."""
        ...


class ReadCheckpoint(ABC):
    """A checkpoint whose task vectors are differences of what is read."""

    names: tuple[str, ...]

    @property
    def origins(self) -> tuple[Checkpoint, ...]:
        """As `Checkpoint.origins`: itself."""
        return (cast(Checkpoint, self),)

    @property
    def stored(self) -> bool:
        """As `Checkpoint.stored`: they are."""
        return True

    @property
    def disk_order(self) -> Sequence[str]:
        """As `Checkpoint.disk_order`: any order is as good."""
        return self.names

    @abstractmethod
    def read(self, name: str, part: slice | None = None) -> Tensor:
        """As `Checkpoint.read`."""

    def task(self, name: str, base: Tensor, part: slice | None = None) -> Tensor:
        """As `Checkpoint.task`."""
        own = self.read(name, part)
        return own.to(base.device, torch.promote_types(own.dtype, base.dtype)).sub_(base).to(base.dtype)

    def may_move(self, name: str) -> bool:
        """As `Checkpoint.may_move`: any may."""
        return True

    def factors(self, name: str) -> LowRank | None:
        """As `Checkpoint.factors`: none is known."""
        return None

    def rank(self, name: str) -> int | None:
        """As `Checkpoint.rank`: none is known."""
        return None


def here(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint's weights are in memory or on this disk, so that reading them downloads nothing."""
    return all(own.location is None or own.location.here for own in checkpoint.origins)
