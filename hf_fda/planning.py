"""Checking a merge from configurations and file headers, before it begins."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from hf_fda.adapters import adapter_of
from hf_fda.adapters.targets import adapted_ranks, plan_adapter
from hf_fda.anchors.container import hidden_size
from hf_fda.blocks import Unit, family_of, find_units, require_blocks
from hf_fda.checkpoint.writer import MAX_SHARD_BYTES, Shard, TensorSpec, plan_shards
from hf_fda.data.opening import OpenedData, most_rows
from hf_fda.errors import InputError
from hf_fda.given_anchors import agree_with_anchors, check_base, check_given, with_rests
from hf_fda.inputs import Inputs, open_inputs, with_ties_apart
from hf_fda.merge_methods import FDAConfig, MethodConfig, resolve_method, with_source_names
from hf_fda.merge_methods.distill import DistillConfig
from hf_fda.merge_methods.looking import RowsConfig
from hf_fda.merge_methods.regmean import RegMeanPlusConfig
from hf_fda.merge_methods.unitwise import UnitwiseConfig
from hf_fda.notes import notes_of
from hf_fda.plan_data import PlanData, open_plan_data
from hf_fda.plans import Plan
from hf_fda.prediction import predict
from hf_fda.provenance import Described, record
from hf_fda.recipes import Output, decide, out_dtype
from hf_fda.refusals import (
    check_apart,
    check_moves,
    check_rows,
    check_ties,
    check_trim,
    check_vocabulary,
    check_wants_data,
)
from hf_fda.settings import Settings


def plan(
    base: Any,
    sources: Any,
    method: str | MethodConfig = "fda",
    output: str | os.PathLike[str] = "merged",
    as_adapter: bool = False,
    data: Mapping[str, Any] | str | None = None,
    device: str | torch.device = "auto",
    dtype: str = "float32",
    seed: int = 0,
    *,
    anchors: Mapping[str, Any] | None = None,
    heads: str = "keep",
    rank: int | None = None,
    energy: float | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    tokenizer: str | None = None,
    tokens: Mapping[str, Any] | None = None,
    chat_template: str | None = None,
    pad_to_multiple_of: int | None = None,
    trust_remote_code: bool = False,
    force: bool = False,
    processes: int | None = None,
    **options: Any,
) -> Plan:
    """Check a merge from configurations and file headers alone; nothing is written, and no weight is read but, where
    rows are drawn from them, token embeddings of files that are on this machine.

    Args:
        base: the checkpoint all sources were fine-tuned from: a Hub id ("org/name", "org/name@revision"), a folder,
            or a model in memory.
        sources: a list of checkpoints, or a mapping from task name to checkpoint. For method "fda" a source may
            also be `FunctionalDualAnchors` or the folder of some.
        method: a registered name (`hf_fda.methods()`) or a config object.
        output: the folder to write. It must be new, empty, or of an earlier merge.
        as_adapter: write a PEFT adapter instead of a full checkpoint.
        data: rows by task name, for methods that look at data; labels are not used. Of each task a `datasets.Dataset`,
            a list of texts or of rows, a `DataLoader`, a file (.jsonl, .json, .csv, .tsv, .parquet, .txt), a folder, a
            Hub dataset ("org/name", "org/name:config@revision"), or a mapping with `path` and any of `name`, `split`,
            `revision`, `columns`, `prompt`, `target`, `rows` and `max_length`. Without any: "synthetic"
            (also for one task), rows drawn from what the token embeddings of a fine-tune of text show of the text that
            it was tuned on, at most 128 a task unless the task's `rows` say more; "anchors", for `divmerge` and `fda`.
            None: no rows; `fda` takes "synthetic" where all sources are full fine-tunes of a text encoder whose
            embeddings show something, else "anchors".
        device: "auto" (Accelerate's choice) or a torch device.
        dtype: type of the written weights: "float32", "bfloat16", "float16", "float64", or "auto" for the base's.
            The computation is in float32 where that is precise enough for one source of weight 1 to come out as it
            is, else in float64.
        seed: of everything random.
        anchors: anchors constructed earlier, by the name of a source that is given as weights.
        heads: "keep" each source's task head beside the merged body, or "merge" heads of one task into one.
        rank: of a merged adapter's factors, at most. None: as much as the sources' ranks together, which is exact
            wherever the merge is a linear combination; full rank where a source is DoRA or a full fine-tune.
        energy: the fraction of the squared norm that a merged adapter's factors keep, module by module.
        max_shard_bytes: size of a weight file.
        tokenizer: the vocabulary of the output, to which all models are brought token by token: "base", "union" (the
            base's tokens, then further ones in the order of the sources) or the name of a source. None: tokens must
            be the same.
        tokens: by token, whose row it gets in the models that lack it: {"source": name, {"kind": "zero"}, or
            {"kind": "model_token", "model": name, "token": text or "token_id": id}}; with "force": True in all of
            them. Without a rule it is the base's row, or the mean of the sources that have the token.
        chat_template: "auto" (the one most sources have), "base", the name of a source, or the template itself. None:
            what comes with the tokenizer.
        pad_to_multiple_of: makes the vocabulary the least multiple of this that holds all tokens. None: it has as
            many rows as the model whose tokenizer it is, more only where tokens are added.
        trust_remote_code: run model code that comes with the checkpoints.
        force: merge anchors although they were constructed on another revision of the base.
        processes: predict how long the merge takes on so many processes (the plan's `time`); this measures the speed
            of the device for a moment. None predicts nothing.
        options: fields of the method's config.

    Raises:
        InputError: naming the argument, source or tensor that cannot be used, and the way out.
    """
    given = resolve_method(method, options)
    check_wants_data(given, data)
    settings = Settings.checked(output, device, dtype, seed, heads, max_shard_bytes, as_adapter, rank, energy)
    settings = replace(settings, force=force)
    inputs = open_inputs(
        base, sources, anchors, trust_remote_code, tokenizer, tokens, chat_template, pad_to_multiple_of
    )
    checked = check_merge(inputs, given, settings, data, trust_remote_code)
    return checked if processes is None else replace(checked, time=predict(checked, processes))


def check_merge(
    inputs: Inputs,
    given: MethodConfig,
    settings: Settings,
    data: Any = None,
    trust_remote_code: bool = False,
    describe: Callable[[PlanData], Described | None] = lambda data: None,
) -> Plan:
    """Check a merge of what is open, and of data as a user gives it. No weights are downloaded: of rows that are to be
    drawn from such, `Plan.settle` checks the merge again.

    Args:
        inputs: base and sources.
        given: the merge method.
        settings: where and how it is written.
        data: by task, or a word; None where there is none.
        trust_remote_code: run code that comes with a tokenizer.
        describe: what the configuration says that the merge was read from, if it was.

    Raises:
        InputError: naming the argument, source or tensor that cannot be used, and the way out.
    """

    def check(fetch: bool) -> Plan:
        found = open_plan_data(data, inputs, given, settings, trust_remote_code, fetch)
        checked = make_plan(inputs, given, settings, found, describe(found))
        return replace(checked, settle=partial(check, True)) if found.assumed else checked

    return check(False)


def make_plan(
    inputs: Inputs,
    given: MethodConfig,
    settings: Settings,
    data: PlanData,
    described: Described | None = None,
) -> Plan:
    """Check a merge of what is open.

    Args:
        inputs: base and sources.
        given: the merge method.
        settings: where and how it is written.
        data: what it looks at beside weights.
        described: what the configuration says that the merge was read from.

    Raises:
        InputError: naming the argument, source or tensor that cannot be used, and the way out.
    """
    check_apart(settings.output, inputs)
    check_rows(given, data.rows)
    check_vocabulary(settings, inputs)
    if settings.budget is not None:
        inputs = with_ties_apart(inputs)
    config = _complete(given, inputs, settings.budget is not None, data.rows)
    check_trim(config, settings, described)
    anchoring = _anchoring(config, inputs, data.anchors)
    units = _units(anchoring or config, inputs)
    check_base(inputs, settings.force)
    if isinstance(config, FDAConfig) and config.rest != "base":
        inputs = with_rests(inputs)
    result = decide(
        inputs,
        config,
        units if isinstance(config, UnitwiseConfig) else (),
        settings.heads,
        described.at if described is not None else None,
    )
    adapter = None if settings.budget is None else plan_adapter(inputs, result, units, settings.budget)
    shards: tuple[Shard, ...] = ()
    if adapter is None:
        check_ties(inputs, result)
        shards = plan_shards(_groups(inputs, result, settings.torch_dtype), settings.max_shard_bytes)
    else:
        check_moves(result)
    factored = isinstance(config, FDAConfig) and config.parametrization == "factors"
    ranks = adapted_ranks(inputs, units, adapter) if factored else {}
    if factored and not ranks and isinstance(given, FDAConfig) and given.parametrization is None:
        config = _complete(replace(given, parametrization="coefficients"), inputs, True, data.rows)
        anchoring = _anchoring(config, inputs, wanted=False)
    return Plan(
        inputs=inputs,
        config=config,
        output=settings.output,
        result=result,
        units=units,
        shards=shards,
        dtype=settings.torch_dtype,
        device=settings.device,
        seed=settings.seed,
        heads=settings.heads,
        arguments=record(inputs, config, settings, data, described),
        notes=tuple(notes_of(inputs, config, result, adapter, ranks, data)),
        adapter=adapter,
        ranks=ranks,
        data=data.rows,
        anchoring=anchoring,
    )


def _complete(config: MethodConfig, inputs: Inputs, as_adapter: bool, data: Mapping[str, OpenedData]) -> MethodConfig:
    """The config with the weights in the order of the sources and every open option filled in."""
    rows = most_rows(data, config.rows) if isinstance(config, RowsConfig) else 0
    names = [source.name for source in inputs.sources]
    without = [source.name for source in inputs.sources if source.weights is None]
    if not isinstance(config, FDAConfig):
        if without:
            raise InputError(f"source '{without[0]}' is anchors only; method '{config.name}' needs its weights")
        if isinstance(config, (DistillConfig, RegMeanPlusConfig)):
            require_blocks(inputs.base.layout)
        if isinstance(config, DistillConfig):
            thin = all(adapter_of(source.checkpoint) is not None for source in inputs.weighted)
            config = config.completed(names, family_of(inputs.base.layout), thin, rows)
        return with_source_names(config, names)
    if without and config.initial not in (None, "base"):
        raise InputError(f"source '{without[0]}' is anchors only; initial must then be 'base', or give its weights")
    restless = [source.name for source in inputs.sources if not source.has_rest]
    if restless and config.rest not in (None, "base"):
        raise InputError(
            f"source '{restless[0]}' is anchors only, and its publisher put nothing beside them; rest must then be "
            "'base', or give its weights"
        )
    if without and config.parametrization in ("coefficients", "factors"):
        raise InputError(
            f"source '{without[0]}' is anchors only and has no task vector; parametrization must then be 'parameters'"
        )
    require_blocks(inputs.base.layout)
    thick = [source.name for source in inputs.weighted if adapter_of(source.checkpoint) is None]
    if thick and config.parametrization == "factors" and not as_adapter:
        raise InputError(
            f"source '{thick[0]}' is no adapter, so its task vector has no thin factors; parametrization must then be "
            "'coefficients' or 'parameters', or the output an adapter (as_adapter=True)"
        )
    config = config.with_sources(
        names, not without, all_thin=not thick, as_adapter=as_adapter, all_have_rest=not restless
    )
    size = hidden_size(inputs.base.config)
    synthetic = any(own.drawn for own in data.values())
    return agree_with_anchors(config, inputs).for_family(family_of(inputs.base.layout), size, rows, synthetic)


def _anchoring(config: MethodConfig, inputs: Inputs, wanted: bool) -> FDAConfig | None:
    """The options with which anchors are constructed, complete; None where none are looked at.

    Args:
        config: the merge method, complete.
        inputs: base and sources.
        wanted: whether anchors stand in the place of data.
    """
    if isinstance(config, FDAConfig) or not wanted:
        return config if isinstance(config, FDAConfig) else None
    require_blocks(inputs.base.layout)
    family, size = family_of(inputs.base.layout), hidden_size(inputs.base.config)
    # By squared error: the metric of the shift overshoots where few numbers are learnt
    config = FDAConfig(initial="base", adaptation_distance="mse")
    return agree_with_anchors(config, inputs).for_family(family, size)


def _units(config: MethodConfig, inputs: Inputs) -> tuple[Unit, ...]:
    if not isinstance(config, UnitwiseConfig):
        return ()
    units = find_units(inputs.base.layout, config.unit or ("block",))
    if isinstance(config, FDAConfig):
        check_given(inputs, units)
    return tuple(unit for unit in units if any(source.has(unit) for source in inputs.sources))


def _groups(
    inputs: Inputs, result: Output, dtype: torch.dtype | None
) -> list[tuple[tuple[str, ...], dict[str, TensorSpec]]]:
    """Groups of output tensors in the order in which the base is read, with what they become on disk, from meta
    tensors."""
    order = {name: number for number, name in enumerate(inputs.base.disk_order)}
    in_memory = {name: order.get(result.base_names.get(name, ""), len(order)) for name in result.recipes}
    groups = []
    for names in result.layout.save_groups(sorted(result.recipes, key=in_memory.__getitem__)):
        meta = {
            name: torch.empty(result.layout.shapes[name], dtype=out_dtype(inputs, result, name, dtype), device="meta")
            for name in names
        }
        on_disk = result.layout.to_disk(meta)
        groups.append((names, {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in on_disk.items()}))
    return groups
