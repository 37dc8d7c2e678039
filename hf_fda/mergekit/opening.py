"""The models of a document as the base and the sources of a merge."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hf_fda.adapters import AdapterCheckpoint, open_adapter
from hf_fda.blocks import find_blocks, regions
from hf_fda.checkpoint.interface import Checkpoint
from hf_fda.checkpoint.location import locate
from hf_fda.checkpoint.reader import open_checkpoint
from hf_fda.errors import InputError
from hf_fda.mergekit.groups import Group
from hf_fda.mergekit.schema import Document, Input, Reference
from hf_fda.mergekit.views import Layers, Stacked, Whole
from hf_fda.provenance import pinned


class Models:
    """The models that a document names, each opened once.

    Args:
        stages: results of earlier documents by name, which references may name.
        trust_remote_code: run model code that comes with a checkpoint.
    """

    def __init__(self, stages: Mapping[str, Checkpoint], trust_remote_code: bool = False) -> None:
        self.stages, self.trust_remote_code = stages, trust_remote_code
        self._open: dict[str, Checkpoint] = {}

    def open(self, reference: Reference) -> Checkpoint:
        """A model, with its adapter on it where it has one.

        Raises:
            InputError: naming the line, when it cannot be used.
        """
        if reference.key not in self._open:
            try:
                self._open[reference.key] = self._opened(reference)
            except InputError as error:
                reference.node.refuse(str(error))
        return self._open[reference.key]

    def pinned(self) -> dict[str, str]:
        """What was opened, as it was named, and as it is named for good: with the commit, where it is on the Hub."""
        found = {}
        for key, checkpoint in self._open.items():
            model, plus, adapter = key.partition("+")
            if isinstance(checkpoint, AdapterCheckpoint):
                parts = (pinned(model, checkpoint.base.commit), pinned(adapter, checkpoint.commit))
                found[key] = plus.join(parts)
            elif model not in self.stages:
                found[key] = pinned(model, checkpoint.commit)
        return found

    def _opened(self, reference: Reference) -> Checkpoint:
        if reference.adapter is not None:
            base = self.open(Reference(reference.model, None, reference.node))
            return open_adapter(reference.adapter, base, locate(reference.adapter))
        if reference.model in self.stages:
            return self.stages[reference.model]
        return open_checkpoint(reference.model, trust_remote_code=self.trust_remote_code, label=reference.model)


@dataclass(frozen=True)
class Opened:
    """The base and the sources (by name) of a document's merge. Without a base it is a model that gives shapes and
    tokenizer (`with_base` is false). `names` tells which of them a reference means, by its key."""

    base: Checkpoint
    sources: dict[str, Checkpoint]
    with_base: bool
    names: dict[str, str]


def open_groups(document: Document, groups: Sequence[Group], models: Models) -> Opened:
    """The models of a document's merge.

    Args:
        document: what is merged.
        groups: its parts.
        models: opens what it names.

    Raises:
        InputError: naming the line, when a model cannot be used or has too few layers.
    """
    for reference in document.references:
        models.open(reference)
    first = groups[0]
    stacked = document.slices != ()
    giving = [group.base or group.sources[0] for group in groups]
    base = _stack(giving, models) if stacked else models.open(document.base or giving[0].reference)
    if isinstance(base, AdapterCheckpoint):
        base = Whole(base)  # as any model is: nothing is left to be done to it
    names: dict[str, str] = {}
    sources: dict[str, Checkpoint] = {}
    for number, source in enumerate(first.sources):
        every = [group.sources[number] for group in groups]
        name = _name([own.reference for own in every], sources)
        opened = _stack(every, models) if stacked else models.open(source.reference)
        exact = isinstance(opened, AdapterCheckpoint) and first.base is not None and opened.base is base
        sources[name] = Whole(opened) if isinstance(opened, AdapterCheckpoint) and not exact else opened
        names |= {own.reference.key: name for own in every}
    if document.base is not None:
        names[document.base.key] = "base"
    return Opened(base, sources, first.base is not None, names)


def _name(references: Sequence[Reference], taken: Mapping[str, Checkpoint]) -> str:
    """A source's name that is not taken: the last parts of its models' paths (and of their adapters')."""
    parts = [part for own in references for part in (own.model.partition("@")[0], own.adapter) if part is not None]
    last = "-".join(dict.fromkeys(os.path.basename(part.rstrip("/")) or "model" for part in parts))
    plain = re.sub(r"[^\w.-]", "_", last).lstrip(".-") or "model"
    names = [plain, *(f"{plain}-{number}" for number in range(2, len(taken) + 3))]
    return next(name for name in names if name not in taken)


def _stack(inputs: Sequence[Input], models: Models) -> Checkpoint:
    """The layers that a source (or the base) has in every slice, as one model."""
    parts: list[Layers] = []
    for own in inputs:
        assert own.layers is not None
        checkpoint = models.open(own.reference)
        if isinstance(checkpoint, AdapterCheckpoint):
            checkpoint = Whole(checkpoint)
        blocks = find_blocks(checkpoint.layout.model)
        towers = {block.rpartition(".")[0] for block in blocks}
        if len(towers) != 1:
            kind = checkpoint.layout.model_class.__name__
            own.node.refuse(f"a {kind} has {len(towers)} lists of layers; slices need a model with one")
        if own.layers[1] > len(blocks):
            own.node.refuse(f"layer_range ends at {own.layers[1]}, '{own.reference.key}' has {len(blocks)} layers")
        if parts and parts[0].checkpoint.layout.model_class is not checkpoint.layout.model_class:
            kinds = [part.layout.model_class.__name__ for part in (parts[0].checkpoint, checkpoint)]
            own.node.refuse(f"slices of a {kinds[0]} and of a {kinds[1]} make no model; use models of one class")
        parts.append(Layers(checkpoint, *own.layers))
    where = regions(parts[0].checkpoint.layout)
    return Stacked(parts, frozenset(name for name, region in where.items() if region == "before"))
