"""Which units are constructed together: as many of one shape as fill the machine, within a bound of memory."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, prod

import torch

from hf_fda.blocks import Unit
from hf_fda.checkpoint.interface import Checkpoint
from hf_fda.costs import active_entries, tokens_of
from hf_fda.merge_methods import FDAConfig

FULL_CORE, FULL_ACCELERATOR = 2**24, 2**32
"""Multiplications of one product from which on it leaves little of a machine idle. On CPU cores six blocks of width 32,
64, 128 and 384 with 320 tokens each took 1.9, 1.57, 1.17 and 0.99 times as long one after the other as together. The
other is reckoned from the 400 TFLOP/s of a data-centre GPU's TF32 and 10 microseconds to start a product, and was not
measured."""

MOST_BYTES = 4 * 2**30
"""What units that are constructed together may take at most; a larger one is constructed alone."""


def construction_bytes(base: Checkpoint, config: FDAConfig, unit: Unit, together: int = 1) -> int:
    """What constructing units takes, in bytes: of each base, source and task vector in float32; gradients and their
    graph, in which each linear output has beside it those of norms, of attention (keys and values once for each head)
    and of activations; the float64 look at a few anchors. Together they are copied once more.

    Args:
        base: whose units they are.
        config: complete.
        unit: one of them.
        together: how many.
    """
    shapes = base.layout.shapes
    entries = sum(prod(shapes[name]) for name in unit.tensors)
    outputs = sum(shapes[name][0] for name in unit.tensors if len(shapes[name]) == 2)
    tokens = (config.num_anchors or 0) * tokens_of(base, config)
    return together * 4 * (entries * (13 if together == 1 else 16) + tokens * outputs * 16)


def group_units(
    base: Checkpoint, config: FDAConfig, units: Sequence[Unit], device: torch.device
) -> tuple[tuple[Unit, ...], ...]:
    """Units by those that are constructed together.

    That depends on their shapes and the kind of device only, so that anchors are the same whoever makes them.

    Args:
        base: whose units they are.
        config: complete.
        units: all units that anchors may be asked for.
        device: where they are constructed.
    """
    forms: dict[object, list[Unit]] = {}
    for unit in units:
        forms.setdefault(_form(base, unit), []).append(unit)
    found = []
    for alike in forms.values():
        count = ceil(len(alike) / _together(base, config, alike[0], device))
        each = ceil(len(alike) / count)  # as evenly as can be
        found += [tuple(alike[first : first + each]) for first in range(0, len(alike), each)]
    return tuple(found)


def _form(base: Checkpoint, unit: Unit) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """The names and shapes of a unit's parameters."""
    return tuple((name.removeprefix(unit.name), tuple(base.layout.shapes[name])) for name in unit.tensors)


def _together(base: Checkpoint, config: FDAConfig, unit: Unit, device: torch.device) -> int:
    """How many units of a form run together."""
    shapes, roles = base.layout.shapes, base.layout.roles
    matrices = [name for name in unit.tensors if len(shapes[name]) > 1]
    if any(roles[name] not in ("linear", "conv1d") for name in matrices):
        return 1  # experts, or a table: not for a stack
    tokens = (config.num_anchors or 0) * tokens_of(base, config)
    product = tokens * active_entries(base, unit.tensors) / max(len(matrices), 1)
    full = FULL_CORE if device.type == "cpu" else FULL_ACCELERATOR
    fitting = MOST_BYTES // (construction_bytes(base, config, unit, 2) // 2)
    return max(1, min(ceil(full / max(product, 1)), fitting))
