"""Checking a merge from configurations and file headers, before any weight is read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from hf_fda.adapters import AdapterCheckpoint
from hf_fda.adapters.targets import adapted_ranks, plan_adapter
from hf_fda.anchors.container import hidden_size
from hf_fda.blocks import Unit, family_of, find_units, require_blocks
from hf_fda.checkpoint.writer import MAX_SHARD_BYTES, TensorSpec, plan_shards
from hf_fda.devices import resolve_device
from hf_fda.errors import InputError, nearest
from hf_fda.estimate import disk_bytes, peak_memory_bytes
from hf_fda.given_anchors import agree_with_anchors, check_given
from hf_fda.inputs import Inputs, open_inputs
from hf_fda.lowrank import Budget
from hf_fda.merge_methods import FDAConfig, MethodConfig, resolve_method, with_source_names
from hf_fda.notes import notes_of
from hf_fda.plans import Plan, readable_size
from hf_fda.prediction import predict
from hf_fda.provenance import record
from hf_fda.recipes import Heads, Output, decide
from hf_fda.store import new_folder

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def plan(
    base: Any,
    sources: Any,
    method: str | MethodConfig = "fda",
    output: str | os.PathLike[str] = "merged",
    as_adapter: bool = False,
    data: Mapping[str, Any] | None = None,
    device: str | torch.device = "auto",
    dtype: str = "float32",
    seed: int = 0,
    *,
    anchors: Mapping[str, Any] | None = None,
    heads: str = "keep",
    rank: int | None = None,
    energy: float | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    trust_remote_code: bool = False,
    processes: int | None = None,
    **options: Any,
) -> Plan:
    """Check a merge from configurations and file headers alone; no weight is read, nothing is written.

    Args:
        base: the checkpoint all sources were fine-tuned from: a Hub id ("org/name", "org/name@revision"), a folder,
            or a model in memory.
        sources: a list of checkpoints, or a mapping from task name to checkpoint. For method "fda" a source may
            also be `FunctionalDualAnchors` or the folder of some.
        method: a registered name (`hf_fda.methods()`) or a config object.
        output: the folder to write. It must be new, empty, or of an earlier merge.
        as_adapter: write a PEFT adapter instead of a full checkpoint.
        data: examples by task name, for methods that look at data.
        device: "auto" (Accelerate's choice) or a torch device.
        dtype: type of the written weights: "float32", "bfloat16", "float16", "float64", or "auto" for the base's.
            The computation is in float32, or float64 where a method works entry by entry.
        seed: of everything random.
        anchors: anchors constructed earlier, by the name of a source that is given as weights.
        heads: "keep" each source's task head beside the merged body, or "merge" heads of one task into one.
        rank: of a merged adapter's factors, at most. None: as much as the sources' ranks together, which is exact
            wherever the merge is a linear combination; full rank where a source is DoRA or a full fine-tune.
        energy: the fraction of the squared norm that a merged adapter's factors keep, module by module.
        max_shard_bytes: size of a weight file.
        trust_remote_code: run model code that comes with the checkpoints.
        processes: predict how long the merge takes on so many processes (the plan's `time`); this measures the speed
            of the device for a moment. None predicts nothing.
        options: fields of the method's config.

    Raises:
        InputError: naming the argument, source or tensor that cannot be used, and the way out.
    """
    given = resolve_method(method, options)
    if data is not None:
        raise InputError(f"data: method '{given.name}' merges from weights alone; leave it out")
    _check_settings(dtype, heads, seed, max_shard_bytes)
    budget = _budget(as_adapter, rank, energy)
    folder = new_folder(output)
    chosen = resolve_device(device)
    inputs = open_inputs(base, sources, anchors, trust_remote_code)
    _check_apart(folder, inputs)
    config = _complete(given, inputs, as_adapter=budget is not None)
    units = _units(config, inputs)
    result = decide(inputs, config, units, cast(Heads, heads))
    out_dtype = DTYPES.get(dtype)
    adapter = None if budget is None else plan_adapter(inputs, result, budget)
    if adapter is None:
        _check_ties(inputs, result)
    factored = isinstance(config, FDAConfig) and config.parametrization == "factors"
    ranks = adapted_ranks(inputs, units, adapter) if factored else {}
    if factored and not ranks and isinstance(given, FDAConfig) and given.parametrization is None:
        config = _complete(replace(given, parametrization="coefficients"), inputs, as_adapter=True)
    shards = () if adapter is not None else plan_shards(_groups(inputs, result, out_dtype), max_shard_bytes)
    checked = Plan(
        inputs=inputs,
        config=config,
        output=folder,
        result=result,
        units=units,
        shards=shards,
        dtype=out_dtype,
        device=chosen,
        seed=int(seed),
        heads=cast(Heads, heads),
        arguments=record(inputs, config, dtype, seed, heads, max_shard_bytes, budget),
        peak_memory_bytes=peak_memory_bytes(inputs, config, units, result, adapter, ranks),
        disk_bytes=disk_bytes(inputs, config, units, shards, adapter),
        notes=tuple(notes_of(inputs, config, result, adapter, ranks)),
        adapter=adapter,
        ranks=ranks,
    )
    return checked if processes is None else replace(checked, time=predict(checked, processes))


def check_disk(plan: Plan) -> None:
    """Refuse a merge that the output's disk cannot hold.

    Raises:
        InputError: with both sizes.
    """
    where = plan.output.absolute()
    while not where.exists():
        where = where.parent
    present = sum(path.stat().st_size for path in plan.output.rglob("*") if path.is_file())
    free = shutil.disk_usage(where).free
    if free < plan.disk_bytes - present:
        raise InputError(
            f"output '{plan.output}': no space left for it: about {readable_size(plan.disk_bytes - present)} are "
            f"needed and {readable_size(free)} free; make room or choose another output"
        )


def _check_settings(dtype: Any, heads: Any, seed: Any, max_shard_bytes: Any) -> None:
    if not isinstance(dtype, str) or dtype not in ("auto", *DTYPES):
        raise InputError(f"dtype '{dtype}': {nearest(str(dtype), ['auto', *DTYPES])}")
    if heads not in ("keep", "merge"):
        raise InputError(f"heads '{heads}': {nearest(str(heads), ['keep', 'merge'])}")
    for name, value, least in (("seed", seed, 0), ("max_shard_bytes", max_shard_bytes, 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InputError(f"{name} must be a whole number, at least {least}, not {value!r}")


def _check_ties(inputs: Inputs, result: Output) -> None:
    """Refuse an adapter that changes one of two tied tensors: in PEFT the other stays, in a checkpoint it cannot."""
    for source in inputs.weighted:
        if not isinstance(source.checkpoint, AdapterCheckpoint):
            continue
        for other, name in result.layout.tied.items():
            own = result.base_names.get(name)
            moves = own is not None and result.recipes[name].rule != "base" and source.may_move(own)
            if own is not None and moves and not source.checkpoint.keeps_ties(source.tensor_of[own]):
                raise InputError(
                    f"source '{source.name}' ({source.checkpoint.id}): the adapter changes '{own}' and leaves "
                    f"'{other}', which the model ties to it; a full checkpoint would change both: as_adapter=True"
                )


def _budget(as_adapter: Any, rank: Any, energy: Any) -> Budget | None:
    """How large a merged adapter's factors may be; None where no adapter is written."""
    if not as_adapter:
        for name, value in (("rank", rank), ("energy", energy)):
            if value is not None:
                raise InputError(f"{name} is of a merged adapter's factors; it needs as_adapter=True (--as-adapter)")
        return None
    return Budget.checked(rank, energy)


def _check_apart(output: Path, inputs: Inputs) -> None:
    """Refuse to write a merge over what it reads."""
    for name, checkpoint in (
        ("the base", inputs.base),
        *((f"source '{s.name}'", s.checkpoint) for s in inputs.weighted),
    ):
        location = checkpoint.location
        if location is not None and location.folder is not None and location.folder.resolve() == output.resolve():
            raise InputError(f"output '{output}' is {name} itself; choose another folder")


def _complete(config: MethodConfig, inputs: Inputs, as_adapter: bool) -> MethodConfig:
    """The config with the weights in the order of the sources and every open option filled in."""
    names = [source.name for source in inputs.sources]
    without = [source.name for source in inputs.sources if source.weights is None]
    if not isinstance(config, FDAConfig):
        if without:
            raise InputError(f"source '{without[0]}' is anchors only; method '{config.name}' needs its weights")
        return with_source_names(config, names)
    for role in ("initial", "rest"):
        if without and getattr(config, role) not in (None, "base"):
            raise InputError(f"source '{without[0]}' is anchors only; {role} must then be 'base', or give its weights")
    if without and config.parametrization in ("coefficients", "factors"):
        raise InputError(
            f"source '{without[0]}' is anchors only and has no task vector; parametrization must then be 'parameters'"
        )
    require_blocks(inputs.base.layout)
    thick = [source.name for source in inputs.weighted if not isinstance(source.checkpoint, AdapterCheckpoint)]
    if thick and config.parametrization == "factors" and not as_adapter:
        raise InputError(
            f"source '{thick[0]}' is no adapter, so its task vector has no thin factors; parametrization must then be "
            "'coefficients' or 'parameters', or the output an adapter (as_adapter=True)"
        )
    config = config.with_sources(names, not without, all_thin=not thick, as_adapter=as_adapter)
    size = hidden_size(inputs.base.config)
    return agree_with_anchors(config, inputs).for_family(family_of(inputs.base.layout), size)


def _units(config: MethodConfig, inputs: Inputs) -> tuple[Unit, ...]:
    if not isinstance(config, FDAConfig):
        return ()
    units = find_units(inputs.base.layout, config.unit or ("block",))
    check_given(inputs, units)
    return tuple(unit for unit in units if any(source.has(unit) for source in inputs.sources))


def _groups(
    inputs: Inputs, result: Output, dtype: torch.dtype | None
) -> list[tuple[tuple[str, ...], dict[str, TensorSpec]]]:
    """Groups of output tensors with what they become on disk, from meta tensors."""
    groups = []
    for names in result.layout.save_groups(result.recipes):
        meta = {
            name: torch.empty(result.layout.shapes[name], dtype=out_dtype(inputs, result, name, dtype), device="meta")
            for name in names
        }
        on_disk = result.layout.to_disk(meta)
        groups.append((names, {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in on_disk.items()}))
    return groups


def out_dtype(inputs: Inputs, result: Output, name: str, dtype: torch.dtype | None) -> torch.dtype:
    """The type an output tensor is written in: whole numbers keep theirs."""
    own = result.base_names.get(name)
    stored = inputs.base.dtype(own) if own is not None else inputs.weighted[0].checkpoint.dtype(name)
    return dtype if dtype is not None and stored.is_floating_point else stored
