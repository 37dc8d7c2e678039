"""The weighted sum of task vectors under the names that PEFT has for it, exact however it is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_fda.merge_methods.config import option
from hf_fda.merge_methods.registry import register
from hf_fda.merge_methods.task_arithmetic import TaskArithmeticConfig, task_arithmetic


@dataclass(frozen=True, kw_only=True)
class CatConfig(TaskArithmeticConfig):
    """Options of `cat`."""

    name: ClassVar[str] = "cat"
    summary: ClassVar[str] = "weighted sum of the task vectors, as PEFT's combination of adapters of that name"
    paper: ClassVar[str] = "Editing models with task arithmetic, arXiv 2212.04089"

    scaling: float = option(1.0, "lambda: factor of the sum of the task vectors")


@dataclass(frozen=True, kw_only=True)
class SVDConfig(CatConfig):
    """Options of `svd`."""

    name: ClassVar[str] = "svd"
    summary: ClassVar[str] = "weighted sum of the task vectors, kept in an adapter of a given rank or energy"


@register(SVDConfig)
@register(CatConfig)
def cat(base: Tensor, tasks: Sequence[Tensor], config: CatConfig) -> Tensor:
    """``lambda * sum_i w_i tau_i``. In a merged adapter the factors of all adapters lie beside each other, truncated to
    the `rank` or `energy` that is asked for.

    Args:
        base: theta_0, any shape (unused).
        tasks: K task tensors of that shape.
        config: the options; `weights` in the order of `tasks`.
    """
    return task_arithmetic(base, tasks, config)
