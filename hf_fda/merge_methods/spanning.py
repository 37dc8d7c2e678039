"""Merges that lie in the span of theta_0 and the task tensors, at factors that follow from their inner products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_fda.merge_methods.config import MethodConfig
from hf_fda.tensors import total

CHUNK = 2**12
"""Entries whose products are added in the type that they are computed in; such sums are added in float64."""


def products_of(vectors: Tensor) -> Tensor:
    """(M, M) inner products of M vectors, in float64 on the CPU.

    Args:
        vectors: (M, n).
    """
    count, size = vectors.shape
    found = torch.zeros(count, count, dtype=torch.float64)
    whole = size - size % CHUNK
    for start, stop, width in ((0, whole, CHUNK), (whole, size, size - whole)):
        if stop > start:
            chunks = vectors[:, start:stop].unflatten(1, (-1, width)).transpose(0, 1)
            found += (chunks @ chunks.mT).cpu().double().sum(0)
    return found


def spanned(base: Tensor, tasks: Sequence[Tensor], config: MethodConfig) -> Tensor:
    """The merged task tensor of a method that `spans`.

    Args:
        base: theta_0, any shape.
        tasks: K task tensors of that shape.
        config: gives the factors.
    """
    vectors = [base, *tasks]
    factors = config.combination(products_of(torch.stack([vector.flatten() for vector in vectors]))).tolist()
    return total(vector * factor for vector, factor in zip(vectors, factors, strict=True) if factor or vector is base)
