"""Matrix products in bfloat16 on a CPU that has it, summed in float32.

Of float32 matrices at precision "medium", `torch.matmul` converts to bfloat16 inside its kernel, which on CPUs with
AVX-512 gains next to nothing; of matrices that are bfloat16 already the same hardware multiplies twice as much.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hf_fda.anchors.precision import narrow_on_cpu

LEAST = 1 << 23
"""Multiplications below which converting to bfloat16 costs more than it saves."""

ROUND = 32
"""What the sizes of matrices are filled up to multiples of: real rows are of many lengths, and for every shape the
machine code of a product is kept, about 0.7 MB."""


@cache
def has_bfloat16() -> bool:
    """Whether this machine's CPU multiplies bfloat16."""
    kinds = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, kind, bool)()) for kind in kinds)


def narrows(a: Tensor, b: Tensor) -> bool:
    """Whether ``a b`` of matrices (..., m, k) and (..., k, n) is taken in bfloat16: at precision "medium", where it
    pays."""
    return (
        a.device.type == "cpu"
        and a.dtype == b.dtype == torch.float32
        and a.shape[-2] * a.shape[-1] * b.shape[-1] >= LEAST
        and narrow_on_cpu()
        and has_bfloat16()
    )


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a b`` of matrices (m, k) and (k, n), or of as many of both (S, m, k) and (S, k, n), in the precision that is
    set; not for autograd."""
    if a.ndim == 3 and len(a) == 1:
        return product(a[0], b[0]).unsqueeze(0)
    if not narrows(a, b):
        return a @ b
    return (_narrow(a) @ _narrow(b))[..., : a.shape[-2], : b.shape[-1]].to(torch.float32)


def _narrow(matrix: Tensor) -> Tensor:
    """Matrices (..., rows, columns) in bfloat16, filled up with zeros to multiples of `ROUND`."""
    if matrix.stride(-2) == 1 < matrix.shape[-2]:
        return _narrow(matrix.mT).mT
    sizes = matrix.shape[-2:]
    filled = [-(-size // ROUND) * ROUND for size in sizes]
    if list(sizes) == filled:
        return matrix.to(torch.bfloat16)
    whole = matrix.new_zeros(*matrix.shape[:-2], *filled, dtype=torch.bfloat16)
    whole[..., : sizes[0], : sizes[1]] = matrix
    return whole


class MatrixProduct(torch.autograd.Function):
    """`product` for autograd, differentiable as often as one likes."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        """`a` (m, k) and `b` (k, n), or as many of both."""
        ctx.save_for_backward(a, b)
        return product(a, b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The derivatives, by the same products."""
        a, b = ctx.saved_tensors
        wanted_a, wanted_b = ctx.needs_input_grad
        to_a = MatrixProduct.apply(grad, b.mT) if wanted_a else None
        return to_a, MatrixProduct.apply(a.mT, grad) if wanted_b else None


class NarrowProducts(TorchFunctionMode):
    """Inside, linear layers multiply by `MatrixProduct` where it pays, in their backward passes too."""

    def __torch_function__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Replace `linear`, and `addmm` as GPT-2's Conv1D calls it; leave everything else."""
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear:
            return _linear(*args, **kwargs)
        if func is torch.addmm and len(args) == 3 and not kwargs and narrows(args[1], args[2]):
            return args[0] + MatrixProduct.apply(args[1], args[2])
        return func(*args, **kwargs)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = input.flatten(0, -2) if input.ndim > 1 else input.unsqueeze(0)
    if not narrows(rows, weight.T):
        return torch.nn.functional.linear(input, weight, bias)
    output = MatrixProduct.apply(rows, weight.T).view(*input.shape[:-1], len(weight))
    return output if bias is None else output + bias
