"""How far the leading singular directions of the sources' task vectors coincide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_fda.checkpoint.alignment import AlignedSource
from hf_fda.inputs import Inputs
from hf_fda.lowrank import LowRank, leading_spectrum, spectrum

MATRICES = 12
"""Matrices that are looked at, evenly spread over those that all sources move."""

COUNT = 16
"""Leading directions of a matrix, at most a quarter of what it has."""

NEGLIGIBLE = 1e-6
"""Singular values below this fraction of the largest have no direction of their own in float32."""

Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Directions:
    """How far the leading singular subspaces of K sources coincide.

    `shared` (K x K) is the mean squared cosine of their principal angles, over `matrices` matrices, over outputs and
    inputs; `chance` is what random subspaces of these sizes would have.
    """

    shared: Matrix
    chance: float
    matrices: int


@dataclass(frozen=True)
class Leading:
    """Orthonormal leading directions of one matrix: outputs (d_out, k) and inputs (d_in, k)."""

    outputs: Tensor
    inputs: Tensor


def compare(inputs: Inputs, names: Sequence[str]) -> Directions | None:
    """Compare the sources' leading directions; one matrix of one source is in memory at a time.

    Args:
        inputs: base and sources.
        names: the base's names of tensors, of which matrices are chosen.

    Returns:
        None where there is no matrix that all sources move.
    """
    count = len(inputs.moving)
    shared, chance, seen = torch.zeros(count, count, dtype=torch.float64), 0.0, 0
    for name in _chosen(inputs, names):
        found = [_of_source(inputs, source, name) for source in inputs.moving]
        known = [own for own in found if own is not None]
        if len(known) < count:
            continue
        seen += 1
        shared += torch.tensor([[coincidence(one, other) for other in known] for one in known], dtype=torch.float64)
        widest = max(own.outputs.shape[1] for own in known)
        chance += sum(widest / own.shape[0] for own in (known[0].outputs, known[0].inputs)) / 2
    return Directions(plain(shared / seen), chance / seen, seen) if seen else None


def coincidence(one: Leading, other: Leading) -> float:
    """The mean squared cosine of the principal angles of two pairs of subspaces: 1 where one lies in the other."""
    sides = ((one.outputs, other.outputs), (one.inputs, other.inputs))
    return sum(float((a.mT @ b).square().sum()) / min(a.shape[1], b.shape[1]) for a, b in sides) / 2


def leading(task: LowRank | Tensor, count: int) -> Leading | None:
    """The leading singular directions of a task matrix; None where it is zero.

    Args:
        task: (d_out, d_in), dense or in thin factors.
        count: how many directions, at most.
    """
    found = spectrum(task) if isinstance(task, LowRank) else leading_spectrum(task, count)
    u, s, vh = found.u, found.s, found.vh
    kept = min(count, int((s > NEGLIGIBLE * s[0]).sum())) if s[0] > 0 else 0
    return Leading(u[:, :kept], vh[:kept].mT) if kept else None


def _of_source(inputs: Inputs, source: AlignedSource, name: str) -> Leading | None:
    """The leading directions of a source in one matrix of the base."""
    shape = inputs.base.shape(name)
    count = max(1, min(COUNT, min(shape) // 4))
    thin = source.factors(name)
    if thin is not None:
        return leading(thin.to("cpu", torch.float32), count)
    return leading(source.task(name, inputs.base.read(name).float()), count)


def _chosen(inputs: Inputs, names: Sequence[str]) -> list[str]:
    """Some weights of linear layers that all sources may move, evenly spread."""
    roles = inputs.base.layout.roles
    found = [
        name
        for name in names
        if roles[name] in ("linear", "conv1d") and all(source.may_move(name) for source in inputs.moving)
    ]
    return [found[number * len(found) // MATRICES] for number in range(MATRICES)] if len(found) > MATRICES else found


def plain(matrix: Tensor) -> Matrix:
    """A matrix as plain numbers."""
    return tuple(tuple(row) for row in matrix.tolist())
