"""What several test files do with merges and merged folders."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
import transformers as t
from conftest import FAMILIES
from safetensors.torch import load_file
from torch import Tensor

import hf_fda
from hf_fda.blocks.discovery import example_inputs

FAST: dict[str, Any] = {"num_anchors": 4, "steps": 3, "epochs": 2}
METHODS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {},
    "linear": {},
    "tsv": {},
    "wudi": {"steps": 3},
    "isotropic": {},
}


def merge(base: Any, sources: Any, method: str, output: Path, **options: Any) -> hf_fda.Merged:
    """A small merge on the CPU."""
    start = {"initial": "base", "rest": "base", "parametrization": "parameters"}
    small = {**FAST, **start} if method == "fda" else {}
    return hf_fda.merge(base, sources, method, output, device="cpu", quiet=True, **{**small, **options})


def weights(folder: Path) -> dict[str, Tensor]:
    """All tensors in a folder's weight files."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def files(folder: Path) -> dict[str, str]:
    """A hash of every file below a folder but the records of work, and but for what a card says a run took."""
    paths = [path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts]
    return {str(path.relative_to(folder)): hashlib.sha256(timeless(path)).hexdigest() for path in paths}


def timeless(path: Path) -> bytes:
    """A file's bytes but for the seconds and the memory that a card states."""
    data = path.read_bytes()
    if path.name == "README.md":
        return re.sub(rb" It took .*", b"", data)
    if path.name == "card.json":
        record = json.loads(data)
        del record["facts"]["spent"], record["card"]
        return json.dumps(record).encode()
    return data


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Two sets of tensors have the same names, types and values."""
    assert left.keys() == right.keys()
    different = [
        name for name in left if left[name].dtype != right[name].dtype or not torch.equal(left[name], right[name])
    ]
    assert not different


def assert_near(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Two sets of tensors have the same names and nearly the same values."""
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-4, atol=1e-5)


def loaded(folder: Path, model_class: Any = None) -> Any:
    """The model in a folder as plain transformers loads it, with nothing missing and nothing left over."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, report = (model_class or getattr(t, name)).from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    return model.eval()


def outputs(model: Any) -> Tensor:
    """What a model says to an example."""
    with torch.no_grad():
        result = model(**example_inputs(model, 1, 5, torch.device("cpu"), embeds=False))
    value = result.get("logits")
    if value is None:
        value = result.get("last_hidden_state")
    return result[0] if value is None else value


def assert_good(family: str, folder: Path) -> None:
    """A merged folder loads as its own class, runs, is finite, and keeps tied weights tied."""
    model = loaded(folder)
    assert type(model) is FAMILIES[family][0]
    assert bool(outputs(model).isfinite().all())
    held = weights(folder)
    assert all(bool(tensor.isfinite().all()) for tensor in held.values())
    state = model.state_dict()
    assert not held.keys() & model.all_tied_weights_keys.keys()
    for target, source in model.all_tied_weights_keys.items():
        assert state[target].data_ptr() == state[source].data_ptr()
