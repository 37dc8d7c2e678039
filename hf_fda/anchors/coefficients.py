"""Coefficients of task vectors from anchors: the merge of units that comes nearest to what the sources do on them.

With ``theta(Gamma) = theta_0 + sum_k Gamma_kg tau_k`` for the tensors of group g, the distance of the units' outputs on
every source's own anchors from its targets is minimised over Gamma: the objective of adaptation (FDA, Section 3.4) over
few numbers, as DivMerge (arXiv 2509.02108) does it with the divergence of whole models' outputs on rows of data. The
functions are smooth, of few variables and the same at every look, so L-BFGS with a line search takes a few dozen looks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hf_fda.anchors.adaptation import Aim, differentiate
from hf_fda.blocks.capture import UnitCall
from hf_fda.errors import RunError

MEMORY = 20
"""Earlier steps that L-BFGS remembers."""


@dataclass(frozen=True)
class UnitProblem:
    """A unit whose task vectors get coefficients: the base's module, for each parameter that any
    source moves its K task tensors, what its outputs shall be, and how it is called where the aim does not say so."""

    module: nn.Module
    tasks: Mapping[str, Sequence[Tensor]]
    aim: Aim
    call: UnitCall = field(default_factory=UnitCall)


class Combined:
    """A unit as a function of its coefficients.

    Args:
        problem: the unit.
        groups: the number of each parameter's group, by its name in the unit.
        batch_size: examples that run together.
    """

    def __init__(self, problem: UnitProblem, groups: Mapping[str, int], batch_size: int) -> None:
        self.problem, self.groups, self.batch_size = problem, groups, batch_size
        parameters = dict(problem.module.requires_grad_(False).named_parameters())
        self.moving = {name: parameters[name].requires_grad_(True) for name in problem.tasks}
        self.origin = {name: parameter.detach().clone() for name, parameter in self.moving.items()}

    def __call__(self, coefficients: Tensor) -> tuple[float, Tensor]:
        """The mean distance, and its derivative with respect to the coefficients.

        Args:
            coefficients: (K, G), in float64 on the CPU.
        """
        self._put(coefficients)
        gradients = {name: torch.zeros_like(parameter) for name, parameter in self.moving.items()}
        total = 0.0
        aim, parameters = self.problem.aim, list(self.moving.values())
        for batch in aim.batches(torch.arange(len(aim)), self.batch_size):
            found, loss = differentiate(aim, self.problem.module, self.problem.call, batch, parameters)
            for name, gradient in zip(self.moving, found, strict=True):
                gradients[name] += gradient
            total += float(loss)
        self._put(torch.zeros_like(coefficients))
        slopes = torch.zeros_like(coefficients)
        for name, gradient in gradients.items():
            products = [float(torch.sum(gradient * task, dtype=torch.float64)) for task in self.problem.tasks[name]]
            slopes[:, self.groups[name]] += torch.tensor(products, dtype=torch.float64)
        return total / aim.divisor, slopes / aim.divisor

    @torch.no_grad()
    def _put(self, coefficients: Tensor) -> None:
        """Bring the parameters to where the coefficients have them."""
        for name, parameter in self.moving.items():
            parameter.copy_(self.origin[name])
            factors = coefficients[:, self.groups[name]].tolist()
            for factor, task in zip(factors, self.problem.tasks[name], strict=True):
                parameter.add_(task, alpha=factor)


def learn_coefficients(
    units: Mapping[str, Callable[[], UnitProblem]],
    groups: Mapping[str, int],
    start: Tensor,
    *,
    steps: int = 50,
    batch_size: int = 1024,
    report: Callable[[str, float], None] = lambda what, distance: None,
) -> Tensor:
    """The coefficients of every group that bring the units nearest to what the sources do.

    Groups that share no unit do not depend on each other and are found one after the other; of a group that lies in
    several units the distances of these add up, each relative to that of the base's own unit.

    Args:
        units: what makes each unit, by its name; called at every look where a group lies in several units.
        groups: the number of each moving tensor's group, by the unit's name and the parameter's ("unit.parameter").
        start: (K, G), the coefficients to start from, in float64 on the CPU; what no unit depends on stays.
        steps: of L-BFGS at most.
        batch_size: examples that run together.
        report: called with the units' names and how far they are from the targets, relative to the base.

    Returns:
        (K, G).

    Raises:
        RunError: naming the unit whose distance is not a number.
    """
    found = start.clone()
    for names, own in _components(units, groups):
        distance = _Distance({name: units[name] for name in names}, groups, batch_size)
        found[:, own] = _minimised(distance, found, own, steps)
        report(", ".join(names), distance.last)
    return found


def _components(units: Mapping[str, object], groups: Mapping[str, int]) -> list[tuple[list[str], list[int]]]:
    """Units that depend on each other by the groups that they share, with these groups."""
    found: list[tuple[list[str], set[int]]] = []
    for unit in units:
        own = {number for name, number in groups.items() if name.startswith(f"{unit}.")}
        names = [unit]
        apart = []
        for others, theirs in found:
            if theirs & own:
                names, own = [*others, *names], own | theirs
            else:
                apart.append((others, theirs))
        found = [*apart, (names, own)]
    return [(names, sorted(own)) for names, own in found if own]


class _Distance:
    """The summed distances of some units, each relative to that of the base's own, as a function of (K, G)."""

    def __init__(
        self, units: Mapping[str, Callable[[], UnitProblem]], groups: Mapping[str, int], batch_size: int
    ) -> None:
        self.units, self.groups, self.batch_size = units, groups, batch_size
        self.kept = self._combined(next(iter(units))) if len(units) == 1 else None
        self.before: dict[str, float] = {}
        self.last = 1.0

    def _combined(self, unit: str) -> Combined:
        prefix = f"{unit}."
        own = {name.removeprefix(prefix): group for name, group in self.groups.items() if name.startswith(prefix)}
        return Combined(self.units[unit](), own, self.batch_size)

    def __call__(self, coefficients: Tensor) -> tuple[float, Tensor]:
        total, slopes = 0.0, torch.zeros_like(coefficients)
        for unit in self.units:
            combined = self.kept or self._combined(unit)
            if unit not in self.before:
                self.before[unit] = combined(torch.zeros_like(coefficients))[0]
            distance, slope = combined(coefficients)
            if not math.isfinite(distance):
                raise RunError(f"block '{unit}': the distance of its outputs is {distance}; start from less")
            scale = 1 / (self.before[unit] or 1.0) / len(self.units)
            total, slopes = total + distance * scale, slopes + slope * scale
        self.last = total
        return total, slopes


def _minimised(distance: _Distance, start: Tensor, own: list[int], steps: int) -> Tensor:
    """The best coefficients (K, g) of some groups, those of the others being what they are."""
    variable = start[:, own].clone().requires_grad_(True)
    search = torch.optim.LBFGS(
        [variable], max_iter=steps, max_eval=2 * steps, history_size=MEMORY, line_search_fn="strong_wolfe"
    )

    def look() -> Tensor:
        whole = start.clone()
        whole[:, own] = variable.detach()
        value, slopes = distance(whole)
        variable.grad = slopes[:, own].clone()
        return torch.tensor(value, dtype=torch.float64)

    if steps:
        search.step(look)
    return variable.detach()
