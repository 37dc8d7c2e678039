"""Named tensors, in memory or in a safetensors file that may be on the Hub."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from hf_fda.checkpoint.hashed import digest
from hf_fda.checkpoint.header import TensorEntry, read_header, read_tensor
from hf_fda.checkpoint.location import Location
from hf_fda.checkpoint.writer import SafetensorsWriter, TensorSpec


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


def write_tensors(path: Path, tensors: Tensors) -> str:
    """Write tensors one by one into a file; its hash."""
    specs = {name: TensorSpec(own.dtype, own.shape) for name, own in tensors.specs.items()}
    with SafetensorsWriter(path, specs) as file:
        for name in specs:
            file.write(name, tensors.read(name))
    return file.digest
