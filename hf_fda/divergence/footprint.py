"""What learning coefficients needs in memory, from headers and shapes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch

from hf_fda.blocks import find_blocks
from hf_fda.checkpoint.alignment import AlignedSource
from hf_fda.checkpoint.interface import Checkpoint
from hf_fda.costs import outputs
from hf_fda.data.opening import OpenedData
from hf_fda.inputs import Inputs
from hf_fda.merge_methods.learned import Initial, LearnedConfig, TaskVectorForm
from hf_fda.merge_methods.looking import RowsConfig

KEPT = 3.5
"""Entries that the backward pass finds kept for each entry of a linear layer's output: what goes in, what norms and
activation functions keep, and what is added. Measured on encoders and decoders."""


def learning_bytes(inputs: Inputs, config: LearnedConfig, names: Sequence[str], rows: Mapping[str, OpenedData]) -> int:
    """Peak bytes of learning: merged tensors, base, task vectors, one gradient, and the activations of a minibatch; or
    of one source that answers its rows, where that is more.

    Args:
        inputs: base and sources.
        config: the options.
        names: the base's names of what is merged.
        rows: of data, by task.
    """
    sources = inputs.weighted
    held = held_bytes(inputs.base, sources, names, config.task_vectors, initial=config.initial)
    heads = 4 * sum(prod(source.checkpoint.shape(name)) for source in sources for name in source.extra)
    # Tied embeddings hold the gradient of their first use until that of the other is there
    gradient = 4 * 2 * max((prod(inputs.base.shape(name)) for name in names), default=0)
    alone = max(4 * sum(prod(own.checkpoint.shape(name)) for name in own.checkpoint.names) for own in sources)
    activations = max((_activation_bytes(inputs, config, own) for own in rows.values()), default=0)
    # All task tensors of one weight with their decompositions
    making = 3 * len(sources) * gradient // 2 if config.initial == "tsv" else 0
    return max(held + heads + max(gradient + activations, making), alone + activations // 2)


def held_bytes(
    base: Checkpoint,
    sources: Sequence[AlignedSource],
    names: Sequence[str],
    form: TaskVectorForm = "float32",
    dtype: torch.dtype = torch.float32,
    initial: Initial = "task_arithmetic",
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
        initial: what the coefficients are of.
    """
    rounded = torch.bfloat16 if form == "bfloat16" else dtype
    total = 0
    for name in names:
        stored, shape = base.dtype(name), base.shape(name)
        size = prod(shape)
        moving = [source for source in sources if source.may_move(name)] if stored.is_floating_point else []
        total += size * (dtype if stored.is_floating_point else stored).itemsize
        total += size * stored.itemsize if moving and form != "disk" else 0
        if initial == "tsv" and moving:
            thin = min(shape) * sum(shape) if base.layout.roles[name] in ("linear", "conv1d") else None
            dense = len(moving) * size
            total += thin * dtype.itemsize if thin is not None and thin < dense else dense * rounded.itemsize
            continue
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


def longest_row(inputs: Inputs, config: RowsConfig) -> int:
    """Tokens of a row at most: of a text as far as the model and `max_length` go, or of an image.

    Args:
        inputs: whose base says how long texts may be, or how large images are.
        config: the options.
    """
    layout = inputs.base.layout
    text: Any = layout.config.get_text_config()
    length = min(config.max_length, int(getattr(text, "max_position_embeddings", None) or config.max_length))
    vision: Any = getattr(layout.config, "vision_config", layout.config)
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    if isinstance(size, int) and isinstance(patch, int):
        length = (size // patch) ** 2 + 1
    return length


def _activation_bytes(inputs: Inputs, config: LearnedConfig, rows: OpenedData) -> int:
    """Bytes that are kept of a minibatch until the backward pass, with rows as long as they may be."""
    layout = inputs.base.layout
    text: Any = layout.config.get_text_config()
    length = longest_row(inputs, config)
    blocks = find_blocks(layout.model)
    inside = tuple(f"{block}." for block in blocks)
    each = outputs(inputs.base, [name for name in layout.names if name.startswith(inside)])
    kept = each / max(len(blocks), 1) if config.recompute else each
    answers = int(getattr(text, "vocab_size", 0)) * 4 if rows.kind == "tokens" else 0
    return int(4 * config.batch_size * length * (KEPT * kept + answers))
