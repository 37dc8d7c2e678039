"""A model that runs with one block's weights in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_fda.blocks.discovery import find_blocks
from hf_fda.checkpoint.layout import ModelLayout

SMALL = 1 << 20
"""Entries of a module's weights up to which it holds them while a model runs."""


class Weights(Protocol):
    """What a model runs with: its layout, and its tensors by name."""

    @property
    def layout(self) -> ModelLayout:
        """Of the model."""
        ...

    @property
    def names(self) -> Sequence[str]:
        """Of the tensors that there are."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor."""
        ...


def stream_weights(
    model: PreTrainedModel, checkpoint: Weights, device: torch.device, skipped: Collection[str] = ()
) -> None:
    """Make a meta model runnable with little memory: a block, or a large module outside the blocks, holds its weights
    only while it runs. A small one has them from the start: some are used without being called.

    Args:
        model: on the meta device with real buffers, of the checkpoint's own class.
        checkpoint: where the weights come from.
        device: where to run.
        skipped: blocks that get no weights.
    """
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    blocks = find_blocks(model)
    inside = tuple(f"{block}." for block in blocks)
    tied = checkpoint.layout.tied
    for path, module in model.named_modules():
        whole = path in blocks
        if path in skipped or path.startswith(inside) or not (whole or module._parameters):
            continue
        loader, dropper = _weight_hooks(path, module, checkpoint, tied, device, recurse=whole)
        if not whole and sum(own.numel() for own in module.parameters(recurse=False)) <= SMALL:
            loader()
            continue
        module.register_forward_pre_hook(loader, prepend=True)
        module.register_forward_hook(dropper, always_call=True)


def _weight_hooks(
    path: str,
    module: nn.Module,
    checkpoint: Weights,
    tied: dict[str, str],
    device: torch.device,
    recurse: bool,
) -> tuple[Callable[..., None], Callable[..., None]]:
    prefix = f"{path}." if path else ""
    meta = dict(module.named_parameters(recurse=recurse))

    def set_all(values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            owner, _, attribute = name.rpartition(".")
            module.get_submodule(owner)._parameters[attribute] = nn.Parameter(value, requires_grad=False)

    held = set(checkpoint.names)

    def weight(name: str, shape: torch.Size) -> Tensor:
        if name not in held:  # a pooler that the files lack: what follows the blocks does not matter here
            return torch.zeros(shape, device=device)
        return checkpoint.read(name).to(device, torch.float32)

    def load(*_: Any) -> None:
        names = {name: tied.get(prefix + name, prefix + name) for name in meta}
        set_all({name: weight(full, meta[name].shape) for name, full in names.items()})

    def drop(*_: Any) -> None:
        set_all(dict(meta))

    return load, drop
