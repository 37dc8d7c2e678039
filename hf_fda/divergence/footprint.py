"""How many bytes learning holds throughout, told from headers."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

from hf_fda.checkpoint.alignment import AlignedSource
from hf_fda.checkpoint.interface import Checkpoint
from hf_fda.divergence.task_tensors import TaskVectorForm


def held_bytes(
    base: Checkpoint,
    sources: Sequence[AlignedSource],
    names: Sequence[str],
    form: TaskVectorForm = "float32",
    dtype: torch.dtype = torch.float32,
) -> int:
    """Bytes that `MergedParameters` of the same arguments holds at most, beside one tensor's gradient.

    At most, since a task vector may turn out to be zero, and is then not held. The tasks' heads, the activations of a
    minibatch and what libraries take come on top.

    Args:
        base: theta_0.
        sources: K sources.
        names: the base's names of the tensors to merge.
        form: how dense task vectors are held.
        dtype: type of the merged tensors.
    """
    rounded = torch.bfloat16 if form == "bfloat16" else dtype
    total = 0
    for name in names:
        stored, shape = base.dtype(name), base.shape(name)
        size = prod(shape)
        moving = [source for source in sources if source.may_move(name)] if stored.is_floating_point else []
        total += size * (dtype if stored.is_floating_point else stored).itemsize
        total += size * stored.itemsize if moving and form != "disk" else 0
        for source in moving:
            entries = _entries_of_factors(source.rank(name), shape)
            if entries is not None and entries < size:
                total += entries * dtype.itemsize
            elif form != "disk":
                total += size * rounded.itemsize
    return total


def _entries_of_factors(rank: int | None, shape: tuple[int, ...]) -> int | None:
    """Entries of two factors of a matrix, of a stack of matrices, or of a convolution's tensor seen as a matrix."""
    if rank is None:
        return None
    *stack, rows, columns = (shape[0], prod(shape[1:])) if len(shape) == 4 else shape
    return prod(stack) * rank * (rows + columns)
