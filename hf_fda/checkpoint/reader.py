"""A checkpoint opened lazily: configuration and names at once, tensors one by one."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from functools import cached_property
from typing import Any, cast

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel

from hf_fda.checkpoint.header import TensorEntry, read_header, read_tensor
from hf_fda.checkpoint.interface import Checkpoint, ReadCheckpoint
from hf_fda.checkpoint.layout import ModelLayout, TensorGroup, model_class_of
from hf_fda.checkpoint.location import Location, locate
from hf_fda.checkpoint.memory import ModelCheckpoint
from hf_fda.checkpoint.tensorlayout import TensorLayout
from hf_fda.errors import InputError


class FileCheckpoint(ReadCheckpoint):
    """A checkpoint in safetensors files, in a folder or on the Hub.

    Args:
        location: where it is.
        trust_remote_code: run model code that comes with the checkpoint.

    Raises:
        InputError: when it has no config or no safetensors, is quantised, truncated, or lacks or contradicts what
            its own config promises.
    """

    def __init__(self, location: Location, trust_remote_code: bool = False) -> None:
        self.location: Location | None = location
        self._files = location
        self.id = location.id
        self.commit = location.commit
        files = location.weight_files()
        config = None if is_unknown(location, trust_remote_code) else _configuration(location, trust_remote_code)
        self._entries: dict[str, tuple[str, TensorEntry]] = {
            name: (file, entry) for file in files for name, entry in location.header(file).items()
        }
        entries = {name: entry for name, (_, entry) in self._entries.items()}
        facts = location.json("config.json")
        self.layout = TensorLayout(facts, entries) if config is None else ModelLayout(*config)
        groups, self.unexpected = self.layout.groups(self._entries)
        self.groups: tuple[TensorGroup, ...] = tuple(groups)
        self._group_of = {name: group for group in groups for name in group.memory}
        self.names = tuple(name for name in self.layout.names if name in self._group_of)
        self._check_shapes()
        self._own = threading.local()
        self._headers: dict[str, dict[str, TensorEntry]] = {}

    @property
    def config(self) -> PretrainedConfig:
        """The model's configuration."""
        return self.layout.config

    @cached_property
    def missing(self) -> tuple[str, ...]:
        """Names that the model has but the checkpoint does not hold."""
        return tuple(name for name in self.layout.names if name not in self._group_of)

    def dtype(self, name: str) -> torch.dtype:
        """The stored type of a tensor."""
        return self._entries[self._group_of[name].disk[0]][1].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor in memory layout."""
        return self.layout.shapes[name]

    def read(self, name: str, part: slice | None = None) -> Tensor:
        """One tensor on the CPU, as `Checkpoint.read`."""
        group = self._group_of[name]
        if group.converter is None:
            return self._read_disk(group.disk[0], part)
        converted: dict[str, Tensor] = getattr(self._own, "converted", {})
        if name not in converted:
            tensors = {disk: self._read_disk(disk) for disk in group.disk}
            converted = self._own.converted = group.to_memory(tensors, self.layout.model)
        if part is not None:
            whole = converted[name] = converted[name].contiguous()  # its other parts are usually asked for next
            return whole.view(-1)[part].clone()
        return converted.pop(name).contiguous()  # and so are its siblings

    def in_parts(self, name: str) -> bool:
        """As `Checkpoint.in_parts`: where the tensor lies in the file as it is."""
        return self._group_of[name].converter is None

    @property
    def disk_order(self) -> Sequence[str]:
        """As `Checkpoint.disk_order`: as they lie in the files."""
        places = {name: self._entries[self._group_of[name].disk[0]] for name in self.names}
        return sorted(self.names, key=lambda name: (places[name][0], places[name][1].start))

    def fingerprint(self) -> str:
        """A hash that changes when the weights do."""
        return self._files.fingerprint()

    def _read_disk(self, name: str, part: slice | None = None) -> Tensor:
        file = self._entries[name][0]
        path = self._files.path(file)
        if file not in self._headers:  # read again: of a file on the Hub only its entries were known so far
            self._headers[file] = read_header(path)
        return read_tensor(path, self._headers[file][name], part)

    def _check_shapes(self) -> None:
        for group in self.groups:
            meta = {
                name: torch.empty(self._entries[name][1].shape, dtype=self._entries[name][1].dtype, device="meta")
                for name in group.disk
            }
            for name, tensor in group.to_memory(meta, self.layout.model).items():
                if tuple(tensor.shape) != self.layout.shapes.get(name, tuple(tensor.shape)):
                    raise InputError(
                        f"{self.id}: tensor '{name}' is {tuple(tensor.shape)} in the file but its config.json says "
                        f"{self.layout.shapes[name]}; config and weights do not belong together"
                    )


def open_checkpoint(
    source: str | os.PathLike[str] | PreTrainedModel | Checkpoint,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    label: str = "model",
) -> Checkpoint:
    """Open a checkpoint: a folder, a Hub id ("org/name", "org/name@revision") or a model in memory.

    Args:
        source: where it is, or one that is open.
        revision: Hub revision; wins over one inside `source`.
        trust_remote_code: run model code that comes with the checkpoint.
        label: what to call it in errors ("base", "source 'sst2'").

    Raises:
        InputError: naming `label`, when it cannot be used.
    """
    try:
        if isinstance(source, ReadCheckpoint):
            return cast(Checkpoint, source)
        if isinstance(source, PreTrainedModel):
            return ModelCheckpoint(source, source.config._name_or_path or type(source).__name__)
        if not isinstance(source, (str, os.PathLike)):
            raise InputError(f"must be a folder, a Hub id or a transformers model, not {type(source).__name__}")
        location = locate(source, revision)
        if location.subfolder:
            raise InputError(f"{location.id}: only adapters are found in a folder of a repository; download it first")
        return FileCheckpoint(location, trust_remote_code)
    except InputError as error:
        raise InputError(f"{label}: {error}") from None


def is_unknown(location: Location, trust_remote_code: bool) -> bool:
    """Whether a checkpoint's configuration names an architecture that is neither in transformers nor in code that is
    trusted; it is merged by its tensors then."""
    if "config.json" not in location.names:
        return False
    facts = location.json("config.json")
    if not isinstance(facts, dict) or not isinstance(facts.get("model_type"), str):
        return False
    names = facts.get("architectures") or [None]
    known_class = names[0] is None or hasattr(transformers, str(names[0]))
    if facts["model_type"] in CONFIG_MAPPING and known_class:
        return False
    remote = isinstance(facts.get("auto_map"), dict) and trust_remote_code
    return not remote and "quantization_config" not in facts


def _configuration(location: Location, trust_remote_code: bool) -> tuple[PretrainedConfig, Any]:
    if "config.json" not in location.names:
        raise InputError(f"{location.id}: no config.json in it, so it is no transformers checkpoint")
    location.json("config.json")
    where = str(location.folder) if location.folder is not None else str(location.repo_id)
    try:
        config = AutoConfig.from_pretrained(where, revision=location.commit, trust_remote_code=trust_remote_code)
    except Exception as error:  # the library raises many kinds here, all of which mean the same to a user
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{location.id}: its config.json cannot be used ({reason})") from None
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(f"{location.id}: it is quantised; merge the checkpoint it was quantised from")
    return config, model_class_of(config, where, trust_remote_code, location.commit)
