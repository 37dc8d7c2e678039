"""`anchors.json`: what a set of anchors is, of which models, and how it was made."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_fda.blocks import Unit
from hf_fda.checkpoint.alignment import AlignedSource
from hf_fda.checkpoint.interface import Checkpoint
from hf_fda.checkpoint.likeness import likeness
from hf_fda.checkpoint.untrusted import read_json
from hf_fda.errors import InputError, nearest
from hf_fda.input_cards import licences_of
from hf_fda.version import versions

MANIFEST = "anchors.json"
FORMAT = 1

STORED_AS = ("float32", "bfloat16", "float16")
"""Types that anchors and targets may be stored in."""

_MODULE = re.compile(r"\w+(\.\w+)*")
"""The path of a module, which is part of a file's name."""


@dataclass(frozen=True)
class AnchorsInfo:
    """What `anchors.json` says: the units in the model's order, the construction's options, where it came from.

    `base` and `source` have `id`, `commit`, `class` and `licences`; of what is not on the Hub the id is the folder's
    own name. The base also has its `likeness`. `dtype` is the type that anchors and targets are stored in, `rounding`
    by unit what that does to a merge (`Rounding`). `rest` names the base's tensors outside the blocks that lie in
    `rest.safetensors`, all that the source changed; None where they were not put there. `head` says the same of the
    tensors in `task_head/`, by their names on the disk.
    """

    units: tuple[str, ...]
    config: dict[str, Any]
    base: dict[str, Any]
    source: dict[str, Any]
    seed: int
    versions: dict[str, str] = field(default_factory=versions)
    dtype: str = "float32"
    rounding: dict[str, dict[str, float]] = field(default_factory=dict)
    rest: tuple[str, ...] | None = None
    head: tuple[str, ...] | None = None
    format: int = FORMAT

    def to_json(self) -> str:
        """The text of `anchors.json`."""
        return json.dumps(self.__dict__, indent=2) + "\n"


def read_manifest(path: Path) -> AnchorsInfo:
    """Read `anchors.json`.

    Raises:
        InputError: when it is damaged, written by a newer version, or names files outside its folder.
    """
    try:
        facts = read_json(path)
        if facts["format"] > FORMAT:
            raise InputError(f"{path}: written by a newer hf_fda (format {facts['format']}); update hf_fda")
        lists = {name: _names(facts.get(name)) for name in ("rest", "head")}
        info = AnchorsInfo(**{**facts, **lists, "units": _names(facts["units"]) or ()})
        _check_kinds(info)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: damaged ({error}); construct or fetch the anchors again") from None
    for unit in info.units:
        if not _MODULE.fullmatch(unit):
            raise InputError(f"{path}: names the block '{unit}', whose file would lie elsewhere; refused")
    return info


def _names(value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise TypeError("a list of names is none")
    return tuple(value)


def _check_kinds(info: AnchorsInfo) -> None:
    for name, kind in {"config": dict, "base": dict, "source": dict, "seed": int, "rounding": dict}.items():
        if not isinstance(getattr(info, name), kind):
            raise TypeError(f"'{name}' is no {kind.__name__}")
    for origin in (info.base, info.source):
        if not isinstance(origin.get("id"), str):
            raise TypeError("base and source need an id")
    check_dtype(info.dtype)


def check_dtype(dtype: Any) -> None:
    """Refuse a type that anchors cannot be stored in.

    Raises:
        InputError: naming the nearest one.
    """
    if dtype not in STORED_AS:
        raise InputError(f"dtype '{dtype}': {nearest(str(dtype), STORED_AS)}")


def manifest(
    base: Checkpoint,
    source: AlignedSource,
    units: Sequence[Unit],
    config: Mapping[str, Any],
    seed: int,
    **what: Any,
) -> AnchorsInfo:
    """What `anchors.json` says of new anchors.

    Args:
        base: the base.
        source: the fine-tuned model.
        units: the units that the anchors are of.
        config: the options that determine them.
        seed: of their start.
        what: further fields of `AnchorsInfo`.
    """
    alike = likeness(base, [name for unit in units for name in unit.tensors])
    names = tuple(unit.name for unit in units)
    origins = {**origin(base), "likeness": alike}, origin(source.checkpoint)
    return AnchorsInfo(names, dict(config), *origins, seed, **what)


def origin(checkpoint: Checkpoint) -> dict[str, Any]:
    """Where a checkpoint came from, as plain values for readers elsewhere."""
    return {
        "id": checkpoint.id.partition("@")[0] if checkpoint.commit else Path(checkpoint.id).name or checkpoint.id,
        "commit": checkpoint.commit,
        "class": checkpoint.layout.model_class.__name__,
        "licences": licences_of(checkpoint),
    }
