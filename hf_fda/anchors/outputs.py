"""Cosines of induced gradients from the gradients at the outputs of linear layers, instead of at their weights.

Autograd is asked for the gradients D at the outputs of linear layers, which with their inputs x make the weights'
gradients ``D^T x`` and the biases', the sums of D's rows (`hf_fda.anchors.cosines`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_fda.anchors.cosines import TensorCosine, weight_cosine
from hf_fda.anchors.distance import distance
from hf_fda.anchors.products import NarrowProducts
from hf_fda.anchors.smooth import SecondDerivatives
from hf_fda.blocks.capture import Call
from hf_fda.merge_methods.fda import Distance

LINEAR = (nn.Linear, Conv1D)


@dataclass
class Tape:
    """What each linear layer took and gave in one run of the block, by the layer's path; hooks fill it."""

    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)


class Matcher:
    """Cosines between the gradients that X induces in units and their task vectors, as a function of X.

    Args:
        base: the base's unit, frozen; of several units, their stack.
        source: the source's unit, frozen; likewise.
        call: how to call both on (S n, T, d).
        tasks: the task vectors of P parameters by name, each (S, *shape): of S units.
        kind: distance of the outputs.
        plain: parameters whose gradient autograd shall build even though a linear layer owns them.
    """

    def __init__(
        self,
        base: nn.Module,
        source: nn.Module,
        call: Call,
        tasks: Mapping[str, Tensor],
        kind: Distance,
        plain: frozenset[str] = frozenset(),
    ) -> None:
        self.base, self.source, self.call, self.kind = base, source, call, kind
        self.tasks = dict(tasks)
        self.count = len(next(iter(self.tasks.values()))) if self.tasks else 1
        self.sizes = {name: torch.linalg.vector_norm(task.flatten(1), dim=1) for name, task in self.tasks.items()}
        parameters = dict(base.named_parameters())
        self.layers = {
            path: module
            for path, module in base.named_modules()
            if isinstance(module, LINEAR) and self._wanted(path) and not plain & set(self._wanted(path))
        }
        taken = {name for path in self.layers for name in self._wanted(path)}
        self.others = {name: parameters[name] for name in self.tasks if name not in taken}
        self.narrow = NarrowProducts()

    def _wanted(self, path: str) -> list[str]:
        prefix = f"{path}." if path else ""
        return [name for name in (f"{prefix}weight", f"{prefix}bias") if name in self.tasks]

    def __call__(self, x: Tensor) -> Tensor:
        """``cos(grad_p S, tau_p)`` for each task vector of each unit, (S, P), S minus the distance; differentiable once
        more if `x` (S, n, T, d) requires a gradient."""
        differentiable = x.requires_grad
        x = x if differentiable else x.detach().requires_grad_(True)
        tape, asked, gradients = self._gradients(x, differentiable)
        cosines: dict[str, Tensor] = {}
        for name in self.others:
            task = self.tasks[name]
            cosines[name] = TensorCosine.apply(gradients.pop(0).view_as(task), task, self.sizes[name])
        for path, count in asked:
            output = self._rows([gradients.pop(0) for _ in range(count)])
            rows = self._rows(tape.inputs[path])
            cosines |= self._layer_cosines(path, output, rows)
        nothing = x.new_zeros(self.count)
        result = torch.stack([cosines.get(name, nothing) for name in self.tasks], dim=-1)
        return result if differentiable else result.detach()

    def _gradients(self, x: Tensor, create_graph: bool) -> tuple[Tape, list[tuple[str, int]], list[Tensor]]:
        """One run of base and source: what the layers took, how many outputs each layer that ran gave, and the
        gradients of the other parameters followed by those at the outputs."""
        tape = Tape()
        hooks = [module.register_forward_hook(_recorder(tape, path)) for path, module in self.layers.items()]
        others = [parameter.requires_grad_(True) for parameter in self.others.values()]
        rows = x.flatten(0, 1)
        try:
            with self.narrow:
                with SecondDerivatives():
                    output = self.call(self.base, rows)
                target = self.call(self.source, rows)
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
        """Cosines of a linear layer's parameters from D (S, N, d_out) and x (S, N, d_in)."""
        cosines = {}
        for name in self._wanted(path):
            task, size = self.tasks[name], self.sizes[name]
            if name.endswith("bias"):
                cosines[name] = TensorCosine.apply(output.sum(1), task, size)
            elif isinstance(self.layers[path], Conv1D):
                cosines[name] = weight_cosine(rows, output, task, size)  # stored (S, d_in, d_out)
            else:
                cosines[name] = weight_cosine(output, rows, task, size)
        return cosines

    def _rows(self, parts: Sequence[Tensor]) -> Tensor:
        """All rows of tensors (S n, ..., d), one below the other for each unit, (S, N, d)."""
        rows = [part.reshape(self.count, -1, part.shape[-1]) for part in parts]
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)


def _recorder(tape: Tape, path: str) -> Any:
    def record(_module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        if not args or not isinstance(output, Tensor) or not output.requires_grad:
            return  # `find_matched` finds the cosine wrong, and leaves the layer to autograd
        tape.inputs.setdefault(path, []).append(args[0])
        tape.outputs.setdefault(path, []).append(output)

    return record
