"""What task vectors have in common, read part by part: norms, angles, signs, leading directions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from hf_fda.advising.directions import Directions, Matrix, compare, plain
from hf_fda.analysis.similarities import from_gram
from hf_fda.inputs import Inputs
from hf_fda.streaming.taskvectors import StoredPart, TaskVectors
from hf_fda.streaming.tensorwise import parts_of

LIMIT = 2**27
"""Entries of each model that are read at most; of larger models parts that lie evenly spread."""


@dataclass(frozen=True)
class Overlap:
    """What the task vectors of K sources have in common. Matrices are K x K, in the order of `names`.

    `norms` are of the task vectors in what was read, `relative` the same as a fraction of the base's there. `cosines`
    are between them, 0 where one is zero. `conflicts` is the share of the entries that both sources move in which they
    do so in opposite directions. `directions` is None where no matrix was moved by all. `read` is the share of all
    entries that was looked at.
    """

    names: tuple[str, ...]
    norms: tuple[float, ...]
    relative: tuple[float, ...]
    cosines: Matrix
    conflicts: Matrix
    directions: Directions | None
    read: float

    @property
    def ratio(self) -> float:
        """The largest norm by the smallest; infinite where one is zero."""
        return max(self.norms) / min(self.norms) if min(self.norms) else math.inf


class Sums:
    """Sums over entries from which norms, cosines and conflicts follow; sums of parts add up.

    Args:
        count: K, the number of sources.
    """

    def __init__(self, count: int) -> None:
        self.base = 0.0
        self.products, self.both, self.signs = (torch.zeros(count, count, dtype=torch.float64) for _ in range(3))

    def add(self, base: Tensor, tasks: Tensor) -> None:
        """Add a part.

        Args:
            base: (n,) theta_0, float64.
            tasks: (K, n) task vectors, float64.
        """
        signs = tasks.sign()
        moved = signs.abs()
        self.base += float(base.square().sum())
        self.products += tasks @ tasks.T
        self.both += moved @ moved.T
        self.signs += signs @ signs.T

    def conflicts(self) -> Matrix:
        """Share of the entries that both move in which the signs differ; 0 where there are none."""
        return plain((self.both - self.signs) / 2 / self.both.clamp_min(1))


def measure(inputs: Inputs, names: Sequence[str], limit: int = LIMIT) -> Overlap:
    """Compare the task vectors of the sources that have any, in bounded memory: a part of a tensor of all models, then
    a matrix of one source at a time.

    Args:
        inputs: base and sources.
        names: the base's names of the tensors to look at.
        limit: entries of each model that are read at most, as near as whole parts allow.
    """
    sources, vectors = inputs.moving, TaskVectors(inputs, torch.device("cpu"))
    total = sum(prod(inputs.base.shape(name)) for name in names)
    moved = [name for name in names if vectors.may_move(name)]
    sums, read = Sums(len(sources)), 0
    for name, part in sampled_parts(vectors, moved, limit):
        _add(sums, vectors.stored(name, part))
        read += part.stop - part.start
    still = sum(prod(inputs.base.shape(name)) for name in names if name not in set(moved))
    alike, base = from_gram([source.name for source in sources], sums.products), math.sqrt(sums.base)
    directions = compare(inputs, moved)
    return Overlap(
        names=alike.names,
        norms=alike.norms,
        relative=tuple(norm / base if base else 0.0 for norm in alike.norms),
        cosines=alike.cosines,
        conflicts=sums.conflicts(),
        directions=directions,
        read=(read + still) / total if total else 1.0,
    )


def _add(sums: Sums, stored: StoredPart) -> None:
    """Add what was read of a tensor."""
    for block in stored.blocks():
        rows = stored.rows(block, torch.device("cpu"), torch.float64)
        sums.add(rows[0], rows[1:])


def sampled_parts(vectors: TaskVectors, names: Iterable[str], limit: int) -> Iterator[tuple[str, slice]]:
    """Parts of tensors, evenly spread, with about `limit` entries in all: every part where all tensors have fewer.

    A tensor that can only be read whole is one part.
    """
    sizes = {name: prod(vectors.base.shape(name)) for name in names}
    share = min(1.0, limit / max(1, sum(sizes.values())))
    due = 0.0
    for name, size in sizes.items():
        for part in parts_of(size) if vectors.in_parts(name) else [slice(0, size)]:
            due += share * (part.stop - part.start)
            if due >= (part.stop - part.start) / 2:
                due -= part.stop - part.start
                yield name, part
