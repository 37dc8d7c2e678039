"""Recorded hidden states on the disk: a file for each part of a source's rows, read unit by unit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten, treespec_dumps, treespec_loads

from hf_fda.blocks.capture import UnitCall
from hf_fda.checkpoint.header import read_header, read_metadata, read_tensor
from hf_fda.checkpoint.writer import save_tensors
from hf_fda.errors import RunError
from hf_fda.states.unit_states import Ragged, UnitStates, held

PLAIN = (type(None), bool, int, float, str)


class _Shelf:
    """Tensors of one file under numbers; what several units share is there once."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[Any, str] = {}

    def put(self, tensor: Tensor) -> str:
        own = held(tensor)
        key = own.data_ptr(), own.shape, own.dtype
        if key not in self._names:
            self._names[key] = f"argument.{len(self._names)}"
            self.tensors[self._names[key]] = own.clone(memory_format=torch.contiguous_format)
        return self._names[key]


def save_states(path: Path, states: Mapping[str, UnitStates]) -> str:
    """Write the states of all units on some rows of one task; the file's SHA-256.

    Raises:
        RunError: naming a unit that is called with something that is neither a tensor nor a plain value.
    """
    shelf, described = _Shelf(), {}
    for name, own in states.items():
        leaves, tree = tree_flatten(own.call.arguments)
        described[name] = json.dumps(
            {
                "hidden": own.call.hidden,
                "tree": treespec_dumps(tree),
                "leaves": [_described(name, leaf, shelf) for leaf in leaves],
                "batched": own.call.batched,
                "along": own.call.along,
            }
        )
    tensors = {f"{name}.inputs": own.inputs.values[:-1] for name, own in states.items()}
    tensors |= {f"{name}.real": own.inputs.real for name, own in states.items()} | shelf.tensors
    return save_tensors(path, {name: tensor.cpu() for name, tensor in tensors.items()}, described)


def _described(unit: str, leaf: Any, shelf: _Shelf) -> dict[str, Any]:
    if isinstance(leaf, Tensor):
        return {"tensor": shelf.put(leaf), "shape": list(leaf.shape)}
    if not isinstance(leaf, PLAIN):
        raise RunError(f"unit '{unit}' is called with a {type(leaf).__name__}; merge it without data")
    return {"value": leaf}


def read_states(paths: Sequence[Path], unit: str) -> UnitStates:
    """The states of one unit on all rows of a task, on the CPU.

    Args:
        paths: the files of all parts, in their order.
        unit: which.
    """
    return UnitStates.together([_read_part(path, unit) for path in paths])


def _read_part(path: Path, unit: str) -> UnitStates:
    entries, facts = read_header(path), json.loads(read_metadata(path)[unit])

    def read(name: str) -> Tensor:
        return read_tensor(path, entries[name])

    leaves = [
        read(leaf["tensor"]).expand(leaf["shape"]) if "tensor" in leaf else leaf["value"] for leaf in facts["leaves"]
    ]
    arguments = tree_unflatten(leaves, treespec_loads(facts["tree"]))
    values, real = read(f"{unit}.inputs"), read(f"{unit}.real")
    size, tokens = values.shape[-1], real.shape[1]
    along = None if facts["along"] is None else tuple(map(tuple, facts["along"]))
    call = UnitCall(arguments, tuple(facts["batched"]), facts["hidden"], size=size, tokens=tokens, along=along)
    return UnitStates(Ragged.of(values, real), call)
