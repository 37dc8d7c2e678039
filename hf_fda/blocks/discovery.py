"""The repeated blocks of a model, what lies before and after them, and one block made on a device."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_fda.checkpoint.layout import ModelLayout, meta_model
from hf_fda.errors import InputError, nearest
from hf_fda.merge_methods.fda import Family

Region = Literal["before", "block", "after"]

EMBEDDABLE = {"input_ids", "inputs_embeds", "pixel_values"}
"""Arguments of a model's forward of which `example_inputs` are made; one of them has to be there."""


@dataclass(frozen=True)
class Unit:
    """What function-space methods merge at once: a block, or a named submodule of one.

    `name` is its path in the model, `tensors` the in-memory names of its parameters.
    """

    name: str
    block: str
    tensors: tuple[str, ...]


def find_blocks(model: nn.Module) -> tuple[str, ...]:
    """Paths of the repeated blocks, in the model's order: items of module lists of checkpointing layers, or, where a
    model marks none, of its only list of several modules that take hidden states.

    >>> from transformers import BertConfig, BertModel
    >>> find_blocks(BertModel(BertConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=2)))
    ('encoder.layer.0', 'encoder.layer.1')
    """
    lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList) and module}
    found = [path for path, module in lists.items() if isinstance(module[0], GradientCheckpointingLayer)]
    if not found:
        found = [path for path, module in lists.items() if len(module) > 1 and _takes_hidden_states(module[0])]
        found = found if len(found) == 1 else []
    return tuple(f"{path}.{index}" for path in found for index in range(len(lists[path])))


def _takes_hidden_states(module: nn.Module) -> bool:
    return next(iter(inspect.signature(module.forward).parameters), "") == "hidden_states"


def require_blocks(layout: ModelLayout) -> tuple[str, ...]:
    """As `find_blocks`, of a model that can be run.

    Raises:
        InputError: when the model has none, or takes neither text nor images.
    """
    blocks = find_blocks(layout.model)
    if not layout.known:
        raise InputError(
            f"{layout.model_class.__name__} is not in transformers, so its blocks are not known; use a parameter-space "
            "method, or pass trust_remote_code=True if it comes with code that you trust"
        )
    if not blocks:
        raise InputError(f"{layout.model_class.__name__} has no repeated blocks; use a parameter-space method")
    body: Any = layout.model.base_model
    if not EMBEDDABLE & inspect.signature(body.forward).parameters.keys():
        raise InputError(f"{type(body).__name__} takes neither text nor images; use a parameter-space method")
    return blocks


def find_units(layout: ModelLayout, unit: tuple[str, ...]) -> tuple[Unit, ...]:
    """The units to merge.

    Args:
        layout: the base's layout.
        unit: ("block",) or names of submodules of every block, such as ("mlp",) or ("self_attn", "mlp").

    Raises:
        InputError: when the model has no blocks, a submodule is missing, or one unit lies inside another.
    """
    units = []
    buffers = {name for name, _ in layout.model.named_buffers()}
    for block in require_blocks(layout):
        for part in unit:
            path = block if part == "block" else f"{block}.{part}"
            try:
                layout.model.get_submodule(path)
            except AttributeError:
                children = [
                    "block",
                    *(name for name, _ in layout.model.get_submodule(block).named_children()),
                ]
                raise InputError(
                    f"unit: block '{block}' has no submodule '{part}': {nearest(part, children)}"
                ) from None
            tensors = tuple(name for name in layout.names if name.startswith(path + ".") and name not in buffers)
            units.append(Unit(path, block, tensors))
    names = [one.name for one in units]
    for name in names:
        if names.count(name) > 1 or any(name.startswith(other + ".") for other in names):
            raise InputError(f"unit: {', '.join(unit)} overlap; name parts that lie beside each other")
    return tuple(units)


@lru_cache(maxsize=64)
def regions(layout: ModelLayout) -> dict[str, Region]:
    """Where each tensor lies: before (or beside) the blocks, in one, or after the last one.

    Found from the order in which modules run on meta tensors; where that cannot be run, from the order in which
    they are registered.
    """
    blocks = tuple(f"{block}." for block in find_blocks(layout.model))
    if not blocks:
        return dict.fromkeys(layout.names, "before")
    order = _execution_order(layout)
    last = max((position for position, path in enumerate(order) if f"{path}.".startswith(blocks)), default=-1)
    first_run: dict[str, int] = {}
    for position, path in enumerate(order):
        first_run.setdefault(path, position)
    result: dict[str, Region] = {}
    for name in layout.names:
        if name.startswith(blocks):
            result[name] = "block"
        else:
            owner = name.rpartition(".")[0]
            runs = first_run.get(owner, -1)  # a module that never runs (an unused token) counts as before
            result[name] = "after" if runs > last else "before"
    return result


def _execution_order(layout: ModelLayout) -> list[str]:
    registered = [path for path, module in layout.model.named_modules() if list(module.parameters(recurse=False))]
    model: Any = meta_model(layout.config, layout.model_class)
    model.to("meta")
    order: list[str] = []
    for path, module in model.named_modules():
        if path in registered:
            module.register_forward_pre_hook(lambda _module, _args, path=path: order.append(path))
    try:
        with torch.no_grad():
            model(**example_inputs(model, batch=1, tokens=5, device=torch.device("meta"), embeds=False))
    except Exception:  # data-dependent control flow (a router) cannot run on meta tensors, for many reasons
        return registered
    return order


def example_inputs(
    model: PreTrainedModel, batch: int, tokens: int, device: torch.device, embeds: bool = True
) -> dict[str, Any]:
    """Inputs that `model` can be called with.

    Args:
        model: a whole model or a bare one.
        batch: number of examples.
        tokens: number of tokens of a text.
        device: where to make them.
        embeds: give embedded text (random), so that no vocabulary is needed, where the model takes it.
    """
    takes = inspect.signature(model.forward).parameters
    config = model.config
    inputs: dict[str, Any] = {}
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(tokens).repeat(batch, 1).to(device)
    if "pixel_values" in takes:
        vision = getattr(config, "vision_config", config)
        height, width = _pair(vision.image_size)
        pixels = torch.randn(1, vision.num_channels, height, width, generator=generator)
        inputs["pixel_values"] = pixels.repeat(batch, 1, 1, 1).to(device)
    for side in ("", "decoder_") if config.is_encoder_decoder else ("",):
        if embeds and f"{side}inputs_embeds" in takes:
            size = _embedding_size(model)
            values = torch.randn(1, tokens, size, generator=generator)
            inputs[f"{side}inputs_embeds"] = values.repeat(batch, 1, 1).to(device)
        elif f"{side}input_ids" in takes:
            inputs[f"{side}input_ids"] = ids
    if "use_cache" in takes:
        inputs["use_cache"] = not embeds  # a cache spares the decoder masks a look at values that meta cannot give
    return inputs


def token_table(model: PreTrainedModel) -> tuple[str, Tensor] | None:
    """The embedding of tokens: its path in the model and its weight (tokens, width); None where there is no single one
    (of an image, or of characters by several hashes)."""
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:  # the library's word for a model that has none
        return None
    path = next((path for path, module in model.named_modules() if module is table), None)
    weight = getattr(table, "weight", None)
    return (path, weight) if path is not None and isinstance(weight, Tensor) else None


def _embedding_size(model: PreTrainedModel) -> int:
    """The width of embedded text, which a model may project to that of its blocks."""
    table = token_table(model)
    return int(model.config.get_text_config().hidden_size) if table is None else table[1].shape[-1]


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def family_of(layout: ModelLayout) -> Family:
    """Which published settings fit a model: "vision", "encoder" (text, encoder-decoders too) or "decoder"."""
    config = layout.config
    if config.is_encoder_decoder:
        return "encoder"
    body: Any = layout.model.base_model
    takes = inspect.signature(body.forward).parameters
    if "pixel_values" in takes:
        return "vision"
    causal = getattr(config, "is_decoder", False) or _causal(layout)
    return "decoder" if causal else "encoder"


def _causal(layout: ModelLayout) -> bool:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    kind = layout.config.model_type
    text = layout.config.get_text_config().model_type
    masked = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return (kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or text in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) and not masked


def make_unit(layout: ModelLayout, unit: Unit, tensors: Mapping[str, Tensor], device: torch.device) -> nn.Module:
    """One unit with real weights on a device, frozen and in evaluation mode; nothing else of the model is made.

    Args:
        layout: the layout whose meta model it is copied from.
        unit: which.
        tensors: the unit's tensors by their names in the model; given to the module as they are.
        device: where.
    """
    module = copy.deepcopy(layout.model.get_submodule(unit.name))
    state = {name.removeprefix(unit.name + "."): tensor for name, tensor in tensors.items()}
    module.load_state_dict(state, assign=True)
    for owner in module.modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[name] = buffer.to(device)
    return module.eval().requires_grad_(False)
