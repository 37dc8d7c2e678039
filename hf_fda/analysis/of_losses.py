"""What is seen in a merge on rows of its tasks: what each block bought, and the landscape that it lies in."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from hf_fda.analysis.charts import table
from hf_fda.analysis.landscapes import Landscape, axis, landscape
from hf_fda.analysis.maps import landscape_chart, tasks_chart
from hf_fda.analysis.measuring import Measuring
from hf_fda.analysis.moves import Bought
from hf_fda.analysis.opened import OpenedMerge
from hf_fda.analysis.planes import Plane, Projected, plane
from hf_fda.analysis.report import Section
from hf_fda.analysis.similarities import gram
from hf_fda.analysis.walking import Directions
from hf_fda.errors import InputError
from hf_fda.progress import Progress, logger

SCALING = 0.3
"""Of the task-arithmetic point: what most merges of several tasks want (Ilharco et al., arXiv 2212.04089)."""

Vector = Callable[[str, Tensor], Tensor]
"""Gives a task vector of a tensor from its name and the base's."""


@dataclass(frozen=True)
class Chosen:
    """The plane that is looked at: its two task vectors with their names, and other merges' on a path."""

    first: tuple[str, Vector]
    second: tuple[str, Vector]
    path: tuple[Vector, ...]


def bought(opened: OpenedMerge, measuring: Measuring, progress: Progress) -> dict[str, Bought]:
    """Restore one block at a time to the base, and measure.

    Args:
        opened: the merge.
        measuring: with the merged weights, which it has again afterwards.
        progress: whom to tell.
    """
    merged, found = measuring(), {}
    for group, names in opened.groups.items():
        progress.now(f"without the move of {group}")
        with measuring.shared.restored(names, opened.base_tensor, opened.merged_tensor):
            found[group] = Bought(merged, measuring())
        progress.finish(f"without the move of {group}")
    return found


def bought_section(found: Mapping[str, Bought], unit: str) -> Section:
    """What was found, as a chart."""
    tasks = list(next(iter(found.values())).gain)
    rows = {group: [*own.gain.values(), own.mean] for group, own in found.items()}
    chart = table(
        "bought",
        "What each block's move bought",
        "By how much the loss rises when this block alone is put back to the base; blue: the move did harm.",
        ("part put back to the base", "task", f"rise of the {unit}"),
        [*tasks, "mean"],
        rows,
    )
    return Section("What each block bought", "", (chart,))


def choose(opened: OpenedMerge, through: Sequence[object]) -> Chosen | None:
    """The plane of base, task arithmetic and the merge; of a merge that is task arithmetic itself, that of the first
    source that spans one with it in its place. None where none does, as where there is one source only.

    Args:
        opened: the merge, whose sources are at hand.
        through: folders of other merges of the same base, which a path goes through.

    Raises:
        InputError: when one of these is of another base.
    """
    path = tuple(opened.another(folder).task for folder in through)

    def arithmetic(name: str, base: Tensor) -> Tensor:
        return opened.summed(name, base).mul_(SCALING)

    others: dict[str, Vector] = {"merged": opened.merged.task}
    others |= {f"fine-tune {own.name}": partial(opened.task_vector, own) for own in opened.sources}
    for label, other in others.items():
        products = _products(opened, (arithmetic, other))
        try:
            plane(products)
        except InputError:
            continue
        return Chosen((f"task arithmetic {SCALING}", arithmetic), (label, other), path)
    logger.info("base, merge and sources lie on one line: there is no plane to look at")
    return None


def _products(opened: OpenedMerge, vectors: Sequence[Vector]) -> Tensor:
    """The products of task vectors with each other."""
    bases = ((name, opened.base_tensor(name)) for name in opened.names)
    return gram(([own(name, base) for own in vectors] for name, base in bases), len(vectors))


def measure(
    opened: OpenedMerge, measuring: Measuring, chosen: Chosen, grid: int, scratch: Path, progress: Progress
) -> Landscape:
    """The losses over a plane; the weights are the merged ones again afterwards.

    Args:
        opened: the merge.
        measuring: with its weights.
        chosen: the plane.
        grid: points on each axis.
        scratch: a folder for base and directions meanwhile; made if it is not there.
        progress: whom to tell.

    Raises:
        InputError: when the three models lie on one line.
    """
    vectors = (chosen.first[1], chosen.second[1], *chosen.path)
    products = _products(opened, vectors)
    of = plane(products[:2, :2])
    marks = {"base": of.project(0.0, 0.0, 0.0)}
    marks |= {label: _on(of, products, place) for place, (label, _) in enumerate((chosen.first, chosen.second))}
    path = [marks["base"], *(_on(of, products, place) for place in range(2, len(vectors))), _on(of, products, 1)]
    seen = [*marks.values(), *path]
    x, y = axis([own.x for own in seen], grid), axis([own.y for own in seen], grid)

    def read(name: str) -> tuple[Tensor, Tensor, Tensor]:
        base = opened.base_tensor(name)
        return base, chosen.first[1](name, base), chosen.second[1](name, base)

    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        shapes = {name: tuple(opened.base.shape(name)) for name in opened.names}
        directions = Directions.write(Path(folder) / "directions.safetensors", shapes, read)

        def loss(a: float, b: float) -> dict[str, float]:
            progress.now("landscape")
            measuring.shared.put(opened.names, directions.at(a, b))
            found = measuring()
            progress.finish("landscape")
            return found

        found = landscape(of, x, y, loss, marks, {"path of the merge": path} if chosen.path else {})
    measuring.shared.put(opened.names, opened.merged_tensor)
    return found


def _on(of: Plane, products: Tensor, place: int) -> Projected:
    """One of the vectors on the plane."""
    first, second, squared = products[0, place], products[1, place], products[place, place]
    return of.project(float(first), float(second), float(squared))


def landscape_section(seen: Landscape, unit: str, rows: int) -> Section:
    """What was found, as charts."""
    x, y, value = seen.lowest
    near = min(seen.points, key=lambda name: (seen.points[name].x - x) ** 2 + (seen.points[name].y - y) ** 2)
    text = (
        f"Real losses, {unit}, on {rows} rows at {len(seen.x)} x {len(seen.y)} points of the plane through "
        f"{', '.join(seen.points)}. The lowest mean on the grid is {value:.4f} at ({x:.2f}, {y:.2f}); of the models "
        f"'{near}' is nearest to it."
    )
    charts = [landscape_chart("landscape", "Mean loss over the plane", "The mean over the tasks.", seen, unit)]
    if len(seen.losses) > 1:
        caption = "Each task on a scale of its own."
        charts.append(tasks_chart("landscape-tasks", "Loss of each task over the plane", caption, seen, unit))
    return Section("Landscape", text, tuple(charts))
