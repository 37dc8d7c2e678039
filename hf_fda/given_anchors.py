"""Anchors that a user gives: whether they fit the base, the options and each other, before they are merged."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from hf_fda.anchors.container import FunctionalDualAnchors
from hf_fda.blocks import Unit
from hf_fda.checkpoint.header import read_header
from hf_fda.checkpoint.layout import ModelLayout
from hf_fda.errors import InputError
from hf_fda.inputs import Inputs, Source
from hf_fda.merge_methods import FDAConfig


def agree_with_anchors(config: FDAConfig, inputs: Inputs) -> FDAConfig:
    """Take units and tokens from given anchors.

    Raises:
        InputError: when they contradict the options or each other.
    """
    for source in inputs.sources:
        if source.anchors is None:
            continue
        for name in ("unit", "num_tokens"):
            theirs = source.anchors.info.config.get(name)
            theirs = tuple(theirs) if isinstance(theirs, list) else theirs
            mine = getattr(config, name)
            if mine is None and theirs is not None:
                change: dict[str, Any] = {name: theirs}
                config = dataclasses.replace(config, **change)
            elif mine != theirs and theirs is not None:
                raise InputError(
                    f"anchors of '{source.name}' were constructed with {name}={theirs}, here it is {mine}; "
                    "use the same for all"
                )
    return config


def check_given(inputs: Inputs, units: Sequence[Unit]) -> None:
    """Refuse given anchors that lack a unit, are damaged, or belong to another base.

    Raises:
        InputError: naming the source and the block or file.
    """
    towers = {unit.block.rpartition(".")[0] for unit in units}
    for source in inputs.sources:
        if source.anchors is None:
            continue
        wanted = [unit for unit in units if source.weights is None or source.has(unit)]
        missing = [unit for unit in wanted if unit.name not in source.anchors]
        if missing and (len(towers) == 1 or len(missing) == len(units)):
            raise InputError(
                f"anchors of '{source.name}' ({source.id}) have none for block '{missing[0].name}'; "
                "they were constructed on another base or for other units"
            )
        for unit in wanted:
            if unit.name in source.anchors:
                _check_unit(source, source.anchors, unit, inputs.base.layout)


def _check_unit(source: Source, anchors: FunctionalDualAnchors, unit: Unit, layout: ModelLayout) -> None:
    if anchors.on_hub:
        return  # a block is fetched when its turn comes
    if anchors.in_memory:
        width = anchors[unit.name].anchors.shape[-1]
    else:
        path = anchors.file(unit.name)
        if not path.is_file():
            raise InputError(f"anchors of '{source.name}': {path} is missing; construct or fetch them again")
        entries = read_header(path)
        if not {"anchors", "targets"} <= set(entries):
            raise InputError(f"anchors of '{source.name}': {path} holds no anchors and targets")
        width = entries["anchors"].shape[-1]
    widths = {size for name in unit.tensors for size in layout.shapes[name]}
    if width not in widths:
        hidden = layout.config.get_text_config().to_dict().get("hidden_size", "another")
        raise InputError(
            f"anchors of '{source.name}' ({source.id}) are {width} wide, block '{unit.name}' of the base is {hidden}; "
            "they were constructed on another base"
        )
