"""Construction: anchors whose gradients on the base block point along the task vector (FDA, Section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_fda.anchors.gradients import (
    gradient_cosines,
    induced_gradients,
    make_matcher,
    matched_parameters,
    task_vectors,
)
from hf_fda.anchors.orthogonal import Stepper, make_stepper
from hf_fda.anchors.outputs import Matcher
from hf_fda.anchors.precision import fine_enough, matmul_precision
from hf_fda.blocks.capture import UnitCall
from hf_fda.errors import RunError
from hf_fda.merge_methods.fda import Distance, Optimizer, Precision

if TYPE_CHECKING:
    from hf_fda.anchors.rounding import Rounding

__all__ = [
    "UnitAnchors",
    "construct_unit",
    "gradient_cosines",
    "induced_gradients",
    "matched_parameters",
    "stalled",
    "task_vectors",
]

CHECK_EVERY = 10
"""Steps between looks at the loss: each look makes the device wait."""


@dataclass(frozen=True)
class UnitAnchors:
    """Anchors of one unit for one source.

    `anchors` are (n, T, d) and `targets` (n, T, d'), float32: the source unit's outputs on them. `loss` is the mean
    over parameter tensors of one minus the cosine between induced gradient and task vector; `cosines` are those
    cosines by parameter; `left_out` names the parameters without a gradient or without a task vector. `rounding` is
    what it does to a merge that both were stored in a narrower type, None where they were not. `snapshots` are anchors
    (n, T, d) on their way, by the steps done, where that was asked for.
    """

    anchors: Tensor
    targets: Tensor
    loss: float
    steps: int
    cosines: dict[str, float]
    left_out: tuple[str, ...] = ()
    rounding: Rounding | None = None
    snapshots: Mapping[int, Tensor] = field(default_factory=dict)

    @property
    def moves(self) -> bool:
        """Whether the source moves the unit; a file that says nothing about its construction counts as if it did."""
        return bool(self.cosines) or math.isnan(self.loss)


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
    optimizer: Optimizer = "adamw",
    precision: Precision | None = None,
    snapshots: Collection[int] = (),
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> UnitAnchors:
    """Optimise the anchors of one unit for one source.

    Minimises over X the sum over parameter tensors p of ``1 - cos(grad_p S(phi_0(X), phi_i(X)), tau_p)`` with
    S minus the distance, and keeps the X of the lowest loss. Only X gets a gradient.

    Args:
        base: the base's unit, frozen.
        source: the source's unit, frozen, on the same device.
        call: how to call both.
        start: (n, T, d), where X starts.
        offset: (T, d) added to X in front of the unit (position embeddings), or None. The anchors include it.
        steps: steps at most.
        learning_rate: AdamW's step size; of "muon", see `orthogonal.Muon`.
        kind: distance of the outputs.
        patience: stop when the best loss has not fallen by 1 % in so many steps; None never stops early. Of "muon" the
            step size falls over all `steps`, and the loss with it, so patience does not apply.
        optimizer: "adamw" at a constant step size as published, or "muon", which needs a fraction of the steps.
        precision: of float32 matrix products while X moves, as of `matmul_precision`, where it is `fine_enough` for
            what the source changes; None leaves what is set. The cosines, loss and targets returned are computed in
            what was set before.
        snapshots: numbers of steps after which X is kept as it is then (0: as it starts), wherever the loss is; those
            that construction does not come to have none.
        report: called with (step, loss) now and then.

    Raises:
        RunError: when the loss becomes infinite or not a number.
    """
    shift = torch.zeros_like(start[0]) if offset is None else offset
    tasks = task_vectors(base, source)
    matcher = make_matcher(base, source, tasks, call, start + shift, kind)
    used, best_x, done = matcher.tasks, start, 0
    kept = {0: (start + shift).cpu()} if 0 in snapshots else {}

    def watch(step: int, now: Tensor) -> None:
        if step in snapshots:
            kept[step] = (now.detach() + shift).cpu()

    if used and steps:
        window = patience if optimizer == "adamw" else None
        x = start.clone().requires_grad_(True)
        stepper = make_stepper(optimizer, x, learning_rate, steps)
        with matmul_precision(fine_enough(precision, _change(base, tasks), start.device), start.device):
            best_x, done = _descend(matcher, x, shift, stepper, steps, window, report, watch)
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
        snapshots=kept,
    )


def _change(base: nn.Module, tasks: Mapping[str, Tensor]) -> float:
    """The norm of a task vector, relative to that of the base's parameters."""
    both = list(tasks.values()), list(base.parameters())
    task, whole = (torch.stack([value.norm() for value in own]).norm() for own in both)
    return float(task / whole)


def _descend(
    matcher: Matcher,
    x: Tensor,
    shift: Tensor,
    stepper: Stepper,
    steps: int,
    patience: int | None,
    report: Callable[[int, float], None],
    watch: Callable[[int, Tensor], None],
) -> tuple[Tensor, int]:
    """The X of the lowest loss seen, and the number of steps; `watch` sees X after every step."""
    best_x, best = x.detach().clone(), torch.full((), math.inf, device=x.device)
    history: list[float] = []
    for done in range(1, steps + 1):
        loss = 1 - matcher(x + shift).mean()
        (x.grad,) = torch.autograd.grad(loss * len(matcher.tasks), x)
        loss = loss.detach()
        improved = loss < best
        best_x, best = torch.where(improved, x.detach(), best_x), torch.where(improved, loss, best)
        if done % CHECK_EVERY == 0 or done == steps:
            current = float(loss)
            if not math.isfinite(current):
                raise RunError(f"the construction loss is {current} at step {done - 1}; try a smaller learning_rate")
            history.append(float(best))
            report(done, history[-1])
            if patience is not None and stalled(history, patience // CHECK_EVERY):
                return best_x, done
        stepper.step()
        watch(done, x)
    return best_x, steps


def stalled(history: list[float], window: int) -> bool:
    """Whether the best loss fell by less than 1 % over the last `window` looks."""
    window = max(window, 1)
    return len(history) > window and history[-1] > 0.99 * history[-1 - window]
