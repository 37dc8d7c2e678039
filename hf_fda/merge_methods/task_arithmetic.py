"""Task arithmetic: the base plus a scaled sum of task vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_fda.merge_methods.combining import SummedConfig, summed
from hf_fda.merge_methods.config import option
from hf_fda.merge_methods.registry import register


@dataclass(frozen=True, kw_only=True)
class TaskArithmeticConfig(SummedConfig):
    """Options of `task_arithmetic`."""

    name: ClassVar[str] = "task_arithmetic"
    summary: ClassVar[str] = "base + scaling * sum of the task vectors"
    paper: ClassVar[str] = "Editing models with task arithmetic, arXiv 2212.04089"

    scaling: float = option(0.4, "lambda: factor of the sum of the task vectors")

    def coefficients(self, count: int) -> tuple[float, ...]:
        """``lambda w_i``, over ``sum_i w_i`` with `normalize`."""
        return tuple(self.factor(count) * weight for weight in self.weight_of_each(count))


@register(TaskArithmeticConfig)
def task_arithmetic(base: Tensor, tasks: Sequence[Tensor], config: TaskArithmeticConfig) -> Tensor:
    """``lambda * sum_i w_i tau_i``, divided by ``sum_i w_i`` with `normalize`.

    Args:
        base: theta_0, any shape (unused).
        tasks: K task tensors of that shape.
        config: the options; `weights` in the order of `tasks`.
    """
    return summed(tasks, config)
