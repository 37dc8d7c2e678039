"""Construction: anchors whose gradients on the base block point along the task vector (FDA, Section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_fda.anchors.descent import Descent, Reached, UnitError
from hf_fda.anchors.gradients import Matched, find_matched, gradient_cosines, task_vectors
from hf_fda.anchors.orthogonal import make_stepper
from hf_fda.anchors.outputs import Matcher
from hf_fda.anchors.precision import fine_enough, matmul_precision
from hf_fda.anchors.stacked import UnitPair, match_together
from hf_fda.blocks.capture import UnitCall
from hf_fda.errors import RunError
from hf_fda.merge_methods.fda import Distance, Optimizer, Precision

if TYPE_CHECKING:
    from hf_fda.anchors.rounding import Rounding


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
    report: Callable[[int, float], None] = lambda step, loss: None,
    **descent: Any,
) -> UnitAnchors:
    """Optimise the anchors of one unit for one source: `construct_units` of one, with the fields of a `UnitPair`.

    Raises:
        RunError: when the loss becomes infinite or not a number.
    """
    return construct_units([UnitPair(base, source, call, start, offset)], report=report, **descent)[0]


def construct_units(
    pairs: Sequence[UnitPair],
    *,
    steps: int,
    learning_rate: float,
    kind: Distance,
    patience: int | None,
    optimizer: Optimizer = "adamw",
    precision: Precision | None = None,
    snapshots: Collection[int] = (),
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> list[UnitAnchors]:
    """Optimise the anchors of several units, together where these are alike.

    Minimises over X the sum over parameter tensors p of ``1 - cos(grad_p S(phi_0(X), phi_i(X)), tau_p)`` with
    S minus the distance, and keeps the X of the lowest loss. Only X gets a gradient. Units do not depend on each other;
    that they run together shows in the rounding only.

    Args:
        pairs: the units, all on one device.
        steps: steps at most.
        learning_rate: AdamW's step size; of "muon", see `orthogonal.Muon`.
        kind: distance of the outputs.
        patience: stop a unit when its best loss has not fallen by 1 % in so many steps; None never stops early. Of
            "muon" the step size falls over all `steps`, and the loss with it, so patience does not apply.
        optimizer: "adamw" at a constant step size as published, or "muon", which needs a fraction of the steps.
        precision: of float32 matrix products while X moves, as of `matmul_precision`, where it is `fine_enough` for
            what the sources change; None leaves what is set. The cosines, loss and targets returned are computed in
            what was set before.
        snapshots: numbers of steps after which X is kept as it is then (0: as it starts), wherever the loss is; those
            that construction does not come to have none.
        report: called with (step, loss) now and then, of several units their mean loss.

    Raises:
        UnitError: when a unit's gradients are not finite, or its loss becomes infinite or not a number.
    """
    changes = [task_vectors(pair.base, pair.source) for pair in pairs]
    matched = [_matched(number, pair, changes[number], kind) for number, pair in enumerate(pairs)]
    reached = [Reached(pair.start, 0) for pair in pairs]
    moving = [number for number, own in enumerate(matched) if own.tasks and steps]
    for matcher, numbers in _matchers(pairs, matched, moving, kind):
        chosen = [pairs[number] for number in numbers]
        least = min(_change(pairs[number].base, changes[number]) for number in numbers)
        x = torch.stack([pair.start for pair in chosen]).requires_grad_(True)
        shift = torch.stack([pair.shift for pair in chosen]).unsqueeze(1)
        descent = Descent(matcher, x, shift, make_stepper(optimizer, x, learning_rate, steps), snapshots)
        with matmul_precision(fine_enough(precision, least, x.device), x.device):
            try:
                ends = descent.run(steps, patience if optimizer == "adamw" else None, report)
            except UnitError as error:
                raise UnitError(numbers[error.number], str(error)) from None
        for number, end in zip(numbers, ends, strict=True):
            reached[number] = end
    return [
        _finished(pair, change, own, end, kind, 0 in snapshots)
        for pair, change, own, end in zip(pairs, changes, matched, reached, strict=True)
    ]


def _matched(number: int, pair: UnitPair, change: Mapping[str, Tensor], kind: Distance) -> Matched:
    try:
        return find_matched(pair.base, pair.source, change, pair.call, pair.start + pair.shift, kind)
    except RunError as error:
        raise UnitError(number, str(error)) from None


def _matchers(
    pairs: Sequence[UnitPair], matched: Sequence[Matched], moving: Sequence[int], kind: Distance
) -> Iterator[tuple[Matcher, list[int]]]:
    """The units' cosines with the numbers of the units: of all together, or one after the other."""
    if len(moving) > 1:
        together = match_together([pairs[number] for number in moving], [matched[number] for number in moving], kind)
        if together is not None:
            yield together, list(moving)
            return
    for number in moving:
        pair = pairs[number]
        yield matched[number].matcher(pair.base, pair.source, pair.call, kind), [number]


def _finished(
    pair: UnitPair, change: Mapping[str, Tensor], matched: Matched, end: Reached, kind: Distance, with_start: bool
) -> UnitAnchors:
    """The anchors of a unit whose descent has ended."""
    anchors, used = (end.x + pair.shift).detach(), matched.tasks
    cosines = gradient_cosines(pair.base, pair.source, pair.call, anchors, used, kind).tolist() if used else []
    with torch.no_grad():
        targets = pair.call(pair.source, anchors)
    first = {0: (pair.start + pair.shift).cpu()} if with_start else {}
    return UnitAnchors(
        anchors.cpu(),
        targets.cpu(),
        loss=1 - sum(cosines) / len(cosines) if cosines else 0.0,
        steps=end.steps,
        cosines=dict(zip(used, cosines, strict=True)),
        left_out=tuple(name for name in change if name not in used),
        snapshots={**first, **end.snapshots},
    )


def _change(base: nn.Module, tasks: Mapping[str, Tensor]) -> float:
    """The norm of a task vector, relative to that of the base's parameters."""
    both = list(tasks.values()), list(base.parameters())
    task, whole = (torch.stack([value.norm() for value in own]).norm() for own in both)
    return float(task / whole)
