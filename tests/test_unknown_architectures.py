"""Checkpoints of architectures that transformers does not know merge by the tensors in their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import assert_near, weights
from safetensors.torch import save_file

import hf_fda
from hf_fda.errors import InputError

CONFIG = {
    "model_type": "alien",
    "architectures": ["AlienForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_alien.AlienForCausalLM"},
    "layers": [{"kind": "mixer"}, {"kind": "attention"}],
    "hidden_size": 8,
    "dtype": "float32",
}
SHAPES = {"embed.weight": (12, 8), "mixers.0.in.weight": (16, 8), "mixers.0.filter": (4, 1, 3), "norm.weight": (8,)}


@pytest.fixture
def aliens(tmp_path: Path) -> list[Path]:
    """A base and two fine-tunes of it."""
    folders = []
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    for number, name in enumerate(("base", "one", "two")):
        folder = tmp_path / name
        folder.mkdir()
        tensors = {
            key: value + 0.1 * number * torch.randn(value.shape, generator=generator) for key, value in base.items()
        }
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(CONFIG))
        (folder / "modeling_alien.py").write_text("raise SystemExit('never run')\n")
        folders.append(folder)
    return folders


@pytest.mark.parametrize("method", ["linear", "ties", "tsv", "isotropic", "wudi"])
def test_every_parameter_space_method(method: str, aliens: list[Path], tmp_path: Path) -> None:
    """One source comes back, the configuration is kept as it was, and the code goes along but is never run."""
    base, one, two = aliens
    options: dict[str, Any] = {"wudi": {"steps": 3}}.get(method, {})
    merged = hf_fda.merge(base, [one, two], method, tmp_path / "out", device="cpu", quiet=True, **options)
    assert {name: tuple(tensor.shape) for name, tensor in weights(merged.folder).items()} == SHAPES
    assert json.loads((merged.folder / "config.json").read_text()) == CONFIG
    assert (merged.folder / "modeling_alien.py").is_file()
    assert "merged tensor by tensor" in (merged.folder / "README.md").read_text()


def test_linear_is_the_mean(aliens: list[Path], tmp_path: Path) -> None:
    base, one, two = aliens
    merged = hf_fda.merge(base, [one, two], "linear", tmp_path / "out", device="cpu", quiet=True)
    a, b = weights(one), weights(two)
    assert_near(weights(merged.folder), {name: (a[name] + b[name]) / 2 for name in a})


def test_the_plan_says_so(aliens: list[Path], tmp_path: Path) -> None:
    plan = hf_fda.plan(aliens[0], aliens[1:], "linear", tmp_path / "out")
    assert "does not know AlienForCausalLM: it is merged tensor by tensor" in str(plan)


def test_what_needs_blocks_is_refused(aliens: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="AlienForCausalLM is not in transformers, so its blocks are not known"):
        hf_fda.merge(aliens[0], aliens[1:], "fda", tmp_path / "out")
    models = [{"model": str(source), "parameters": {"weight": [0, 1]}} for source in aliens[1:]]
    with pytest.raises(InputError, match="layers of a model that transformers does not know"):
        hf_fda.merge_config({"merge_method": "linear", "models": models}, tmp_path / "out")


def test_another_shape_is_refused(aliens: list[Path], tmp_path: Path) -> None:
    tensors = weights(aliens[1])
    tensors["norm.weight"] = torch.ones(9)
    save_file(tensors, aliens[1] / "model.safetensors")
    with pytest.raises(InputError, match=r"'norm.weight' is \(9,\), the base's is \(8,\)"):
        hf_fda.merge(aliens[0], aliens[1:], "linear", tmp_path / "out")


def test_loading_names_the_way_out(aliens: list[Path], tmp_path: Path) -> None:
    merged = hf_fda.merge(aliens[0], aliens[1:], "linear", tmp_path / "out", device="cpu", quiet=True)
    with pytest.raises(InputError, match="trust_remote_code"):
        merged.load()
