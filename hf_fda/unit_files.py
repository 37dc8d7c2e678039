"""How an adapted unit lies in its file: tensors as they are, or the thin factors of what is added to the base's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from hf_fda.checkpoint.header import read_header, read_metadata, read_tensor
from hf_fda.checkpoint.writer import save_tensors
from hf_fda.lowrank import LowRank
from hf_fda.store import WORK

BLOCKS = f"{WORK}/blocks"
"""Where adapted units wait in the output folder until the files that hold them are written."""

DISTANCES = ("distance_before", "distance_after")
"""The words of a unit's file for its distances."""


@dataclass(frozen=True)
class AdaptedUnit:
    """A unit as its file holds it (`unit_tensors`), and the mean distance to what the sources do before and after
    adaptation; None where it was not adapted."""

    tensors: Mapping[str, Tensor]
    distances: tuple[float, float] | None = None

    def write(self, path: Path) -> str:
        """Write its file, and give the file's hash."""
        said = {} if self.distances is None else dict(zip(DISTANCES, map(repr, self.distances), strict=True))
        return save_tensors(path, self.tensors, said)


def read_distances(path: Path) -> tuple[float, float] | None:
    """The distances before and after adaptation that a unit's file states."""
    said = read_metadata(path)
    before, after = (said.get(name) for name in DISTANCES)
    return None if before is None or after is None else (float(before), float(after))


def adapted_file(unit: str) -> str:
    """Where an adapted unit lies in the output folder."""
    return f"{BLOCKS}/{unit}.safetensors"


def unit_tensors(parameters: Mapping[str, Tensor], factors: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """What is saved of an adapted unit.

    Args:
        parameters: adapted tensors by the base's names.
        factors: by the base's names, what is added to it.
    """
    halves = {name: {"left": own.left, "right": own.right} for name, own in factors.items()}
    named = {f"{name}.{half}": part for name, both in halves.items() for half, part in both.items()}
    return {**parameters, **{name: part.contiguous() for name, part in named.items()}}


def read_adapted(path: Path, name: str, shape: tuple[int, ...]) -> Tensor | LowRank:
    """One adapted tensor, or as factors what is added to the base's.

    Args:
        path: the unit's file.
        name: the base's name of the tensor.
        shape: of the tensor.
    """
    entries = read_header(path)
    if name in entries:
        return read_tensor(path, entries[name])
    left, right = (read_tensor(path, entries[f"{name}.{half}"]) for half in ("left", "right"))
    return LowRank(left, right, shape)
