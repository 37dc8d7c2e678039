"""Adaptation: moving a unit's parameters until its outputs on all anchors match the sources' (FDA, Section 3.4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from hf_fda.anchors.distance import distance
from hf_fda.blocks.capture import UnitCall
from hf_fda.errors import RunError
from hf_fda.merge_methods.fda import Distance


class Stepper(Protocol):
    """Something that moves parameters along their gradients."""

    def step(self, gradients: Sequence[Tensor]) -> None:
        """One step; `gradients` are in the order of the parameters."""
        ...


class CoefficientAdam:
    """Adam on elementwise coefficients of K task vectors, with the state of one.

    With ``theta = theta_0 + sum_k alpha_k * tau_k`` and g the gradient at theta, the gradient of alpha_k is
    ``tau_k g``, so its moments are ``tau_k m`` and ``tau_k^2 v`` where m and v are those of g. Adam's step on all
    alpha_k therefore moves theta by

        ``-lr * m_hat * sum_k tau_k^2 / (|tau_k| sqrt(v_hat) + eps)``

    which needs one (m, v) per entry instead of K, and gives the same trajectory to rounding.

    Args:
        parameters: P tensors, changed in place.
        tasks: for each parameter its K task vectors.
        learning_rate: Adam's step size, in units of a coefficient.
        betas: decay rates of the moments.
        eps: Adam's epsilon.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        tasks: Sequence[Sequence[Tensor]],
        learning_rate: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.parameters = list(parameters)
        self.tasks = [list(own) for own in tasks]
        self.learning_rate, self.betas, self.eps = learning_rate, betas, eps
        self.first = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.second = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.steps = 0

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor]) -> None:
        """One step along `gradients`, in the order of the parameters."""
        self.steps += 1
        low, high = self.betas
        for parameter, gradient, tasks, m, v in zip(
            self.parameters, gradients, self.tasks, self.first, self.second, strict=True
        ):
            m.lerp_(gradient, 1 - low)
            v.mul_(high).addcmul_(gradient, gradient, value=1 - high)
            root = (v / (1 - high**self.steps)).sqrt_()
            factor = torch.zeros_like(root)
            for task in tasks:
                factor += task.square() / (task.abs() * root + self.eps)
            parameter.addcmul_(m, factor, value=-self.learning_rate / (1 - low**self.steps))


class ParameterAdam:
    """Adam on the parameters themselves.

    Args:
        parameters: P tensors, changed in place.
        learning_rate: Adam's step size, in units of a parameter.
    """

    def __init__(self, parameters: Sequence[Tensor], learning_rate: float) -> None:
        self.parameters = list(parameters)
        self.optimizer = torch.optim.Adam(self.parameters, lr=learning_rate)

    def step(self, gradients: Sequence[Tensor]) -> None:
        """One step along `gradients`, in the order of the parameters."""
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()


@dataclass(frozen=True)
class Adapted:
    """An adapted unit: its parameters by name (on the CPU) and the mean distance before and after."""

    parameters: dict[str, Tensor]
    loss_before: float
    loss_after: float


def adapt_unit(
    module: nn.Module,
    call: UnitCall,
    anchors: Sequence[Tensor],
    targets: Sequence[Tensor],
    tasks: Sequence[Mapping[str, Tensor]] | None,
    *,
    kind: Distance,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    generator: torch.Generator,
    report: Callable[[int, float], None] = lambda epoch, loss: None,
) -> Adapted:
    """Fit a unit to the targets of all sources at once, from the parameters it has.

    A step minimises the distance summed over the batch (over its anchors for "cosine", over all entries of its outputs
    otherwise), as published: of a mean the gradients of coefficients would be as small as Adam's epsilon.

    Args:
        module: the unit at its start; changed in place.
        call: how to call it.
        anchors: for each source (n_i, T, d).
        targets: for each source (n_i, T, d').
        tasks: K task vectors by parameter name: step on their elementwise coefficients. None: on the parameters.
        kind: distance of the outputs.
        epochs: passes over all anchors.
        learning_rate: Adam's step size.
        batch_size: anchors a step, drawn from all sources mixed.
        generator: on the CPU; the order of the batches.
        report: called with (epoch, loss) now and then.

    Raises:
        RunError: when the loss becomes infinite or not a number.
    """
    x, y = torch.cat(list(anchors)), torch.cat(list(targets))
    named = dict(module.requires_grad_(True).named_parameters())
    parameters = list(named.values())
    stepper: Stepper
    if tasks is None:
        stepper = ParameterAdam(parameters, learning_rate)
    else:
        stepper = CoefficientAdam(parameters, [[task[name] for task in tasks] for name in named], learning_rate)
    before = _mean_distance(module, call, x, y, kind, batch_size)
    for epoch in range(epochs):
        order = torch.randperm(len(x), generator=generator).to(x.device)
        summed = torch.zeros((), device=x.device)
        for batch in order.split(batch_size):
            target = y[batch]
            loss = distance(kind, call(module, x[batch]), target)
            summed_loss = loss * (len(batch) if kind == "cosine" else target.numel())
            stepper.step(torch.autograd.grad(summed_loss, parameters, materialize_grads=True))
            summed += loss.detach() * len(batch)
        if (epoch + 1) % 10 == 0 or epoch + 1 == epochs:
            current = float(summed) / len(x)
            if not math.isfinite(current):
                raise RunError(f"the adaptation loss is {current} at epoch {epoch}; try a smaller step size")
            report(epoch + 1, current)
    after = _mean_distance(module, call, x, y, kind, batch_size)
    return Adapted({name: value.detach().cpu() for name, value in named.items()}, before, after)


@torch.no_grad()
def _mean_distance(module: nn.Module, call: UnitCall, x: Tensor, y: Tensor, kind: Distance, batch_size: int) -> float:
    parts = zip(x.split(batch_size), y.split(batch_size), strict=True)
    return float(sum(distance(kind, call(module, a), b) * len(a) for a, b in parts)) / len(x)
