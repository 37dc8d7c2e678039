"""What is seen in a merge without data: how far each block moved, and where its sources pull against each other."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch import Tensor

from hf_fda.analysis.charts import Axes, Chart, lines
from hf_fda.analysis.forecasts import Forecast, seconds_of
from hf_fda.analysis.interference import Words, interference_charts
from hf_fda.analysis.moves import Move, move
from hf_fda.analysis.opened import OpenedMerge
from hf_fda.analysis.report import Section
from hf_fda.analysis.similarities import gram
from hf_fda.progress import Progress

TASK_VECTORS = Words(
    "interference",
    "Cosines of the task vectors",
    "Over all shared tensors: near zero, sources change different things; below zero, they undo each other's work.",
    "Task vectors by block",
    "task vectors",
    "part of the model",
)


@dataclass(frozen=True)
class MergeSeen:
    """By group of tensors (a block, or what lies before or after them): how far it moved, and the products of the
    sources' task vectors, (K, K), where there are sources."""

    moves: dict[str, Move]
    products: dict[str, Tensor]


def forecast(opened: OpenedMerge) -> Forecast:
    """What `look` will take: one block is read once."""
    names = next(iter(opened.groups.values()))
    seconds = seconds_of(lambda: move(opened.pairs(names)))
    share = sum(prod(opened.base.shape(name)) for name in names) / max(1, opened.nbytes // 4)
    largest = max(prod(opened.base.shape(name)) for name in opened.names)
    count = len(opened.sources)
    return Forecast(seconds * (1 + count) / share, largest * 4 * (count + 3))


def look(opened: OpenedMerge, progress: Progress) -> MergeSeen:
    """Compare base, merge and sources, with one tensor of each in memory at a time."""
    moves, products = {}, {}
    for group, names in opened.groups.items():
        progress.now(f"moves of {group}")
        moves[group] = move(opened.pairs(names))
        if opened.sources:
            products[group] = gram((opened.task_vectors(name) for name in names), len(opened.sources))
        progress.finish(f"moves of {group}")
    return MergeSeen(moves, products)


def section(opened: OpenedMerge, seen: MergeSeen) -> Section:
    """What was found, as charts."""
    places = [float(number) for number in range(len(seen.moves))]
    groups = " ".join(
        f"{number}: {group}." for number, group in enumerate(seen.moves) if number in (0, len(places) - 1)
    )
    charts: list[Chart] = [
        lines(
            "moves",
            "How far each block moved",
            f"Norm of merged minus base as a share of the base's norm. Part {groups}",
            Axes("part of the model, from the first", "relative move (share of the norm)"),
            {"merged": (places, [own.relative for own in seen.moves.values()])},
        )
    ]
    names = [own.name for own in opened.sources]
    if len(names) > 1:
        charts += interference_charts(TASK_VECTORS, names, list(seen.products.values()))
    return Section("What the merge moved", "", tuple(charts))
