"""What a candidate costs, from its plan."""

from __future__ import annotations

from dataclasses import dataclass

from hf_fda.merge_methods.learned import LearnedConfig
from hf_fda.merge_methods.unitwise import UnitwiseConfig
from hf_fda.plans import Plan, readable_size
from hf_fda.prediction import predict, readable_time


@dataclass(frozen=True)
class Cost:
    """What a merge is expected to take on one process: memory and disk at most, by its plan.

    `seconds` is None where they are not predicted: of methods that learn from outputs or solve from statistics of rows,
    and of closed forms into an adapter.
    """

    seconds: float | None
    peak_memory_bytes: int
    disk_bytes: int

    def __str__(self) -> str:
        time = "not predicted" if self.seconds is None else f"about {readable_time(self.seconds)}"
        return f"{time}, {readable_size(self.peak_memory_bytes)} of memory, {readable_size(self.disk_bytes)} of disk"


def cost_of(plan: Plan) -> Cost:
    """What a plan will take; the speed of its device is measured for a moment."""
    learnt = isinstance(plan.config, LearnedConfig)
    plain = plan.adapter is None and not plan.data
    seconds = predict(plan, 1).seconds if isinstance(plan.config, UnitwiseConfig) or (plain and not learnt) else None
    return Cost(seconds, plan.peak_memory_bytes, plan.disk_bytes)
