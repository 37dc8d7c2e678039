"""What a publisher may put beside anchors: what the source changed outside the blocks, and its task head."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_fda.blocks import regions
from hf_fda.checkpoint.alignment import AlignedSource, check_shapes
from hf_fda.checkpoint.hashed import digest
from hf_fda.checkpoint.header import TensorEntry, read_header, read_tensor
from hf_fda.checkpoint.interface import Checkpoint
from hf_fda.checkpoint.location import Location
from hf_fda.checkpoint.view import View
from hf_fda.checkpoint.writer import SafetensorsWriter, TensorSpec
from hf_fda.errors import InputError
from hf_fda.heads import head_files, task_head

REST = "rest.safetensors"
HEAD = "task_head"
HEAD_WEIGHTS = f"{HEAD}/model.safetensors"
HEAD_CONFIG = f"{HEAD}/config.json"


class Tensors(Protocol):
    """Some tensors by name, in a file or in memory."""

    @property
    def specs(self) -> Mapping[str, TensorSpec | TensorEntry]:
        """Their types and shapes; told without reading them."""
        ...

    def read(self, name: str, part: slice | None = None) -> Tensor:
        """One of them on the CPU, or `part` of its flattened entries."""
        ...

    def digest(self) -> str:
        """A hash of all of them."""
        ...


class HeldTensors:
    """Tensors in memory.

    Args:
        tensors: by name.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)
        self.specs = {name: TensorSpec(own.dtype, tuple(own.shape)) for name, own in tensors.items()}

    def read(self, name: str, part: slice | None = None) -> Tensor:
        """As `Tensors.read`."""
        own = self._tensors[name]
        return (own if part is None else own.flatten()[part]).clone()

    def digest(self) -> str:
        """As `Tensors.digest`."""
        hashed = hashlib.sha256()
        for name, tensor in self._tensors.items():
            hashed.update(f"{name} {self.specs[name]}".encode())
            hashed.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return hashed.hexdigest()


class FileTensors:
    """Tensors in a safetensors file of a folder or repository, which is fetched when one is read.

    Args:
        location: where the file is.
        name: of the file.
    """

    def __init__(self, location: Location, name: str) -> None:
        self._location, self._name = location, name

    @cached_property
    def specs(self) -> dict[str, TensorEntry]:
        """As `Tensors.specs`."""
        return self._location.header(self._name)

    @cached_property
    def _file(self) -> tuple[Path, dict[str, TensorEntry]]:
        path = self._location.path(self._name)
        return path, read_header(path)

    def read(self, name: str, part: slice | None = None) -> Tensor:
        """As `Tensors.read`."""
        path, entries = self._file
        return read_tensor(path, entries[name], part)

    def digest(self) -> str:
        """As `Tensors.digest`: of the file's bytes."""
        return digest(self._file[0])


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


def write_tensors(path: Path, tensors: Tensors) -> str:
    """Write tensors one by one into a file; its hash."""
    specs = {name: TensorSpec(own.dtype, own.shape) for name, own in tensors.specs.items()}
    with SafetensorsWriter(path, specs) as file:
        for name in specs:
            file.write(name, tensors.read(name))
    return file.digest


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


class WithRest(View):
    """A base whose tensors outside the blocks are a source's own where it changed them.

    Args:
        base: the base.
        rest: the source's tensors, by the base's names.
        id: what to call it in messages.

    Raises:
        InputError: when a tensor is not the base's, lies in a block, or has another shape.
    """

    def __init__(self, base: Checkpoint, rest: Tensors, id: str) -> None:
        super().__init__(base)
        self.id, self.commit, self._rest = id, None, rest
        where = regions(base.layout)
        for name, spec in rest.specs.items():
            if where.get(name, "block") == "block":
                raise InputError(f"{id}: {REST} holds '{name}', which is no tensor of the base outside its blocks")
            if spec.shape != base.shape(name):
                raise InputError(
                    f"{id}: '{name}' in {REST} is {spec.shape}, that of the merge {base.shape(name)}; with other "
                    "tokens than the base's it cannot be used: rest='base'"
                )

    def aligned(self, name: str) -> AlignedSource:
        """It as a source that has what lies outside the blocks."""
        where = regions(self.layout)
        outside = {own: own for own in self.names if where[own] != "block"}
        return AlignedSource(name, self, outside, (), tuple(own for own in self.names if own not in outside))

    def dtype(self, name: str) -> torch.dtype:
        """As `Checkpoint.dtype`."""
        return self._rest.specs[name].dtype if name in self._rest.specs else super().dtype(name)

    def read(self, name: str, part: slice | None = None) -> Tensor:
        """As `Checkpoint.read`."""
        return self._rest.read(name, part) if name in self._rest.specs else super().read(name, part)

    def in_parts(self, name: str) -> bool:
        """As `Checkpoint.in_parts`."""
        return name in self._rest.specs or super().in_parts(name)

    def may_move(self, name: str) -> bool:
        """As `Checkpoint.may_move`: where the file says so."""
        return name in self._rest.specs

    def fingerprint(self) -> str:
        """As `Checkpoint.fingerprint`."""
        return hashlib.sha256(f"{super().fingerprint()} {self._rest.digest()}".encode()).hexdigest()
