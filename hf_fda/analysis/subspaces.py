"""How much of some vectors lies in the main directions of others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_fda.analysis.matrices import as_matrix
from hf_fda.errors import InputError


@dataclass(frozen=True)
class ProjectionEnergy:
    """Shares of vectors' summed squared norm in the top-k directions of others, for each k of `ks`.

    `shares` is what lies in those directions, `expected` what lies in a random subspace of k of the d dimensions on
    average (k / d), and `best` what lies in the vectors' own top-k directions, the most that any k hold.
    """

    ks: tuple[int, ...]
    shares: tuple[float, ...]
    expected: tuple[float, ...]
    best: tuple[float, ...]


def projection_energy(vectors: Tensor, onto: Tensor, ks: Sequence[int], centred: bool = False) -> ProjectionEnergy:
    """The share of vectors' squared norm on the top-k right-singular subspace of others, in float64.

    >>> axes = torch.eye(4)
    >>> projection_energy(axes[:2], axes[:1], [1]).shares
    (0.5,)

    Args:
        vectors: (..., d), those that are projected.
        onto: (..., d), those whose singular directions they are projected on.
        ks: numbers of directions.
        centred: both less their own mean.

    Raises:
        InputError: when vectors cannot be used or all are zero, or a k is larger than `onto` has directions.
    """
    rows, basis = as_matrix(vectors, "the vectors", centred), as_matrix(onto, "the vectors projected on", centred)
    size = rows.shape[1]
    if basis.shape[1] != size:
        raise InputError(f"the vectors have {size} entries, those projected on {basis.shape[1]}; give vectors alike")
    whole = float(rows.square().sum())
    if whole == 0 or not bool(basis.any()):
        raise InputError("the vectors are all zero, so that they have no direction")
    directions = torch.linalg.svd(basis, full_matrices=False).Vh
    for k in ks:
        if not 1 <= k <= len(directions):
            raise InputError(f"k is {k}; {len(basis)} vectors of {size} entries have 1 to {len(directions)} directions")
    shares = ((rows @ directions.T).square().sum(0).cumsum(0) / whole).clamp_max(1.0)
    own = torch.linalg.svdvals(rows).square().cumsum(0) / whole
    return ProjectionEnergy(
        tuple(ks),
        tuple(float(shares[k - 1]) for k in ks),
        tuple(k / size for k in ks),
        tuple(min(1.0, float(own[min(k, len(own)) - 1])) for k in ks),
    )
