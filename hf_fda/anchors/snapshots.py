"""Anchors on their way: kept beside a block where that is asked for, to see how construction changes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_fda.checkpoint.header import read_header, read_tensor
from hf_fda.checkpoint.writer import save_tensors
from hf_fda.errors import InputError

PREFIX = "step."


def snapshot_file(unit: str) -> str:
    """The path of a unit's snapshots inside an anchors folder."""
    return f"snapshots/{unit}.safetensors"


def check_snapshots(steps: Any) -> None:
    """Refuse what are no numbers of steps.

    Raises:
        InputError: naming the first that is none.
    """
    for step in steps:
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise InputError(f"snapshots: {step!r} is no number of steps; give whole numbers from 0, as [0, 10, 40]")


def write_snapshots(path: Path, snapshots: Mapping[int, Tensor]) -> None:
    """Write a unit's snapshots.

    Args:
        path: of the file; its folder is made.
        snapshots: anchors (n, T, d) by steps done.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, {f"{PREFIX}{step}": anchors for step, anchors in sorted(snapshots.items())})


def read_snapshots(path: Path) -> dict[int, Tensor]:
    """A unit's snapshots by steps done, in rising order.

    Raises:
        InputError: when the file is damaged.
    """
    entries = read_header(path)
    try:
        steps = sorted(int(name.removeprefix(PREFIX)) for name in entries)
    except ValueError:
        raise InputError(f"{path}: holds no snapshots of anchors; construct or fetch them again") from None
    return {step: read_tensor(path, entries[f"{PREFIX}{step}"]).float() for step in steps}
