"""Models of the tasks: a source as it is, or the merged body that all tasks share under a task's own head."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from hf_fda.blocks import find_blocks
from hf_fda.checkpoint.alignment import AlignedSource
from hf_fda.checkpoint.layout import meta_model
from hf_fda.data.rows import Batch
from hf_fda.divergence.measures import at_scored
from hf_fda.errors import InputError, RunError, few


def source_model(source: AlignedSource, device: torch.device, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A source as it is (of an adapter: the base with what it adds), frozen and in evaluation mode.

    Args:
        source: which.
        device: where to make it.
        dtype: type of its weights.

    Raises:
        InputError: when weights that the model needs are not in its files.
    """
    return task_model(source, {}, device, dtype)


def task_model(
    source: AlignedSource,
    shared: Mapping[str, Tensor],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    others: Mapping[str, Tensor] | None = None,
    recompute: bool = False,
) -> PreTrainedModel:
    """A source's model with other tensors in place of some of its own, in evaluation mode.

    What is shared is not copied: a change of it, in place, is seen by all models that it was given to. The source's own
    tensors are frozen copies.

    Args:
        source: whose class, configuration and remaining tensors (its head) the model has.
        shared: tensors by the base's names, on the device.
        device: where to make it.
        dtype: type of the source's own weights.
        others: tensors by the source's own names, for those that the base does not have and that are not its own.
        recompute: keep the activations of one block at a time, and compute them again on the way back.

    Raises:
        InputError: when weights that the model needs are not in its files.
    """
    layout = source.checkpoint.layout
    if not layout.known:
        raise InputError(
            f"source '{source.name}' is a {layout.model_class.__name__}, which transformers does not know, so that it "
            "cannot be run on rows; use a method that does not look at data"
        )
    given = {source.tensor_of[name]: tensor for name, tensor in shared.items() if name in source.tensor_of}
    given |= others or {}
    held = set(source.checkpoint.names)
    lacking = [name for name in layout.names if name not in given and name not in held]
    if lacking:
        raise InputError(
            f"source '{source.name}' ({source.checkpoint.id}) lacks {few(lacking)}, without which it cannot be run on "
            "rows; fetch or save it again"
        )
    model = meta_model(layout.config, layout.model_class, attention=None)
    for name in layout.names:
        tensor = given[name] if name in given else _own(source, name, device, dtype)
        _put(model, name, tensor)
    for target, origin in layout.tied.items():
        _put(model, target, model.get_parameter(origin))
    _buffers_to(model, device)
    if recompute:
        _recompute_blocks(model)
    return model


def _own(source: AlignedSource, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    tensor = source.checkpoint.read(name)
    return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Give a module a tensor as its parameter or buffer, the very object where it can be one."""
    path, _, attribute = name.rpartition(".")
    module: Any = model.get_submodule(path)
    if attribute in module._buffers:
        module._buffers[attribute] = tensor
    else:
        is_parameter = isinstance(tensor, nn.Parameter)
        module._parameters[attribute] = tensor if is_parameter else nn.Parameter(tensor, requires_grad=False)


def _buffers_to(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device != device:
                module._buffers[name] = buffer.to(device)


def _recompute_blocks(model: PreTrainedModel) -> None:
    """The library's own gradient checkpointing works in training mode alone, where dropout is on."""
    for path in find_blocks(model):
        block: Any = model.get_submodule(path)
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def logits_of(model: PreTrainedModel, batch: Batch) -> Tensor:
    """A model's logits at the rows or positions of a batch that count, (n, C).

    Args:
        model: any.
        batch: on its device.

    Raises:
        RunError: when the model gives no logits.
    """
    takes = inspect.signature(model.forward).parameters
    extra = {"use_cache": False} if "use_cache" in takes else {}
    output: Any = model(**batch.inputs, **extra)
    logits = output.get("logits")
    if logits is None:
        raise RunError(
            f"{type(model).__name__} gives no logits to compare; give the task a source with a head (a classifier, a "
            "language model)"
        )
    return at_scored(logits, batch.scored)
