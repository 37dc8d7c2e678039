"""Pure functions on tensors that several merge methods share. Nothing here knows about models or files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hf_fda.selection import cut_for, equal, keep


def weighted(tensors: Sequence[Tensor], weights: Sequence[float] | None) -> list[Tensor]:
    """Each tensor times its own weight; the tensors themselves where it is one, or when there are no weights.

    Args:
        tensors: K tensors of one shape.
        weights: K factors, or None for all ones.
    """
    if weights is None:
        return list(tensors)
    return [tensor if weight == 1 else tensor * weight for tensor, weight in zip(tensors, weights, strict=True)]


def total(tensors: Iterable[Tensor]) -> Tensor:
    """Sum of K tensors of one shape, added in order without stacking them."""
    rest = iter(tensors)
    result = next(rest).clone()
    for tensor in rest:
        result += tensor
    return result


def mean(tensors: Sequence[Tensor]) -> Tensor:
    """Mean of K tensors of one shape."""
    return total(tensors) / len(tensors)


def trim(tensor: Tensor, density: float, outliers: float = 0.0) -> Tensor:
    """A tensor of which the largest entries by magnitude stay, and all others are zero.

    ``floor(density * n)`` stay, but one at least; only where the density is zero none does.

    Of entries that tie at the border the first ones stay. Magnitudes are compared in float32.

    Args:
        tensor: any shape.
        density: fraction of entries to keep.
        outliers: fraction of entries, the very largest, that go too; fewer where the density needs them.
    """
    entries = tensor.numel()
    kept = max(1, int(density * entries)) if density > 0 else 0
    if kept >= entries:
        return tensor
    left_out = min(int(outliers * entries), entries - kept)
    if left_out:
        positions = tensor.abs().flatten().topk(kept + left_out).indices[left_out:]
        result = torch.zeros_like(tensor).flatten()
        result[positions] = tensor.flatten()[positions]
        return result.view_as(tensor)
    if not kept:
        return torch.zeros_like(tensor)
    flat = tensor.to(torch.float32).reshape(-1)
    result = keep(flat, cut_for(flat, kept)).view(tensor.shape)
    return result if tensor.dtype == torch.float32 else tensor * (result != 0)


def drop(tensor: Tensor, density: float, generator: torch.Generator, rescale: bool = True) -> Tensor:
    """A tensor of which each entry stays with a probability, and is zero else.

    One random byte an entry decides, and where it falls on the border (one entry in 256) 32 bits more do: the
    probability is exact to 2^-40.

    Args:
        tensor: any shape.
        density: the probability.
        generator: on the CPU; the same entries stay on any device.
        rescale: divide what stays by the probability, which keeps the expectation.
    """
    if density in (0.0, 1.0):
        return tensor * density
    border, beyond = divmod(density * 256, 1)
    drawn = random_bytes(tensor.numel(), generator)
    kept = drawn.to(torch.float32).lt_(border)
    undecided = equal(drawn, int(border))
    further = torch.empty(len(undecided), dtype=torch.int64).random_(2**32, generator=generator)
    kept[undecided] = (further < beyond * 2**32).to(torch.float32)
    result = kept.to(tensor.device).view(tensor.shape) * tensor
    return result.div_(density) if rescale else result


def random_bytes(count: int, generator: torch.Generator) -> Tensor:
    """So many random bytes on the CPU, drawn eight at a time."""
    words = torch.empty(-(-count // 8), dtype=torch.int64)
    return words.random_(-(2**63), None, generator=generator).view(torch.uint8)[:count]


def of_same_sum(part: Tensor, whole: Tensor) -> Tensor:
    """`part` times the factor that gives its magnitudes the sum that those of `whole` have."""
    there, wanted = part.abs().sum(), whole.abs().sum()
    return part * (wanted / torch.where(there > 0, there, 1.0))


def agreement(tensors: Sequence[Tensor], method: str) -> list[Tensor]:
    """Which entries of each tensor have the elected sign.

    Args:
        tensors: K tensors of one shape.
        method: the elected sign is that of the "total" of the entries, or that of most of them ("frequency"); plus
            where they are even.

    Returns:
        K tensors of true and false. An entry that is zero has no sign.
    """
    election = total(tensors) if method == "total" else total(tensor.sign() for tensor in tensors)
    elected = torch.where(election >= 0, 1.0, -1.0).to(election.dtype)
    return [tensor.sign() == elected for tensor in tensors]


def sum_where(
    tensors: Sequence[Tensor], weights: Sequence[float | Tensor], chosen: Sequence[Tensor], normalize: bool
) -> Tensor:
    """The sum of chosen entries, divided by the sum of their sources' weights.

    Args:
        tensors: K tensors of one shape, times their weights.
        weights: K factors.
        chosen: K tensors of true and false.
        normalize: divide.
    """
    summed = total(tensor * own for tensor, own in zip(tensors, chosen, strict=True))
    if not normalize:
        return summed
    share = total(own.to(summed.dtype) * weight for own, weight in zip(chosen, weights, strict=True))
    return summed / torch.where(share == 0, 1.0, share)


def agreeing_mean(tensors: Sequence[Tensor], weights: Sequence[float], method: str, normalize: bool) -> Tensor:
    """The sum of the entries whose sign is the elected one, divided by the sum of their sources' weights.

    Args:
        tensors: K tensors of one shape, times their weights.
        weights: K factors.
        method: of election, as of `agreement`.
        normalize: divide.
    """
    election = total(tensors) if method == "total" else total([tensor.sign() for tensor in tensors])
    elected = election.ge_(0).mul_(2).sub_(1)
    agreeing = [(tensor * elected).relu_() for tensor in tensors]  # what disagrees is zero
    summed = total(agreeing).mul_(elected)
    if not normalize:
        return summed
    share = total([own.sign_().mul_(weight) for own, weight in zip(agreeing, weights, strict=True)])
    return summed.div_(share.add_(share.clone().eq_(0)))


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin singular value decomposition ``matrix = U diag(S) Vh``.

    Args:
        matrix: (d_out, d_in).

    Returns:
        U (d_out, r), S (r,) in falling order, Vh (r, d_in), with r = min(d_out, d_in).
    """
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u, s, vh


def numerical_rank(values: Tensor, shape: Sequence[int]) -> int:
    """How many singular values stand above rounding; those below have no directions of their own.

    Args:
        values: (r,), in falling order.
        shape: of the matrix that they belong to.
    """
    floor = values[:1] * torch.finfo(values.dtype).eps * max(shape)
    return int((values > floor).sum())


def nearest_orthonormal(matrix: Tensor) -> Tensor:
    """The matrix with orthonormal columns (rows, if it is wide) nearest in the Frobenius norm.

    The orthogonal Procrustes solution: from the SVD ``P diag(S) Qh`` it is ``P Qh``.

    Args:
        matrix: (m, n).
    """
    p, _, qh = svd(matrix)
    return p @ qh


def pseudo_inverse_right(left: Tensor, gram: Tensor, tolerance: float | None = None) -> Tensor:
    """``left @ gram^+`` for a symmetric positive semi-definite `gram`, by one eigendecomposition.

    Args:
        left: (d_out, d).
        gram: (d, d), symmetric positive semi-definite.
        tolerance: eigenvalues below this fraction of the largest count as zero.
    """
    if tolerance is None:
        tolerance = len(gram) * torch.finfo(gram.dtype).eps
    values, vectors = torch.linalg.eigh(gram)
    keep = values > tolerance * values[-1].clamp_min(0)
    inverse = torch.where(keep, 1 / torch.where(keep, values, torch.ones_like(values)), 0)
    return ((left @ vectors) * inverse) @ vectors.mT
