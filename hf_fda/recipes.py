"""Which rule makes each tensor of the merged model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from hf_fda.blocks import Unit, find_blocks, regions
from hf_fda.checkpoint.alignment import AlignedSource
from hf_fda.checkpoint.layout import ModelLayout
from hf_fda.errors import InputError, few
from hf_fda.heads import TaskHead, check_same_heads, task_head
from hf_fda.inputs import Inputs, Source
from hf_fda.merge_methods import MethodConfig
from hf_fda.merge_methods.linear import LinearConfig
from hf_fda.merge_methods.unitwise import UnitwiseConfig

Heads = Literal["keep", "merge"]


@dataclass(frozen=True)
class Recipe:
    """How one output tensor is made.

    "base": the base's own. "method": a parameter-space method over the sources. "unit": adapted with its unit.
    "soup": the mean of the sources' tensors, for a tensor that the base does not have.
    """

    rule: Literal["base", "method", "unit", "soup"]
    config: MethodConfig | None = None
    unit: str | None = None


@dataclass(frozen=True)
class Output:
    """The merged model: its layout, a recipe for each of its tensors, and the heads kept beside it.

    `base_names` maps an output tensor to the base's; a tensor that the base does not have is not in it.
    """

    layout: ModelLayout
    recipes: Mapping[str, Recipe]
    base_names: Mapping[str, str]
    heads: tuple[TaskHead, ...]


def decide(
    inputs: Inputs,
    config: MethodConfig,
    units: Sequence[Unit],
    heads: Heads,
    at: Callable[[str], MethodConfig] | None = None,
) -> Output:
    """Decide how every tensor of the merged model is made.

    Args:
        inputs: base and sources.
        config: the merge method, complete.
        units: what function-space methods merge.
        heads: "keep" each source's task head beside the merged body, or "merge" them into one.
        at: the config for one of the base's tensors by name, where it is not everywhere the same.

    Raises:
        InputError: when sources have tensors that have no place in the output.
    """
    sources = inputs.weighted
    kept = tuple(head for source in inputs.sources if (head := _head(source)) is not None)
    if heads == "merge" and kept:
        given = [source.name for source in inputs.sources if source.weights is None]
        if given:
            raise InputError(f"heads='merge': source '{given[0]}' is anchors only; its head can be kept: heads='keep'")
        check_same_heads(sources)
        kept = ()
        merged_heads = True
    else:
        merged_heads = False
    with_heads = {head.task for head in kept}
    plain = [source for source in sources if source.name not in with_heads]
    layout, base_names = _output_layout(inputs, plain)
    where = regions(layout)
    unit_of = {name: unit.name for unit in units for name in unit.tensors}
    blocks = tuple(f"{block}." for block in find_blocks(inputs.base.layout.model))
    recipes = {}
    for name in layout.names:
        own = base_names.get(name)
        if own is None:
            recipes[name] = Recipe("soup", LinearConfig())
        elif own in unit_of:
            recipes[name] = Recipe("unit", unit=unit_of[own])
        elif where[name] == "after" and kept:
            recipes[name] = Recipe("base")
        elif where[name] == "after" and merged_heads:
            recipes[name] = Recipe("method", LinearConfig())
        else:
            here = config if at is None else at(own)
            recipes[name] = _by_method(here, inside=own.startswith(blocks))
    present = [name for name in recipes if name in base_names or recipes[name].rule == "soup"]
    return Output(layout, {name: recipes[name] for name in present}, base_names, kept)


def _head(source: Source) -> TaskHead | None:
    """A source's task head: in its weights, or beside its anchors."""
    if source.weights is not None:
        return task_head(source.weights)
    assert source.anchors is not None
    head = source.anchors.beside.head if source.anchors.info.head is not None else None
    return None if head is None else TaskHead(source.name, tuple(head[0].specs))


def _by_method(config: MethodConfig, inside: bool) -> Recipe:
    if not isinstance(config, UnitwiseConfig):
        return Recipe("method", config)
    chosen = config.initial if inside else config.rest
    return Recipe("method", chosen) if isinstance(chosen, MethodConfig) else Recipe("base")


def _output_layout(inputs: Inputs, sources: Sequence[AlignedSource]) -> tuple[ModelLayout, dict[str, str]]:
    """The base's layout; the sources' own where all of them add the same tensors to it (language-model heads)."""
    base = inputs.base
    adding = [source for source in sources if source.extra]
    if not adding:
        return base.layout, {name: name for name in base.names}
    first = adding[0]
    for source in sources:
        same = source.checkpoint.layout.model_class is first.checkpoint.layout.model_class
        if not same or source.extra != first.extra:
            raise InputError(
                f"source '{first.name}' has tensors that the base lacks ({few(first.extra)}) and source "
                f"'{source.name}' does not have the same; merge sources of one class"
            )
    return first.checkpoint.layout, {theirs: own for own, theirs in first.tensor_of.items()}


def out_dtype(inputs: Inputs, result: Output, name: str, dtype: torch.dtype | None) -> torch.dtype:
    """The type an output tensor is written in: whole numbers keep theirs."""
    own = result.base_names.get(name)
    stored = inputs.base.dtype(own) if own is not None else inputs.weighted[0].checkpoint.dtype(name)
    return dtype if dtype is not None and stored.is_floating_point else stored
