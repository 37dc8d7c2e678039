"""Safetensors files written piece by piece: the header first, from shapes alone, then each tensor in its place."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from hf_fda.checkpoint.hashed import HashedFile
from hf_fda.checkpoint.header import DTYPE_NAMES

MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class TensorSpec:
    """Type and shape of a tensor that will be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * self.dtype.itemsize


class SafetensorsWriter:
    """One safetensors file, in the format's own layout, never held in memory.

    When it is closed, `digest` is the hash of its bytes.

    Args:
        path: the file to make.
        specs: what it will hold. Tensors lie in falling order of alignment, else in this order.
        metadata: words for the header, by name.

    Example:
        >>> with SafetensorsWriter(path, {"weight": TensorSpec(torch.float32, (2, 3))}) as file:  # doctest: +SKIP
        ...     file.write("weight", torch.zeros(2, 3))
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None = None) -> None:
        self.specs = dict(specs)
        self._missing = {name: prod(spec.shape) for name, spec in specs.items()}
        header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        self._start: dict[str, int] = {}
        offset = 0
        for name, spec in sorted(self.specs.items(), key=lambda item: -item[1].dtype.itemsize):
            end = offset + spec.nbytes
            header[name] = {
                "dtype": DTYPE_NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [offset, end],
            }
            self._start[name] = offset
            offset = end
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._data = 8 + len(encoded)
        self.digest = ""
        self._file = HashedFile(path, self._data + offset)
        self._file.write(0, len(encoded).to_bytes(8, "little") + encoded)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor (any device; cast to the promised type).

        Raises:
            ValueError: when its shape is not the promised one, or it was written before.
        """
        spec = self.specs[name]
        if tuple(tensor.shape) != spec.shape or self._missing.get(name) != tensor.numel():
            raise ValueError(f"tensor '{name}' {tuple(tensor.shape)} was promised as {spec.shape}, once")
        self.append(name, tensor.flatten())

    def append(self, name: str, entries: Tensor) -> None:
        """Write the next flattened entries of a tensor (any device; cast to the promised type).

        Raises:
            ValueError: when the tensor has fewer left.
        """
        spec, missing = self.specs[name], self._missing.get(name, -1)
        if len(entries) > missing:
            raise ValueError(f"{len(entries)} entries of tensor '{name}', of which {max(missing, 0)} are missing")
        place = self._start[name] + (prod(spec.shape) - missing) * spec.dtype.itemsize
        self._missing[name] = missing - len(entries)
        if not self._missing[name]:
            del self._missing[name]
        flat = entries.detach().to("cpu", spec.dtype).contiguous()
        self._file.write(self._data + place, flat.view(torch.uint8).numpy().data)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self._missing:
                raise ValueError(f"tensors promised and not written: {sorted(self._missing)}")
            self.digest = self._file.digest() if kind is None else ""
        finally:
            self._file.close()


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write a few tensors that are already in memory; the hash of the file."""
    specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with SafetensorsWriter(path, specs, metadata) as file:
        for name, tensor in tensors.items():
            file.write(name, tensor)
    return file.digest


@dataclass(frozen=True)
class Shard:
    """One output file: its name, the groups of in-memory tensors that go into it, and what lies in it on disk."""

    file: str
    groups: tuple[tuple[str, ...], ...]
    specs: dict[str, TensorSpec]

    @property
    def nbytes(self) -> int:
        """Size of the tensors in bytes."""
        return sum(spec.nbytes for spec in self.specs.values())


def plan_shards(
    groups: Iterable[tuple[tuple[str, ...], dict[str, TensorSpec]]], max_bytes: int = MAX_SHARD_BYTES
) -> tuple[Shard, ...]:
    """Deal groups of tensors out to shards, in order.

    Args:
        groups: for each group its names in memory and its tensors on disk.
        max_bytes: size of a shard; a single larger group gets a shard of its own.
    """
    parts: list[tuple[list[tuple[str, ...]], dict[str, TensorSpec]]] = [([], {})]
    size = 0
    for names, specs in groups:
        grown = sum(spec.nbytes for spec in specs.values())
        if size and size + grown > max_bytes:
            parts.append(([], {}))
            size = 0
        parts[-1][0].append(names)
        parts[-1][1].update(specs)
        size += grown
    count = len(parts)
    return tuple(
        Shard(
            "model.safetensors" if count == 1 else f"model-{index:05d}-of-{count:05d}.safetensors",
            tuple(names),
            specs,
        )
        for index, (names, specs) in enumerate(parts, 1)
    )


def shard_index(shards: Iterable[Shard]) -> str:
    """The text of `model.safetensors.index.json`."""
    listed = list(shards)
    index = {
        "metadata": {"total_size": sum(shard.nbytes for shard in listed)},
        "weight_map": {name: shard.file for shard in listed for name in shard.specs},
    }
    return json.dumps(index, indent=2, sort_keys=True) + "\n"
