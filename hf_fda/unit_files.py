"""How an adapted unit lies in its file: tensors as they are, or the thin factors of what is added to the base's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from hf_fda.checkpoint.header import read_header, read_tensor
from hf_fda.lowrank import LowRank


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
