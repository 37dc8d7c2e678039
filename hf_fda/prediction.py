"""How long a plan will take on so many processes like this one: its work at a speed measured here in a moment."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

import torch

from hf_fda import costs
from hf_fda.anchors.grouping import group_units
from hf_fda.anchors.precision import matmul_precision
from hf_fda.anchors.products import product
from hf_fda.blocks import Unit
from hf_fda.costs import Work
from hf_fda.errors import InputError
from hf_fda.merge_methods import FDAConfig
from hf_fda.merge_methods.distill import DistillConfig
from hf_fda.merge_methods.fda import Precision
from hf_fda.merge_methods.unitwise import UnitwiseConfig
from hf_fda.shared_sum import largest_share
from hf_fda.stages import assign
from hf_fda.states.footprint import StatesFootprint

if TYPE_CHECKING:
    from hf_fda.plans import Plan

CONSTRUCTION_EFFICIENCY = 0.7
"""Share of the speed of a plain product that construction reaches."""

ADAPTATION_EFFICIENCY = 0.65
"""The same of adaptation."""

MOMENT = 0.04
"""Seconds that each of the four speeds is measured for."""

SIDE = 2048
"""Rows and columns of a product from which on it is about as fast as larger ones, which would take much memory."""

LARGE = 2**23
"""Entries of a tensor that no cache holds."""


@dataclass(frozen=True)
class Speed:
    """What a process does in a second: `flops` of products, bytes `moved` through memory, bytes of `files` and
    `calls` of the smallest operation."""

    flops: float
    moved: float
    files: float
    calls: float

    def seconds(self, work: Work, efficiency: float = 1.0) -> float:
        """How long some work takes, when products reach `efficiency` of their speed."""
        moving = work.moved / self.moved + work.files / self.files
        return work.flops / (self.flops * efficiency) + moving + work.calls / self.calls


@dataclass(frozen=True)
class Prediction:
    """Seconds that each stage of a merge will take on so many processes."""

    processes: int
    construction: float
    adaptation: float
    writing: float

    @property
    def seconds(self) -> float:
        """All stages, one after the other."""
        return self.construction + self.adaptation + self.writing

    def __str__(self) -> str:
        stages = {"construction": self.construction, "adaptation": self.adaptation, "weight files": self.writing}
        parts = ", ".join(f"{name} {readable_time(seconds)}" for name, seconds in stages.items() if seconds)
        where = "1 process" if self.processes == 1 else f"{self.processes} processes"
        return f"about {readable_time(self.seconds)} on {where} like this one ({parts})"


def predict(plan: Plan, processes: int) -> Prediction:
    """How long a plan will take from the beginning, all steps of construction done.

    Args:
        plan: the plan.
        processes: how many share the work, each on a device like the plan's; of processes on the CPU each has the
            threads that OMP_NUM_THREADS says, or one (as `torchrun` sets it).

    Raises:
        InputError: when `processes` is no whole number from 1.
    """
    if not isinstance(processes, int) or isinstance(processes, bool) or processes < 1:
        raise InputError(f"processes must be a whole number, at least 1, not {processes!r}")
    inputs, config = plan.inputs, plan.config
    with _threads(processes):
        precision = plan.anchoring.precision if plan.anchoring is not None else None
        speed = measure_speed(plan.device, _shape(plan), precision)
    constructing = _constructing(plan, plan.anchoring, speed) if plan.anchoring is not None else []
    adapting = _adapting(plan, config, speed, processes) if isinstance(config, UnitwiseConfig) else 0.0
    writing = [speed.seconds(costs.writing(inputs, plan.result, shard)) for shard in plan.shards]
    return Prediction(processes, makespan(constructing, processes), adapting, makespan(writing, processes))


def _constructing(plan: Plan, config: FDAConfig, speed: Speed) -> list[float]:
    """Seconds of constructing anchors, by the units that one process constructs together."""
    base, found = plan.inputs.base, []
    for group in group_units(base, config, plan.units, plan.device):
        each = costs.construction(base, config, group[0], len(group))
        found += [len(group) * speed.seconds(each, CONSTRUCTION_EFFICIENCY)] * len(plan.anchors_made)
    return found


def _adapting(plan: Plan, config: UnitwiseConfig, speed: Speed, processes: int) -> float:
    """Seconds of matching all units."""
    works = [_matching(plan, config, unit, before) for before, unit in enumerate(plan.units)]
    seconds = [speed.seconds(work, ADAPTATION_EFFICIENCY) for work in works]
    if not plan.propagates:
        return makespan(seconds, processes)
    rows = StatesFootprint.of(plan.inputs, config, plan.data).vectors.values()
    anchors = costs.anchor_positions(plan.inputs.base, config, len(plan.inputs.sources))
    return sum(seconds) * largest_share([*rows, anchors], processes, plan.device)


def _matching(plan: Plan, config: UnitwiseConfig, unit: Unit, before: int) -> Work:
    """The work of matching one unit, with so many before it, to what its sources do."""
    base, sources = plan.inputs.base, len(plan.sources_of(unit))
    shown = StatesFootprint.of(plan.inputs, config, plan.data).shown
    if isinstance(config, DistillConfig):
        work = costs.distillation(base, config, unit, sources, shown)
    else:
        assert isinstance(config, FDAConfig)
        work = costs.adaptation(base, config, unit, sources, plan.ranks, shown)
    return work + costs.propagation(base, unit, shown, before) if plan.propagates else work


def makespan(seconds: Sequence[float], processes: int) -> float:
    """How long pieces take when they are spread over processes as the merge does it."""
    load = [0.0] * processes
    for piece, owner in zip(seconds, assign(seconds, processes), strict=True):
        load[owner] += piece
    return max(load)


def measure_speed(device: torch.device, shape: tuple[int, int, int], precision: Precision | None = None) -> Speed:
    """Measure the speeds of this device, each for a moment.

    Args:
        device: where.
        shape: (tokens, d_in, d_out) of a product as the work has them; cut to what takes a moment and little memory.
        precision: of products, as of `matmul_precision`.
    """
    tokens, d_in, d_out = shape[0], *(min(side, SIDE) for side in shape[1:])
    tokens = max(1, min(tokens, int(4e9 if device.type != "cpu" else 4e8) // (d_in * d_out)))
    x, weight = torch.ones(tokens, d_in, device=device), torch.ones(d_out, d_in, device=device)
    large, small = torch.ones(LARGE, device=device), torch.ones(1, device=device)
    data = b"\0" * 2_000_000
    with matmul_precision(precision, device):
        products = _rate(lambda: product(x, weight.T), device) * 2 * tokens * d_in * d_out
    passes = _rate(lambda: large.mul_(1.0), device) * 2 * 4 * LARGE
    calls = _rate(lambda: [small.add(1.0) for _ in range(100)], device) * 100
    with tempfile.TemporaryFile(buffering=0) as file:
        files = _rate(lambda: _write_and_read(file, data), torch.device("cpu")) * 2 * len(data)
    return Speed(products, passes, files, calls)


def _write_and_read(file: IO[bytes], data: bytes) -> None:
    file.seek(0)
    file.truncate()  # a merge writes new pages, which takes longer than to write over old ones
    file.write(data)
    file.seek(0)
    file.read()


def _rate(work: Callable[[], object], device: torch.device) -> float:
    """Times a second that something can be done: the best of a few."""
    best, end = float("inf"), time.perf_counter() + MOMENT
    work()
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.ones(1, device=device).item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 1 / max(best, 1e-9)


def _shape(plan: Plan) -> tuple[int, int, int]:
    """(tokens, d_in, d_out) of the largest product in the plan's first unit, or of a large weight where it has none."""
    base, config = plan.inputs.base, plan.anchoring
    names = plan.units[0].tensors if plan.units else base.names
    shapes = [base.layout.shapes[name] for name in names if base.layout.roles[name] in ("linear", "conv1d")]
    d_out, d_in = max(shapes, key=lambda shape: shape[0] * shape[1], default=(1024, 1024))
    tokens = (config.num_anchors or 1) * costs.tokens_of(base, config) if config is not None else d_in
    return tokens, d_in, d_out


@contextmanager
def _threads(processes: int) -> Iterator[None]:
    """The threads that one of several processes has."""
    before = torch.get_num_threads()
    if processes > 1:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1").split(",")[0]))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def readable_time(seconds: float) -> str:
    """Seconds for reading.

    >>> readable_time(5400)
    '1.5 h'
    """
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 0.1 else f"{seconds * 1000:.0f} ms"
