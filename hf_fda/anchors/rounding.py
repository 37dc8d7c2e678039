"""Anchors stored in a narrower type, and what that does to a merge."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_fda.anchors.adaptation import adapt_unit, mean_distance, objective_of
from hf_fda.anchors.stepping import Moves
from hf_fda.errors import RunError
from hf_fda.randomness import random_stream

if TYPE_CHECKING:
    from hf_fda.anchors.builder import AnchorBuilder
    from hf_fda.anchors.construction import UnitAnchors
    from hf_fda.blocks import Unit


@dataclass(frozen=True)
class Rounding:
    """What storing a unit's anchors in a narrower type does to the merge of them alone, which starts from the base.

    `change` is how far apart the unit's parameters come out on the stored anchors and on those of float32, as a share
    of how far the latter are from the base's (Euclidean norms over all parameters). `left` and `left_stored` are the
    shares of the base's distance to the float32 targets, on the float32 anchors, that remain after adaptation to those
    and to the stored ones.
    """

    change: float
    left: float
    left_stored: float

    def to_dict(self) -> dict[str, float]:
        """Its numbers by name."""
        return asdict(self)


def rounding_of(units: Mapping[str, UnitAnchors]) -> dict[str, dict[str, float]]:
    """What is known of it of units by name, as plain values."""
    return {name: own.rounding.to_dict() for name, own in units.items() if own.rounding is not None}


def rounded(found: UnitAnchors, dtype: str) -> UnitAnchors:
    """Anchors and targets as they come back from files of some type, in float32.

    Raises:
        RunError: when that type does not reach so far.
    """
    kind = getattr(torch, dtype)
    anchors, targets = (own.to(kind).float() for own in (found.anchors, found.targets))
    if not bool(anchors.isfinite().all()) or not bool(targets.isfinite().all()):
        raise RunError(f"anchors or targets are too large for {dtype}; store them as bfloat16 or float32")
    return replace(found, anchors=anchors, targets=targets)


def stored(builder: AnchorBuilder, unit: Unit, found: UnitAnchors, dtype: str) -> UnitAnchors:
    """Anchors as they come back from files of some type, with what that does to a merge.

    Args:
        builder: of the anchors; its options say how a unit is adapted.
        unit: which.
        found: its anchors in float32.
        dtype: of the files.

    Raises:
        RunError: when that type does not reach so far.
    """
    if dtype == "float32":
        return found
    narrow = rounded(found, dtype)
    return replace(narrow, rounding=_measured(builder, unit, found, narrow) if found.moves else Rounding(0.0, 1.0, 1.0))


def _measured(builder: AnchorBuilder, unit: Unit, found: UnitAnchors, narrow: UnitAnchors) -> Rounding:
    """Adapt the base's unit to both, and compare."""
    config, call = builder.config, builder.capture.calls[unit.name]
    assert config.batch_size is not None
    base = builder.load(builder.base.read, unit)
    aims = [objective_of(config, base, call, [own], builder.device) for own in (found, narrow)]
    moved, left = [], []
    start = mean_distance(aims[0], base, call, config.batch_size)
    for own, aim in zip((found, narrow), aims, strict=True):
        module = copy.deepcopy(base)
        assert config.epochs is not None and config.adaptation_learning_rate is not None
        adapt_unit(
            module,
            call,
            aim,
            Moves(),
            epochs=config.epochs,
            learning_rate=config.adaptation_learning_rate,
            schedule=config.adaptation_schedule,
            batch_size=config.batch_size,
            generator=random_stream(builder.seed, "batches", unit.name),
            frozen=frozenset(own.left_out),
        )
        moved.append(_flat(module) - _flat(base))
        left.append(mean_distance(aims[0], module, call, config.batch_size) / start if start else 1.0)
    length = float(moved[0].norm())
    return Rounding(float((moved[1] - moved[0]).norm()) / length if length else 0.0, left[0], left[1])


def _flat(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
