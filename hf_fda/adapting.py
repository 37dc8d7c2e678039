"""One unit of a merge adapted: from its start in parameter space to what the sources do on their anchors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from hf_fda.anchors import AnchorBuilder, Moves, UnitAnchors, adapt_unit
from hf_fda.anchors.adaptation import Aim, objective_of
from hf_fda.blocks import Unit, UnitCall
from hf_fda.errors import about
from hf_fda.lowrank import Budget, LowRank, factorise
from hf_fda.merge_methods import FDAConfig, MethodConfig
from hf_fda.merge_methods.distill import DistillConfig
from hf_fda.merge_methods.task_arithmetic import TaskArithmeticConfig
from hf_fda.plans import Plan
from hf_fda.progress import Progress, logger
from hf_fda.randomness import random_stream
from hf_fda.shared_sum import SharedSum
from hf_fda.states.lessons import Lesson
from hf_fda.states.objective import Examples, StatesObjective, matched, shown
from hf_fda.states.unit_states import Ragged
from hf_fda.streaming.taskvectors import TaskVectors
from hf_fda.streaming.tensorwise import apply_method
from hf_fda.tensors import total
from hf_fda.unit_files import AdaptedUnit, unit_tensors


def adapted_unit(
    plan: Plan,
    builder: AnchorBuilder,
    vectors: TaskVectors,
    unit: Unit,
    found: Sequence[UnitAnchors],
    progress: Progress,
    lessons: Sequence[Lesson | None] = (),
    adding: SharedSum | None = None,
) -> AdaptedUnit:
    """One merged unit, in float32 on the CPU.

    Args:
        plan: of a merge by "fda".
        builder: loads units.
        vectors: reads base and sources.
        unit: which.
        found: its anchors for every source that is matched on them.
        progress: whom to tell.
        lessons: its hidden states for every source that is matched on rows; None where another process matches it.
        adding: which process matches what: an item for each of `lessons`, and one for all anchors. One alone if None.

    Raises:
        RunError: naming the unit, when the loss becomes infinite or not a number.
        PeerError: when another process ended or failed.
    """
    config = plan.config
    assert isinstance(config, FDAConfig) and config.epochs is not None and config.batch_size is not None
    assert config.adaptation_learning_rate is not None and config.interpolation is not None
    module, call = builder.load(plan.inputs.base.read, unit), builder.capture.calls[unit.name]
    moved = [anchors for anchors in found if anchors.moves]
    adding = adding or SharedSum.alone(len(lessons) + 1)
    real = _on_states(config, module, builder, unit, lessons, vectors)
    shown = bool(adding.total(torch.tensor(sum(own is not None for own in real))))
    if not moved and not shown:  # steps would only follow rounding noise
        moves = move_to_start(config, module, unit, vectors, plan.ranks)
        there = {path: value.detach().cpu() for path, value in module.named_parameters() if path not in moves.factors}
        return AdaptedUnit(_named(unit, there, moves.factors))
    with about(f"block '{unit.name}'"):
        if shown:
            objective: Aim = _mixed(config, module, call, moved, real, adding, plan.device)
        else:
            objective = objective_of(config, module, call, moved, plan.device)
        adapted = adapt_unit(
            module,
            call,
            objective,
            move_to_start(config, module, unit, vectors, plan.ranks),
            epochs=config.epochs,
            learning_rate=config.adaptation_learning_rate,
            schedule=config.adaptation_schedule,
            batch_size=config.batch_size,
            generator=random_stream(plan.seed, "batches", unit.name),
            interpolation=config.interpolation,
            frozen=_frozen(config, unit, [] if shown else moved, vectors),
            never_worse=shown,
            precision=config.precision,
            report=lambda epoch, loss: progress.now(f"adapt {unit.name}", loss),
        )
    logger.debug("%s: distance %.4g before, %.4g after", unit.name, adapted.loss_before, adapted.loss_after)
    distances = (adapted.loss_before, adapted.loss_after)
    return AdaptedUnit(_named(unit, adapted.parameters, adapted.factors), distances)


def _named(unit: Unit, parameters: Mapping[str, Tensor], factors: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """What a unit's file holds, by the base's names."""
    whole = {f"{unit.name}.{path}": value for path, value in parameters.items()}
    return unit_tensors(whole, {f"{unit.name}.{path}": own for path, own in factors.items()})


def _frozen(config: FDAConfig, unit: Unit, found: Sequence[UnitAnchors], vectors: TaskVectors) -> frozenset[str]:
    """Parameters that stay: whose gradient is zero for every source on its anchors, and those that no source moves."""
    left_out = [frozenset(anchors.left_out) for anchors in found]
    frozen = frozenset.intersection(*left_out) if left_out else frozenset()
    if config.parametrization == "parameters":
        return frozen
    return frozen | {name.removeprefix(f"{unit.name}.") for name in unit.tensors if not vectors.may_move(name)}


def _on_states(
    config: FDAConfig,
    module: nn.Module,
    builder: AnchorBuilder,
    unit: Unit,
    lessons: Sequence[Lesson | None],
    vectors: TaskVectors,
) -> list[Examples | None]:
    """What a unit shall match on rows, for the sources that move it, from the base's unit."""
    examples: list[Examples | None] = []
    for lesson in lessons:
        if lesson is None:
            examples.append(None)
            continue
        found = shown(module, builder.load(lesson.source.read, unit), lesson.to(builder.device), _power(config))
        vectors.note_move(lesson.source.name, partial(bool, found is not None))
        examples.append(found)
    return examples


def _mixed(
    config: FDAConfig,
    module: nn.Module,
    call: UnitCall,
    found: Sequence[UnitAnchors],
    real: Sequence[Examples | None],
    adding: SharedSum,
    device: torch.device,
) -> StatesObjective:
    """What a unit shall match, on real hidden states and on anchors."""
    assert config.adaptation_distance is not None

    def beside(own: UnitAnchors) -> Examples | None:
        inputs, targets = (Ragged.whole(values.to(device)) for values in (own.anchors, own.targets))
        return matched(module, inputs, call, targets, _power(config))

    anchors = [beside(own) if adding.mine(len(real)) else None for own in found]
    items = [*range(len(real)), *[len(real)] * len(anchors)]
    return StatesObjective(config.adaptation_distance, [*real, *anchors], items, adding)


def _power(config: FDAConfig) -> float | None:
    """The power of the metric of errors; None where there is no metric."""
    return config.metric_power if config.adaptation_distance == "shift" else None


def move_to_start(
    config: FDAConfig | DistillConfig,
    module: nn.Module,
    unit: Unit,
    vectors: TaskVectors,
    ranks: Mapping[str, int],
    work: torch.dtype = torch.float32,
) -> Moves:
    """Move a unit from the base to where adaptation starts, but for what is factored.

    Args:
        config: complete.
        module: the base's unit; changed in place.
        unit: which.
        vectors: reads base and sources.
        ranks: by the base's name of a tensor, the largest rank of its factors.
        work: the type to compute the start in; in float64 one source of scaling 1 comes out as it is.

    Returns:
        how its parameters are stepped on.
    """
    if config.initial == "base" and config.parametrization == "parameters":
        return Moves()
    roles = vectors.base.layout.roles
    scales: dict[str, Tensor] = {}
    factors: dict[str, LowRank] = {}
    squares = [0.0] * (1 + len(vectors.inputs.moving))
    for path, parameter in module.named_parameters():
        name = f"{unit.name}.{path}"
        if not vectors.may_move(name):
            continue
        if name in ranks:
            factors[path] = _start_in_factors(config, name, vectors, ranks[name])
            continue
        base, tasks = vectors.read(name, work)
        squares = [before + float(own.square().sum()) for before, own in zip(squares, (base, *tasks), strict=True)]
        if isinstance(config.initial, MethodConfig):
            merged = apply_method(config.initial, base, tasks, roles[name], vectors.generator(name))
            parameter.data = (base + merged).float().contiguous()
        scales[path] = total([task.abs_() for task in tasks]).float()
    change = 0.0 if factors else _least(squares)
    return Moves(None if config.parametrization == "parameters" else scales, factors, change)


def _least(squares: Sequence[float]) -> float:
    """The norm of the smallest task vector that is not zero, relative to the base's: from their squares, its first."""
    whole, *tasks = squares
    return min((math.sqrt(own / whole) for own in tasks if own > 0), default=0.0) if whole else 0.0


def _start_in_factors(config: FDAConfig | DistillConfig, name: str, vectors: TaskVectors, rank: int) -> LowRank:
    """The nearest product of a rank to the start of a tensor's task vector; from the base a left factor of zero beside
    the right one of the sum of the sources' task vectors."""
    method = config.initial if isinstance(config.initial, MethodConfig) else TaskArithmeticConfig()
    merged: LowRank | Tensor | None = vectors.merged_factors(name, method)
    if merged is None:
        merged = vectors.merged_task(name, method).to(vectors.device)
    start = factorise(merged, Budget(rank), rank).product.to(vectors.device, torch.float32)
    return start if isinstance(config.initial, MethodConfig) else start.from_zero()
