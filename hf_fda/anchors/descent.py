"""The descent of construction: the X of one or several units moves until all steps are done or its loss stalls."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_fda.anchors.orthogonal import Stepper
from hf_fda.anchors.outputs import Matcher
from hf_fda.errors import RunError

CHECK_EVERY = 10
"""Steps between looks at the loss: each look makes the device wait."""


class UnitError(RunError):
    """Why a unit's anchors cannot be constructed; `number` is the unit's among those that are constructed together."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


@dataclass(frozen=True)
class Reached:
    """Where a unit's descent ended: X (n, T, d) of the lowest loss, the steps it took, and anchors (n, T, d) on their
    way, by the steps done."""

    x: Tensor
    steps: int
    snapshots: Mapping[int, Tensor] = field(default_factory=dict)


class Descent:
    """One run of steps of S units at once.

    Args:
        matcher: their cosines.
        x: (S, n, T, d), which `stepper` moves.
        shift: (S, 1, T, d), added to X in front of the units.
        stepper: moves `x` along its gradient.
        snapshots: numbers of steps after which X is kept.
    """

    def __init__(
        self, matcher: Matcher, x: Tensor, shift: Tensor, stepper: Stepper, snapshots: Collection[int] = ()
    ) -> None:
        self.matcher, self.x, self.shift, self.stepper, self.wanted = matcher, x, shift, stepper, snapshots
        self.count = len(x)
        self.best_x, self.best = x.detach().clone(), x.new_full((self.count,), math.inf)
        self.histories: list[list[float]] = [[] for _ in range(self.count)]
        self.ended: list[int | None] = [None] * self.count
        self.snapshots: list[dict[int, Tensor]] = [{} for _ in range(self.count)]

    def run(self, steps: int, patience: int | None, report: Callable[[int, float], None]) -> list[Reached]:
        """All steps, or those until every unit's loss has stalled; arguments as of `construct_units`.

        Raises:
            UnitError: when a unit's loss becomes infinite or not a number.
        """
        moving = torch.ones_like(self.best, dtype=torch.bool)
        for done in range(1, steps + 1):
            loss = 1 - self.matcher(self.x + self.shift).mean(-1)
            (self.x.grad,) = torch.autograd.grad(loss.sum() * len(self.matcher.tasks), self.x)
            loss = loss.detach()
            improved = (loss < self.best) & moving
            self.best_x = torch.where(improved.view(-1, 1, 1, 1), self.x.detach(), self.best_x)
            self.best = torch.where(improved, loss, self.best)
            if done % CHECK_EVERY == 0 or done == steps:
                self._look(loss.tolist(), done, patience, report)
                if None not in self.ended:
                    break
                if any(self.ended):
                    moving = torch.tensor([end is None for end in self.ended], device=moving.device)
            self.stepper.step()
            self._keep(done)
        ends = [steps if end is None else end for end in self.ended]
        return [Reached(*own) for own in zip(self.best_x, ends, self.snapshots, strict=True)]

    def _look(
        self, losses: Sequence[float], done: int, patience: int | None, report: Callable[[int, float], None]
    ) -> None:
        """Check what the losses are, and note whose have stalled."""
        for number, (loss, best) in enumerate(zip(losses, self.best.tolist(), strict=True)):
            if self.ended[number] is not None:
                continue
            if not math.isfinite(loss):
                what = f"the construction loss is {loss} at step {done - 1}; try a smaller learning_rate"
                raise UnitError(number, what)
            self.histories[number].append(best)
            if patience is not None and stalled(self.histories[number], patience // CHECK_EVERY):
                self.ended[number] = done
        report(done, sum(history[-1] for history in self.histories) / self.count)

    def _keep(self, done: int) -> None:
        """Keep X where it is now, of the units that still move."""
        if done in self.wanted:
            for number, x in enumerate((self.x.detach() + self.shift).cpu()):
                if self.ended[number] is None:
                    self.snapshots[number][done] = x


def stalled(history: Sequence[float], window: int) -> bool:
    """Whether the best loss fell by less than 1 % over the last `window` looks."""
    window = max(window, 1)
    return len(history) > window and history[-1] > 0.99 * history[-1 - window]
