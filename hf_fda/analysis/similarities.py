"""Which sources pull a block in the same direction: cosines of their task vectors, or of their induced gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_fda.errors import InputError

PIECE = 1 << 20
"""Entries of each vector that are in float64 at a time."""


@dataclass(frozen=True)
class Similarity:
    """Cosines between K sources (K x K) and the norms of their vectors (K).

    One on the diagonal; a source that does not move has the norm zero and cosines of zero with all others, as with
    itself.
    """

    names: tuple[str, ...]
    cosines: tuple[tuple[float, ...], ...]
    norms: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean cosine of two different sources; zero where there is one only."""
        count = len(self.names)
        apart = [self.cosines[i][j] for i in range(count) for j in range(count) if i != j]
        return sum(apart) / len(apart) if apart else 0.0


def similarity(names: Sequence[str], parts: Iterable[Sequence[Tensor]]) -> Similarity:
    """The cosines of vectors that come part by part; one part of all is in memory at a time.

    >>> x, y = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])
    >>> round(similarity(["a", "b"], [(x, y)]).cosines[0][1], 6)
    0.707107

    Args:
        names: of K sources.
        parts: of every tensor, that of each of the K sources, in shapes alike.

    Raises:
        InputError: when there is no part, or an entry is not finite.
    """
    return from_gram(names, gram(parts, len(names)))


def gram(parts: Iterable[Sequence[Tensor]], count: int) -> Tensor:
    """The products of K vectors with each other, (K, K) in float64, from their parts.

    Args:
        parts: of every tensor, that of each vector.
        count: K.

    Raises:
        InputError: when there is no part, or an entry is not finite.
    """
    total, seen = torch.zeros(count, count, dtype=torch.float64), False
    for part in parts:
        for pieces in zip(*(own.detach().flatten().split(PIECE) for own in part), strict=True):
            rows = torch.stack([piece.double().cpu() for piece in pieces])
            total, seen = total + rows @ rows.T, True
    if not seen or not count:
        raise InputError("there are no vectors to compare; give the tensors of one block at least")
    if not bool(total.isfinite().all()):
        raise InputError("the vectors are not all finite numbers; check the weights for infinities or NaN")
    return total


def from_gram(names: Sequence[str], products: Tensor) -> Similarity:
    """The cosines that products of vectors with each other say.

    Args:
        names: of K sources.
        products: (K, K), as `gram` gives them.
    """
    norms = products.diagonal().clamp_min(0).sqrt()
    scale = torch.where(norms > 0, 1 / norms.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    cosines = (products * scale[:, None] * scale).clamp(-1, 1)
    return Similarity(tuple(names), tuple(map(tuple, cosines.tolist())), tuple(norms.tolist()))
