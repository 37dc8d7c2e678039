"""One unit of a merge by layer-wise distillation (ProDistill, arXiv 2502.12706)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from hf_fda.adapting import move_to_start
from hf_fda.anchors import Adapted, adapt_unit
from hf_fda.anchors.builder import load_unit
from hf_fda.anchors.metric import shift_metric
from hf_fda.blocks import Unit, UnitCall
from hf_fda.checkpoint.interface import Checkpoint
from hf_fda.errors import about
from hf_fda.merge_methods.distill import DistillConfig
from hf_fda.plans import Plan
from hf_fda.progress import logger
from hf_fda.randomness import random_stream
from hf_fda.shared_sum import SharedSum
from hf_fda.states.lessons import Lesson
from hf_fda.states.objective import Examples, StatesObjective, outputs
from hf_fda.streaming.taskvectors import TaskVectors
from hf_fda.unit_files import AdaptedUnit


def distilled_unit(
    plan: Plan,
    vectors: TaskVectors,
    unit: Unit,
    lessons: Sequence[Lesson | None],
    adding: SharedSum,
    report: Callable[[int, float], None] = lambda epoch, loss: None,
) -> AdaptedUnit:
    """One merged unit, its tensors by the base's names, in float32 on the CPU.

    Args:
        plan: of a merge by "distill".
        vectors: reads base and sources.
        unit: which.
        lessons: of every source that has it; None where another process matches it.
        adding: which process matches what, its items as `lessons`.
        report: called with (epoch, loss) now and then.

    Raises:
        RunError: naming the unit, when the loss becomes infinite or not a number.
        PeerError: when another process ended or failed.
    """
    config = plan.config
    assert isinstance(config, DistillConfig) and config.distance is not None and config.epochs is not None
    base = plan.inputs.base
    with about(f"block '{unit.name}'"):
        examples = [None if own is None else _examples(base, unit, config, own, plan.device) for own in lessons]
        aim = StatesObjective(config.distance, examples, range(len(examples)), adding)
        module = load_unit(base.layout, base.read, unit, plan.device)
        moves = move_to_start(config, module, unit, vectors, {}, torch.float64)
        found: Adapted = adapt_unit(
            module,
            UnitCall(),
            aim,
            moves,
            epochs=config.epochs,
            learning_rate=config.learning_rate,
            schedule=config.schedule,
            batch_size=config.batch_size,
            generator=random_stream(plan.seed, "batches", unit.name),
            frozen=frozenset(name for name, _ in module.named_parameters() if name not in (moves.scales or {})),
            never_worse=True,
            report=report,
        )
    logger.debug("%s: distance %.4g before, %.4g after", unit.name, found.loss_before, found.loss_after)
    tensors = {f"{unit.name}.{path}": value for path, value in found.parameters.items()}
    return AdaptedUnit(tensors, (found.loss_before, found.loss_after))


def _examples(base: Checkpoint, unit: Unit, config: DistillConfig, lesson: Lesson, device: torch.device) -> Examples:
    """What a unit shall do for one source: take the merged model's hidden states, give the source's outputs on its own.

    The metric of "shift" is of the source's shift from the base on the source's own hidden states.
    """
    there = lesson.to(device)
    own, merged = there.own, there.merged
    assert merged is not None
    targets = outputs(load_unit(base.layout, lesson.source.read, unit, device), own.inputs, own.call)
    if config.distance != "shift":
        return Examples(merged.inputs, targets, merged.call)
    before = outputs(load_unit(base.layout, base.read, unit, device), own.inputs, own.call)
    factor = shift_metric(targets.values[:-1] - before.values[:-1], config.metric_power)
    return Examples(merged.inputs, targets, merged.call, factor)
