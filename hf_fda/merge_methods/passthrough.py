"""Passthrough: one source as it is, or its parameters times a number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_fda.merge_methods.config import MethodConfig, option
from hf_fda.merge_methods.registry import register


@dataclass(frozen=True, kw_only=True)
class PassthroughConfig(MethodConfig):
    """Options of `passthrough`."""

    name: ClassVar[str] = "passthrough"
    summary: ClassVar[str] = "one source as it is, or its parameters times a number"
    paper: ClassVar[str] = "mergekit's method of that name, arXiv 2403.13257"
    max_sources: ClassVar[int | None] = 1

    scale: float = option(1.0, "factor of the source's parameters (not of its task vector)")

    def coefficients(self, count: int) -> tuple[float, ...] | None:
        """One, where the source stays as it is; scaled parameters are no multiple of a task vector."""
        return (1.0,) if self.scale == 1 else None

    def leaves_equals(self) -> bool:
        """Not where parameters are scaled."""
        return self.scale == 1


@register(PassthroughConfig)
def passthrough(base: Tensor, tasks: Sequence[Tensor], config: PassthroughConfig) -> Tensor:
    """``scale * theta_1 - theta_0``.

    Args:
        base: theta_0, any shape.
        tasks: one task tensor of that shape.
        config: the options.
    """
    return config.scale * tasks[0] + (config.scale - 1) * base
