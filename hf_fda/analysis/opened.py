"""A merged folder as an analysis sees it: its base, the merge in the base's names, and the sources that are at hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor

from hf_fda.adapters import open_source
from hf_fda.anchors.container import FunctionalDualAnchors
from hf_fda.anchors.manifest import MANIFEST
from hf_fda.blocks import find_blocks, regions
from hf_fda.checkpoint.alignment import AlignedSource, align
from hf_fda.checkpoint.interface import Checkpoint
from hf_fda.checkpoint.location import Location, locate
from hf_fda.checkpoint.reader import open_checkpoint
from hf_fda.errors import InputError
from hf_fda.evaluation.candidates import merged_model, recorded
from hf_fda.evaluation.headed import WithHead
from hf_fda.merged import tasks_of
from hf_fda.progress import logger

BEFORE, AFTER = "before the blocks", "after the blocks"


@dataclass
class OpenedMerge:
    """A merge and what it was made of.

    `names` are the base's tensors that the merge holds in the same shape and that are no task's own; `sources` those
    that went into it and are at hand.
    """

    location: Location
    base: Checkpoint
    merged: AlignedSource
    sources: tuple[AlignedSource, ...]
    names: tuple[str, ...]
    trust_remote_code: bool = False

    @cached_property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """The names by block, in the model's order, with what lies before and after the blocks."""
        where, blocks = regions(self.base.layout), find_blocks(self.base.layout.model)
        found: dict[str, list[str]] = {name: [] for name in (BEFORE, *blocks, AFTER)}
        for name in self.names:
            inside = next((block for block in blocks if name.startswith(f"{block}.")), None)
            found[inside or (AFTER if where[name] == "after" else BEFORE)].append(name)
        return {group: tuple(names) for group, names in found.items() if names}

    @property
    def tasks(self) -> list[str]:
        """The tasks with heads of their own."""
        return tasks_of(self.location)

    @property
    def nbytes(self) -> int:
        """Bytes of the shared weights in single precision."""
        return 4 * sum(prod(self.base.shape(name)) for name in self.names)

    def task_vectors(self, name: str) -> list[Tensor]:
        """Every source's task vector of a tensor, in single precision; zeros of a source that lacks it."""
        base = self.base_tensor(name)
        return [self.task_vector(own, name, base) for own in self.sources]

    def summed(self, name: str, base: Tensor) -> Tensor:
        """The sum of the sources' task vectors of a tensor, with one of them in memory at a time."""
        total = torch.zeros_like(base)
        for own in self.sources:
            total += self.task_vector(own, name, base)
        return total

    def task_vector(self, source: AlignedSource, name: str, base: Tensor) -> Tensor:
        """A source's task vector of a tensor, in single precision; zeros where it lacks the tensor."""
        moves = source.may_move(name) and _held(self.base, source, name)
        return source.task(name, base) if moves else torch.zeros_like(base)

    def pairs(self, names: Sequence[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """The base's tensors and the merged ones, one pair at a time."""
        for name in names:
            base = self.base_tensor(name)
            yield base, base + self.merged.task(name, base)

    def base_tensor(self, name: str) -> Tensor:
        """One of the base's tensors, in single precision."""
        return self.base.read(name).float()

    def merged_tensor(self, name: str) -> Tensor:
        """One of the merged tensors, in single precision."""
        base = self.base_tensor(name)
        return base + self.merged.task(name, base)

    def another(self, folder: Any) -> AlignedSource:
        """Another merge of the same base, as `merged`.

        Raises:
            InputError: when it cannot be opened, or is of another architecture or size.
        """
        found = open_source(self.base, folder, self.trust_remote_code, f"merge '{folder}'")
        aligned = align(self.base, found, str(folder))
        lacking = [name for name in self.names if not _held(self.base, aligned, name)]
        if lacking:
            raise InputError(f"{folder}: is no merge of the same base: it has no '{lacking[0]}' of the same shape")
        return aligned

    def model(self, task: str) -> AlignedSource:
        """The merged model with a task's own head, in the base's names."""
        adapter = "config.json" not in self.location.names
        inputs = merged_model(self.location, task, self.base.id if adapter else None, self.trust_remote_code)
        return align(self.base, inputs.weighted[0].checkpoint, task)

    @cached_property
    def anchors(self) -> dict[str, FunctionalDualAnchors]:
        """The anchors that lie in the folder, by source."""
        folder = self.location.folder
        found = sorted(folder.glob(f"anchors/*/{MANIFEST}")) if folder is not None else []
        return {path.parent.name: FunctionalDualAnchors.from_pretrained(path.parent) for path in found}


def open_merge(folder: Any, base: Any = None, trust_remote_code: bool = False) -> OpenedMerge:
    """Open a merged folder.

    Args:
        folder: the folder or Hub id.
        base: where its base is now; None: where it was.
        trust_remote_code: run model code that comes with the checkpoints.

    Raises:
        InputError: when it is no finished merge, or its base is not to be found.
    """
    location = locate(folder)
    record = recorded(location)
    stated = base if base is not None else record.get("base", record.get("base_model"))
    if stated is None:
        raise InputError(f"{folder}: does not say which base it was made from; say where that is: base=... (--base)")
    try:
        theta = open_checkpoint(stated, trust_remote_code=trust_remote_code, label="base")
    except InputError as error:
        raise InputError(f"{folder}: its base cannot be opened ({error}); say where it is: base=... (--base)") from None
    merged = align(theta, open_source(theta, folder, trust_remote_code, f"merge '{folder}'"), "merged")
    own = _own_of_tasks(theta, location, trust_remote_code)
    names = tuple(name for name in theta.names if _held(theta, merged, name) and name not in own)
    return OpenedMerge(location, theta, merged, _sources(theta, record, trust_remote_code), names, trust_remote_code)


def _own_of_tasks(base: Checkpoint, location: Location, trust_remote_code: bool) -> set[str]:
    """The base's names of tensors that each task has as its own."""
    found: set[str] = set()
    for task in tasks_of(location):
        headed = WithHead(base, location, task, trust_remote_code)
        found |= {name for name, other in align(base, headed, task).tensor_of.items() if other in headed.own}
    return found


def _held(base: Checkpoint, source: AlignedSource, name: str) -> bool:
    return name in source.tensor_of and source.checkpoint.shape(source.tensor_of[name]) == base.shape(name)


def _sources(base: Checkpoint, record: Any, trust_remote_code: bool) -> tuple[AlignedSource, ...]:
    """The sources of a merge that are where they were, and have weights."""
    found = []
    for name, id in dict(record.get("sources", {})).items():
        try:
            found.append(align(base, open_source(base, id, trust_remote_code, f"source '{name}'"), name))
        except InputError as error:
            logger.warning("left out of the analysis: %s", error)
    return tuple(found)
