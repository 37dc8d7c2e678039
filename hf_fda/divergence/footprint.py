"""What learning coefficients needs in memory, from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from hf_fda.blocks import find_blocks
from hf_fda.checkpoint.alignment import AlignedSource
from hf_fda.checkpoint.interface import Checkpoint
from hf_fda.costs import outputs
from hf_fda.data.opening import OpenedData
from hf_fda.inputs import Inputs
from hf_fda.merge_methods.learned import LearnedConfig
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
    base, sources = inputs.base, inputs.weighted
    entries = {name: prod(base.shape(name)) for name in names}
    merged = 4 * sum(entries.values())
    stored = sum(count * base.dtype(name).itemsize for name, count in entries.items())
    tasks = sum(_task_bytes(config, source, name, base) for source in sources for name in names)
    heads = 4 * sum(prod(source.checkpoint.shape(name)) for source in sources for name in source.extra)
    gradient = 4 * 2 * max(entries.values(), default=0)  # tied embeddings hold that of their first use meanwhile
    held = merged + (0 if config.task_vectors == "disk" else stored) + tasks + heads
    alone = max(4 * sum(prod(source.checkpoint.shape(n)) for n in source.checkpoint.names) for source in sources)
    activations = max((_activation_bytes(inputs, config, own) for own in rows.values()), default=0)
    return max(held + gradient + activations, alone + activations // 2)


def _task_bytes(config: LearnedConfig, source: AlignedSource, name: str, base: Checkpoint) -> int:
    """Bytes of a source's task vector of one tensor, as it is held."""
    if not source.may_move(name):
        return 0
    shape, rank = base.shape(name), source.rank(name)
    if rank is not None:
        return 4 * rank * (shape[0] + prod(shape[1:]))
    return prod(shape) * {"float32": 4, "bfloat16": 2, "disk": 0}[config.task_vectors]


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
