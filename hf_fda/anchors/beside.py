"""What a publisher may put beside anchors: what the source changed outside the blocks, and its task head."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_fda.blocks import regions
from hf_fda.checkpoint.alignment import AlignedSource, check_shapes
from hf_fda.checkpoint.interface import Checkpoint
from hf_fda.checkpoint.named import HeldTensors, Tensors, write_tensors
from hf_fda.errors import InputError
from hf_fda.heads import head_files, task_head

REST = "rest.safetensors"
HEAD = "task_head"
HEAD_WEIGHTS = f"{HEAD}/model.safetensors"
HEAD_CONFIG = f"{HEAD}/config.json"


@dataclass(frozen=True)
class Beside:
    """What lies beside anchors; None where it was not put there.

    `rest` are the source's tensors outside the blocks that differ from the base's, by the base's names. `head` are the
    tensors after its last block, by their names on the disk, with the source's configuration.
    """

    rest: Tensors | None = None
    head: tuple[Tensors, dict[str, Any]] | None = None

    @classmethod
    def of(cls, base: Checkpoint, source: AlignedSource, rest: bool, head: bool) -> Beside:
        """What of a source is wanted beside its anchors, read into memory; `check_beside` let it pass."""
        own = HeldTensors(_changed(base, source)) if rest else None
        return cls(own, _head(source) if head else None)

    def described(self) -> dict[str, tuple[str, ...] | None]:
        """The fields of `anchors.json` that say what there is."""
        return {
            "rest": None if self.rest is None else tuple(self.rest.specs),
            "head": None if self.head is None else tuple(self.head[0].specs),
        }

    def write(self, folder: Path) -> None:
        """Write it into an anchors folder, and remove what an earlier one left there."""
        for name in (REST, HEAD_WEIGHTS, HEAD_CONFIG):
            (folder / name).unlink(missing_ok=True)
        if self.rest is not None:
            write_tensors(folder / REST, self.rest)
        if self.head is not None:
            tensors, config = self.head
            (folder / HEAD).mkdir(parents=True, exist_ok=True)
            write_tensors(folder / HEAD_WEIGHTS, tensors)
            (folder / HEAD_CONFIG).write_text(config_text(config), encoding="utf-8")


def config_text(config: Mapping[str, Any]) -> str:
    """A configuration as it is written."""
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def _outside(base: Checkpoint, source: AlignedSource) -> list[str]:
    """The base's tensors outside its blocks that a source has, but for those of its task's own head."""
    where, head = regions(base.layout), task_head(source)
    own = set(head.tensors) if head is not None else set()
    return [
        name
        for name in base.names
        if where[name] != "block" and name in source.tensor_of and source.tensor_of[name] not in own
    ]


def check_beside(base: Checkpoint, source: AlignedSource, rest: bool, head: bool) -> None:
    """Refuse what cannot be put beside the anchors of a source.

    Raises:
        InputError: when it has no task head, or other shapes outside the blocks than the base.
    """
    if head and task_head(source) is None:
        kind = source.checkpoint.layout.model_class.__name__
        raise InputError(f"source '{source.name}' ({source.checkpoint.id}) is a {kind}, which has no task head")
    if rest:
        check_shapes(base, source, _outside(base, source))


def _changed(base: Checkpoint, source: AlignedSource) -> dict[str, Tensor]:
    """The tensors outside the blocks that a source changed, even if only in their type."""
    found = {}
    for name in (name for name in _outside(base, source) if source.may_move(name)):
        theirs, ours = source.read(name), base.read(name)
        if theirs.dtype != ours.dtype or not torch.equal(theirs, ours):
            found[name] = theirs
    return found


def _head(source: AlignedSource) -> tuple[Tensors, dict[str, Any]]:
    head = task_head(source)
    assert head is not None
    tensors, config = head_files(source, head)
    return HeldTensors(tensors), config
