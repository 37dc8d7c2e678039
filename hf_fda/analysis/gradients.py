"""Whether anchors induce the gradients that real hidden states do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_fda.anchors.gradients import NO_GRADIENT, Call, gradients_towards, induced_gradients
from hf_fda.blocks import UnitCall
from hf_fda.errors import InputError
from hf_fda.merge_methods.fda import Distance
from hf_fda.states import UnitStates


@dataclass(frozen=True)
class GradientAgreement:
    """The cosine between two gradients of each parameter, by its name in the unit; `left_out` names those without a
    gradient in one of them (the key bias under softmax)."""

    cosines: Mapping[str, float]
    left_out: tuple[str, ...]

    @property
    def mean(self) -> float:
        """The mean over the parameters; zero where none has a gradient."""
        return sum(self.cosines.values()) / len(self.cosines) if self.cosines else 0.0


def gradient_agreement(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> GradientAgreement:
    """The cosine of two gradients, parameter by parameter, in float64.

    A gradient that is a `NO_GRADIENT` share of the largest of its kind, in root mean square, is taken for rounding.

    >>> x, y = {"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([2.0, 0.0])}
    >>> gradient_agreement(x, y).cosines
    {'w': 1.0}

    Args:
        first: by parameter.
        second: of the same parameters.

    Raises:
        InputError: when the parameters differ, there are none, or a gradient is not finite.
    """
    if not first or first.keys() != second.keys():
        raise InputError("gradients can be compared of the same parameters only, one at least")
    sizes = [
        {name: float(own.double().square().mean().sqrt()) for name, own in each.items()} for each in (first, second)
    ]
    for name in first:
        if not all(torch.isfinite(each[name]).all() for each in (first, second)):
            raise InputError(f"the gradient of {name} is not finite; check the weights for infinities or NaN")
    floors = [NO_GRADIENT * max(own.values()) for own in sizes]
    used = [name for name in first if all(own[name] > floor for own, floor in zip(sizes, floors, strict=True))]
    cosines = {name: _cosine(first[name].double().flatten(), second[name].double().flatten()) for name in used}
    return GradientAgreement(cosines, tuple(name for name in first if name not in used))


def _cosine(first: Tensor, second: Tensor) -> float:
    return float(functional.cosine_similarity(first, second, dim=0, eps=torch.finfo(torch.float64).tiny))


def anchor_gradients(
    base: nn.Module, call: Call, anchors: Tensor, targets: Tensor, names: Sequence[str], kind: Distance
) -> dict[str, Tensor]:
    """The gradients that anchors induce in the base's unit.

    Args:
        base: the unit, frozen.
        call: how to call it.
        anchors: (n, T, d) on its device, in its type.
        targets: (n, T, d'), the source unit's outputs on them.
        names: of the parameters.
        kind: distance of the outputs, as in construction.

    Returns:
        by parameter, ``grad_p S(phi(theta_0; X), targets)`` with S minus the distance.
    """
    found = gradients_towards(base, call, anchors, targets, list(names), kind)
    return dict(zip(names, found, strict=True))


def states_gradients(
    base: nn.Module, source: nn.Module, states: UnitStates, names: Sequence[str], kind: Distance, batch_size: int = 16
) -> dict[str, Tensor]:
    """The gradients that real hidden states induce in the base's unit: the mean over rows, as over anchors.

    What rows are filled up with counts nowhere: the outputs there are taken for zero in both models.

    Args:
        base: the unit, frozen.
        source: the source's unit, frozen, on the same device.
        states: what the unit is called with on real rows, on the device.
        names: of the parameters.
        kind: distance of the outputs; of "mse" and "mae" the mean is over the positions of the longest row.
        batch_size: rows at a time.

    Raises:
        InputError: when there are no rows.
    """
    if not len(states):
        raise InputError("there are no rows of hidden states; record some")
    dtype = next(base.parameters()).dtype
    total: dict[str, Tensor] = {}
    for rows in torch.arange(len(states), device=states.inputs.places.device).split(batch_size):
        real = states.inputs.real_at(rows)[..., None]
        masked = _masked(states.call.at(rows).to(dtype), real)
        found = induced_gradients(base, source, masked, states.inputs.at(rows).to(dtype), list(names), kind)
        for name, own in zip(names, found, strict=True):
            share = own * (len(rows) / len(states))
            total[name] = total[name] + share if name in total else share
    return total


def _masked(call: UnitCall, real: Tensor) -> Call:
    """A call whose outputs are zero where a position is not real."""
    return lambda module, x: call(module, x) * real
