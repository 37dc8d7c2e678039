"""Telling two revisions of a model apart by a little of each tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch

from hf_fda.checkpoint.interface import Checkpoint

ENTRIES = 64
"""How many entries of a tensor are looked at."""


def likeness(checkpoint: Checkpoint, names: Iterable[str]) -> str:
    """A hash of the first entries of some tensors, in float32: the same wherever the same weights lie.

    Stacks of experts are left out: they lie in many files, all of which would have to be read.

    Args:
        checkpoint: whose.
        names: of the tensors.
    """
    hashed = hashlib.sha256()
    for name in sorted(names):
        if checkpoint.layout.roles[name] == "stack":
            continue
        count = min(torch.Size(checkpoint.shape(name)).numel(), ENTRIES)
        entries = checkpoint.read(name, slice(0, count)).float().contiguous()
        hashed.update(f"{name} {checkpoint.shape(name)}".encode())
        hashed.update(entries.view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()
