"""An adapter seen as a checkpoint: the base's tensors with what the adapter does to them."""

from __future__ import annotations

import copy
import hashlib
import os
import threading
from collections.abc import Container, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PretrainedConfig

from hf_fda.adapters.changes import Change, Replaced, find_changes
from hf_fda.adapters.files import CONFIG, AdapterFiles, from_model, read_files
from hf_fda.adapters.skeleton import Skeleton, build
from hf_fda.adapters.ties import fold, with_loaded
from hf_fda.checkpoint.alignment import match_names
from hf_fda.checkpoint.interface import Checkpoint
from hf_fda.checkpoint.layout import ModelLayout
from hf_fda.checkpoint.location import INDEX, SINGLE, Location, locate
from hf_fda.checkpoint.reader import open_checkpoint
from hf_fda.checkpoint.view import RowView
from hf_fda.errors import InputError
from hf_fda.lowrank import LowRank


class AdapterCheckpoint:
    """An adapter on its base, as a checkpoint whose tensors differ from the base's where the adapter changes them.

    Args:
        files: the adapter.
        base: what it is an adapter of.
        skeleton: a model that the adapter is in; one is made if None.

    Raises:
        InputError: when the adapter does not fit the base.
    """

    stored = False
    """As `Checkpoint.stored`: what an adapter adds is known better than the rounded sum."""
    unexpected: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    def __init__(self, files: AdapterFiles, base: Checkpoint, skeleton: Skeleton | None = None) -> None:
        if not base.layout.known:
            raise InputError(
                f"{files.id}: the base is a {base.layout.model_class.__name__}, which transformers does not "
                "know, so that no adapter can be put on it; pass trust_remote_code=True if it comes with code you trust"
            )
        self.files = files
        self.id, self.location = files.id, files.location
        self.commit = files.location.commit if files.location is not None else None
        skeleton = skeleton or build(files, base.layout)
        found = find_changes(files.id, skeleton, getattr(files.config, "init_lora_weights", None))
        self._by_place = with_loaded(files.id, found, skeleton.loaded, skeleton.layout)
        self._settle(base, skeleton.layout)

    def _settle(self, base: Checkpoint, layout: ModelLayout) -> None:
        """Match the changes to the tensors of a base."""
        self.base, self.layout = base, layout
        self.changes: Mapping[str, Change]
        self.changes, self.apart = fold(self._by_place, layout)
        known = match_names(base.names, base.layout.body_prefixes, layout.names, layout.body_prefixes)
        self._base_name = {own: name for name, own in known.items()}
        self.names = tuple(name for name in layout.names if name in self._base_name or name in self.changes)
        self._check_shapes()
        self._own_dense = threading.local()

    def untied(self, base: Checkpoint) -> AdapterCheckpoint:
        """The same adapter with each place of a tied tensor as a tensor of its own, which PEFT changes on its own.

        Args:
            base: the base in this form, `Untied`.

        Raises:
            InputError: when the base lacks one that the adapter changes.
        """
        other = copy.copy(self)
        other._settle(base, self.layout.untied())
        return other

    def check_ties(self, names: Container[str], label: str, way_out: str) -> None:
        """Refuse the adapter where each of these tensors is one for all its places, which are not changed alike.

        Args:
            names: of stored tensors.
            label: what to call the adapter in errors.
            way_out: what to do instead.

        Raises:
            InputError: naming the places.
        """
        for name in self.layout.names:
            if name in self.apart and name in names:
                places = " and ".join(f"'{place}'" for place in self.layout.places(name))
                raise InputError(
                    f"{label}: the model ties {places}, which the adapter does not change alike, and a full checkpoint "
                    f"holds one tensor for them; {way_out}"
                )

    @property
    def config(self) -> PretrainedConfig:
        """The configuration of the model that the adapter was trained on."""
        return self.layout.config

    @property
    def origins(self) -> tuple[Checkpoint, ...]:
        """As `Checkpoint.origins`: the adapter; its base is named elsewhere."""
        return (self,)

    def dtype(self, name: str) -> torch.dtype:
        """The base's stored type of a tensor; the adapter's own for one that the base lacks."""
        if name in self._base_name:
            return self.base.dtype(self._base_name[name])
        return self._own(name).dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor in memory layout."""
        return self.layout.shapes[name]

    def read(self, name: str, part: slice | None = None) -> Tensor:
        """One tensor on the CPU, as `Checkpoint.read`; in float32 at least where the adapter changes it."""
        if name not in self._base_name:
            own = self._own(name)
            return (own if part is None else own.flatten()[part]).clone()
        if name not in self.changes:
            return self.base.read(self._base_name[name], part)
        base = self.base.read(self._base_name[name], part)
        base = base.to(torch.promote_types(base.dtype, torch.float32))
        return base + self.task(name, base, part)

    def task(self, name: str, base: Tensor, part: slice | None = None) -> Tensor:
        """A tensor's task vector, as `Checkpoint.task`: not the difference of two rounded sums."""
        if name not in self.changes:
            return torch.zeros_like(base)
        change = self.changes[name]
        if part is None:
            return change.task(base).clone()
        if not change.needs_base and (thin := change.factors(None)) is not None:
            return thin.to(base.device, base.dtype).part(part)
        dense: tuple[str, Tensor] | None = getattr(self._own_dense, "task", None)
        if dense is None or dense[0] != name:  # the parts of one tensor are asked for in turn
            whole = self.base.read(self._base_name[name]).to(base.device, base.dtype)
            dense = self._own_dense.task = (name, change.task(whole).flatten())
        return dense[1][part].clone()

    def in_parts(self, name: str) -> bool:
        """As `Checkpoint.in_parts`: where it is the base's own, or parts of a thin product."""
        if name in self.changes:
            change = self.changes[name]
            return not change.needs_base and change.factors(None) is not None
        return self.base.in_parts(self._base_name[name])

    @property
    def disk_order(self) -> tuple[str, ...]:
        """As `Checkpoint.disk_order`: any order is as good."""
        return self.names

    def may_move(self, name: str) -> bool:
        """Whether the adapter changes a tensor."""
        return name in self.changes

    def replaces(self, name: str) -> bool:
        """Whether the adapter brings a tensor whole (PEFT's `modules_to_save`)."""
        return isinstance(self.changes.get(name), Replaced)

    def factors(self, name: str) -> LowRank | None:
        """A tensor's task vector as thin factors; None where the adapter does not change it, or by no thin product."""
        change = self.changes.get(name)
        if change is None:
            return None
        return change.factors(self.base.read(self._base_name[name]) if change.needs_base else None)

    def rank(self, name: str) -> int | None:
        """The rank of these factors."""
        change = self.changes.get(name)
        return None if change is None else change.rank

    def fingerprint(self) -> str:
        """A hash that changes when adapter or base do."""
        return hashlib.sha256((self.files.fingerprint() + self.base.fingerprint()).encode()).hexdigest()

    def _own(self, name: str) -> Tensor:
        """A tensor that comes with the adapter."""
        change = self.changes[name]
        assert isinstance(change, Replaced)
        return change.tensor

    def _check_shapes(self) -> None:
        tied = {place for places in self.layout.shared.values() if len(places) > 1 for place in places}
        for name, change in self.changes.items():
            own = self._base_name.get(name)
            if own is None:
                if not isinstance(change, Replaced) or name in tied:
                    raise InputError(
                        f"{self.id}: the adapter changes '{name}', which the base does not have; give as the base a "
                        f"{self.layout.model_class.__name__}, as the adapter's own was"
                    )
            elif self.base.shape(own) != self.shape(name) and not isinstance(change, Replaced):
                raise InputError(
                    f"{self.id}: tensor '{name}' is {self.shape(name)} in the model of the adapter and "
                    f"{self.base.shape(own)} in the base; it was trained on another base"
                )


def adapter_of(checkpoint: Checkpoint) -> AdapterCheckpoint | None:
    """The adapter that a checkpoint is, also where it is seen with another vocabulary; None where it is none."""
    inner = checkpoint.origin if isinstance(checkpoint, RowView) else checkpoint
    return inner if isinstance(inner, AdapterCheckpoint) else None


def is_adapter(value: Any, location: Location | None = None) -> bool:
    """Whether a source is a PEFT adapter: a `PeftModel`, an open one, or files with the configuration of one and
    without a model's weights."""
    if isinstance(value, (PeftModel, AdapterCheckpoint)):
        return True
    return location is not None and CONFIG in location.names and not {INDEX, SINGLE} & set(location.names)


def find_adapter(location: Location) -> Location:
    """Where a source's files are: the place itself, or the folder in it that holds the adapter (PEFT saves others than
    "default" in folders of their names).

    Raises:
        InputError: when several folders in it hold one.
    """
    if {CONFIG, INDEX, SINGLE, "config.json"} & set(location.names):
        return location
    folders = location.holding(CONFIG)
    if len(folders) > 1:
        listed = ", ".join(f"'{location.inside(name).id}'" for name in folders)
        raise InputError(f"{location.id}: several adapters are in it; say which: {listed}")
    return location.inside(folders[0]) if folders else location


def open_adapter(value: Any, base: Checkpoint, location: Location | None = None) -> AdapterCheckpoint:
    """Open an adapter on its base.

    Args:
        value: a `PeftModel` (its active adapter), or where the adapter is.
        base: what it is an adapter of.
        location: of `value`, where it is a folder or a Hub id.

    Raises:
        InputError: when it is not understood, or does not fit the base.
    """
    if isinstance(value, AdapterCheckpoint):
        return value
    if isinstance(value, PeftModel):
        return AdapterCheckpoint(from_model(value), base)
    assert location is not None and isinstance(value, (str, os.PathLike))
    return AdapterCheckpoint(read_files(location), base)


def open_source(base: Checkpoint, value: Any, trust_remote_code: bool = False, label: str = "source") -> Checkpoint:
    """Open a source: a checkpoint, or an adapter on the base.

    Args:
        base: what it was trained from.
        value: a folder, a Hub id, a transformers model or a `PeftModel`.
        trust_remote_code: run model code that comes with the checkpoint.
        label: what to call it in errors.

    Raises:
        InputError: naming `label`, when it cannot be used.
    """
    try:
        location = find_adapter(locate(value)) if isinstance(value, (str, os.PathLike)) else None
        if is_adapter(value, location):
            return open_adapter(value, base, location)
    except InputError as error:
        raise InputError(f"{label}: {error}") from None
    return open_checkpoint(value, trust_remote_code=trust_remote_code, label=label)
