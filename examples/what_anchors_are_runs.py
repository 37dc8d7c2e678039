"""What `what_anchors_are.py` measured, as its page asks for it: cells, curves, and which statements are true."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

CENTRED = 0
"""Which of a pair of figures is shown: 0 of the vectors as they are, 1 less their mean."""

HOLDS, FAILS = 0.9, 0.1
"""Shares of the cells (a seed, a task, a block) from which on, and up to which, a claim is said to hold or not."""

ALIGNED = "states on anchors", "anchors on states", "gradients"
"""Figures of claim 2."""

Points = tuple[list[float], list[float]]

Runs = Mapping[int, Mapping[str, Any]]
"""What was measured, by seed."""


def gap_and_gain(merges: Runs) -> tuple[float, float]:
    """Points of accuracy between merges with anchors from weights and from noise at most, and those gained over the
    base."""
    found = [{name: 100 * own for name, own in run["accuracy"].items()} for run in merges.values()]
    gap = max(abs(own["weights"] - own["gaussian"]) for own in found)
    return gap, statistics.mean(own["weights"] - own["base"] for own in found)


def variants_of(runs: Runs) -> list[str]:
    """Optimizers and starts, in words."""
    return list(next(iter(runs.values()))["variants"])


def read_runs(work: Path, setting: str, part: str) -> dict[int, dict[str, Any]]:
    """What was measured of a setting, by seed."""
    files = sorted(work.glob(f"{setting}-{part}-*.json"))
    return {int(file.stem.rpartition("-")[2]): json.loads(file.read_text(encoding="utf-8")) for file in files}


def cells_of(runs: Runs, variant: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """What a variant's anchors were after each step, and the limits, cell by cell."""
    for run in runs.values():
        for task, blocks in run["variants"][variant].items():
            for block, own in blocks.items():
                yield own, run["limits"][task][block]


def figure_at(own: Mapping[str, Any], step: str, name: str) -> float:
    """A figure of a cell after some steps."""
    value = own["steps"][step][name]
    return float(value[CENTRED] if isinstance(value, list) else value)


def ends_of(own: Mapping[str, Any], name: str) -> tuple[float, float]:
    """A figure at the start and at the end."""
    steps = list(own["steps"])
    return figure_at(own, steps[0], name), figure_at(own, steps[-1], name)


def verdict(true: Sequence[bool]) -> str:
    """Whether a claim holds, from whether it does in each cell."""
    share = sum(true) / len(true)
    word = "holds" if share >= HOLDS else "does not hold" if share <= FAILS else "holds in part"
    return f"{word} ({sum(true)} of {len(true)} cells)"


def curves_of(runs: Runs, name: str) -> dict[str, Points]:
    """A figure over construction steps, by variant: the mean over all cells."""
    found = {}
    for variant in variants_of(runs):
        cells = [own for own, _ in cells_of(runs, variant)]
        steps = list(cells[0]["steps"])
        means = [statistics.mean(figure_at(own, step, name) for own in cells) for step in steps]
        found[variant] = [float(step) for step in steps], means
    return found


def falls(losses: Sequence[float]) -> bool:
    return all(after < before for before, after in itertools.pairwise(losses))


def nearer(run: Mapping[str, Any]) -> bool:
    x, y, _ = run["lowest"]
    path = run["paths"]["adapting from the base"]
    away = [math.dist((own["x"], own["y"]), (x, y)) for own in path]
    return away[-1] < away[0]


FACTS: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "adapting from the base lowers the loss at every look": lambda run: falls(run["walked"]["from the base"]),
    "adapting from task arithmetic lowers it at every look": lambda run: falls(
        [run["line"]["0.3"], *run["walked"]["from task arithmetic"]]
    ),
    "adapting from the base comes nearer to the plane's lowest point": nearer,
    "adapting from the base ends below task arithmetic at its best scaling": lambda run: (
        run["walked"]["from the base"][-1] < min(run["line"].values())
    ),
    "adapting from task arithmetic ends below it": lambda run: (
        run["walked"]["from task arithmetic"][-1] < min(run["line"].values())
    ),
    "task arithmetic drifts away: its loss rises again before scaling 1": lambda run: (
        run["line"]["1.0"] > min(run["line"].values())
    ),
}
"""What claim 3 says of a run."""
