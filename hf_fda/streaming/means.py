"""Merges that are means of the models themselves: the base need not be read for them."""

from __future__ import annotations

from math import fsum

import torch

from hf_fda.merge_methods import MethodConfig
from hf_fda.streaming.taskvectors import TaskVectors

Factors = list[tuple[int, float]]
"""Sources, by their number, with what each is multiplied by."""

HALF_TYPES = (torch.bfloat16, torch.float16)


def mean_of_models(vectors: TaskVectors, name: str, config: MethodConfig, dtype: torch.dtype) -> Factors | None:
    """``theta_0 + sum_i c_i (theta_i - theta_0)`` as ``sum_i c_i theta_i``, without the base, where the c_i sum to one.

    A model of factor 1 comes out as it is. Where all types are narrower than the one that is computed in, so do equal
    models. None where it would not be as exact as task vectors, or the method is no such mean.

    Args:
        vectors: reads base and sources.
        name: the base's name of a tensor.
        config: the method.
        dtype: of the result.
    """
    sources = vectors.inputs.moving
    factors = config.coefficients(len(sources))
    if factors is None or abs(1 - fsum(factors)) > 2**-48:
        return None
    if not all(name in source.tensor_of and source.checkpoint.stored for source in sources):
        return None
    types = [dtype, *(source.dtype(name) for source in sources)]
    precise = torch.float64 not in types and (vectors.device.type != "mps" or all(own in HALF_TYPES for own in types))
    return [(number, factor) for number, factor in enumerate(factors) if factor] if precise else None
