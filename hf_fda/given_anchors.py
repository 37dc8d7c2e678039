"""Anchors that a user gives: whether they fit the base, the options and each other, before they are merged."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from hf_fda.anchors.container import FunctionalDualAnchors
from hf_fda.anchors.files import describe
from hf_fda.anchors.rest import WithRest
from hf_fda.blocks import Unit, find_units
from hf_fda.checkpoint.interface import here
from hf_fda.checkpoint.layout import ModelLayout
from hf_fda.checkpoint.likeness import likeness
from hf_fda.errors import InputError
from hf_fda.inputs import Inputs, Source
from hf_fda.merge_methods import FDAConfig
from hf_fda.provenance import pinned


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


def check_base(inputs: Inputs, force: bool, fetch: bool = False) -> None:
    """Refuse given anchors that were constructed on another revision of the base, told by a little of every tensor of
    its blocks; a base that is still on the Hub is not fetched for it before the merge begins, and its commit settles it
    where it is the same.

    Args:
        inputs: base and sources.
        force: let them pass.
        fetch: whether a base on the Hub may be fetched.

    Raises:
        InputError: naming the source and both bases.
    """
    if force or not (fetch or here(inputs.base)):
        return
    alike: dict[tuple[str, ...], str] = {}
    for source in inputs.sources:
        stated = source.anchors.info.base if source.anchors is not None else {}
        same = inputs.base.commit is not None and stated.get("commit") == inputs.base.commit
        if source.anchors is None or "likeness" not in stated or same:
            continue
        unit = tuple(source.anchors.info.config.get("unit") or ("block",))
        if unit not in alike:
            names = [name for own in find_units(inputs.base.layout, unit) for name in own.tensors]
            alike[unit] = likeness(inputs.base, names)
        if alike[unit] != stated["likeness"]:
            theirs = pinned(stated["id"], stated.get("commit"))
            raise InputError(
                f"anchors of '{source.name}' ({source.id}) were constructed on another revision of the base: on "
                f"'{theirs}', and not on '{pinned(inputs.base.id, inputs.base.commit)}'; merge them on that one, or "
                "all the same with force=True (--force)"
            )


def with_rests(inputs: Inputs) -> Inputs:
    """Inputs in which sources that are anchors only have what lies outside the blocks, from beside their anchors.

    Raises:
        InputError: when that does not fit the base.
    """

    def of(source: Source) -> Source:
        if source.weights is not None or source.anchors is None or source.anchors.info.rest is None:
            return source
        rest = source.anchors.beside.rest
        assert rest is not None
        label = f"anchors of '{source.name}' ({source.id})"
        return dataclasses.replace(source, rest=WithRest(inputs.base, rest, label).aligned(source.name))

    return dataclasses.replace(inputs, sources=tuple(map(of, inputs.sources)))


def _check_unit(source: Source, anchors: FunctionalDualAnchors, unit: Unit, layout: ModelLayout) -> None:
    if anchors.on_hub:
        return  # a block is fetched when its turn comes
    try:
        held = anchors.in_memory
        shape = anchors[unit.name].anchors.shape if held else describe(anchors.file(unit.name))[0]["anchors"].shape
        _, tokens, width = shape
    except InputError as error:
        raise InputError(f"anchors of '{source.name}': {error}") from None
    stated = anchors.info.config.get("num_tokens")
    if stated not in (None, tokens):
        raise InputError(
            f"anchors of '{source.name}' ({source.id}): those of block '{unit.name}' have {tokens} tokens and not "
            f"num_tokens={stated}; construct or fetch them again"
        )
    widths = {size for name in unit.tensors for size in layout.shapes[name]}
    if width not in widths:
        hidden = layout.config.get_text_config().to_dict().get("hidden_size", "another")
        raise InputError(
            f"anchors of '{source.name}' ({source.id}) are {width} wide, block '{unit.name}' of the base is {hidden}; "
            "they were constructed on another base"
        )
