"""Adaptation: moving a unit's parameters until its outputs on all anchors match the sources' (FDA, Section 3.4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_fda.anchors.distance import distance
from hf_fda.anchors.metric import shift_metric
from hf_fda.blocks.capture import UnitCall
from hf_fda.errors import RunError
from hf_fda.merge_methods.fda import AdaptationDistance, Schedule


class CoefficientAdam:
    """Adam on elementwise coefficients of K task vectors, with the state of one.

    With ``theta = theta_0 + sum_k alpha_k * tau_k`` and g the gradient at theta, the gradient of alpha_k is
    ``tau_k g``, so its moments are ``tau_k m`` and ``tau_k^2 v`` where m and v are those of g. Adam's step on all
    alpha_k therefore moves theta by

        ``-lr * m_hat / sqrt(v_hat) * sum_k |tau_k|``

    which needs one (m, v) per entry instead of K, and the sum of the magnitudes instead of the K task vectors. Adam's
    epsilon is added to ``sqrt(v_hat)``, that is to the gradient of theta, not of alpha_k. With scales of one this is
    Adam on the parameters themselves.

    Args:
        parameters: P tensors, changed in place.
        scales: for each parameter ``sum_k |tau_k|``, of its shape; None: ones.
        learning_rate: Adam's step size, in units of a coefficient (of a parameter, where `scales` is None).
        betas: decay rates of the moments.
        eps: Adam's epsilon.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        scales: Sequence[Tensor] | None,
        learning_rate: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.parameters = [parameter.detach() for parameter in parameters]
        self.scales = None if scales is None else list(scales)
        self.learning_rate, self.betas, self.eps = learning_rate, betas, eps
        self.first = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.second = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.steps = 0

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], rate: float = 1.0) -> None:
        """One step along `gradients`, in the order of the parameters; `rate` is a factor of the step size."""
        self.steps += 1
        low, high = self.betas
        own = list(gradients)
        torch._foreach_lerp_(self.first, own, 1 - low)
        torch._foreach_mul_(self.second, high)
        torch._foreach_addcmul_(self.second, own, own, 1 - high)
        root = torch._foreach_div(self.second, 1 - high**self.steps)
        torch._foreach_sqrt_(root)
        torch._foreach_add_(root, self.eps)
        size = -rate * self.learning_rate / (1 - low**self.steps)
        if self.scales is None:
            torch._foreach_addcdiv_(self.parameters, self.first, root, size)
        else:
            change = torch._foreach_div(self.first, root)
            torch._foreach_addcmul_(self.parameters, change, self.scales, size)


@dataclass(frozen=True)
class Adapted:
    """An adapted unit: its parameters by name (on the CPU) and the mean distance before and after."""

    parameters: dict[str, Tensor]
    loss_before: float
    loss_after: float


@dataclass(frozen=True)
class Batch:
    """Numbers of anchors (b,), on the device, in the order of their sources, and how many each source has."""

    rows: Tensor
    counts: tuple[int, ...]


class Objective:
    """How far a unit's outputs are from the targets of all sources.

    Args:
        kind: "shift" (the metric of every source's own shift, `shift_metric`), "cosine", "mse" or "mae".
        anchors: for each source (n_i, T, d).
        targets: for each source (n_i, T, d').
        shifts: for each source the shift of its outputs (n_i, T, d'); used by "shift" alone.
        power: of the metric of "shift".

    Raises:
        RunError: when anchors or targets are not finite.
    """

    def __init__(
        self,
        kind: AdaptationDistance,
        anchors: Sequence[Tensor],
        targets: Sequence[Tensor],
        shifts: Sequence[Tensor] | None = None,
        power: float = 0.5,
    ) -> None:
        self.kind: AdaptationDistance = kind
        self.anchors, self.targets = torch.cat(list(anchors)), torch.cat(list(targets))
        if not bool(self.anchors.isfinite().all()) or not bool(self.targets.isfinite().all()):
            raise RunError("anchors or targets are not finite; construct or fetch them again")
        self.source = torch.repeat_interleave(torch.tensor([len(own) for own in anchors]))
        if kind == "shift":
            assert shifts is not None
            self.factors = torch.stack([shift_metric(shift, power) for shift in shifts])

    def __len__(self) -> int:
        return len(self.anchors)

    def batches(self, order: Tensor, batch_size: int) -> list[Batch]:
        """Anchors in some order, cut into batches; the device is not asked for anything.

        Args:
            order: (n,), numbers of anchors, on the CPU.
            batch_size: anchors in a batch.
        """
        parts = [part[self.source[part].argsort(stable=True)] for part in order.split(batch_size)]
        kinds = int(self.source[-1]) + 1
        counts = [tuple(self.source[part].bincount(minlength=kinds).tolist()) for part in parts]
        on_device = torch.cat(parts).to(self.anchors.device).split(batch_size)
        return [Batch(rows, own) for rows, own in zip(on_device, counts, strict=True)]

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """The distance summed over a batch (over all entries of its outputs, for "mse" and "mae", as published: of a
        mean the gradients of coefficients would be as small as Adam's epsilon).

        Args:
            output: (b, T, d'), the unit's outputs on the batch's anchors.
            batch: which these are.
        """
        target = self.targets[batch.rows]
        if self.kind != "shift":
            return distance(self.kind, output, target) * (len(target) if self.kind == "cosine" else target.numel())
        errors = (output - target).split(batch.counts)
        weighed = [error @ factor for error, factor in zip(errors, self.factors, strict=True)]
        return torch.cat(weighed).square().sum() / output.shape[1]

    @torch.no_grad()
    def mean(self, call: Callable[[Tensor], Tensor], batch_size: int) -> float:
        """The distance per anchor (per entry, for "mse" and "mae") of a unit's outputs from all targets."""
        batches = self.batches(torch.arange(len(self)), batch_size)
        summed = torch.stack([self.loss(call(self.anchors[batch.rows]), batch) for batch in batches]).sum()
        return float(summed) / self.divisor

    @property
    def divisor(self) -> int:
        """What the summed distance is divided by for its mean."""
        return self.targets.numel() if self.kind in ("mse", "mae") else len(self)


def adapt_unit(
    module: nn.Module,
    call: UnitCall,
    objective: Objective,
    scales: Mapping[str, Tensor] | None,
    *,
    epochs: int,
    learning_rate: float,
    schedule: Schedule,
    batch_size: int,
    generator: torch.Generator,
    interpolation: float = 1.0,
    frozen: frozenset[str] = frozenset(),
    report: Callable[[int, float], None] = lambda epoch, loss: None,
) -> Adapted:
    """Fit a unit to the targets of all sources at once, from the parameters it has.

    Anchors and targets lie on the device throughout, batches are drawn by the host without asking the device, and the
    host looks at the loss once in ten epochs.

    Args:
        module: the unit at its start; changed in place.
        call: how to call it.
        objective: what to match.
        scales: ``sum_k |tau_k|`` by parameter name: step on elementwise coefficients. None: on the parameters.
        epochs: passes over all anchors.
        learning_rate: Adam's step size.
        schedule: "constant", or "linear": the step size falls to zero over all steps.
        batch_size: anchors a step, drawn from all sources mixed.
        generator: on the CPU; the order of the batches.
        interpolation: how far to go from the start (0) to the fitted parameters (1); the loss after is measured there.
        frozen: names of parameters that stay as they are.
        report: called with (epoch, loss) now and then.

    Raises:
        RunError: when the loss becomes infinite or not a number.
    """
    everything = dict(module.requires_grad_(False).named_parameters())
    moving = {name: value.requires_grad_(True) for name, value in everything.items() if name not in frozen}
    parameters = list(moving.values())
    start = [value.detach().to("cpu", copy=True) for value in parameters] if interpolation < 1 else []
    stepper = CoefficientAdam(parameters, None if scales is None else [scales[name] for name in moving], learning_rate)

    def run(x: Tensor) -> Tensor:
        return call(module, x)

    before = objective.mean(run, batch_size)
    total = epochs * -(-len(objective) // batch_size)
    for epoch in range(epochs):
        summed = torch.zeros((), device=objective.anchors.device)
        for batch in objective.batches(torch.randperm(len(objective), generator=generator), batch_size):
            loss = objective.loss(run(objective.anchors[batch.rows]), batch)
            rate = 1.0 if schedule == "constant" else 1 - stepper.steps / total
            stepper.step(torch.autograd.grad(loss, parameters, materialize_grads=True), rate)
            summed += loss.detach()
        if (epoch + 1) % 10 == 0 or epoch + 1 == epochs:
            current = float(summed) / objective.divisor
            if not math.isfinite(current):
                raise RunError(f"the adaptation loss is {current} at epoch {epoch}; try a smaller step size")
            report(epoch + 1, current)
    for value, origin in zip(parameters, start, strict=False):
        value.data = origin.to(value.device).lerp_(value.data, interpolation)
    after = objective.mean(run, batch_size)
    return Adapted({name: value.detach().cpu() for name, value in everything.items()}, before, after)
