"""NearSwap: the base takes over a source's entries where both are near each other already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_fda.merge_methods.config import MethodConfig, option
from hf_fda.merge_methods.registry import register


@dataclass(frozen=True, kw_only=True)
class NearSwapConfig(MethodConfig):
    """Options of `nearswap`."""

    name: ClassVar[str] = "nearswap"
    summary: ClassVar[str] = "the base, every entry moved towards one source by at most t"
    paper: ClassVar[str] = "huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001"
    max_sources: ClassVar[int | None] = 1

    t: float = option(1e-4, "how far an entry may move", minimum=0)


@register(NearSwapConfig)
def nearswap(base: Tensor, tasks: Sequence[Tensor], config: NearSwapConfig) -> Tensor:
    """``min(1, t / |tau|) * tau``, which is tau kept within -t and t: a weight between base and source that falls with
    their distance.

    Args:
        base: theta_0, any shape (unused).
        tasks: one task tensor of that shape.
        config: the options.
    """
    return tasks[0].clamp(-config.t, config.t)
