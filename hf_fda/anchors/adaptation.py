"""Adaptation: moving a unit's parameters until its outputs on all anchors match the sources' (FDA, Section 3.4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_fda.anchors.construction import UnitAnchors
from hf_fda.anchors.distance import distance
from hf_fda.anchors.metric import shift_metric
from hf_fda.anchors.precision import fine_enough, matmul_precision
from hf_fda.anchors.products import NarrowProducts
from hf_fda.anchors.stepping import Moves, Product, Stepper
from hf_fda.blocks.capture import UnitCall
from hf_fda.devices import release_memory
from hf_fda.errors import RunError
from hf_fda.lowrank import LowRank
from hf_fda.merge_methods.fda import AdaptationDistance, FDAConfig, Precision, Schedule
from hf_fda.shared_sum import SharedSum


@dataclass(frozen=True)
class Adapted:
    """An adapted unit (on the CPU) and the mean distance before and after: its parameters by name, and of those that
    moved by their factors these, ``theta - theta_0``, instead."""

    parameters: dict[str, Tensor]
    factors: dict[str, LowRank]
    loss_before: float
    loss_after: float


@dataclass(frozen=True)
class Batch:
    """Numbers of anchors (b,), on the device, in the order of their sources, and how many each source has."""

    rows: Tensor
    counts: tuple[int, ...]


class Aim(Protocol):
    """What a unit is fitted to: examples of all sources, in batches that only the aim understands."""

    def __len__(self) -> int:
        """The number of examples."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the examples lie."""
        ...

    @property
    def divisor(self) -> int:
        """What the summed distance is divided by for its mean."""
        ...

    def batches(self, order: Tensor, batch_size: int) -> Sequence[Any]:
        """Examples in some order, (n,) numbers on the CPU, cut into batches."""
        ...

    @property
    def adding(self) -> SharedSum:
        """How what comes of a batch is added, in one process or several."""
        ...

    def terms(self, batch: Any) -> Mapping[int, Any]:
        """A batch by the leaves of `adding`; parts that other processes evaluate stand there too."""
        ...

    def evaluate(self, module: nn.Module, call: UnitCall, part: Any) -> Tensor:
        """A unit's distance summed over a part of a batch that this process evaluates, a scalar."""
        ...


@torch.no_grad()
def mean_distance(aim: Aim, module: nn.Module, call: UnitCall, batch_size: int) -> float:
    """The distance per example (per entry, for "mse" and "mae") of a unit's outputs from all targets."""
    terms: dict[int, list[Any]] = {}
    for batch in aim.batches(torch.arange(len(aim)), batch_size):
        for leaf, part in aim.terms(batch).items():
            terms.setdefault(leaf, []).append(part)

    def distances(parts: Sequence[Any]) -> list[Tensor]:
        return [torch.stack([aim.evaluate(module, call, part) for part in parts]).sum()]

    (summed,) = aim.adding.sum(terms, distances, [torch.zeros((), device=aim.device)])
    return float(summed) / aim.divisor


def differentiate(
    aim: Aim, module: nn.Module, call: UnitCall, batch: Any, parameters: Sequence[Tensor]
) -> tuple[list[Tensor], Tensor]:
    """The derivatives of a unit's distance, summed over a batch, with respect to some of its parameters, and that
    distance."""

    def gradients(part: Any) -> list[Tensor]:
        loss = aim.evaluate(module, call, part)
        return [*torch.autograd.grad(loss, parameters, materialize_grads=True), loss.detach()]

    *found, loss = aim.adding.sum(aim.terms(batch), gradients, [*parameters, torch.zeros((), device=aim.device)])
    return found, loss


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
        self.adding = SharedSum.alone()
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

    def terms(self, batch: Batch) -> dict[int, Batch]:
        """As `Aim.terms`: anchors of all sources run together."""
        return {0: batch}

    def evaluate(self, module: nn.Module, call: UnitCall, batch: Batch) -> Tensor:
        """As `Aim.evaluate`."""
        return self.loss(call(module, self.anchors[batch.rows]), batch)

    @property
    def device(self) -> torch.device:
        """Where anchors and targets lie."""
        return self.anchors.device

    @property
    def divisor(self) -> int:
        """What the summed distance is divided by for its mean."""
        return self.targets.numel() if self.kind in ("mse", "mae") else len(self)


def objective_of(
    config: FDAConfig, module: nn.Module, call: UnitCall, found: Sequence[UnitAnchors], device: torch.device
) -> Objective:
    """What a unit shall match, from the base's unit and the anchors of the sources that move it."""
    anchors = [own.anchors.to(device) for own in found]
    targets = [own.targets.to(device) for own in found]
    assert config.adaptation_distance is not None
    shifts = None
    if config.adaptation_distance == "shift":
        with torch.no_grad():
            shifts = [target - call(module, own) for own, target in zip(anchors, targets, strict=True)]
    return Objective(config.adaptation_distance, anchors, targets, shifts, config.metric_power)


def adapt_unit(
    module: nn.Module,
    call: UnitCall,
    objective: Aim,
    moves: Moves,
    *,
    epochs: int,
    learning_rate: float,
    schedule: Schedule,
    batch_size: int,
    generator: torch.Generator,
    interpolation: float = 1.0,
    frozen: frozenset[str] = frozenset(),
    never_worse: bool = False,
    precision: Precision | None = None,
    report: Callable[[int, float], None] = lambda epoch, loss: None,
) -> Adapted:
    """Fit a unit to the targets of all sources at once, from the parameters it has.

    Examples and targets lie on the device throughout, batches are drawn by the host without asking the device, and the
    host looks at the loss once in ten epochs.

    Args:
        module: the unit at its start (at theta_0 in what is factored); changed in place.
        call: how to call it.
        objective: what to match.
        moves: what is stepped on, and where factors start.
        epochs: passes over all anchors.
        learning_rate: Adam's step size.
        schedule: "constant", or "linear": the step size falls to zero over all steps.
        batch_size: anchors a step, drawn from all sources mixed.
        generator: on the CPU; the order of the batches.
        interpolation: how far to go from the start (0) to the end (1) in what is stepped on; the loss after is measured
            there.
        frozen: names of parameters that stay as they are.
        never_worse: go back to the start where the distance to all targets is not smaller in the end: a unit that has
            what it shall match would otherwise follow rounding noise.
        precision: of float32 matrix products while the unit moves, as of `matmul_precision`, where it is `fine_enough`
            for `moves.change`; the losses before and after are measured in what was set before.
        report: called with (epoch, loss) now and then.

    Raises:
        RunError: when the loss becomes infinite or not a number.
    """
    everything = dict(module.requires_grad_(False).named_parameters())
    products = {name: Product(everything[name], own) for name, own in moves.factors.items()}
    moving = {name: value.requires_grad_(True) for name, value in everything.items() if name not in frozen}
    parameters = list(moving.values())
    followed = {name: own for name, own in products.items() if name in moving}
    stepper = Stepper(moving, followed, moves.scales, learning_rate)
    start = stepper.values() if interpolation < 1 or never_worse else []
    before = mean_distance(objective, module, call, batch_size)
    precision = fine_enough(precision, moves.change, objective.device)
    total, narrow = epochs * -(-len(objective) // batch_size), NarrowProducts()
    for epoch in range(epochs):
        summed = torch.zeros((), device=objective.device)
        for batch in objective.batches(torch.randperm(len(objective), generator=generator), batch_size):
            with matmul_precision(precision, objective.device), narrow:
                gradients, loss = differentiate(objective, module, call, batch, parameters)
            stepper.step(gradients, 1.0 if schedule == "constant" else 1 - stepper.steps / total)
            summed += loss
        release_memory()  # real rows are of many lengths
        if (epoch + 1) % 10 == 0 or epoch + 1 == epochs:
            current = float(summed) / objective.divisor
            if not math.isfinite(current):
                raise RunError(f"the adaptation loss is {current} at epoch {epoch}; try a smaller step size")
            report(epoch + 1, current)
    if interpolation < 1:
        stepper.draw_back(start, interpolation)
    after = mean_distance(objective, module, call, batch_size)
    if never_worse and not after < before:
        stepper.draw_back(start, 0.0)
        after = before
    plain = {name: value.detach().cpu() for name, value in everything.items() if name not in products}
    factors = {name: own.product.to("cpu", torch.float32) for name, own in products.items()}
    return Adapted(plain, factors, before, after)
