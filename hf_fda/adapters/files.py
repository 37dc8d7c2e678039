"""An adapter's configuration and tensors, from a folder, the Hub or a `PeftModel`, and what of it is understood."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from hf_fda.checkpoint.header import read_header, read_tensor
from hf_fda.checkpoint.location import Location
from hf_fda.errors import InputError, few

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

KINDS = ("LORA", "LOHA", "LOKR", "IA3", "VERA", "OFT")
"""Kinds of adapter that merge into the base's weights."""

UNDERSTOOD = {
    *("r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora"),
    *("modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "use_dora"),
    *("alpha_pattern", "lora_bias", "target_parameters", "ensure_weight_tying", "eva_config", "corda_config"),
    *("lora_ga_config", "loftq_config", "runtime_config", "megatron_core", "qalora_group_size"),
    "trainable_token_indices",
}
"""Options of LoRA whose meaning for the merged weights is known, or that have none."""

REPLAYED = ("pissa", "olora")
"""Initialisations that take something out of the base's weights, and take the same whenever they are repeated."""

UNREPEATABLE = ("pissa_niter", "corda", "loftq", "lora_ga")
"""Initialisations that change the base's weights in a way that nobody but who trained the adapter knows."""


@dataclass
class AdapterFiles:
    """One adapter: where it is, its configuration, and its tensors by the names of the saved file."""

    id: str
    config: PeftConfig
    tensors: dict[str, Tensor] = field(repr=False)
    location: Location | None = None

    @property
    def kind(self) -> str:
        """The kind of adapter, such as "LORA" or "DoRA"."""
        if getattr(self.config, "use_dora", False):
            return "DoRA"
        return str(getattr(self.config.peft_type, "value", self.config.peft_type))

    def fingerprint(self) -> str:
        """A hash that changes when the adapter does."""
        settings = json.dumps(self.config.to_dict(), sort_keys=True, default=_ordered)
        digest = hashlib.sha256(settings.encode())
        for name in sorted(self.tensors):
            digest.update(name.encode())
            digest.update(self.tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def _ordered(value: Any) -> Any:
    """A setting as plain values; a set is in another order in every process."""
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def read_files(location: Location) -> AdapterFiles:
    """An adapter in a folder or on the Hub.

    Raises:
        InputError: when it is of a kind, or has an option, that is not understood, or has no safetensors.
    """
    raw = location.json(CONFIG)
    config = _parse(location.id, raw)
    check_understood(location.id, config)
    if WEIGHTS not in location.names:
        raise InputError(
            f"{location.id}: no {WEIGHTS} in it (pickled weights are never opened; load it with PEFT and save it again)"
        )
    path = location.path(WEIGHTS)
    tensors = {name: read_tensor(path, entry) for name, entry in read_header(path).items()}
    return AdapterFiles(location.id, config, tensors, location)


def from_model(model: PeftModel) -> AdapterFiles:
    """The active adapter of a model in memory.

    Raises:
        InputError: when several are active, or it is not understood.
    """
    active = model.active_adapter
    if not isinstance(active, str) or active not in model.peft_config:
        raise InputError(f"the model has no single adapter '{active}'; it has {', '.join(model.peft_config)}")
    config = copy.deepcopy(model.peft_config[active])
    check_understood(active, config)
    state = get_peft_model_state_dict(model, adapter_name=active)
    return AdapterFiles(active, config, {name: tensor.detach().cpu() for name, tensor in state.items()})


def _parse(id: str, raw: Any) -> PeftConfig:
    kind = raw.get("peft_type") if isinstance(raw, dict) else None
    if kind not in KINDS:
        raise InputError(f"{id}: adapters of type '{kind}' do not merge into weights; known are {', '.join(KINDS)}")
    known = {field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[kind])}
    strange = sorted(raw.keys() - known)
    if strange:
        raise InputError(f"{id}: {CONFIG} has options this PEFT does not know ({few(strange)}); update peft")
    return PeftConfig.from_peft_type(**raw)


def named_in(model: PeftModel, adapter: str) -> AdapterFiles:
    """What an adapter of a model in memory is called and configured as; its tensors stay in the model.

    Raises:
        InputError: when it is not understood.
    """
    config = copy.deepcopy(model.peft_config[adapter])
    check_understood(adapter, config, true_base=False)
    return InMemory(adapter, config, {})


class InMemory(AdapterFiles):
    """An adapter of a model in memory, hashed by no more than its name there: nothing of the work outlives the call."""

    def fingerprint(self) -> str:
        """A hash of what is in memory now."""
        return self.id


def check_understood(id: str, config: PeftConfig, true_base: bool = True) -> None:
    """Refuse an adapter that does what is not understood.

    Args:
        id: the adapter, for messages.
        config: its configuration.
        true_base: whether it shall go with the base as that was loaded, not as the adapter's initialisation left it.

    Raises:
        InputError: naming the option.
    """
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind not in KINDS:
        raise InputError(f"{id}: adapters of type '{kind}' do not merge into weights; known are {', '.join(KINDS)}")
    if kind != "LORA":
        return
    general = {field.name for field in dataclasses.fields(PeftConfig)}
    for option in dataclasses.fields(config):
        value = getattr(config, option.name)
        known = option.name in UNDERSTOOD or option.name in general
        if not known and value not in (None, False, _default(option)):
            raise InputError(f"{id}: adapter option '{option.name}' ({value!r}) is not understood; it cannot be merged")
    start = getattr(config, "init_lora_weights", True)
    if true_base and isinstance(start, str) and start.startswith(UNREPEATABLE):
        raise InputError(
            f"{id}: an adapter initialised by '{start}' belongs to changed base weights that it does not hold; save it "
            "with PEFT's path_initial_model_for_weight_conversion, which makes it one of the true base"
        )


def _default(option: dataclasses.Field[Any]) -> Any:
    return option.default_factory() if option.default_factory is not dataclasses.MISSING else option.default
