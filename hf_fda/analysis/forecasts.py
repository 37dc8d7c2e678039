"""What an analysis will take, told before it starts: a first piece of the work is done and timed, memory follows from
shapes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from hf_fda.plans import readable_size
from hf_fda.prediction import readable_time


@dataclass(frozen=True)
class Forecast:
    """Seconds, bytes of memory beside what the libraries themselves take, and bytes of disk for the while."""

    seconds: float = 0.0
    memory: int = 0
    disk: int = 0

    def __add__(self, other: Forecast) -> Forecast:
        """Both, one after the other."""
        return Forecast(self.seconds + other.seconds, max(self.memory, other.memory), max(self.disk, other.disk))

    def __str__(self) -> str:
        stored = f", {readable_size(self.disk)} of disk meanwhile" if self.disk else ""
        return (
            f"about {readable_time(self.seconds)} and {readable_size(self.memory)} of memory beside the libraries' own"
            f"{stored}"
        )


def seconds_of(work: Callable[[], object]) -> float:
    """How long some work takes when it is done once."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
