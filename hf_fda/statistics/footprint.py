"""What statistics of rows need in memory and on the disk, from shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

from hf_fda.blocks import find_blocks, regions
from hf_fda.checkpoint.interface import Checkpoint
from hf_fda.costs import outputs, width
from hf_fda.data.opening import OpenedData
from hf_fda.divergence.footprint import KEPT, longest_row
from hf_fda.inputs import Inputs
from hf_fda.merge_methods import MethodConfig
from hf_fda.merge_methods.fisher import FisherConfig
from hf_fda.merge_methods.looking import RowsConfig
from hf_fda.merge_methods.regmean import RegMeanConfig, RegMeanPlusConfig
from hf_fda.statistics.layers import d_in, gram_bytes, group_layers, layer_weights
from hf_fda.statistics.passes import TOKENS
from hf_fda.statistics.reading import HELD_BYTES
from hf_fda.streaming.footprint import AROUND


def statistics_bytes(
    inputs: Inputs, config: MethodConfig, names: Sequence[str], rows: Mapping[str, OpenedData]
) -> tuple[int, int]:
    """Peak bytes of memory while statistics are made, and bytes that they take on the disk until the merge is written.

    Args:
        inputs: base and sources.
        config: of "regmean", "regmean_pp" or "fisher"; others need neither.
        names: the base's names of what is merged by it.
        rows: of data, by task.
    """
    if isinstance(config, FisherConfig):
        return _fisher(inputs, config, names, rows)
    if isinstance(config, RegMeanPlusConfig):
        return _following(inputs, config, names, rows)
    if isinstance(config, RegMeanConfig):
        return _regmean(inputs, config, names)
    return 0, 0


def _regmean(inputs: Inputs, config: RegMeanConfig, names: Sequence[str]) -> tuple[int, int]:
    """Gram matrices of a pass, the source's weights that are held, the running block and what it computes."""
    base = inputs.base
    grams = [gram_bytes(base, group.weights) for group in group_layers(base, layer_weights(base, names))]
    held = min(HELD_BYTES, max(_bytes(own.checkpoint, own.checkpoint.names) for own in inputs.weighted))
    return max(grams, default=0) + held + _running(inputs, config), len(inputs.weighted) * sum(grams)


def _following(
    inputs: Inputs, config: RegMeanPlusConfig, names: Sequence[str], rows: Mapping[str, OpenedData]
) -> tuple[int, int]:
    """Gram matrices of a step, the weights of two blocks and of what is outside of blocks, what they compute, and one
    source's states; or a layer that is solved for, where that is more. On the disk two steps of all sources, and the
    merged layers."""
    base, sources = inputs.base, len(inputs.weighted)
    layers = layer_weights(base, names)
    where = regions(base.layout)
    outside = _bytes(base, [name for name in base.names if where[name] != "block"], itemsize=4)
    grams = max((gram_bytes(base, group.weights) for group in group_layers(base, layers, budget=0)), default=0)
    states = (
        max((_count(own, config) for own in rows.values()), default=0) * longest_row(inputs, config) * width(base) * 4
    )
    merged = _bytes(base, layers, itemsize=4)
    solving = max((_solving(base, config, name, sources) for name in layers), default=0)
    return max(grams + outside + _running(inputs, config) + states, outside + solving), 2 * sources * (
        grams + states
    ) + merged


def _solving(base: Checkpoint, config: RegMeanPlusConfig, name: str, sources: int) -> int:
    """Bytes that merging a layer takes, with all of its step that is merged already."""
    weight, width_in = prod(base.layout.shapes[name]), d_in(base, name)
    return 4 * weight * (3 * sources + 8) + config.extra_bytes((weight // width_in, width_in))


def _fisher(
    inputs: Inputs, config: FisherConfig, names: Sequence[str], rows: Mapping[str, OpenedData]
) -> tuple[int, int]:
    """A whole source, as many sums, the activations of a row and the largest gradient: it is copied while the graph is
    kept, squared, and tied embeddings hold that of their first use meanwhile."""
    base = inputs.base
    whole = max(_bytes(own.checkpoint, own.checkpoint.names, itemsize=4) for own in inputs.weighted)
    gradient = 4 * max((_bytes(base, [name], itemsize=4) for name in names), default=0)
    text: Any = base.layout.config.get_text_config()
    answers = int(getattr(text, "vocab_size", 0)) * 8 if any(own.kind == "tokens" for own in rows.values()) else 0
    each = KEPT * outputs(base, base.names) + answers
    information = _bytes(base, names, itemsize=4)
    return AROUND + whole + information + gradient + int(4 * longest_row(inputs, config) * each), len(
        rows
    ) * information


def _running(inputs: Inputs, config: RowsConfig) -> int:
    """Two blocks in float32, and what the largest computes of a batch: attention, and four times its layers' outputs
    (what comes out, is made of it, goes into the next layer, and is picked of that), as measured on an encoder."""
    base, text = inputs.base, inputs.base.layout.config.get_text_config()
    blocks = find_blocks(base.layout.model) or ("",)
    inside = [[name for name in base.names if name.startswith(f"{block}." if block else "")] for block in blocks]
    weights = max(_bytes(base, names, itemsize=4) for names in inside)
    length = longest_row(inputs, config)
    attention = 3 * int(getattr(text, "num_attention_heads", 0) or 0) * length
    tokens = max(TOKENS, length)
    return AROUND + 2 * weights + 4 * tokens * (4 * max(outputs(base, names) for names in inside) + attention)


def _count(rows: OpenedData, config: RowsConfig) -> int:
    """Rows of a task at most, as far as that is known."""
    return rows.count if rows.count is not None else config.rows or 0


def _bytes(checkpoint: Checkpoint, names: Sequence[str], itemsize: int | None = None) -> int:
    """Bytes of some tensors, as they are stored or in another type."""
    size: Callable[[str], int] = lambda name: itemsize or checkpoint.dtype(name).itemsize  # noqa: E731
    return sum(prod(checkpoint.shape(name)) * size(name) for name in names)
