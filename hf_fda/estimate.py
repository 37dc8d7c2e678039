"""What a merge will need, from shapes alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING

from hf_fda.adapters import adapter_of
from hf_fda.adapters.targets import AdapterPlan, Target
from hf_fda.anchors.grouping import construction_bytes, group_units
from hf_fda.blocks import Unit
from hf_fda.costs import outputs, tokens_of, width
from hf_fda.divergence.footprint import KEPT, learning_bytes
from hf_fda.inputs import Inputs
from hf_fda.merge_methods import FDAConfig
from hf_fda.merge_methods.distill import DistillConfig
from hf_fda.merge_methods.learned import LearnedConfig
from hf_fda.merge_methods.unitwise import UnitwiseConfig
from hf_fda.states.footprint import StatesFootprint
from hf_fda.states.objective import FORWARD
from hf_fda.statistics.footprint import statistics_bytes
from hf_fda.streaming.footprint import AROUND, Footprint

if TYPE_CHECKING:
    from hf_fda.plans import Plan


ROWS_AROUND = 2**28
"""Bytes that tokenizers, machine code of products of many shapes, fragments and libraries loaded on the way take beside
the tensors where units learn from rows: of five encoders of width 384 up to 140 MB more than the tensors alone."""


def peak_memory_bytes(plan: Plan) -> int:
    """Peak bytes a merge holds at once, beside the libraries: the largest of its stages, and the adapters it reads."""
    inputs = plan.inputs
    writing = [Footprint(inputs, plan.result, plan.dtype).peak(shard) for shard in plan.shards]
    stages = writing if plan.adapter is None else [_factor_stage(inputs, plan.adapter)]
    if plan.anchoring is not None and plan.constructions:
        groups = group_units(inputs.base, plan.anchoring, plan.units, plan.device)
        stages += [construction_bytes(inputs.base, plan.anchoring, group[0], len(group)) for group in groups]
    if isinstance(plan.config, UnitwiseConfig):
        stages += _unit_stages(plan, plan.config)
    elif isinstance(plan.config, LearnedConfig) and plan.anchoring is not None:
        stages += [coefficient_bytes(inputs, plan.anchoring, unit) for unit in plan.units]
    elif isinstance(plan.config, LearnedConfig):
        stages.append(learning_bytes(inputs, plan.config, merged_by_method(plan), plan.data))
    stages.append(statistics_bytes(inputs, plan.config, merged_by_method(plan), plan.data)[0])
    read = [adapter_of(own.checkpoint) for own in inputs.weighted]
    return max(stages) + sum(t.nbytes for own in read if own is not None for t in own.files.tensors.values())


def _unit_stages(plan: Plan, config: UnitwiseConfig) -> list[int]:
    """What the units need while they are matched, one by one."""
    inputs, states = plan.inputs, StatesFootprint.of(plan.inputs, config, plan.data)
    found = []
    batch = 0
    if states.vectors:
        assert isinstance(config, FDAConfig | DistillConfig)
        found.append(states.recording(plan.units) + recording_bytes(inputs, plan.units, states.positions))
        each = max(outputs(inputs.base, unit.tensors) for unit in plan.units)
        batch = int(4 * KEPT * each * (config.batch_size or 0) * states.positions)
        batch += ROWS_AROUND + (states.held if plan.propagates else 0)
    if isinstance(config, FDAConfig):
        beside = states.learning(2 if plan.propagates else 1) + batch if states.vectors else 0
        anchored = any(plan.anchored(source) for source in inputs.sources)
        found += [adaptation_bytes(inputs, config, unit, plan.ranks, anchored) + beside for unit in plan.units]
    if isinstance(config, DistillConfig):
        found += [distillation_bytes(inputs, unit) + states.learning(2) + batch for unit in plan.units]
    return found


def recording_bytes(inputs: Inputs, units: Sequence[Unit], positions: int) -> int:
    """A whole source in float32, and what a block makes of the rows that run together, before and after its widest
    layer.

    Args:
        inputs: base and sources.
        units: whose hidden states are recorded.
        positions: of a row.
    """
    whole = max(sum(prod(own.checkpoint.shape(name)) for name in own.checkpoint.names) for own in inputs.weighted)
    widest = max((inputs.base.layout.shapes[name][0] for unit in units for name in unit.tensors), default=0)
    return AROUND + 4 * (whole + 2 * FORWARD * positions * widest)


def merged_by_method(plan: Plan) -> list[str]:
    """The base's names of the tensors that are merged by the plan's own method."""
    recipes, known = plan.result.recipes, plan.result.base_names
    return [known[name] for name, own in recipes.items() if own.config is plan.config]


def _factor_stage(inputs: Inputs, adapter: AdapterPlan) -> int:
    """One tensor of base and sources, dense, with the merged one and its decomposition."""
    largest = max(_entries(inputs, [target.base_name]) for target in adapter.targets)
    return largest * 4 * (3 * len(inputs.sources) + 8)


def adapter_bytes(inputs: Inputs, adapter: AdapterPlan) -> int:
    """Bytes of a merged adapter in float32: of whole tensors, and of factors of the largest rank they may have."""
    return 4 * sum(_kept_entries(inputs, target, adapter) for target in adapter.targets)


def _kept_entries(inputs: Inputs, target: Target, adapter: AdapterPlan) -> int:
    shape = inputs.base.shape(target.base_name)
    return factor_entries(shape, adapter.rank_of(target)) if target.factored else prod(shape)


def factor_entries(shape: tuple[int, ...], rank: int) -> int:
    """Entries of both factors of a tensor: of a matrix, of each in a stack, or of what counts as a matrix.

    >>> factor_entries((8, 6), 2)
    28
    """
    if len(shape) == 3:
        return shape[0] * rank * (shape[1] + shape[2])
    return rank * (shape[0] + prod(shape[1:]))


def adaptation_bytes(
    inputs: Inputs, config: FDAConfig, unit: Unit, ranks: Mapping[str, int], anchored: bool = True
) -> int:
    """Parameters, gradients, two moments, the step and its scale, the start to stay near to; the tensor that is read
    from all sources, with its decomposition where it is factored; anchors, targets and metrics.

    What is factored has of itself the parameter, the base's, the gradient and the product; all else of its factors.
    Without anchors only the rest.
    """
    largest = max(_entries(inputs, [name]) for name in unit.tensors) * (len(inputs.sources) + 2)
    size, tokens = width(inputs.base), (config.num_anchors or 0) * tokens_of(inputs.base, config)
    metric = size * size if config.adaptation_distance == "shift" else 0
    anchors = len(inputs.sources) * (tokens * size * 2 + metric) if anchored else 0
    copies = 8 if config.interpolation == 1 else 9
    factored = [name for name in unit.tensors if name in ranks]
    thin = sum(factor_entries(inputs.base.shape(name), ranks[name]) for name in factored)
    dense = _entries(inputs, unit.tensors) - _entries(inputs, factored)
    own = (dense + thin) * copies + _entries(inputs, factored) * 4
    decomposed = max((_entries(inputs, [name]) for name in factored), default=0) * 6
    return (own + largest + decomposed + anchors) * 4


def distillation_bytes(inputs: Inputs, unit: Unit) -> int:
    """Parameters, gradients, two moments, the step and its scale, the start to go back to, the source's and the base's
    unit; the tensor that is read from all sources in float64. Hidden states come beside."""
    largest = max(_entries(inputs, [name]) for name in unit.tensors) * (len(inputs.sources) + 2)
    return 4 * (_entries(inputs, unit.tensors) * 11 + 2 * largest)


def coefficient_bytes(inputs: Inputs, config: FDAConfig, unit: Unit) -> int:
    """The base's unit, its origin, gradients and all sources' task vectors; anchors, targets and metrics."""
    size, tokens = width(inputs.base), (config.num_anchors or 0) * tokens_of(inputs.base, config)
    anchors = len(inputs.sources) * (tokens * size * 2 + size * size) + _activations(inputs, config, unit) * 4
    return 4 * (_entries(inputs, unit.tensors) * (4 + len(inputs.sources)) + anchors)


def _activations(inputs: Inputs, config: FDAConfig, unit: Unit) -> int:
    """Entries of all linear outputs of a unit for all its anchors."""
    shapes = inputs.base.layout.shapes
    outputs = sum(shapes[name][0] for name in unit.tensors if len(shapes[name]) == 2)
    return (config.num_anchors or 0) * tokens_of(inputs.base, config) * outputs


def _entries(inputs: Inputs, names: Iterable[str]) -> int:
    return sum(prod(inputs.base.layout.shapes[name]) for name in names)


def disk_bytes(plan: Plan) -> int:
    """Bytes the output folder will take, with what is there while it is being made (an adapter: its parts too)."""
    inputs, config, units = plan.inputs, plan.config, plan.units
    total = sum(shard.nbytes for shard in plan.shards)
    total += 0 if plan.adapter is None else 2 * adapter_bytes(inputs, plan.adapter)
    total += statistics_bytes(inputs, config, merged_by_method(plan), plan.data)[1]
    if isinstance(config, UnitwiseConfig):
        total += sum(_entries(inputs, unit.tensors) for unit in units) * 4
        total += StatesFootprint.of(inputs, config, plan.data).on_disk(inputs, units)
    if plan.anchoring is not None:
        tokens = (plan.anchoring.num_anchors or 0) * tokens_of(inputs.base, plan.anchoring)
        total += len(plan.constructions) * tokens * width(inputs.base) * 4 * 2
    return total
