"""The precision of float32 matrix products, for a while: torch's setting, or on a CPU what `products` does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from hf_fda.merge_methods.fda import Precision

LEAST_CHANGE = 5e-3
"""Norm of a task vector, relative to that of the parameters, below which bfloat16's rounding of weights shows in what
is matched. Of an encoder's block the loss after 25 steps of construction was 0.261 instead of 0.260 at 1.6e-2, 0.284 at
1.6e-3 and 0.372 at 3e-4; what adaptation left of the distance 0.109, 0.110 and 0.132 instead of 0.109."""

_NARROW = ContextVar("_NARROW", default=False)


def narrow_on_cpu() -> bool:
    """Whether products on the CPU are to be taken in bfloat16 (by `products.product`)."""
    return _NARROW.get()


def fine_enough(precision: Precision | None, change: float, device: torch.device) -> Precision | None:
    """The precision that was asked for, or on a CPU full precision in place of bfloat16 that would show.

    Args:
        precision: as of `matmul_precision`.
        change: norm of the task vector that is matched, relative to that of the parameters.
        device: where the products are taken.
    """
    return "highest" if precision == "medium" and device.type == "cpu" and change < LEAST_CHANGE else precision


@contextmanager
def matmul_precision(precision: Precision | None, device: torch.device) -> Iterator[None]:
    """Inside, float32 matrix products of this precision; None changes nothing.

    Args:
        precision: "high" is TF32 on a GPU that has it, as `torch.set_float32_matmul_precision` has it; "medium" the
            same there, and bfloat16 on a CPU that has it, by `products.product` and not by torch's setting, which
            slows small products down; "highest" plain float32.
        device: where the products are taken.
    """
    if precision is None:
        yield
        return
    narrow = precision == "medium" and device.type == "cpu"
    before, token = torch.get_float32_matmul_precision(), _NARROW.set(narrow)
    torch.set_float32_matmul_precision("highest" if narrow else precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        _NARROW.reset(token)
