"""What is seen in anchors beside real hidden states: whether they lie in the same directions, and pull alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from hf_fda.analysis.charts import Axes, Chart, lines, table
from hf_fda.analysis.forecasts import Forecast
from hf_fda.analysis.gradients import GradientAgreement, anchor_gradients, gradient_agreement, states_gradients
from hf_fda.analysis.recording import real_states, vectors_of
from hf_fda.analysis.report import Section
from hf_fda.analysis.subspaces import projection_energy
from hf_fda.anchors.builder import AnchorBuilder
from hf_fda.anchors.container import FunctionalDualAnchors
from hf_fda.blocks import family_of
from hf_fda.checkpoint.alignment import AlignedSource
from hf_fda.costs import tokens_of, width
from hf_fda.data.rows import TaskRows
from hf_fda.devices import release_memory
from hf_fda.progress import Progress
from hf_fda.states.footprint import TEXT_POSITIONS

SHARE = 16
"""Subspaces have d / 16 directions."""


@dataclass(frozen=True)
class Alignment:
    """One block: shares of squared norm in the top-k directions of the other, after construction and at its start.

    `states` are real hidden states on the anchors' directions, `anchors` these on the real states' directions;
    `expected` is what a random subspace holds, `best` what k directions can hold of the real states. `gradients`
    compares what both induce.
    """

    k: int
    states: float
    states_at_start: float
    anchors: float
    anchors_at_start: float
    expected: float
    best: float
    gradients: GradientAgreement


def forecast(builder: AnchorBuilder, rows: int, max_length: int) -> Forecast:
    """Memory that comparing one task takes: the states of all units in half precision, one unit's in float64, and the
    unit's parameters and gradients.

    Args:
        builder: that calls the units.
        rows: of the task.
        max_length: tokens of a text, at most; it is taken to have `TEXT_POSITIONS`, as plans do.
    """
    base, units = builder.base, builder.units
    image = family_of(base.layout) == "vision"
    positions = tokens_of(base, builder.config) if image else min(max_length, TEXT_POSITIONS)
    vectors = width(base) * rows * positions
    entries = max(sum(prod(base.shape(name)) for name in unit.tensors) for unit in units)
    return Forecast(0.0, (2 * len(units) + 3 * 8) * vectors + 5 * 4 * entries)


def align_task(
    builder: AnchorBuilder,
    source: AlignedSource,
    anchors: FunctionalDualAnchors,
    rows: TaskRows,
    progress: Progress,
) -> dict[str, Alignment]:
    """Compare a source's anchors with what its blocks see on rows, by block.

    Args:
        builder: that calls the base's units as construction did.
        source: the fine-tune.
        anchors: its anchors.
        rows: of its task.
        progress: whom to tell.
    """
    units = [unit for unit in builder.units if unit.name in anchors]
    size = width(builder.base)
    recorded = real_states(source, units, rows, size, builder.device)
    found = {}
    for unit in units:
        what = f"{source.name}: anchors and real states of {unit.name}"
        progress.now(what)
        states, own = recorded[unit.name], anchors[unit.name]
        real, start = vectors_of(states), builder.start(source, unit)
        k = max(1, min(size // SHARE, own.anchors[..., 0].numel(), len(real)))
        after, before = (projection_energy(real, x, [k]) for x in (own.anchors, start))
        names = list(own.cosines)
        base, tuned = builder.load(builder.base.read, unit), builder.load(source.read, unit)
        call, kind = builder.capture.calls[unit.name], builder.config.distance
        x, aim = own.anchors.to(builder.device), own.targets.to(builder.device)
        induced = anchor_gradients(base, call, x, aim, names, kind)
        by_states = states_gradients(base, tuned, states.to(builder.device), names, kind)
        found[unit.name] = Alignment(
            k,
            after.shares[0],
            before.shares[0],
            projection_energy(own.anchors, real, [k]).shares[0],
            projection_energy(start, real, [k]).shares[0],
            after.expected[0],
            after.best[0],
            gradient_agreement(induced, by_states) if names else GradientAgreement({}, ()),
        )
        release_memory()
        progress.finish(what)
    return found


def section(found: Mapping[str, Mapping[str, Alignment]]) -> Section:
    """What was found for each task, as charts."""
    charts: list[Chart] = []
    for task, blocks in found.items():
        charts += [_energy_chart(task, blocks), *_gradient_charts(task, blocks)]
    text = (
        "Real hidden states are those that the fine-tune's own blocks see on the given rows. Where anchors lie as they "
        "do, the anchors' directions hold more of them than a random subspace and than the start did, and the "
        "gradients of both point alike."
    )
    return Section("Anchors beside real hidden states", text, tuple(charts))


def _energy_chart(task: str, blocks: Mapping[str, Alignment]) -> Chart:
    own = list(blocks.values())
    places = [float(number) for number in range(len(own))]
    series: dict[str, Sequence[float]] = {
        "states on anchors": [one.states for one in own],
        "states on the start": [one.states_at_start for one in own],
        "anchors on states": [one.anchors for one in own],
        "start on states": [one.anchors_at_start for one in own],
    }
    references = {"random": [one.expected for one in own], "most possible": [one.best for one in own]}
    return lines(
        f"alignment-{task}",
        f"{task}: energy in each other's top {own[0].k} directions",
        "Share of squared norm, by block: real hidden states on the main directions of the anchors and of what these "
        "started from, and the reverse. Vectors are not centred.",
        Axes("block, from the first", "share of squared norm"),
        {label: (places, values) for label, values in series.items()},
        {label: (places, values) for label, values in references.items()},
    )


def _gradient_charts(task: str, blocks: Mapping[str, Alignment]) -> list[Chart]:
    names = list(dict.fromkeys(name for own in blocks.values() for name in own.gradients.cosines))
    if not names:
        return []
    rows = {name: [own.gradients.cosines.get(name, 0.0) for own in blocks.values()] for name in names}
    return [
        table(
            f"gradients-{task}",
            f"{task}: gradients of anchors and of real states",
            "Cosine by parameter; a parameter without a gradient in a block has zero.",
            ("parameter of the block", "block, from the first", "cosine"),
            [str(number) for number in range(len(blocks))],
            rows,
            limit=1.0,
        )
    ]
