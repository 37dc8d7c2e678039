"""Which linear layers have inputs that can be looked at, and in which groups that is done."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_fda.blocks import find_blocks
from hf_fda.checkpoint.alignment import AlignedSource
from hf_fda.checkpoint.interface import Checkpoint

GROUP_BYTES = 2**30
"""Bytes of Gram matrices that are summed up in one pass over the rows; a block with more has a pass of its own."""


@dataclass(frozen=True)
class Group:
    """Weights, by the base's names, whose inputs are looked at together.

    `blocks` are the base's blocks that they lie in; () where some lie outside of blocks.
    """

    name: str
    weights: tuple[str, ...]
    blocks: tuple[str, ...]


def layer_weights(base: Checkpoint, names: Iterable[str]) -> list[str]:
    """Those of the base's tensors that are the weight of a linear layer, in the model's order.

    A stack of experts is none: its weights are multiplied inside one module, where no single one's inputs show.

    Args:
        base: the base.
        names: tensors to choose from.
    """
    known = set(names)
    modules = dict(base.layout.model.named_modules())
    return [name for name in base.names if name in known and _is_layer(modules, name)]


def _is_layer(modules: dict[str, nn.Module], name: str) -> bool:
    path, _, part = name.rpartition(".")
    return part == "weight" and isinstance(modules.get(path), (nn.Linear, Conv1D))


def d_in(base: Checkpoint, name: str) -> int:
    """The width of a layer's inputs.

    Args:
        base: the base.
        name: of the layer's weight.
    """
    shape = base.layout.shapes[name]
    return shape[0] if base.layout.roles[name] == "conv1d" else shape[1]


def gram_bytes(base: Checkpoint, names: Iterable[str]) -> int:
    """Bytes of the Gram matrices of some weights in float32, if none were shared."""
    return 4 * sum(d_in(base, name) ** 2 for name in names)


def group_layers(base: Checkpoint, weights: Sequence[str], budget: int = GROUP_BYTES) -> list[Group]:
    """Weights in groups whose Gram matrices fit into a number of bytes: whole blocks, and at last all outside of them.

    Args:
        base: the base.
        weights: of linear layers, in the model's order.
        budget: bytes; a block that needs more is a group of its own.
    """
    inside = {
        block: [name for name in weights if name.startswith(f"{block}.")] for block in find_blocks(base.layout.model)
    }
    groups: list[Group] = []
    for block, own in inside.items():
        if not own:
            continue
        last = groups[-1] if groups else None
        if last is not None and gram_bytes(base, [*last.weights, *own]) <= budget:
            groups[-1] = Group(last.name, last.weights + tuple(own), (*last.blocks, block))
        else:
            groups.append(Group(f"{len(groups)}", tuple(own), (block,)))
    held = {name for own in inside.values() for name in own}
    outside = tuple(name for name in weights if name not in held)
    return [*groups, Group(f"{len(groups)}", outside, ())] if outside else groups


def path_in(source: AlignedSource, path: str, names: Iterable[str]) -> str:
    """A module's path in a source.

    Args:
        source: the source.
        path: of the module in the base.
        names: the base's names of tensors, of which one at least is the module's and the source's.
    """
    name = next(name for name in names if name.startswith(f"{path}.") and name in source.tensor_of)
    return source.tensor_of[name].removesuffix(name.removeprefix(path))
