"""What a plan refuses although each of its parts can be used: things that do not go together."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_fda.adapters import adapter_of
from hf_fda.data.opening import OpenedData
from hf_fda.data.request import ANCHORS, SYNTHETIC
from hf_fda.errors import InputError
from hf_fda.inputs import Inputs
from hf_fda.merge_methods import MethodConfig
from hf_fda.merge_methods.unitwise import UnitwiseConfig
from hf_fda.plans import Plan, readable_size
from hf_fda.provenance import Described
from hf_fda.recipes import Output
from hf_fda.settings import Settings
from hf_fda.streaming.trimming import refuse_global, trims_globally


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


def check_ties(inputs: Inputs, result: Output) -> None:
    """Refuse an adapter that changes one of two tied tensors: in PEFT the other stays, in a checkpoint it cannot."""
    merged = {result.base_names.get(name) for name, recipe in result.recipes.items() if recipe.rule != "base"}
    for source in inputs.weighted:
        adapter = adapter_of(source.checkpoint)
        if adapter is not None:
            names = {theirs for own, theirs in source.tensor_of.items() if own in merged}
            label = f"source '{source.name}' ({source.checkpoint.id})"
            adapter.check_ties(names, label, "as_adapter=True keeps them apart")


def check_moves(result: Output) -> None:
    """Refuse an adapter of a method that changes what no source does: only tensors that one changes are in it."""
    for recipe in result.recipes.values():
        if recipe.config is not None and not recipe.config.leaves_equals():
            raise InputError(
                f"method '{recipe.config.name}' with these options changes what no source does, which an adapter does "
                "not hold; write a full checkpoint (as_adapter=False)"
            )


def check_vocabulary(settings: Settings, inputs: Inputs) -> None:
    """Refuse an adapter for a base with another vocabulary."""
    if settings.budget is not None and inputs.vocabulary.changes_base:
        raise InputError(
            "as_adapter=True: an adapter goes with the base's own vocabulary; say tokenizer='base', or merge into a "
            "full checkpoint"
        )


def check_apart(output: Path, inputs: Inputs) -> None:
    """Refuse to write a merge over what it reads."""
    for name, checkpoint in (
        ("the base", inputs.base),
        *((f"source '{s.name}'", s.checkpoint) for s in inputs.weighted),
    ):
        location = checkpoint.location
        if location is not None and location.folder is not None and location.folder.resolve() == output.resolve():
            raise InputError(f"output '{output}' is {name} itself; choose another folder")
    for source in inputs.sources:
        folder = source.anchors.folder if source.anchors is not None else None
        if folder is not None and folder.resolve() == output.resolve():
            raise InputError(f"output '{output}' is the anchors of '{source.name}' themselves; choose another folder")


def check_wants_data(config: MethodConfig, data: Any) -> None:
    """Refuse data that a method does not look at, and a method that looks at data without any."""
    if data is not None and config.data == "never":
        raise InputError(f"data: method '{config.name}' merges from weights alone; leave it out")
    words = (*((ANCHORS,) if config.takes_anchors else ()), SYNTHETIC)
    if isinstance(data, str) and data not in words:
        ways_out = " or ".join(f"'{word}'" for word in words)
        raise InputError(
            f"data: must be a mapping from task name to rows, such as {{'task': 'rows.jsonl'}}, or {ways_out}, "
            f"not '{data}'"
        )
    if data is None and config.data == "must":
        anchors = f"data='{ANCHORS}' makes do without any, and " if config.takes_anchors else ""
        raise InputError(
            f"method '{config.name}' looks at unlabelled rows of every task: data={{'task': 'rows.jsonl'}} "
            f"(--data task=rows.jsonl); {anchors}data='{SYNTHETIC}' draws them from the weights of models of text; "
            "without any, 'fda' is the method"
        )


def check_rows(config: MethodConfig, rows: Mapping[str, OpenedData]) -> None:
    """Refuse tasks whose outputs a method cannot look at."""
    for task, own in rows.items():
        if config.name == "adamerging" and own.kind == "values":
            raise InputError(f"source '{task}' is a regression, which has no entropy; 'divmerge' takes it")
        if own.lacks_targets and isinstance(config, UnitwiseConfig):
            raise InputError(
                f"data of '{task}': '{config.name}' has to know what an encoder-decoder is to write on each row: name "
                "that column (target), or use 'divmerge', which lets the source write"
            )


def check_trim(config: MethodConfig, settings: Settings, described: Described | None) -> None:
    """Refuse a trim over whole task vectors where blocks, adapters or tensors are merged by rules of their own."""
    if settings.budget is not None:
        refuse_global(config, "adapters")
    if described is not None and {"density", "trim"} & set(described.varying) and trims_globally(config):
        raise InputError(f"method '{config.name}': trim='global' needs one density for all tensors")
    if isinstance(config, UnitwiseConfig):
        for own in (config.initial, config.rest):
            if isinstance(own, MethodConfig):
                refuse_global(own, f"method '{config.name}'")
