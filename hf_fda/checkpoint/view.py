"""Checkpoints that read their tensors from another: as they are, with each place of a tied tensor as one of its own, or
with the rows of its vocabulary elsewhere."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from math import prod

import torch
from torch import Tensor
from transformers import PretrainedConfig

from hf_fda.checkpoint.interface import Checkpoint, ReadCheckpoint
from hf_fda.checkpoint.layout import ModelLayout
from hf_fda.checkpoint.location import Location
from hf_fda.lowrank import LowRank

GiveRows = Callable[[str, Tensor], Tensor]
"""From a tensor's name and row numbers (n,) of the view to these rows (n, ...)."""


class View(ReadCheckpoint):
    """A checkpoint that reads its tensors from another one. Its task vectors are differences of what is read.

    Args:
        origin: the other.
    """

    def __init__(self, origin: Checkpoint) -> None:
        self.origin = origin
        self.id, self.commit = origin.id, origin.commit
        self.location: Location | None = origin.location
        self.layout, self.names = origin.layout, origin.names
        self.unexpected: Sequence[str] = origin.unexpected

    @property
    def missing(self) -> tuple[str, ...]:
        """Names that the model has but the checkpoint does not hold."""
        return self.origin.missing

    @property
    def config(self) -> PretrainedConfig:
        """The model's configuration."""
        return self.layout.config

    @property
    def origins(self) -> tuple[Checkpoint, ...]:
        """As `Checkpoint.origins`."""
        return self.origin.origins

    def dtype(self, name: str) -> torch.dtype:
        """The stored type of a tensor."""
        return self.origin.dtype(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor in memory layout."""
        return self.origin.shape(name)

    def read(self, name: str, part: slice | None = None) -> Tensor:
        """One tensor on the CPU, as `Checkpoint.read`."""
        return self.origin.read(name, part)

    def in_parts(self, name: str) -> bool:
        """As `Checkpoint.in_parts`."""
        return self.origin.in_parts(name)

    @property
    def disk_order(self) -> Sequence[str]:
        """As `Checkpoint.disk_order`."""
        return self.origin.disk_order

    def fingerprint(self) -> str:
        """A hash that changes when the weights do."""
        return hashlib.sha256(f"{type(self).__name__} {self.origin.fingerprint()}".encode()).hexdigest()


class Untied(View):
    """A checkpoint in which each place of a tied tensor has one of its own, for changes that are not the same in all.

    Args:
        origin: the checkpoint.
    """

    def __init__(self, origin: Checkpoint) -> None:
        super().__init__(origin)
        self.layout = origin.layout.untied()
        self._stored = {place: name for name in origin.names for place in origin.layout.places(name)}
        self.names = tuple(self._stored)

    def dtype(self, name: str) -> torch.dtype:
        """The stored type of a tensor."""
        return self.origin.dtype(self._stored[name])

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor in memory layout."""
        return self.origin.shape(self._stored[name])

    def read(self, name: str, part: slice | None = None) -> Tensor:
        """One tensor on the CPU, as `Checkpoint.read`."""
        return self.origin.read(self._stored[name], part)

    def in_parts(self, name: str) -> bool:
        """As `Checkpoint.in_parts`."""
        return self.origin.in_parts(self._stored[name])

    @property
    def disk_order(self) -> Sequence[str]:
        """As `Checkpoint.disk_order`: the places of a tensor follow each other."""
        return [place for name in self.origin.disk_order for place in self.origin.layout.places(name)]


class RowView(View):
    """A checkpoint whose vocabulary tensors are read row by row through a map; all else passes through.

    Args:
        origin: the checkpoint.
        layout: the same model with the view's number of rows.
        axes: the vocabulary tensors, and which of their axes counts tokens.
        rows: (rows of the view,) for each the checkpoint's own row, or -1 where it has none.
        give: the rows that the checkpoint does not have.
    """

    def __init__(
        self, origin: Checkpoint, layout: ModelLayout, axes: Mapping[str, int], rows: Tensor, give: GiveRows
    ) -> None:
        super().__init__(origin)
        self.layout = layout
        self._axes, self._rows, self._give = dict(axes), rows, give

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor: of a vocabulary tensor with the view's rows, of another as it is."""
        return self.layout.shapes[name] if name in self._axes else self.origin.shape(name)

    def read(self, name: str, part: slice | None = None) -> Tensor:
        """One tensor on the CPU, as `Checkpoint.read`."""
        if name not in self._axes:
            return self.origin.read(name, part)
        shape = self.shape(name)
        if self._axes[name] != 0:
            whole = self._turned(name)
            return whole if part is None else whole.flatten()[part]
        if part is None:
            return self._between(name, 0, shape[0])
        first, last, _ = part.indices(prod(shape))
        width = prod(shape[1:])
        start = first // width
        entries = self._between(name, start, -(-last // width)).flatten()
        return entries[first - start * width : last - start * width]

    def in_parts(self, name: str) -> bool:
        """As `Checkpoint.in_parts`: row by row where the checkpoint is."""
        return self._axes.get(name, 0) == 0 and self.origin.in_parts(name)

    @property
    def stored(self) -> bool:
        """As `Checkpoint.stored`."""
        return self.origin.stored

    def task(self, name: str, base: Tensor, part: slice | None = None) -> Tensor:
        """As `Checkpoint.task`."""
        return super().task(name, base, part) if name in self._axes else self.origin.task(name, base, part)

    def may_move(self, name: str) -> bool:
        """As `Checkpoint.may_move`: any vocabulary tensor may, as its rows are others."""
        return name in self._axes or self.origin.may_move(name)

    def factors(self, name: str) -> LowRank | None:
        """As `Checkpoint.factors`: none is known of a vocabulary tensor."""
        return None if name in self._axes else self.origin.factors(name)

    def rank(self, name: str) -> int | None:
        """As `Checkpoint.rank`: none is known of a vocabulary tensor."""
        return None if name in self._axes else self.origin.rank(name)

    def fingerprint(self) -> str:
        """A hash that changes when the checkpoint's own weights do; what the rows mean is not in it."""
        return self.origin.fingerprint()

    def _between(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of a vocabulary tensor whose first axis counts tokens."""
        width = self.shape(name)[1:]
        rows = self._rows[start:stop]
        stretches = [(place, read_rows(self.origin, name, own, count)) for place, own, count in runs(rows)]
        dtype = stretches[0][1].dtype if stretches else self.dtype(name)  # an adapter reads in more than is stored
        found = torch.empty((len(rows), *width), dtype=dtype)
        for place, stretch in stretches:
            found[place : place + len(stretch)] = stretch
        lacking = (rows < 0).nonzero().flatten()
        if len(lacking):
            found[lacking] = self._give(name, lacking + start).to(found.dtype)
        return found

    def _turned(self, name: str) -> Tensor:
        """A vocabulary tensor with the tokens on another axis than the first, which are small."""
        axis = self._axes[name]
        own = self.origin.read(name).movedim(axis, 0)
        found = own[self._rows.clamp(min=0)]
        lacking = (self._rows < 0).nonzero().flatten()
        if len(lacking):
            found[lacking] = self._give(name, lacking).to(found.dtype)
        return found.movedim(0, axis).contiguous()


def runs(rows: Tensor) -> list[tuple[int, int, int]]:
    """Row numbers as stretches that lie beside each other: place, first row and length; those below 0 are left out.

    >>> runs(torch.tensor([4, 5, -1, 0, 1, 2]))
    [(0, 4, 2), (3, 0, 3)]
    """
    if not len(rows):
        return []
    breaks = (rows[1:] != rows[:-1] + 1) | (rows[1:] < 0) | (rows[:-1] < 0)
    starts = [0, *(breaks.nonzero().flatten() + 1).tolist()]
    ends = [*starts[1:], len(rows)]
    firsts = rows[torch.tensor(starts)].tolist()
    stretches = zip(starts, firsts, ends, strict=True)
    return [(start, first, end - start) for start, first, end in stretches if first >= 0]


def read_rows(checkpoint: Checkpoint, name: str, first: int, count: int) -> Tensor:
    """Some rows (count, ...) of a tensor whose first axis counts them; no other row is read."""
    shape = checkpoint.shape(name)
    width = prod(shape[1:])
    return checkpoint.read(name, slice(first * width, (first + count) * width)).view(count, *shape[1:])
