"""Cosines of induced gradients from the gradients at the outputs of linear layers, instead of at their weights.

For a linear layer with input x (N, d_in) and output gradient D (N, d_out) the weight's gradient is ``G = D^T x`` and
the bias's the sum of D's rows. Asking autograd for D and doing the rest here, with the derivative of the cosine written
out, spares the passes over matrices of the weight's size that autograd makes through a cosine; where N is small against
the widths, G is not built at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from hf_fda.anchors.distance import distance
from hf_fda.anchors.products import NarrowProducts, product
from hf_fda.anchors.smooth import SecondDerivatives
from hf_fda.blocks.capture import UnitCall
from hf_fda.merge_methods.fda import Distance

LINEAR = (nn.Linear, Conv1D)


def _slopes(dot: Tensor, square: Tensor, size: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The derivative of ``grad * cos(G, tau)`` with respect to G is ``a * tau + b * G``: a and b.

    Both are zero where G is.

    Args:
        dot: <G, tau>.
        square: |G|^2.
        size: |tau|.
        grad: a scalar.
    """
    tiny = torch.finfo(square.dtype).tiny
    norm = square.clamp_min(tiny).sqrt()
    a = torch.where(square > tiny, grad / (norm * size), 0.0)
    return a, -a * dot / square.clamp_min(tiny)


def _cosine(dot: Tensor, square: Tensor, size: Tensor) -> Tensor:
    return dot / (square.clamp_min(torch.finfo(square.dtype).tiny).sqrt() * size)


class TensorCosine(torch.autograd.Function):
    """``cos(G, tau)`` of a gradient that is given, of any shape."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, task: Tensor, size: Tensor) -> Tensor:
        """`gradient` and `task` of one shape, `size` the norm of `task`; gives a scalar."""
        flat = gradient.reshape(-1)
        dot, square = torch.dot(flat, task.reshape(-1)), torch.dot(flat, flat)
        ctx.save_for_backward(gradient, task, size, dot, square)
        return _cosine(dot, square, size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """The derivative with respect to the gradient; tau is constant."""
        gradient, task, size, dot, square = ctx.saved_tensors
        a, b = _slopes(dot, square, size, grad)
        return (gradient * b).addcmul_(task, a), None, None


class ProductCosine(torch.autograd.Function):
    """``cos(D^T x, tau)``; builds ``G = D^T x``: three products of N * d_out * d_in in all."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, task: Tensor, size: Tensor) -> Tensor:
        """`output` D (N, d_out), `x` (N, d_in), `task` (d_out, d_in), `size` its norm; gives a scalar."""
        gradient = product(output.T, x)
        flat = gradient.view(-1)
        dot, square = torch.dot(flat, task.reshape(-1)), torch.dot(flat, flat)
        ctx.save_for_backward(output, x, gradient, task, size, dot, square)
        return _cosine(dot, square, size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """The derivatives with respect to D and x."""
        output, x, gradient, task, size, dot, square = ctx.saved_tensors
        a, b = _slopes(dot, square, size, grad)
        slope = (gradient * b).addcmul_(task, a)
        return product(x, slope.T), product(output, slope), None, None


class GramCosine(torch.autograd.Function):
    """``cos(D^T x, tau)`` without ``D^T x``: two products of N * d_out * d_in, and four of N^2 times a width.

    ``<D^T x, tau> = sum(D * (x tau^T))`` and ``|D^T x|^2 = sum((x x^T) * (D D^T))``.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, task: Tensor, size: Tensor) -> Tensor:
        """`output` D (N, d_out), `x` (N, d_in), `task` (d_out, d_in), `size` its norm; gives a scalar."""
        image, inputs, outputs = product(x, task.T), product(x, x.T), product(output, output.T)
        dot = torch.dot(output.reshape(-1), image.view(-1))
        square = torch.dot(inputs.view(-1), outputs.view(-1))
        ctx.save_for_backward(output, x, image, inputs, outputs, task, size, dot, square)
        return _cosine(dot, square, size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """The derivatives with respect to D and x."""
        output, x, image, inputs, outputs, task, size, dot, square = ctx.saved_tensors
        a, b = _slopes(dot, square, size, grad)
        to_output = (image * a).addcmul_(product(inputs, output), b)
        to_x = product(output, task).mul_(a).addcmul_(product(outputs, x), b)
        return to_output, to_x, None, None


def gram_pays(rows: int, width_in: int, width_out: int) -> bool:
    """Whether `GramCosine` multiplies less than `ProductCosine`: N below half the harmonic sum of the widths."""
    return 2 * rows * (width_in + width_out) < width_in * width_out


def weight_cosine(output: Tensor, x: Tensor, task: Tensor, size: Tensor) -> Tensor:
    """The cosine of ``D^T x`` and `task`, in the cheaper form.

    Args:
        output: D (N, d_out).
        x: (N, d_in).
        task: (d_out, d_in).
        size: norm of `task`.
    """
    form = GramCosine if gram_pays(len(x), x.shape[1], output.shape[1]) else ProductCosine
    return form.apply(output, x, task, size)


@dataclass
class Tape:
    """What each linear layer took and gave in one run of the block, by the layer's path; hooks fill it."""

    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)


class Matcher:
    """Cosines between the gradients that X induces in a unit and its task vectors, as a function of X.

    Args:
        base: the base's unit, frozen.
        source: the source's unit, frozen.
        call: how to call both.
        tasks: P task vectors by parameter name.
        kind: distance of the outputs.
        plain: parameters whose gradient autograd shall build even though a linear layer owns them.
    """

    def __init__(
        self,
        base: nn.Module,
        source: nn.Module,
        call: UnitCall,
        tasks: Mapping[str, Tensor],
        kind: Distance,
        plain: frozenset[str] = frozenset(),
    ) -> None:
        self.base, self.source, self.call, self.kind = base, source, call, kind
        self.tasks = dict(tasks)
        self.sizes = {name: torch.linalg.vector_norm(task) for name, task in self.tasks.items()}
        parameters = dict(base.named_parameters())
        self.layers = {
            path: module
            for path, module in base.named_modules()
            if isinstance(module, LINEAR) and self._wanted(path) and not plain & set(self._wanted(path))
        }
        taken = {name for path in self.layers for name in self._wanted(path)}
        self.others = {name: parameters[name] for name in self.tasks if name not in taken}

    def _wanted(self, path: str) -> list[str]:
        prefix = f"{path}." if path else ""
        return [name for name in (f"{prefix}weight", f"{prefix}bias") if name in self.tasks]

    def __call__(self, x: Tensor) -> Tensor:
        """``cos(grad_p S, tau_p)`` for each task vector, (P,), S minus the distance; differentiable once more if
        `x` (n, T, d) requires a gradient."""
        differentiable = x.requires_grad
        x = x if differentiable else x.detach().requires_grad_(True)
        tape, asked, gradients = self._gradients(x, differentiable)
        cosines: dict[str, Tensor] = {}
        for name in self.others:
            cosines[name] = TensorCosine.apply(gradients.pop(0), self.tasks[name], self.sizes[name])
        for path, count in asked:
            output = _rows([gradients.pop(0) for _ in range(count)])
            rows = _rows(tape.inputs[path])
            cosines |= self._layer_cosines(path, output, rows)
        nothing = x.new_zeros(())
        result = torch.stack([cosines.get(name, nothing) for name in self.tasks])
        return result if differentiable else result.detach()

    def _gradients(self, x: Tensor, create_graph: bool) -> tuple[Tape, list[tuple[str, int]], list[Tensor]]:
        """One run of both units: what the layers took, how many outputs each layer that ran gave, and the gradients of
        the other parameters followed by those at the outputs."""
        tape = Tape()
        hooks = [module.register_forward_hook(_recorder(tape, path)) for path, module in self.layers.items()]
        others = [parameter.requires_grad_(True) for parameter in self.others.values()]
        try:
            with NarrowProducts():
                with SecondDerivatives():
                    output = self.call(self.base, x)
                target = self.call(self.source, x)
            similarity = -distance(self.kind, output, target)
            asked = [(path, len(outputs)) for path, outputs in tape.outputs.items()]
            wanted = others + [one for outputs in tape.outputs.values() for one in outputs]
            gradients = torch.autograd.grad(similarity, wanted, create_graph=create_graph, materialize_grads=True)
        finally:
            for hook in hooks:
                hook.remove()
            self.base.requires_grad_(False)
        return tape, asked, list(gradients)

    def _layer_cosines(self, path: str, output: Tensor, rows: Tensor) -> dict[str, Tensor]:
        """Cosines of a linear layer's parameters from D (N, d_out) and x (N, d_in)."""
        cosines = {}
        for name in self._wanted(path):
            task, size = self.tasks[name], self.sizes[name]
            if name.endswith("bias"):
                cosines[name] = TensorCosine.apply(output.sum(0), task, size)
            elif isinstance(self.layers[path], Conv1D):
                cosines[name] = weight_cosine(rows, output, task, size)  # stored (d_in, d_out)
            else:
                cosines[name] = weight_cosine(output, rows, task, size)
        return cosines


def _rows(parts: Sequence[Tensor]) -> Tensor:
    """All rows of tensors (..., d), one below the other."""
    rows = [part.reshape(-1, part.shape[-1]) for part in parts]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _recorder(tape: Tape, path: str) -> Any:
    def record(_module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        if not args or not isinstance(output, Tensor) or not output.requires_grad:
            return  # `make_matcher` finds the cosine wrong, and leaves the layer to autograd
        tape.inputs.setdefault(path, []).append(args[0])
        tape.outputs.setdefault(path, []).append(output)

    return record
