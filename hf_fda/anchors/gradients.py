"""The gradients that anchors induce in the base's unit, and which of them can be matched to a task vector."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_fda.anchors.distance import distance
from hf_fda.anchors.outputs import Matcher
from hf_fda.blocks.capture import Call, UnitCall, apart
from hf_fda.errors import RunError, few
from hf_fda.merge_methods.fda import Distance

NO_GRADIENT = 1e-9
"""A parameter whose gradient, in float64, is smaller than this fraction of the largest has none."""

FAITHFUL = 1e-6
"""How far, in float64, a cosine from a layer's output may be from the one that autograd's gradient gives."""


def task_vectors(base: nn.Module, source: nn.Module) -> dict[str, Tensor]:
    """theta_i - theta_0 of a unit, by parameter."""
    own = dict(source.named_parameters())
    return {name: (own[name] - parameter).detach() for name, parameter in base.named_parameters()}


def gradient_cosines(
    base: nn.Module, source: nn.Module, call: UnitCall, x: Tensor, tasks: Mapping[str, Tensor], kind: Distance
) -> Tensor:
    """Cosine between each parameter's induced gradient and its task vector, differentiable in `x`.

    Args:
        base: the base's unit.
        source: the source's unit.
        call: how to call both.
        x: (n, T, d), requires a gradient if the cosines shall be differentiated.
        tasks: P task vectors by parameter name.
        kind: distance of the outputs.

    Returns:
        (P,): ``cos(grad_p S, tau_p)``, S minus the distance.
    """
    gradients = induced_gradients(base, source, call, x, list(tasks), kind, create_graph=x.requires_grad)
    return torch.stack([_cosine(gradient, task) for gradient, task in zip(gradients, tasks.values(), strict=True)])


def induced_gradients(
    base: nn.Module,
    source: nn.Module,
    call: Call,
    x: Tensor,
    names: list[str],
    kind: Distance,
    create_graph: bool = False,
) -> list[Tensor]:
    """``grad_p S(phi(theta_0; X), phi(theta_i; X))`` for the named parameters, S minus the distance."""
    return gradients_towards(base, call, x, call(source, x), names, kind, create_graph)


def gradients_towards(
    base: nn.Module,
    call: Call,
    x: Tensor,
    target: Tensor,
    names: list[str],
    kind: Distance,
    create_graph: bool = False,
) -> list[Tensor]:
    """As `induced_gradients`, from the source's outputs (n, T, d') in place of the source."""
    parameters = dict(base.named_parameters())
    chosen = [parameters[name].requires_grad_(True) for name in names]
    try:
        similarity = -distance(kind, call(base, x), target)
        return list(torch.autograd.grad(similarity, chosen, create_graph=create_graph, materialize_grads=True))
    finally:
        base.requires_grad_(False)


@dataclass(frozen=True)
class Matched:
    """What of a unit can be matched: task vectors by parameter name, and which of these parameters' gradients autograd
    has to build although a linear layer owns them (`plain`)."""

    tasks: dict[str, Tensor]
    plain: frozenset[str] = frozenset()

    def matcher(self, base: nn.Module, source: nn.Module, call: Call, kind: Distance) -> Matcher:
        """The cosines of one unit as a function of X (1, n, T, d)."""
        tasks = {name: task.unsqueeze(0) for name, task in self.tasks.items()}
        return Matcher(base, source, call, tasks, kind, self.plain)


def find_matched(
    base: nn.Module, source: nn.Module, tasks: Mapping[str, Tensor], call: UnitCall, x: Tensor, kind: Distance
) -> Matched:
    """The task vectors that can be matched: not zero, and of a parameter whose gradient is not identically zero.

    A gradient that is zero in exact arithmetic (the key bias under softmax) is rounding noise in float32 and would
    only add noise to the cosine. In float64, on a few anchors, it stands ten orders below the others. There it is also
    seen where output gradients are not the whole story: a weight that is used otherwise than by its own linear layer,
    too, is left to autograd.

    Args:
        base: the base's unit.
        source: the source's unit.
        tasks: all task vectors by parameter name.
        call: how to call both.
        x: (n, T, d); a few of them are tried.
        kind: distance of the outputs.

    Raises:
        RunError: naming the parameters, when a gradient is not finite; when a unit does not run apart from its model.
    """
    names = [name for name, task in tasks.items() if bool(task.any())]
    if not names:
        return Matched({})
    (first, second), double_call, sample = in_double((base, source), call, x)
    with apart("it"):
        found = induced_gradients(first, second, double_call, sample, names, kind)
    gradients = dict(zip(names, found, strict=True))
    sizes = {name: float(gradient.square().mean().sqrt()) for name, gradient in gradients.items()}
    broken = [name for name, size in sizes.items() if not math.isfinite(size)]
    if broken:
        raise RunError(
            f"the gradient of {few(broken)} is not finite; check the weights for infinities or NaN, or, where they are "
            "sound, name parts of the blocks (such as unit='mlp') or use a parameter-space method"
        )
    floor = NO_GRADIENT * max(sizes.values())
    used = {name: tasks[name].to(sample) for name in names if sizes[name] > floor}
    plain = [_cosine(gradients[name], task) for name, task in used.items()]
    quick = Matched(used).matcher(first, second, double_call, kind)(sample.unsqueeze(0))[0].tolist() if used else []
    left = [name for name, one, own in zip(used, plain, quick, strict=True) if not abs(one - own) < FAITHFUL]
    return Matched({name: tasks[name] for name in used}, frozenset(left))


def in_double(modules: Sequence[nn.Module], call: UnitCall, x: Tensor) -> tuple[list[nn.Module], UnitCall, Tensor]:
    """Modules, their call and some anchors in float64."""
    device = torch.device("cpu") if x.device.type == "mps" else x.device  # which has no float64
    double = [copy.deepcopy(module).to(device, torch.float64) for module in modules]
    return double, call.to(torch.float64), x[:8].detach().to(device, torch.float64)


def _cosine(gradient: Tensor, task: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(gradient.flatten(), task.flatten(), dim=0, eps=1e-30)
