"""A model's tensors by their names in memory, and how they lie on disk.

Names on disk are not names in memory: transformers renames (ViT), stacks (experts) and splits tensors while it loads,
and undoes that while it saves. The layout applies the library's own rules to one group of tensors at a time, to meta
tensors where only shapes are asked for.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    apply_converters,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from hf_fda.errors import InputError

Role = Literal["linear", "conv1d", "embedding", "stack", "other"]
"""What a tensor is to a matrix method: a (d_out, d_in) weight, its transpose, a lookup table, a stack of weights."""


@dataclass(frozen=True)
class TensorGroup:
    """Tensors on disk that together become some tensors in memory.

    Most groups are one tensor and one name. A stack of experts is many on disk and one in memory; a fused
    projection may be one on disk and three in memory.
    """

    disk: tuple[str, ...]
    memory: tuple[str, ...]
    key: str
    patterns: tuple[str, ...] = ()
    converter: WeightConverter | None = None

    def to_memory(self, tensors: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
        """Convert the group's tensors on disk (by name) to those in memory."""
        if self.converter is None:
            return {self.memory[0]: tensors[self.disk[0]]}
        converter = copy.deepcopy(self.converter)
        for name, pattern in zip(self.disk, self.patterns, strict=True):
            converter.add_tensor(self.key, name, pattern, tensors[name])  # type: ignore[arg-type]
        converted = converter.convert(self.key, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}


def model_class_of(
    config: PretrainedConfig, id: str, trust_remote_code: bool = False, revision: str | None = None
) -> type[PreTrainedModel]:
    """The class that a checkpoint's config names (`architectures`), or the bare model of its `model_type`.

    Args:
        config: the configuration.
        id: folder or Hub id, where remote code would come from.
        trust_remote_code: run it.
        revision: the commit that the code is taken from.

    Raises:
        InputError: when transformers does not know it, or it needs remote code that was not trusted.
    """
    architecture = config.architectures[0] if config.architectures else None
    if architecture is None:
        bare: Any = transformers.AutoModel._model_mapping[type(config)]
        return bare[0] if isinstance(bare, tuple) else bare
    known = getattr(transformers, architecture, None)
    if known is not None:
        return known
    remote = {str(ref).rpartition(".")[2]: ref for ref in (getattr(config, "auto_map", None) or {}).values()}
    if architecture in remote and trust_remote_code:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        return get_class_from_dynamic_module(remote[architecture], id, revision=revision)
    way_out = "pass trust_remote_code=True if you trust its code" if architecture in remote else "update transformers"
    raise InputError(f"{id}: transformers {transformers.__version__} has no class '{architecture}'; {way_out}")


def meta_model(
    config: PretrainedConfig, model_class: type[PreTrainedModel], attention: str | None = "eager"
) -> PreTrainedModel:
    """The model with its parameters on the meta device and its buffers real: no weights, half a second for 80 layers.

    Attention and experts are the eager implementations: the others have no second derivative on every device. Sparse
    attention is full, as in models that have it where tokens are few.

    Args:
        config: its configuration.
        model_class: its class.
        attention: another implementation of attention; None: the one that `from_pretrained` chooses.
    """
    config = copy.deepcopy(config)
    if getattr(config, "attention_type", None) == "block_sparse":  # BigBird
        config.attention_type = "original_full"
    kwargs: dict[str, Any] = {"dtype": torch.float32}
    if attention is not None:
        kwargs["attn_implementation"] = attention
    if model_class._can_set_experts_implementation():
        kwargs["experts_implementation"] = "eager"
    with init_empty_weights(include_buffers=False), no_init_weights():
        model = model_class._from_config(config, **kwargs)
    return model.eval().requires_grad_(False)


class ModelLayout:
    """Names, shapes and roles of a model class's tensors, in the model's order.

    Args:
        config: the model's configuration.
        model_class: its class.
    """

    known = True
    """Whether transformers knows the class."""

    def __init__(self, config: PretrainedConfig, model_class: type[PreTrainedModel]) -> None:
        self.config = config
        self.model_class = model_class
        self.model = meta_model(config, model_class)
        self.tied: dict[str, str] = dict(self.model.all_tied_weights_keys)
        state = self.model.state_dict()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in state.items() if name not in self.tied}

    @property
    def names(self) -> tuple[str, ...]:
        """In-memory names of all stored tensors; of tied ones, the one that is stored."""
        return tuple(self.shapes)

    @cached_property
    def shared(self) -> dict[str, tuple[str, ...]]:
        """Of each tensor that the model ties to others all their names, where a module computes with them.

        A module with others inside, which holds the tensor for one of these (BERT's head its bias), is left out.
        """
        groups: dict[str, list[str]] = {}
        for other, name in self.model.all_tied_weights_keys.items():
            groups.setdefault(name, [name]).append(other)
        return {name: tuple(filter(self._computes, group)) or (name,) for name, group in groups.items()}

    def _computes(self, name: str) -> bool:
        return not list(self.model.get_submodule(name.rpartition(".")[0]).children())

    def places(self, name: str) -> tuple[str, ...]:
        """All names of a stored tensor in the model: `shared`, or its own alone."""
        return self.shared.get(name, (name,)) if self.tied else (name,)

    def untied(self) -> ModelLayout:
        """The same model, but each place of a tied tensor holds one of its own. Such a model is never written."""
        apart = copy.copy(self)
        apart.shapes = {place: shape for name, shape in self.shapes.items() for place in self.places(name)}
        apart.tied = {}
        apart.__dict__.pop("roles", None)
        return apart

    @cached_property
    def roles(self) -> dict[str, Role]:
        """The role of every tensor by name."""
        modules = dict(self.model.named_modules())
        return {name: _role(modules[name.rpartition(".")[0]], shape) for name, shape in self.shapes.items()}

    @cached_property
    def body_prefixes(self) -> tuple[str, ...]:
        """Prefixes under which the bare model may lie: "" and, say, "bert."."""
        paths = [path for path, module in self.model.named_modules() if path and isinstance(module, PreTrainedModel)]
        return ("", *(f"{path}." for path in paths))

    def groups(self, on_disk: Iterable[str]) -> tuple[list[TensorGroup], list[str]]:
        """How the tensors of a checkpoint become this model's, as `from_pretrained` would do it.

        Args:
            on_disk: names in the checkpoint's files.

        Returns:
            groups in the model's order, and the names that the model has no place for.
        """
        conversions = get_model_conversion_mapping(self.model, add_legacy=True)
        converters = [item for item in conversions if isinstance(item, WeightConverter)]
        renamings: Any = [item for item in conversions if not isinstance(item, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        state = self.model.state_dict()
        prefix = self.model.base_model_prefix
        collected: dict[str, list[tuple[str, str | None]]] = {}
        unexpected = []
        for name in sorted(on_disk, key=_natural):
            renamed, pattern = rename_source_key(name, renamings, converters, prefix, state)
            if renamed not in state and name in state:
                renamed, pattern = rename_source_key(name, [], [], prefix, state)
            if renamed in state:
                collected.setdefault(renamed, []).append((name, pattern))
            else:
                unexpected.append(name)
        self._remember_for_saving(conversions)
        groups = []
        for key, members in collected.items():
            if key in self.tied:
                if self.tied[key] in collected:
                    continue  # a redundant copy of a tied tensor
                key = self.tied[key]
            groups.append(self._group(key, members, by_pattern))
        order = {name: position for position, name in enumerate(self.names)}
        return sorted(groups, key=lambda group: order[group.memory[0]]), unexpected

    def _group(
        self, key: str, members: list[tuple[str, str | None]], by_pattern: Mapping[str, WeightConverter]
    ) -> TensorGroup:
        pattern = members[0][1]
        if pattern is None:
            return TensorGroup((members[0][0],), (key,), key)
        converter = by_pattern[pattern]
        targets = [key.replace(converter.target_patterns[0], target, 1) for target in converter.target_patterns]
        memory = tuple(name for name in targets if name in self.shapes) or (key,)
        return TensorGroup(
            tuple(name for name, _ in members), memory, key, tuple(str(p) for _, p in members), converter
        )

    def _remember_for_saving(self, conversions: list[Any]) -> None:
        legacy = {repr(item) for item in get_model_conversion_mapping(self.model)} - {
            repr(item) for item in get_model_conversion_mapping(self.model, add_legacy=False)
        }
        used: Any = [item for item in conversions if item.was_used() and repr(item) not in legacy]
        self.model._weight_conversions = used  # what revert_weight_conversion undoes

    def save_groups(self, names: Iterable[str]) -> list[tuple[str, ...]]:
        """In-memory names, in order, dealt into the smallest groups that `to_disk` can convert."""
        reverse = self._reverse()
        groups: dict[str, list[str]] = {}
        for name in names:
            key, pattern = apply_converters(name, reverse)
            groups.setdefault(name if pattern is None else key, []).append(name)
        return [tuple(group) for group in groups.values()]

    def unconverted(self, names: Iterable[str]) -> set[str]:
        """Those of some in-memory names whose tensors `to_disk` only renames."""
        reverse = self._reverse()
        return {name for name in names if apply_converters(name, reverse)[1] is None}

    def _reverse(self) -> list[Any]:
        """What turns tensors in memory into those on disk, beside renaming."""
        conversions = getattr(self.model, "_weight_conversions", None)
        if conversions is None:
            conversions = get_model_conversion_mapping(self.model, add_legacy=False)
        return [item.reverse_transform() for item in conversions[::-1] if isinstance(item, WeightConverter)]

    def to_disk(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors in memory (whole groups, by name) under the names and in the shapes `save_pretrained` writes."""
        return revert_weight_conversion(self.model, dict(tensors))

    def written_config(self) -> dict[str, Any]:
        """The content of `config.json` for a model of this layout."""
        config = copy.deepcopy(self.config)
        config.architectures = [self.model_class.__name__]
        facts: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
        facts.pop("_name_or_path", None)
        return facts


def _role(module: nn.Module, shape: tuple[int, ...]) -> Role:
    if isinstance(module, nn.Embedding):
        return "embedding"
    if len(shape) == 2:
        return "conv1d" if isinstance(module, Conv1D) else "linear"
    if len(shape) == 3 and shape[0] > 1 and not isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return "stack"
    return "other"


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key that counts: layer 10 after layer 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]
