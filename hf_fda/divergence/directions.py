"""What TSV-M adds for each source, so that its weights can be learnt: the merge is the sum of these."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_fda.checkpoint.layout import Role
from hf_fda.lowrank import LowRank
from hf_fda.merge_methods.tsv import orthogonalised


def orthogonal_parts(tasks: Sequence[Tensor], role: Role) -> list[LowRank] | list[Tensor]:
    """What `tsv` with all weights one adds to a tensor, source by source.

    Args:
        tasks: K task tensors; zeros of a source that does not move the tensor.
        role: of the tensor.

    Returns:
        of linear weights K products of thin factors; of a stack of them K dense tensors; of anything else the K task
        tensors over K.
    """
    if role == "linear":
        return orthogonalised(tasks, tasks[0].shape)
    if role == "conv1d":
        turned = orthogonalised([task.mT for task in tasks], tasks[0].shape[::-1])
        return [LowRank(part.right.mT, part.left.mT, tuple(tasks[0].shape)) for part in turned]
    if role == "stack":
        each = [orthogonalised([task[i] for task in tasks], tasks[0].shape[1:]) for i in range(len(tasks[0]))]
        return [torch.stack([part.dense() for part in own]) for own in zip(*each, strict=True)]
    return [task / len(tasks) for task in tasks]
