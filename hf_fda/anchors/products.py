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


class Operand:
    """Matrices (..., m, n) that more than one product takes: they are converted once, when the first needs it.

    Args:
        matrix: what is multiplied; not for autograd, and not to be changed.
        narrow: what it was converted to already.
    """

    def __init__(self, matrix: Tensor, narrow: Tensor | None = None) -> None:
        self.matrix = matrix.detach()
        self._cell, self._turned = [narrow], False

    @property
    def mT(self) -> Operand:
        """Its transpose, which shares the conversion."""
        other = Operand(self.matrix.mT)
        other._cell, other._turned = self._cell, not self._turned
        return other

    def narrow(self) -> Tensor:
        """In bfloat16, filled up as by `_narrow`."""
        found = self.converted
        if found is None:
            found = _narrow(self.matrix)
            self._cell[0] = found.mT if self._turned else found
        return found

    @property
    def converted(self) -> Tensor | None:
        """As of `narrow`, if a product has needed it."""
        (found,) = self._cell
        return found.mT if found is not None and self._turned else found


def product(a: Tensor | Operand, b: Tensor | Operand) -> Tensor:
    """``a b`` of matrices (m, k) and (k, n), or of as many of both (S, m, k) and (S, k, n), in the precision that is
    set; not for autograd."""
    a, b = (one if isinstance(one, Operand) else Operand(one) for one in (a, b))
    narrow = narrows(a.matrix, b.matrix)
    left, right = (a.narrow(), b.narrow()) if narrow else (a.matrix, b.matrix)
    found = (left[0] @ right[0]).unsqueeze(0) if left.ndim == 3 and len(left) == 1 else left @ right
    return found[..., : a.matrix.shape[-2], : b.matrix.shape[-1]].to(torch.float32) if narrow else found


def _narrow(matrix: Tensor) -> Tensor:
    """Matrices (..., rows, columns) in bfloat16, filled up with zeros to multiples of `ROUND`."""
    if _turned(matrix):
        return _narrow(matrix.mT).mT
    sizes = matrix.shape[-2:]
    filled = [-(-size // ROUND) * ROUND for size in sizes]
    if list(sizes) == filled:
        return matrix.to(torch.bfloat16)
    whole = matrix.new_zeros(*matrix.shape[:-2], *filled, dtype=torch.bfloat16)
    whole[..., : sizes[0], : sizes[1]] = matrix
    return whole


def _turned(matrix: Tensor) -> bool:
    """Whether a matrix lies in memory column by column."""
    return matrix.stride(-2) == 1 < matrix.shape[-2]


class MatrixProduct(torch.autograd.Function):
    """`product` for autograd, differentiable as often as one likes."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, own_a: Operand | None = None, own_b: Operand | None = None) -> Tensor:
        """`a` (m, k) and `b` (k, n), or as many of both, and the same as operands where other products take them."""
        own_a, own_b = own_a or Operand(a), own_b or Operand(b)
        result = product(own_a, own_b)
        wanted_a, wanted_b, *_ = ctx.needs_input_grad
        ctx.save_for_backward(a, b)
        ctx.converted = own_a.converted if wanted_b else None, own_b.converted if wanted_a else None
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """The derivatives, by the same products; what belongs to `b` lies in memory as that does."""
        a, b = ctx.saved_tensors
        wanted_a, wanted_b, *_ = ctx.needs_input_grad
        own_a, own_b = (Operand(*pair) for pair in zip((a, b), ctx.converted, strict=True))
        own, to_a, to_b = Operand(grad), None, None
        if wanted_a:
            to_a = MatrixProduct.apply(grad, b.mT, own, own_b.mT)
        if wanted_b and _turned(b):
            to_b = MatrixProduct.apply(grad.mT, a, own.mT, own_a).mT
        elif wanted_b:
            to_b = MatrixProduct.apply(a.mT, grad, own_a.mT, own)
        return to_a, to_b, None, None


class NarrowProducts(TorchFunctionMode):
    """Inside, linear layers multiply by `MatrixProduct` where it pays, in their backward passes too.

    A parameter is converted once, until it changes; what it was converted to is held as long as this is.
    """

    def __init__(self) -> None:
        super().__init__()
        self._weights: dict[int, tuple[Tensor, int, Operand]] = {}

    def __torch_function__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Replace `linear`, and `addmm` as GPT-2's Conv1D calls it; leave everything else."""
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear:
            return self._linear(*args, **kwargs)
        if func is torch.addmm and len(args) == 3 and not kwargs and narrows(args[1], args[2]):
            return args[0] + MatrixProduct.apply(args[1], args[2], None, self._operand(args[2]))
        return func(*args, **kwargs)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = input.flatten(0, -2) if input.ndim > 1 else input.unsqueeze(0)
        if not narrows(rows, weight.T):
            return torch.nn.functional.linear(input, weight, bias)
        output = MatrixProduct.apply(rows, weight.T, None, self._operand(weight).mT)
        output = output.view(*input.shape[:-1], len(weight))
        return output if bias is None else output + bias

    def _operand(self, weight: Tensor) -> Operand:
        if not isinstance(weight, torch.nn.Parameter):  # made anew in every pass
            return Operand(weight)
        known, version, operand = self._weights.get(id(weight), (None, 0, None))
        if known is not weight or version != weight._version or operand is None:
            operand = Operand(weight)
            self._weights[id(weight)] = weight, weight._version, operand
        return operand
