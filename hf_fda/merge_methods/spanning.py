"""Merges that lie in the span of theta_0 and the task tensors, at factors that follow from their inner products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_fda.merge_methods.config import MethodConfig
from hf_fda.tensors import total

CHUNK = 2**12
"""Entries whose products are added in the type that they are computed in; such sums are added in float64."""


def products_of(vectors: Sequence[Tensor]) -> Tensor:
    """(M, M) inner products of M flat vectors, in float64 on the CPU.

    Args:
        vectors: M tensors (n,).
    """
    count, size = len(vectors), len(vectors[0])
    found = torch.zeros(count, count, dtype=torch.float64)
    whole = size - size % CHUNK
    for start, stop, width in ((0, whole, CHUNK), (whole, size, size - whole)):
        if stop > start:
            stacked = torch.stack([vector[start:stop].view(-1, width) for vector in vectors], dim=1)
            found += (stacked @ stacked.mT).cpu().double().sum(0)
    return found


def spanned(base: Tensor, tasks: Sequence[Tensor], config: MethodConfig) -> Tensor:
    """The merged task tensor of a method that `spans`.

    Args:
        base: theta_0, any shape.
        tasks: K task tensors of that shape.
        config: gives the factors.
    """
    vectors = [base, *tasks]
    factors = config.combination(products_of([vector.flatten() for vector in vectors])).tolist()
    return total(vector * factor for vector, factor in zip(vectors, factors, strict=True) if factor or vector is base)
