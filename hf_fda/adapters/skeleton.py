"""The model that an adapter belongs to, without its weights, with the adapter's own in place."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from peft import PeftModel
from peft.utils import set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from hf_fda.adapters.files import AdapterFiles
from hf_fda.checkpoint.layout import ModelLayout, meta_model
from hf_fda.errors import InputError, few

AUTO = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""Which class of model each of PEFT's task types is trained on."""

ADAPTER = "default"


@dataclass
class Skeleton:
    """A model with an adapter in it, whose parameters may be hollow: of the right shape, without memory.

    `layout` is the model's without the adapter; `whole` are the tensors of modules that the adapter brings in place of
    the model's (`modules_to_save`), `loaded` those that it loads into the model's own, both by their names there;
    `adapter` is what the model calls it.
    """

    model: PeftModel
    layout: ModelLayout
    whole: dict[str, Tensor]
    loaded: dict[str, Tensor] = field(default_factory=dict)
    adapter: str = ADAPTER


def plain_name(name: str) -> str:
    """What a base's tensor in a PEFT model was called before modules were wrapped, however often.

    >>> plain_name("experts.base_layer.base_layer.down_proj")
    'experts.down_proj'
    """
    return re.sub(r"\.(base_layer|original_module|token_adapter)(?=\.)", "", name)


def skeleton_of(model: PeftModel, adapter: str, layout: ModelLayout) -> Skeleton:
    """An adapter where it is, in a model in memory.

    Args:
        model: the model, of which nothing is changed.
        adapter: a name of its adapters.
        layout: of the model without adapters.
    """
    inner: Any = model.base_model.model
    mark = f".modules_to_save.{adapter}."
    own = {name: value for name, value in inner.named_parameters(remove_duplicate=False) if mark in name}
    whole = {plain_name(name).replace(mark, "."): own[name].detach() for name in own}
    return Skeleton(model, layout, whole, adapter=adapter)


def build(files: AdapterFiles, base: ModelLayout) -> Skeleton:
    """Put an adapter into the hollow model it belongs to.

    Args:
        files: the adapter.
        base: layout of the base.

    Raises:
        InputError: when the adapter does not fit the base's architecture.
    """
    model_class, config = _model_of(files, base)
    layout = base if model_class is base.model_class and config is base.config else ModelLayout(config, model_class)
    _check_rows(files, layout)
    model = meta_model(config, model_class)
    hollow = _hollow_out(model)
    own = copy.deepcopy(files.config)
    if hasattr(own, "init_lora_weights"):
        own.init_lora_weights = False  # not from the base's weights, which are not here
    own.inference_mode = True
    based = {name: value for name, value in files.tensors.items() if ".base_layer." in name}
    wide = {name: value.float() for name, value in based.items()}  # PEFT rounds factors to their base's type
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped: Any = PeftModel(model, own, ADAPTER, low_cpu_mem_usage=True)
            result: Any = set_peft_model_state_dict(wrapped, files.tensors | wide, ADAPTER, low_cpu_mem_usage=True)
    except (ValueError, RuntimeError, KeyError, AttributeError) as error:  # all that PEFT raises where it does not fit
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{files.id}: the adapter does not fit the base, a {base.model_class.__name__} ({reason})"
        ) from None
    if result.unexpected_keys and getattr(files.config, "ensure_weight_tying", False):
        raise InputError(
            f"{files.id}: PEFT does not load what it saved of this adapter with ensure_weight_tying=True "
            f"({few(result.unexpected_keys)}); give the PeftModel in memory that was trained, or train without it"
        )
    if result.unexpected_keys:
        raise InputError(
            f"{files.id}: the adapter has tensors for which the base, as a {model_class.__name__}, has no place "
            f"({few(result.unexpected_keys)}); it was trained on another base"
        )
    empty = [name for name, value in (*wrapped.named_parameters(), *wrapped.named_buffers()) if value.is_meta]
    if empty:
        raise InputError(f"{files.id}: the adapter lacks tensors that its configuration promises ({few(empty)})")
    brought = {
        plain_name(name): value.detach()
        for name, value in wrapped.base_model.model.named_parameters(remove_duplicate=False)
        if id(value) not in hollow
    } | {plain_name(name.removeprefix("base_model.model.")): value for name, value in based.items()}
    mark = f".modules_to_save.{ADAPTER}."
    whole = {name.replace(mark, "."): value for name, value in brought.items() if mark in name}
    return Skeleton(wrapped, layout, whole, _loaded(files.id, brought, layout))


def _loaded(label: str, brought: Mapping[str, Tensor], layout: ModelLayout) -> dict[str, Tensor]:
    """What of all that an adapter brings takes the place of a tensor of the base.

    Raises:
        InputError: when it would be two tensors in the place of one.
    """
    found = {name: value for name, value in brought.items() if layout.tied.get(name, name) in layout.shapes}
    for name, value in found.items():
        other = layout.tied.get(name, name)
        if not torch.equal(found.get(other, value), value):
            raise InputError(
                f"{label}: the adapter comes with base weights for '{name}' and other ones for '{other}', which the "
                "base ties; it was trained on a base that does not tie them: give that"
            )
    return found


def _check_rows(files: AdapterFiles, layout: ModelLayout) -> None:
    """Refuse an adapter that comes with embeddings of another size than the base's."""
    for key, tensor in files.tensors.items():
        name = key.removeprefix("base_model.model.").replace(".modules_to_save", "")
        shape = layout.shapes.get(name)
        if shape is not None and layout.roles[name] == "embedding" and tuple(tensor.shape) != shape:
            raise InputError(
                f"{files.id}: the adapter comes with '{name}' of {len(tensor)} rows, the base has {shape[0]}; it goes "
                "with a base whose vocabulary was changed: merge it into that (merge_and_unload), save the model with "
                "its tokenizer, and give that with tokenizer='union'"
            )


def _hollow_out(model: nn.Module) -> dict[int, nn.Parameter]:
    """Give every parameter one stored number in all its places, and return them by identity."""
    hollow: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if parameter not in hollow:
                empty = torch.zeros((), dtype=torch.float32).expand(parameter.shape)
                hollow[parameter] = nn.Parameter(empty, requires_grad=False)
            module._parameters[name] = hollow[parameter]
    return {id(own): own for own in hollow.values()}


def _model_of(files: AdapterFiles, base: ModelLayout) -> tuple[type[PreTrainedModel], PretrainedConfig]:
    """The class that an adapter was trained on and its configuration: the base's, but for the size of a task's head."""
    named = (files.config.auto_mapping or {}).get("base_model_class")
    task = str(getattr(files.config.task_type, "value", files.config.task_type))
    if named is not None and hasattr(transformers, named):
        model_class = getattr(transformers, named)
    elif task in AUTO:
        model_class = getattr(transformers, AUTO[task])._model_mapping.get(type(base.config), base.model_class)
    else:
        model_class = base.model_class
    if isinstance(model_class, tuple):
        model_class = model_class[0]
    if not getattr(model_class, "config_class", None) or not isinstance(base.config, model_class.config_class):
        raise InputError(
            f"{files.id}: the adapter is one of a {model_class.__name__}, the base a {base.model_class.__name__}"
        )
    labels = _labels(files.tensors, base.config, model_class)
    if labels is None or labels == base.config.num_labels:
        return model_class, base.config
    config = copy.deepcopy(base.config)
    config.num_labels = labels
    return model_class, config


def _labels(tensors: dict[str, Tensor], config: PretrainedConfig, model_class: type[PreTrainedModel]) -> int | None:
    """How many labels the head has that comes with an adapter: told by a tensor whose shape depends on it."""
    if all(".lora_" in name for name in tensors):  # no head comes with it; the models below would be built in vain
        return None
    shapes = []
    for count in (7, 11):
        trial = copy.deepcopy(config)
        trial.num_labels = count
        shapes.append({name: tuple(p.shape) for name, p in meta_model(trial, model_class).named_parameters()})
    for name, shape in shapes[0].items():
        if shape == shapes[1][name]:
            continue
        position = next(i for i, size in enumerate(shape) if size != shapes[1][name][i])
        found = [tensor for key, tensor in tensors.items() if key.endswith(f".{name}") and tensor.ndim == len(shape)]
        if found:
            return found[0].shape[position]
    return None
