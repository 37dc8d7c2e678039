"""Activations whose second derivative is cheap: what construction differentiates twice."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode


class Slope(torch.autograd.Function):
    """``g * f'(x)`` for given f'(x) and f''(x): what the backward pass of an activation computes."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, x: Tensor, first: Tensor, curve: Callable[[Tensor], Tensor]) -> Tensor:
        """`grad`, `x` and `first` = f'(x) of one shape; `curve` is f''."""
        ctx.save_for_backward(grad, x, first)
        ctx.curve = curve
        return grad * first

    @staticmethod
    def backward(ctx: Any, again: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """The derivatives with respect to `grad` and `x`."""
        grad, x, first = ctx.saved_tensors
        return again * first, ctx.curve(x).mul_(grad).mul_(again), None, None


class Gelu(torch.autograd.Function):
    """The exact GELU, ``x Phi(x)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """`x` of any shape."""
        first = torch.ops.aten.gelu_backward(torch.ones_like(x), x)
        ctx.save_for_backward(x, first)
        return torch.nn.functional.gelu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Through `Slope`, which can be differentiated again."""
        x, first = ctx.saved_tensors
        return Slope.apply(grad, x, first, gelu_curve)


def gelu_curve(x: Tensor) -> Tensor:
    """The second derivative of the exact GELU, ``(2 - x^2) pdf(x)``."""
    square = x.square()
    density = (square * -0.5).exp_()
    return square.neg_().add_(2).mul_(density).mul_(1 / math.sqrt(2 * math.pi))


class NormSlope(torch.autograd.Function):
    """The backward pass of a layer norm over the last dimension: the gradients of its input, weight and bias.

    With y the normalised input, r one over its standard deviation and g = D w, the input's gradient is
    ``J g = r (g - mean(g) - y mean(g y))``; J is symmetric, so the derivative with respect to g is J again.
    """

    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, weight: Tensor, normal: Tensor, rate: Tensor, x: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`grad` D, `normal` y and `x` are (..., N, d), `weight` (..., 1, d), `rate` r (..., N, 1). The input is named
        only so that its derivative has somewhere to go."""
        g = grad * weight
        mean, slope = g.mean(-1, keepdim=True), torch.linalg.vecdot(g, normal).unsqueeze(-1) / g.shape[-1]
        ctx.save_for_backward(grad, weight, normal, rate, mean, slope)
        to_weight = (grad * normal).sum(-2, keepdim=True)
        return _jacobian(g, normal, rate, mean, slope), to_weight, grad.sum(-2, keepdim=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor, v_weight: Tensor, v_bias: Tensor) -> Any:
        """The derivatives with respect to D and x."""
        grad, weight, normal, rate, mean, slope = ctx.saved_tensors
        width = v.shape[-1]
        v_mean = v.mean(-1, keepdim=True)
        v_slope = torch.linalg.vecdot(v, normal).unsqueeze(-1) / width
        to_grad = _jacobian(v, normal, rate, v_mean, v_slope).mul_(weight).add_(v_bias).addcmul_(normal, v_weight)
        g = grad * weight
        inner = torch.linalg.vecdot(v, g).unsqueeze(-1) / width - v_mean * mean - v_slope * slope
        to_normal = (grad * v_weight).addcmul_(v, -rate * slope).addcmul_(g, -rate * v_slope)
        average = to_normal.mean(-1, keepdim=True)
        along = torch.linalg.vecdot(to_normal, normal).unsqueeze(-1) / width
        to_x = _jacobian(to_normal, normal, rate, average, along).addcmul_(normal, -rate.square() * inner)
        return to_grad, None, None, None, to_x


def _jacobian(g: Tensor, normal: Tensor, rate: Tensor, mean: Tensor, slope: Tensor) -> Tensor:
    """``r (g - mean(g) - y mean(g y))``."""
    return (g - mean).addcmul_(normal, slope, value=-1).mul_(rate)


class Norm(torch.autograd.Function):
    """A layer norm over the last dimension with weight and bias, or with several, each for as many rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """`x` (..., d), `weight` and `bias` (d,), or (S, d): one for each S-th of the rows."""
        if weight.ndim == 1:
            output, mean, rate = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
        else:
            normal, mean, rate = torch.native_layer_norm(x, weight.shape[-1:], None, None, eps)
            rows = normal.view(len(weight), -1, weight.shape[-1])
            output = torch.addcmul(bias.unsqueeze(-2), rows, weight.unsqueeze(-2)).view_as(x)
        ctx.save_for_backward(x, weight, mean, rate)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Through `NormSlope`, which can be differentiated again."""
        x, weight, mean, rate = ctx.saved_tensors
        rows = (*weight.shape[:-1], -1, weight.shape[-1])
        normal = ((x.detach() - mean) * rate).reshape(rows)
        rates = rate.reshape(*rows[:-1], 1)
        result = NormSlope.apply(grad.reshape(rows), weight.unsqueeze(-2), normal, rates, x.reshape(rows))
        return result[0].view_as(x), result[1].view_as(weight), result[2].view_as(weight), None


class SecondDerivatives(TorchFunctionMode):
    """Inside, activations that autograd differentiates twice in many passes take few."""

    def __torch_function__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Replace `gelu` and `layer_norm`; leave everything else."""
        kwargs = kwargs or {}
        if func is torch.nn.functional.gelu and kwargs.get("approximate", "none") == "none" and len(args) == 1:
            return Gelu.apply(args[0])
        if func is torch.nn.functional.layer_norm:
            return _layer_norm(*args, **kwargs)
        return func(*args, **kwargs)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    if weight is None or bias is None or len(normalized_shape) != 1 or input.ndim < 2:
        return torch.nn.functional.layer_norm(input, normalized_shape, weight, bias, eps)
    return Norm.apply(input, weight, bias, eps)
