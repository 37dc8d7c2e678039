"""Construction: anchors whose gradients on the base block point along the task vector (FDA, Section 3.2)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_fda.anchors.distance import distance
from hf_fda.blocks.capture import UnitCall
from hf_fda.errors import RunError, few
from hf_fda.merge_methods.fda import Distance

CHECK_EVERY = 10
"""Steps between looks at the loss: each look makes the device wait."""

NO_GRADIENT = 1e-9
"""A parameter whose gradient, in float64, is smaller than this fraction of the largest has none."""


@dataclass(frozen=True)
class UnitAnchors:
    """Anchors of one unit for one source.

    `anchors` are (n, T, d) and `targets` (n, T, d'), float32: the source unit's outputs on them. `loss` is the mean
    over parameter tensors of one minus the cosine between induced gradient and task vector; `cosines` are those
    cosines by parameter; `left_out` names the parameters without a gradient or without a task vector.
    """

    anchors: Tensor
    targets: Tensor
    loss: float
    steps: int
    cosines: dict[str, float]
    left_out: tuple[str, ...] = ()


def construct_unit(
    base: nn.Module,
    source: nn.Module,
    call: UnitCall,
    start: Tensor,
    offset: Tensor | None,
    *,
    steps: int,
    learning_rate: float,
    kind: Distance,
    patience: int | None,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> UnitAnchors:
    """Optimise the anchors of one unit for one source, by AdamW.

    Minimises over X the sum over parameter tensors p of ``1 - cos(grad_p S(phi_0(X), phi_i(X)), tau_p)`` with
    S minus the distance, and keeps the X of the lowest loss. Only X gets a gradient.

    Args:
        base: the base's unit, frozen.
        source: the source's unit, frozen, on the same device.
        call: how to call both.
        start: (n, T, d), where X starts.
        offset: (T, d) added to X in front of the unit (position embeddings), or None. The anchors include it.
        steps: steps at most.
        learning_rate: AdamW step size.
        kind: distance of the outputs.
        patience: stop when the best loss has not fallen by 1 % in so many steps; None never stops early.
        report: called with (step, loss) now and then.

    Raises:
        RunError: when the loss becomes infinite or not a number.
    """
    shift = torch.zeros_like(start[0]) if offset is None else offset
    tasks = task_vectors(base, source)
    used = matched_parameters(base, source, tasks, call, start + shift, kind)
    x = start.clone().requires_grad_(True)
    best_x, best = start.clone(), torch.full((), math.inf, device=start.device)
    optimizer = torch.optim.AdamW([x], lr=learning_rate)
    history: list[float] = []
    done = 0
    for step in range(steps if used else 0):
        loss = 1 - gradient_cosines(base, source, call, x + shift, used, kind).mean()
        improved = loss.detach() < best
        best_x, best = torch.where(improved, x.detach(), best_x), torch.where(improved, loss.detach(), best)
        (x.grad,) = torch.autograd.grad(loss * len(used), x)
        optimizer.step()
        done = step + 1
        if done % CHECK_EVERY == 0 or done == steps:
            current = float(loss.detach())
            if not math.isfinite(current):
                raise RunError(f"the construction loss is {current} at step {step}; try a smaller learning_rate")
            history.append(float(best))
            report(done, history[-1])
            if patience is not None and stalled(history, patience // CHECK_EVERY):
                break
    anchors = (best_x + shift).detach()
    cosines = gradient_cosines(base, source, call, anchors, used, kind).tolist() if used else []
    with torch.no_grad():
        targets = call(source, anchors)
    return UnitAnchors(
        anchors.cpu(),
        targets.cpu(),
        loss=1 - sum(cosines) / len(cosines) if cosines else 0.0,
        steps=done,
        cosines=dict(zip(used, cosines, strict=True)),
        left_out=tuple(name for name in tasks if name not in used),
    )


def stalled(history: list[float], window: int) -> bool:
    """Whether the best loss fell by less than 1 % over the last `window` looks."""
    window = max(window, 1)
    return len(history) > window and history[-1] > 0.99 * history[-1 - window]


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
    cosines = [
        torch.nn.functional.cosine_similarity(gradient.flatten(), task.flatten(), dim=0, eps=1e-30)
        for gradient, task in zip(gradients, tasks.values(), strict=True)
    ]
    return torch.stack(cosines)


def induced_gradients(
    base: nn.Module,
    source: nn.Module,
    call: UnitCall,
    x: Tensor,
    names: list[str],
    kind: Distance,
    create_graph: bool = False,
) -> list[Tensor]:
    """``grad_p S(phi(theta_0; X), phi(theta_i; X))`` for the named parameters, S minus the distance."""
    parameters = dict(base.named_parameters())
    chosen = [parameters[name].requires_grad_(True) for name in names]
    try:
        similarity = -distance(kind, call(base, x), call(source, x))
        return list(torch.autograd.grad(similarity, chosen, create_graph=create_graph, materialize_grads=True))
    finally:
        base.requires_grad_(False)


def matched_parameters(
    base: nn.Module, source: nn.Module, tasks: Mapping[str, Tensor], call: UnitCall, x: Tensor, kind: Distance
) -> dict[str, Tensor]:
    """The task vectors that can be matched: not zero, and of a parameter whose gradient is not identically zero.

    A gradient that is zero in exact arithmetic (the key bias under softmax) is rounding noise in float32 and would
    only add noise to the cosine. In float64, on a few anchors, it stands ten orders below the others.

    Raises:
        RunError: naming the parameters, when a gradient is not finite.
    """
    names = [name for name, task in tasks.items() if bool(task.any())]
    if not names:
        return {}
    device = torch.device("cpu") if x.device.type == "mps" else x.device  # which has no float64
    double = [copy.deepcopy(module).to(device, torch.float64) for module in (base, source)]
    sample = x[:8].detach().to(device, torch.float64)
    gradients = induced_gradients(double[0], double[1], call.to(torch.float64), sample, names, kind)
    sizes = {name: float(gradient.square().mean().sqrt()) for name, gradient in zip(names, gradients, strict=True)}
    broken = [name for name, size in sizes.items() if not math.isfinite(size)]
    if broken:
        raise RunError(f"the gradient of {few(broken)} is not finite; check the weights for infinities or NaN")
    floor = NO_GRADIENT * max(sizes.values())
    return {name: tasks[name] for name in names if sizes[name] > floor}
