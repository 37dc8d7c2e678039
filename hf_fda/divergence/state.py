"""Where learning stands: coefficients, the optimiser's moments and what was seen on the rows held out, as one file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_fda.errors import RunError


@dataclass(frozen=True)
class Look:
    """What was seen on the rows held out after some steps: the objective of each task."""

    step: int
    objective: tuple[float, ...]


@dataclass
class LearningState:
    """Learning after some steps of Adam.

    Args:
        coefficients: (K, G), float64 on the CPU; steps change them in place.
        step: steps taken.
        moments: Adam's two, of the same shape.
        history: all looks at the rows held out.
        best: the coefficients of the best look; of `best_step`, where `best_value` was seen.
        since_best: looks since then.
    """

    coefficients: Tensor
    step: int = 0
    moments: tuple[Tensor, Tensor] | None = None
    history: list[Look] = field(default_factory=list)
    best: Tensor | None = None
    best_step: int = 0
    best_value: float = math.inf
    since_best: int = 0

    def optimizer(self, learning_rate: float) -> torch.optim.Adam:
        """Adam on the coefficients, as far as it has come."""
        adam = torch.optim.Adam([self.coefficients], lr=learning_rate)
        if self.moments is None:
            self.moments = torch.zeros_like(self.coefficients), torch.zeros_like(self.coefficients)
        first, second = self.moments
        taken = torch.tensor(float(self.step))
        adam.state[self.coefficients] = {"step": taken, "exp_avg": first, "exp_avg_sq": second}
        return adam

    def look(self, found: Sequence[float], factors: Sequence[float]) -> float:
        """Remember what was measured at the coefficients of now, and whether it is the best.

        Args:
            found: each task's objective.
            factors: of each task's objective.

        Returns:
            the sum.

        Raises:
            RunError: when what is measured is not finite.
        """
        value = sum(factor * own for factor, own in zip(factors, found, strict=True))
        if not math.isfinite(value):
            raise RunError(f"the objective is {value} after {self.step} steps; try a smaller step size, or bounds")
        self.history.append(Look(self.step, tuple(found)))
        self.since_best += 1
        if value < self.best_value:
            self.best_value, self.best_step, self.since_best = value, self.step, 0
            self.best = self.coefficients.clone()
        return value

    def write(self, path: Path) -> None:
        """Write all to a safetensors file."""
        assert self.best is not None and self.moments is not None
        first, second = self.moments
        tensors = {"coefficients": self.coefficients, "best": self.best, "first": first, "second": second}
        rest = {
            "step": self.step,
            "history": [asdict(look) for look in self.history],
            "best_step": self.best_step,
            "best_value": self.best_value,
            "since_best": self.since_best,
        }
        save_file(tensors, path, {"learning": json.dumps(rest)})

    @classmethod
    def read(cls, path: Path) -> LearningState:
        """What `write` wrote, bit for bit."""
        with safe_open(path, "pt") as file:
            rest = json.loads(file.metadata()["learning"])
            tensors = {name: file.get_tensor(name) for name in ("coefficients", "best", "first", "second")}
        history = [Look(look["step"], tuple(look["objective"])) for look in rest.pop("history")]
        moments = tensors["first"], tensors["second"]
        return cls(tensors["coefficients"], moments=moments, history=history, best=tensors["best"], **rest)


Keep = Callable[[LearningState], None]
