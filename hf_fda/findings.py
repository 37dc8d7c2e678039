"""What a merge found on its way, kept beside its weights, and the pictures of it."""

from __future__ import annotations

from hf_fda.anchors.files import INDEX, read_index
from hf_fda.block_losses import LOSSES, LOSSES_PICTURE, BlockLoss, BlockLosses
from hf_fda.coefficients import COEFFICIENTS, HEAT_MAP, Coefficients
from hf_fda.drawing import can_draw
from hf_fda.inputs import Source
from hf_fda.merge_methods.learned import LearnedConfig
from hf_fda.pictures import draw_coefficients, draw_losses
from hf_fda.plans import Plan
from hf_fda.store import Store
from hf_fda.unit_files import adapted_file, read_distances


def write_findings(plan: Plan, store: Store) -> None:
    """Write and draw what a merge learnt and how well its blocks were fitted; of an earlier merge leave nothing.

    Args:
        plan: what was done; what was adapted still waits in its own files, unless an earlier run had finished.
        store: the output folder.
    """
    if not isinstance(plan.config, LearnedConfig):
        store.remove(COEFFICIENTS)
        store.remove(HEAT_MAP)
    elif can_draw():
        coefficients = Coefficients.read(plan.output / COEFFICIENTS)
        store.write_plainly(HEAT_MAP, lambda path: draw_coefficients(coefficients, path))
    if not plan.units:
        store.remove(LOSSES)
        store.remove(LOSSES_PICTURE)
        return
    waiting = any((plan.output / adapted_file(unit.name)).is_file() for unit in plan.units)
    if waiting or not (plan.output / LOSSES).is_file():
        losses = _losses(plan)
        store.write_text(LOSSES, losses.text())
        if can_draw() and any(row.construction or row.left is not None for row in losses.rows):
            store.write_plainly(LOSSES_PICTURE, lambda path: draw_losses(losses, path))


def _losses(plan: Plan) -> BlockLosses:
    """What is known of every unit: from the anchors that were looked at, and from the adapted units that still wait."""
    anchored = [source for source in plan.inputs.sources if plan.anchored(source)]
    constructed = {source.name: _constructed(plan, source) for source in anchored}
    rows = []
    for unit in plan.units:
        losses = {name: own[unit.name] for name, own in constructed.items() if unit.name in own}
        path = plan.output / adapted_file(unit.name)
        distances = read_distances(path) if path.is_file() else None
        rows.append(BlockLoss(unit.name, losses, *(distances or (None, None))))
    return BlockLosses(tuple(rows))


def _constructed(plan: Plan, source: Source) -> dict[str, float]:
    """The loss of a source's anchors by block."""
    given = source.anchors
    index = given.index if given is not None else read_index(plan.output / "anchors" / source.name / INDEX)
    return {row["block"]: row["loss"] for row in index if row["loss"] == row["loss"]}
