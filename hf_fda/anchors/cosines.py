"""Cosines between the gradients of parameters and their task vectors, with the derivatives written out.

For a linear layer with input x (N, d_in) and output gradient D (N, d_out) the weight's gradient is ``G = D^T x``. Its
derivative through the cosine, written out, spares the passes over matrices of the weight's size that autograd makes;
where N is small against the widths, G is not built at all. All is done for S units of one shape at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_fda.anchors.products import Operand, product


def _slopes(dot: Tensor, square: Tensor, size: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The derivative of ``grad * cos(G, tau)`` with respect to G is ``a * tau + b * G``: a and b, (S,).

    Both are zero where G is.

    Args:
        dot: <G, tau>, (S,).
        square: |G|^2, (S,).
        size: |tau|, (S,).
        grad: (S,).
    """
    tiny = torch.finfo(square.dtype).tiny
    norm = square.clamp_min(tiny).sqrt()
    a = torch.where(square > tiny, grad / (norm * size), 0.0)
    return a, -a * dot / square.clamp_min(tiny)


def _cosine(dot: Tensor, square: Tensor, size: Tensor) -> Tensor:
    return dot / (square.clamp_min(torch.finfo(square.dtype).tiny).sqrt() * size)


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of S tensors with as many others, (S,)."""
    if len(a) == 1:
        return torch.dot(a.reshape(-1), b.reshape(-1)).view(1)
    return torch.linalg.vecdot(a.flatten(1), b.flatten(1))


def _each(scale: Tensor, of: Tensor) -> Tensor:
    """(S,) in a shape that multiplies S tensors."""
    return scale.view(-1, *(1,) * (of.ndim - 1))


class TensorCosine(torch.autograd.Function):
    """``cos(G, tau)`` of gradients that are given, of any shape."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, task: Tensor, size: Tensor) -> Tensor:
        """`gradient` and `task` of one shape (S, ...), `size` (S,) the norms of `task`; gives (S,)."""
        dot, square = _dots(gradient, task), _dots(gradient, gradient)
        ctx.save_for_backward(gradient, task, size, dot, square)
        return _cosine(dot, square, size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """The derivative with respect to the gradient; tau is constant."""
        gradient, task, size, dot, square = ctx.saved_tensors
        a, b = (_each(own, task) for own in _slopes(dot, square, size, grad))
        return (gradient * b).addcmul_(task, a), None, None


class ProductCosine(torch.autograd.Function):
    """``cos(D^T x, tau)``; builds ``G = D^T x``: three products of N * d_out * d_in in all."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, task: Tensor, size: Tensor) -> Tensor:
        """`output` D (S, N, d_out), `x` (S, N, d_in), `task` (S, d_out, d_in), `size` (S,) its norms; gives (S,)."""
        own_output, own_x = Operand(output), Operand(x)
        gradient = product(own_output.mT, own_x)
        dot, square = _dots(gradient, task), _dots(gradient, gradient)
        ctx.save_for_backward(output, x, gradient, task, size, dot, square)
        ctx.converted = own_output.converted, own_x.converted
        return _cosine(dot, square, size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """The derivatives with respect to D and x."""
        output, x, gradient, task, size, dot, square = ctx.saved_tensors
        a, b = (_each(own, task) for own in _slopes(dot, square, size, grad))
        own_output, own_x = (Operand(*pair) for pair in zip((output, x), ctx.converted, strict=True))
        slope = Operand((gradient * b).addcmul_(task, a))
        return product(own_x, slope.mT), product(own_output, slope), None, None


class GramCosine(torch.autograd.Function):
    """``cos(D^T x, tau)`` without ``D^T x``: two products of N * d_out * d_in, and four of N^2 times a width.

    ``<D^T x, tau> = sum(D * (x tau^T))`` and ``|D^T x|^2 = sum((x x^T) * (D D^T))``.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, task: Tensor, size: Tensor) -> Tensor:
        """`output` D (S, N, d_out), `x` (S, N, d_in), `task` (S, d_out, d_in), `size` (S,) its norms; gives (S,)."""
        own_output, own_x = Operand(output), Operand(x)
        image = product(own_x, task.mT)
        inputs, outputs = product(own_x, own_x.mT), product(own_output, own_output.mT)
        dot, square = _dots(output, image), _dots(inputs, outputs)
        ctx.save_for_backward(output, x, image, inputs, outputs, task, size, dot, square)
        ctx.converted = own_output.converted, own_x.converted
        return _cosine(dot, square, size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """The derivatives with respect to D and x."""
        output, x, image, inputs, outputs, task, size, dot, square = ctx.saved_tensors
        a, b = (_each(own, task) for own in _slopes(dot, square, size, grad))
        own_output, own_x = (Operand(*pair) for pair in zip((output, x), ctx.converted, strict=True))
        to_output = (image * a).addcmul_(product(inputs, own_output), b)
        to_x = product(own_output, task).mul_(a).addcmul_(product(outputs, own_x), b)
        return to_output, to_x, None, None


def gram_pays(rows: int, width_in: int, width_out: int) -> bool:
    """Whether `GramCosine` multiplies less than `ProductCosine`: N below half the harmonic sum of the widths."""
    return 2 * rows * (width_in + width_out) < width_in * width_out


def weight_cosine(output: Tensor, x: Tensor, task: Tensor, size: Tensor) -> Tensor:
    """The cosines of ``D^T x`` and `task` of S units, (S,), in the cheaper form.

    Args:
        output: D (S, N, d_out).
        x: (S, N, d_in).
        task: (S, d_out, d_in).
        size: norms of `task`, (S,).
    """
    form = GramCosine if gram_pays(x.shape[1], x.shape[2], output.shape[2]) else ProductCosine
    return form.apply(output, x, task, size)
