"""The header of a safetensors file: what it holds, checked against the file's real size."""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from hf_fda.checkpoint.untrusted import MOST_JSON, parse_json
from hf_fda.errors import InputError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a safetensors file: its type, shape and place (bytes from the start of the file)."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file by name; its data is not read.

    Raises:
        InputError: when the file is no safetensors file, is truncated, or its offsets contradict the shapes.
    """
    header, length = _header(path)
    size = os.path.getsize(path)
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, fields, 8 + length) for name, fields in header.items()}
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if entry.start != end:
            raise InputError(f"{path}: tensor '{name}' does not begin where the one before ends; fetch the file again")
        end += entry.nbytes
    if end != size:
        problem = "truncated" if size < end else "longer than its header says"
        raise InputError(f"{path}: {problem} ({size} bytes, {end} expected); fetch or save the file again")
    return entries


def read_metadata(path: Path) -> dict[str, str]:
    """The free words in a safetensors file's header.

    Raises:
        InputError: when the file is no safetensors file, or they are no words.
    """
    words = _header(path)[0].get("__metadata__", {})
    if not isinstance(words, dict) or not all(isinstance(word, str) for word in words.values()):
        raise InputError(f"{path}: the words in its safetensors header are corrupt; fetch or save the file again")
    return words


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """What a safetensors file's header says, and its length in bytes."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MOST_JSON):
            raise InputError(f"{path}: not a safetensors file, or truncated ({size} bytes); fetch or save it again")
        try:
            header = parse_json(file.read(length))
        except ValueError:
            header = None
    if not isinstance(header, dict):
        raise InputError(f"{path}: its safetensors header is corrupt; fetch or save the file again")
    return header, length


def _entry(path: Path, name: str, fields: dict[str, Any], offset: int) -> TensorEntry:
    try:
        dtype, shape, (start, end) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
        numbers = all(isinstance(number, int) and number >= 0 for number in (*shape, start, end))
    except (KeyError, TypeError, ValueError):
        numbers, dtype = False, None
    if not numbers or not isinstance(dtype, str):
        raise InputError(f"{path}: the header entry of tensor '{name}' is corrupt; fetch the file again")
    entry = TensorEntry(known_dtype(str(path), name, dtype), shape, offset + start)
    if end - start != entry.nbytes:
        raise InputError(f"{path}: tensor '{name}' {shape} does not fill its place in the file; fetch the file again")
    return entry


def known_dtype(where: str, name: str, dtype: str) -> torch.dtype:
    """The torch type of a type's name in a header.

    Raises:
        InputError: when it is one that cannot be merged.
    """
    if dtype not in DTYPES:
        raise InputError(f"{where}: tensor '{name}' has type {dtype}, which cannot be merged; save it as float first")
    return DTYPES[dtype]


def read_tensor(path: Path, entry: TensorEntry, part: slice | None = None) -> torch.Tensor:
    """One tensor of a file, in its stored type, in memory of its own.

    A plain read instead of a memory map: what a process holds is then exactly what it asked for.

    Args:
        path: the file.
        entry: where the tensor lies in it.
        part: read only these of its flattened entries, as a flat tensor.
    """
    if part is not None:
        first, last, _ = part.indices(prod(entry.shape))
        entry = TensorEntry(entry.dtype, (last - first,), entry.start + first * entry.dtype.itemsize)
    buffer = torch.empty(max(entry.nbytes, 1), dtype=torch.uint8)[: entry.nbytes]
    with open(path, "rb", buffering=0) as file:
        file.seek(entry.start)
        view = buffer.numpy().data
        done = 0
        while done < entry.nbytes:
            count = file.readinto(view[done:])
            if not count:
                raise InputError(f"{path}: ends inside a tensor; it was changed while it was read")
            done += count
    return buffer.view(entry.dtype).view(entry.shape)
