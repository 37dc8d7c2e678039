"""A merged adapter in PEFT's own form: its configuration and its tensors by the names that PEFT saves."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_fda.adapters.experts import parameter_halves, wrapper_paths
from hf_fda.adapters.targets import AdapterPlan
from hf_fda.lowrank import LowRank

PREFIX = "base_model.model."


def adapter_config(
    plan: AdapterPlan, ranks: Mapping[str, int], base_id: str, revision: str | None = None
) -> LoraConfig:
    """The configuration of a merged adapter, in which alpha is the rank, so that factors count as they are.

    Args:
        plan: what the adapter holds.
        ranks: by tensor name (in the adapter's model), of its factors.
        base_id: what the adapter is for.
        revision: the commit of it.
    """
    modules = dict(plan.layout.model.named_modules())
    by_place = {target.place: ranks[target.name] for target in plan.targets if target.factored}
    for target in plan.targets:
        if target.form == "bias":
            by_place.setdefault(target.module, 1)
    common = Counter(by_place.values()).most_common(1)[0][0] if by_place else 1
    pattern = {place: rank for place, rank in by_place.items() if rank != common}
    parameters = sorted(target.name for target in plan.targets if target.form == "parameter")
    factored = sorted(by_place.keys() - set(parameters))
    whole = sorted({target.module for target in plan.targets if target.form == "whole"})
    turned = {isinstance(modules[module], Conv1D) for module in factored}
    return LoraConfig(
        r=common,
        lora_alpha=common,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=None if parameters and not factored else factored,
        target_parameters=parameters or None,
        modules_to_save=whole or None,
        lora_bias=any(target.form == "bias" for target in plan.targets),
        fan_in_fan_out=turned == {True} and not parameters,
        task_type=plan.task_type,
        base_model_name_or_path=base_id,
        revision=revision,
        inference_mode=True,
        auto_mapping={
            "base_model_class": plan.layout.model_class.__name__,
            "parent_library": plan.layout.model_class.__module__,
        },
    )


def adapter_tensors(
    plan: AdapterPlan,
    factors: Mapping[str, LowRank],
    others: Mapping[str, Tensor],
    base: Callable[[str], Tensor],
) -> dict[str, Tensor]:
    """The tensors of a merged adapter by the names that PEFT saves.

    Args:
        plan: what the adapter holds.
        factors: by tensor name (in the adapter's model).
        others: by tensor name: merged tensors of the form "whole", and what is added to biases.
        base: reads the base's tensor of a name; for parts of a module that are not merged.
    """
    modules: dict[str, Any] = dict(plan.layout.model.named_modules())
    biased = any(target.form == "bias" for target in plan.targets)
    found: dict[str, Tensor] = {}
    wrappers = wrapper_paths(plan.layout.model, [t.name for t in plan.targets if t.form == "parameter"])
    for name, path in wrappers.items():
        halves = parameter_halves(modules[name.rpartition(".")[0]], factors[name])
        found.update({f"{path}.{half}": tensor for half, tensor in halves.items()})
    linear = {t.module: modules[t.module] for t in plan.targets if t.form in ("factors", "bias")}
    for path, module in linear.items():
        product = factors.get(f"{path}.weight") or _nothing(module)
        found.update({f"{path}.{name}": tensor for name, tensor in _halves(module, product).items()})
        if biased:
            size = product.right.shape[1] if isinstance(module, Conv1D) else product.left.shape[0]
            found[f"{path}.lora_B.bias"] = others.get(f"{path}.bias", torch.zeros(size))
    for path in plan.whole_modules:
        for part, _ in modules[path].named_parameters():
            name = f"{path}.{part}"
            found[name] = others[name] if name in others else base(name)
    return {PREFIX + name: found[name].contiguous() for name in sorted(found)}


def _halves(module: nn.Module, product: LowRank) -> dict[str, Tensor]:
    """A product as the two tensors that PEFT keeps for a kind of module."""
    if isinstance(module, nn.Embedding):  # (rows, r) and (r, d), both kept turned
        return {"lora_embedding_A": product.left.mT, "lora_embedding_B": product.right.mT}
    if isinstance(module, Conv1D):
        return {"lora_A.weight": product.left.mT, "lora_B.weight": product.right.mT}
    if isinstance(module, nn.Conv2d):
        shape = (product.rank, *module.weight.shape[1:])
        return {"lora_A.weight": product.right.reshape(shape), "lora_B.weight": product.left[..., None, None]}
    return {"lora_A.weight": product.right, "lora_B.weight": product.left}


def _nothing(module: Any) -> LowRank:
    """A product of rank one that is zero, for a module whose bias alone is merged."""
    rows, columns = module.weight.shape[0], module.weight.shape[1:].numel()
    return LowRank(torch.zeros(rows, 1), torch.zeros(1, columns), tuple(module.weight.shape))


def config_text(config: LoraConfig) -> str:
    """The text of `adapter_config.json`."""
    facts = {name: _plain(value) for name, value in config.to_dict().items()}
    return json.dumps(facts, indent=2, sort_keys=True) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, Path):
        return str(value)
    return getattr(value, "value", value)
