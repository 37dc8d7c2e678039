"""The precision of float32 matrix products: torch's setting, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hf_fda.merge_methods.fda import Precision


@contextmanager
def matmul_precision(precision: Precision | None) -> Iterator[None]:
    """Inside, float32 matrix products of this precision; None changes nothing.

    Args:
        precision: as `torch.set_float32_matmul_precision` names it: "high" is TF32 on a GPU that has it, "medium"
            bfloat16 on a CPU that has it, "highest" plain float32.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision or before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
