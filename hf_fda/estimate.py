"""What a merge will need, from shapes alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod

import torch

from hf_fda.adapters import adapter_of
from hf_fda.adapters.targets import AdapterPlan, Target
from hf_fda.blocks import Unit
from hf_fda.checkpoint.writer import Shard
from hf_fda.costs import tokens_of, width
from hf_fda.data.opening import OpenedData
from hf_fda.divergence.footprint import learning_bytes
from hf_fda.inputs import Inputs
from hf_fda.merge_methods import FDAConfig, MethodConfig
from hf_fda.merge_methods.learned import LearnedConfig
from hf_fda.merge_methods.unitwise import UnitwiseConfig
from hf_fda.recipes import Output
from hf_fda.states.footprint import StatesFootprint
from hf_fda.streaming.footprint import Footprint


def peak_memory_bytes(
    inputs: Inputs,
    config: MethodConfig,
    units: Sequence[Unit],
    result: Output,
    shards: Sequence[Shard],
    dtype: torch.dtype | None,
    adapter: AdapterPlan | None = None,
    ranks: Mapping[str, int] | None = None,
    rows: Mapping[str, OpenedData] | None = None,
) -> int:
    """Peak bytes a merge holds at once, beside the libraries: the largest of its stages, and the adapters it reads."""
    writing = [Footprint(inputs, result, dtype).peak(shard) for shard in shards]
    stages = writing if adapter is None else [_factor_stage(inputs, adapter)]
    if isinstance(config, UnitwiseConfig) and units:
        stages += _unitwise_stages(inputs, config, units, ranks or {}, rows or {})
    if isinstance(config, LearnedConfig):
        merged = [result.base_names[name] for name, own in result.recipes.items() if own.config is config]
        stages.append(learning_bytes(inputs, config, merged, rows or {}))
    read = [adapter_of(own.checkpoint) for own in inputs.weighted]
    return max(stages) + sum(t.nbytes for own in read if own is not None for t in own.files.tensors.values())


def _unitwise_stages(
    inputs: Inputs,
    config: UnitwiseConfig,
    units: Sequence[Unit],
    ranks: Mapping[str, int],
    rows: Mapping[str, OpenedData],
) -> list[int]:
    """Bytes of the stages of a method that merges units."""
    states, stages = StatesFootprint.of(inputs, config, rows), []
    if rows:
        stages.append(states.recording(units) + 4 * max(_entries(inputs, unit.tensors) for unit in units))
    if not isinstance(config, FDAConfig):
        return stages + [distillation_bytes(inputs, unit) + states.learning(2) for unit in units]
    anchored, beside = not rows or config.with_data == "mixed", states.learning(1) if rows else 0
    stages += [construction_bytes(inputs, config, unit) for unit in units if anchored]
    return stages + [adaptation_bytes(inputs, config, unit, ranks, anchored) + beside for unit in units]


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


def construction_bytes(inputs: Inputs, config: FDAConfig, unit: Unit) -> int:
    """Base, source and task vector in float32; gradients and their graph; the float64 look at a few anchors."""
    entries = _entries(inputs, unit.tensors)
    return entries * 4 * 14 + _activations(inputs, config, unit) * 4 * 8


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


def _activations(inputs: Inputs, config: FDAConfig, unit: Unit) -> int:
    """Entries of all linear outputs of a unit for all its anchors."""
    shapes = inputs.base.layout.shapes
    outputs = sum(shapes[name][0] for name in unit.tensors if len(shapes[name]) == 2)
    return (config.num_anchors or 0) * tokens_of(inputs.base, config) * outputs


def _entries(inputs: Inputs, names: Iterable[str]) -> int:
    return sum(prod(inputs.base.layout.shapes[name]) for name in names)


def disk_bytes(
    inputs: Inputs,
    config: MethodConfig,
    units: Sequence[Unit],
    shards: Sequence[Shard],
    adapter: AdapterPlan | None = None,
    rows: Mapping[str, OpenedData] | None = None,
) -> int:
    """Bytes the output folder will take, with what is there while it is being made (an adapter: its parts too)."""
    model = sum(shard.nbytes for shard in shards) + (0 if adapter is None else 2 * adapter_bytes(inputs, adapter))
    blocks = sum(_entries(inputs, unit.tensors) for unit in units) * 4
    if isinstance(config, UnitwiseConfig):
        blocks += StatesFootprint.of(inputs, config, rows or {}).on_disk(inputs, units)
    if not isinstance(config, FDAConfig) or (rows and config.with_data == "states"):
        return model + blocks
    tokens = tokens_of(inputs.base, config)
    constructed = sum(source.anchors is None for source in inputs.sources)
    anchors = constructed * len(units) * (config.num_anchors or 0) * tokens * width(inputs.base) * 4 * 2
    return model + blocks + anchors
