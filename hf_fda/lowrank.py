"""Products of two thin factors in place of dense matrices, and what can be done to them without building these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_fda.errors import InputError


@dataclass(frozen=True)
class LowRank:
    """A tensor that is the product of two factors.

    Args:
        left: (..., m, r).
        right: (..., r, n).
        shape: of the tensor: (..., m, n), or what that is a view of (a convolution's (m, c, h, w) with n = c h w).

    >>> LowRank(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0]]), (2, 2)).dense()
    tensor([[3., 4.],
            [6., 8.]])
    """

    left: Tensor
    right: Tensor
    shape: tuple[int, ...]

    @property
    def rank(self) -> int:
        """Number of columns of `left`: the product's rank at most."""
        return self.left.shape[-1]

    def dense(self) -> Tensor:
        """The tensor itself."""
        return (self.left @ self.right).reshape(self.shape)

    def part(self, entries: slice) -> Tensor:
        """Some of the flattened entries; of a matrix only their rows are built.

        Args:
            entries: start and stop, no step.
        """
        if self.left.ndim > 2:
            return self.dense().flatten()[entries]
        width = self.right.shape[1]
        first, last = entries.start // width, -(-entries.stop // width)
        rows = (self.left[first:last] @ self.right).flatten()
        return rows[entries.start - first * width : entries.stop - first * width]

    def to(self, device: torch.device | str, dtype: torch.dtype) -> LowRank:
        """The same on another device, in another type."""
        return LowRank(self.left.to(device, dtype), self.right.to(device, dtype), self.shape)

    def from_zero(self) -> LowRank:
        """A product that is zero, and may become anything with this one's right factor."""
        return LowRank(torch.zeros_like(self.left), self.right, self.shape)

    def scaled(self, factor: float) -> LowRank:
        """The tensor times a number."""
        return LowRank(self.left * factor, self.right, self.shape)


def add(parts: Sequence[LowRank]) -> LowRank:
    """The exact sum of tensors of one shape: their factors beside each other, so that ranks add up."""
    return LowRank(
        torch.cat([part.left for part in parts], dim=-1),
        torch.cat([part.right for part in parts], dim=-2),
        parts[0].shape,
    )


@dataclass(frozen=True)
class Spectrum:
    """A singular value decomposition: u (..., m, r) and vh (..., r, n) orthonormal, s (..., r) falling."""

    u: Tensor
    s: Tensor
    vh: Tensor
    shape: tuple[int, ...]

    def truncated(self, rank: int) -> LowRank:
        """The nearest tensor of a rank, in the Frobenius norm; both factors carry the roots of the values."""
        root = self.s[..., :rank].sqrt()
        return LowRank(self.u[..., :rank] * root[..., None, :], root[..., :, None] * self.vh[..., :rank, :], self.shape)

    def error(self, rank: int) -> float:
        """The Frobenius norm of what a truncation leaves out, as a fraction of the whole's."""
        whole = float(self.s.square().sum())
        return (float(self.s[..., rank:].square().sum()) / whole) ** 0.5 if whole else 0.0

    def rank_for(self, energy: float) -> int:
        """The least rank that keeps a fraction of the sum of squared singular values (in every matrix of a stack)."""
        squares = self.s.double().square()
        kept = squares.cumsum(-1) / squares.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        lacking = (kept < energy * (1 - 1e-12)).sum(-1)
        return min(int(lacking.max()) + 1, self.s.shape[-1])

    def numerical_rank(self) -> int:
        """The least rank that leaves out no more than rounding does (of the matrix of a stack that needs most).

        What is left out counts together: many small values, each of which might be rounding, may be none in sum.
        """
        left_out = self.s.double().square().flip(-1).cumsum(-1).flip(-1).sqrt()
        return int((left_out > left_out[..., :1] * 32 * torch.finfo(self.s.dtype).eps).sum(-1).max())


def spectrum(factors: LowRank) -> Spectrum:
    """The singular value decomposition of a product, from QR of its factors and the small core between them.

    Nothing of the product's own size is built: with rank r it costs O((m + n) r^2).
    """
    q_left, r_left = torch.linalg.qr(factors.left)
    q_right, r_right = torch.linalg.qr(factors.right.mT)
    u, s, vh = torch.linalg.svd(r_left @ r_right.mT, full_matrices=False)
    return Spectrum(q_left @ u, s, vh @ q_right.mT, factors.shape)


@dataclass(frozen=True)
class Budget:
    """How large an adapter's factors may be: a rank, a fraction of the squared norm to keep, or exact."""

    rank: int | None = None
    energy: float | None = None

    @classmethod
    def checked(cls, rank: Any, energy: Any) -> Budget:
        """A budget from what a user says.

        Raises:
            InputError: when the rank is no whole number from 1 up, or the energy no fraction.
        """
        if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
            raise InputError(f"rank must be a whole number, at least 1, or None for an exact adapter; not {rank!r}")
        if energy is not None:
            number = isinstance(energy, (int, float)) and not isinstance(energy, bool)
            if not number or not 0 < energy <= 1:
                raise InputError(f"energy must be a fraction above 0, at most 1; not {energy!r}")
        return cls(rank, None if energy is None else float(energy))


@dataclass(frozen=True)
class Factored:
    """A tensor in two factors, and the Frobenius norm of what they leave out, as a fraction of the tensor's."""

    product: LowRank
    error: float
    norm: float


def kept(product: LowRank) -> Factored:
    """A product as it is."""
    left, right = product.left.double(), product.right.double()
    squared = ((left.mT @ left) * (right @ right.mT)).sum()
    return Factored(product, 0.0, float(squared.clamp_min(0)) ** 0.5)


RANDOMISED = 1024
"""A dense matrix whose smaller side is longer is decomposed by random projection where little of it is kept."""


SPARE, PASSES = 10, 4
"""Random directions beyond those that are sought, and passes of subspace iteration."""


def factorise(tensor: LowRank | Tensor, budget: Budget, limit: int) -> Factored:
    """The nearest product of thin factors within a budget.

    Thin factors are never multiplied out. Exact ones (no rank, no energy) lose only directions that are zero but for
    rounding.

    Args:
        tensor: a product, or a dense tensor of two dimensions, or more that count as one (a convolution's).
        budget: how much may be kept.
        limit: ranks above this are cut where no rank is given.
    """
    if isinstance(tensor, LowRank):
        found = spectrum(tensor)
    else:
        matrix = tensor.flatten(1) if tensor.ndim == 4 else tensor
        kept = min(budget.rank or limit, limit)
        if min(matrix.shape[-2:]) > RANDOMISED and 4 * kept < min(matrix.shape[-2:]):
            return _randomised(matrix, tensor.shape, budget, kept)
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        found = Spectrum(u, s, vh, tuple(tensor.shape))
    rank = min(budget.rank or limit, limit, max(1, found.numerical_rank()))
    if budget.energy is not None:
        rank = min(rank, found.rank_for(budget.energy))
    return Factored(found.truncated(rank), found.error(rank), float(found.s.square().sum()) ** 0.5)


def leading_spectrum(matrix: Tensor, count: int, shape: Sequence[int] | None = None) -> Spectrum:
    """The leading singular directions of a dense matrix, and a few more that are less exact: by subspace iteration from
    random directions, which are the same each time (Halko et al., arXiv 0909.4061).

    Args:
        matrix: (..., d_out, d_in).
        count: how many are wanted.
        shape: of the tensor that the matrix is; None: its own.
    """
    generator = torch.Generator(matrix.device).manual_seed(0)
    size = (*matrix.shape[:-2], matrix.shape[-1], min(count + SPARE, min(matrix.shape[-2:])))
    basis = torch.randn(size, generator=generator, device=matrix.device, dtype=matrix.dtype)
    left = torch.linalg.qr(matrix @ basis)[0]
    for _ in range(PASSES):
        left = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ left)[0])[0]
    u, s, vh = torch.linalg.svd(left.mT @ matrix, full_matrices=False)
    return Spectrum(left @ u, s, vh, tuple(matrix.shape if shape is None else shape))


def _randomised(matrix: Tensor, shape: Sequence[int], budget: Budget, kept: int) -> Factored:
    """The nearest product of a large matrix by the random way."""
    found = leading_spectrum(matrix, kept, shape)
    s = found.s
    of_each = matrix.square().sum((-2, -1), keepdim=True).squeeze(-1).double()
    whole, rank = float(of_each.sum()), kept
    if budget.energy is not None:
        share = s.double().square().cumsum(-1) / of_each.clamp_min(torch.finfo(torch.float64).tiny)
        rank = min(kept, int((share < budget.energy).sum(-1).max()) + 1)
    error = max(whole - float(s[..., :rank].square().sum()), 0.0)
    return Factored(found.truncated(rank), (error / whole) ** 0.5 if whole else 0.0, whole**0.5)
