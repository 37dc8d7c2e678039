"""One unit of a merge adapted: from its start in parameter space to what the sources do on their anchors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hf_fda.anchors import AnchorBuilder, Objective, UnitAnchors, adapt_unit
from hf_fda.blocks import Unit, UnitCall
from hf_fda.errors import RunError
from hf_fda.merge_methods import FDAConfig, MethodConfig
from hf_fda.plans import Plan
from hf_fda.progress import Progress, logger
from hf_fda.randomness import random_stream
from hf_fda.taskvectors import TaskVectors
from hf_fda.tensors import total
from hf_fda.tensorwise import apply_method


def adapted_unit(
    plan: Plan,
    builder: AnchorBuilder,
    vectors: TaskVectors,
    unit: Unit,
    found: Sequence[UnitAnchors],
    progress: Progress,
) -> dict[str, Tensor]:
    """The merged tensors of one unit, by the base's names, in float32 on the CPU.

    Args:
        plan: of a merge by "fda".
        builder: loads units.
        vectors: reads base and sources.
        unit: which.
        found: its anchors for every source that has it.
        progress: whom to tell.

    Raises:
        RunError: naming the unit, when the loss becomes infinite or not a number.
    """
    config = plan.config
    assert isinstance(config, FDAConfig) and config.epochs is not None and config.batch_size is not None
    assert config.adaptation_learning_rate is not None and config.interpolation is not None
    module, call = builder.load(plan.inputs.base.read, unit), builder.capture.calls[unit.name]
    moved = [anchors for anchors in found if anchors.moves]
    if not moved:  # steps would only follow rounding noise
        move_to_start(config, module, unit, vectors)
        return {f"{unit.name}.{path}": value.detach().cpu() for path, value in module.named_parameters()}
    try:
        objective = _objective(config, module, call, moved, plan.device)
        scales = move_to_start(config, module, unit, vectors)
        adapted = adapt_unit(
            module,
            call,
            objective,
            scales if config.parametrization == "coefficients" else None,
            epochs=config.epochs,
            learning_rate=config.adaptation_learning_rate,
            schedule=config.adaptation_schedule,
            batch_size=config.batch_size,
            generator=random_stream(plan.seed, "batches", unit.name),
            interpolation=config.interpolation,
            frozen=frozenset.intersection(*(frozenset(anchors.left_out) for anchors in moved)),
            report=lambda epoch, loss: progress.now(f"adapt {unit.name}", loss),
        )
    except RunError as error:
        raise RunError(f"block '{unit.name}': {error}") from None
    logger.debug("%s: distance %.4g before, %.4g after", unit.name, adapted.loss_before, adapted.loss_after)
    return {f"{unit.name}.{name}": tensor for name, tensor in adapted.parameters.items()}


def _objective(
    config: FDAConfig, module: nn.Module, call: UnitCall, found: Sequence[UnitAnchors], device: torch.device
) -> Objective:
    """What a unit shall match, from the base's unit and the anchors of the sources that move it."""
    anchors = [own.anchors.to(device) for own in found]
    targets = [own.targets.to(device) for own in found]
    assert config.adaptation_distance is not None
    shifts = None
    if config.adaptation_distance == "shift":
        with torch.no_grad():
            shifts = [target - call(module, own) for own, target in zip(anchors, targets, strict=True)]
    return Objective(config.adaptation_distance, anchors, targets, shifts, config.metric_power)


def move_to_start(config: FDAConfig, module: nn.Module, unit: Unit, vectors: TaskVectors) -> dict[str, Tensor]:
    """Move a unit from the base to where adaptation starts.

    Args:
        config: complete.
        module: the base's unit; changed in place.
        unit: which.
        vectors: reads base and sources.

    Returns:
        by parameter, the sum of the magnitudes of the sources' task vectors; nothing where none is read.
    """
    scales: dict[str, Tensor] = {}
    if config.initial == "base" and config.parametrization == "parameters":
        return scales
    roles = vectors.base.layout.roles
    for path, parameter in module.named_parameters():
        name = f"{unit.name}.{path}"
        base, tasks = vectors.read(name, torch.float32)
        if isinstance(config.initial, MethodConfig):
            merged = apply_method(config.initial, base, tasks, roles[name], vectors.generator(name))
            parameter.data = (base + merged).contiguous()
        scales[path] = total([task.abs_() for task in tasks])
    return scales
