"""The singular values of anchors: how fast they fall, and over how many directions they spread."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_fda.analysis.matrices import as_matrix
from hf_fda.errors import InputError

FIRST_RANK = 2
"""Where the tail starts, counted from 1: the largest value is mostly the vectors' common mean."""

TAIL_SHARE = 0.5
"""Where it ends, as a share of the rank: the smallest values of few vectors fall off whatever they are drawn from."""


@dataclass(frozen=True)
class Tail:
    """A power law ``sigma_i ~ i^-exponent`` through singular values: the slope of a least-squares line of log sigma_i
    over log i, ranks `first` to `last` (counted from 1, both with it). `fit` is the line's share of the variance of
    log sigma_i (R squared): near one, the values do follow a power law."""

    exponent: float
    first: int
    last: int
    fit: float


@dataclass(frozen=True)
class Spectrum:
    """Singular values of a matrix of vectors (N, d), falling.

    `effective_rank` is the exponential of the entropy of ``sigma_i / sum sigma`` (Roy and Vetterli, EUSIPCO 2007, The
    effective rank): from one to the number of values. `tail` is None where fewer than three values are in its range.
    """

    values: tuple[float, ...]
    effective_rank: float
    tail: Tail | None

    @property
    def shares(self) -> tuple[float, ...]:
        """The values as shares of the largest."""
        largest = self.values[0] or 1.0
        return tuple(value / largest for value in self.values)


def spectrum(vectors: Tensor, centred: bool = False, ranks: tuple[int, int] | None = None) -> Spectrum:
    """The singular values of vectors, in float64.

    >>> spectrum(torch.diag(torch.tensor([4.0, 2.0, 1.0]))).values
    (4.0, 2.0, 1.0)

    Args:
        vectors: (..., d), such as anchors (n, T, d).
        centred: of the vectors less their mean.
        ranks: first and last rank of the tail, counted from 1; None: from the second to half of the numerical rank.

    Raises:
        InputError: when the vectors cannot be used, or the ranks are none of theirs.
    """
    values = torch.linalg.svdvals(as_matrix(vectors, centred=centred))
    listed = tuple(values.tolist())
    rank = _rank(listed, max(vectors.shape[-1], vectors.numel() // vectors.shape[-1]))
    first, last = ranks or (FIRST_RANK, int(TAIL_SHARE * rank))
    if ranks is not None and not 1 <= first < last <= rank:
        raise InputError(f"ranks {first} to {last} are not among the {rank} values that are not zero; choose others")
    return Spectrum(listed, effective_rank(listed), tail(listed, first, last) if last >= first + 2 else None)


def effective_rank(values: Sequence[float]) -> float:
    """The exponential of the entropy of values as shares of their sum; zero where all are zero.

    >>> round(effective_rank([1.0, 1.0, 1.0, 0.0]), 6)
    3.0

    Args:
        values: none negative.
    """
    total = math.fsum(values)
    shares = [value / total for value in values if value > 0] if total > 0 else []
    return math.exp(-math.fsum(share * math.log(share) for share in shares)) if shares else 0.0


def tail(values: Sequence[float], first: int, last: int) -> Tail:
    """The power law through values of some ranks.

    >>> round(tail([1.0, 1 / 2, 1 / 3, 1 / 4], 1, 4).exponent, 6)
    1.0

    Args:
        values: falling, positive in the range.
        first: rank it starts at, counted from 1.
        last: rank it ends at.
    """
    x = torch.arange(first, last + 1, dtype=torch.float64).log()
    y = torch.tensor(values[first - 1 : last], dtype=torch.float64).log()
    x, y = x - x.mean(), y - y.mean()
    slope = float((x @ y) / (x @ x))
    spread = float(y @ y)
    fit = slope**2 * float(x @ x) / spread if spread > 0 else 1.0
    return Tail(-slope, first, last, fit)


def _rank(values: Sequence[float], size: int) -> int:
    """How many singular values are more than rounding."""
    floor = values[0] * size * torch.finfo(torch.float64).eps
    return sum(value > floor for value in values)
