"""FDA that steps on thin factors: Adam on them, from the truncated start, into the adapter as they are."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import KINDS, make_base, outputs, relative, save
from checks import files
from conftest import fine_tune
from peft import LoraConfig, PeftModel
from processes import fork
from safetensors.torch import load_file
from torch import Tensor, nn

import hf_fda
from hf_fda.anchors import Moves, Objective, adapt_unit
from hf_fda.anchors.stepping import FACTOR_STEP
from hf_fda.lowrank import LowRank

SMALL: dict[str, Any] = {"num_anchors": 6, "num_tokens": 3, "steps": 3, "epochs": 4}


def merge(base: Path, sources: dict[str, str], output: Path, method: str = "fda", **options: Any) -> hf_fda.Merged:
    torch.set_num_threads(1)
    options = {**(SMALL if method == "fda" else {}), "quiet": True, "device": "cpu", **options}
    return hf_fda.merge(str(base), sources, method, output, **options)


@pytest.fixture
def adapters(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A base and adapters of ranks 3 and 3, of which one has rank 5 in places; both bring a norm."""
    base = make_base("bert")
    base.save_pretrained(tmp_path / "base")
    kinds = {"patterns": KINDS["patterns"]("bert"), "norms": KINDS["modules_to_save"]("bert")}
    folders = {
        name: str(save(base, config, tmp_path / name, seed)) for seed, (name, config) in enumerate(kinds.items())
    }
    return tmp_path / "base", folders


class Layer(nn.Module):
    """A weight, a stack of weights and a bias."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(6, 5, generator=generator))
        self.stack = nn.Parameter(torch.randn(2, 4, 6, generator=generator))
        self.bias = nn.Parameter(torch.randn(4, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(x @ self.weight.mT)
        return torch.stack([hidden @ matrix.mT for matrix in self.stack]).sum(0) + self.bias


def call(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)


def random_factors(layer: Layer) -> dict[str, LowRank]:
    generator = torch.Generator().manual_seed(1)
    return {
        "weight": LowRank(torch.randn(6, 2, generator=generator), torch.randn(2, 5, generator=generator), (6, 5)),
        "stack": LowRank(
            torch.randn(2, 4, 3, generator=generator), torch.randn(2, 3, 6, generator=generator), (2, 4, 6)
        ),
    }


def adapt(layer: Layer, factors: dict[str, LowRank], **options: Any) -> Any:
    generator = torch.Generator().manual_seed(2)
    x, target = torch.randn(8, 3, 5, generator=generator), torch.randn(8, 3, 4, generator=generator)
    settings: dict[str, Any] = {"epochs": 5, "learning_rate": 1e-2, "schedule": "constant", "batch_size": 8}
    moves = Moves({"bias": torch.full((4,), 0.5)}, factors)
    settings |= {"generator": torch.Generator(), **options}
    found = adapt_unit(copy.deepcopy(layer), call, Objective("mse", [x], [target]), moves, **settings)  # type: ignore[arg-type]
    return found, x, target


def test_steps_are_those_of_adam_on_the_factors_through_the_layer() -> None:
    layer = Layer()
    start = random_factors(layer)
    found, x, target = adapt(layer, start)
    leaves = {
        f"{name}.{half}": getattr(own, half).clone().requires_grad_(True)
        for name, own in start.items()
        for half in ("left", "right")
    }
    leaves["bias"] = layer.bias.detach().clone().requires_grad_(True)
    sizes = {name: FACTOR_STEP * float(own.detach().square().mean().sqrt()) for name, own in leaves.items()}
    sizes["bias"] = 0.5
    optimizer = torch.optim.Adam([{"params": [own], "lr": 1e-2 * sizes[name]} for name, own in leaves.items()])
    order = torch.Generator()
    for _ in range(5):
        rows = torch.randperm(8, generator=order)
        weights = {
            name: getattr(layer, name).detach() + leaves[f"{name}.left"] @ leaves[f"{name}.right"] for name in start
        }
        output = torch.func.functional_call(layer, {**weights, "bias": leaves["bias"]}, (x[rows],))
        optimizer.zero_grad()
        (output - target[rows]).square().sum().backward()
        optimizer.step()
    for name, own in found.factors.items():
        torch.testing.assert_close(own.left, leaves[f"{name}.left"].detach(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(own.right, leaves[f"{name}.right"].detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.parameters["bias"], leaves["bias"].detach(), rtol=1e-4, atol=1e-6)
    assert found.parameters.keys() == {"bias"}
    assert found.loss_after < found.loss_before


def test_from_the_base_the_left_factor_starts_at_zero_and_moves() -> None:
    layer = Layer()
    start = {name: own.from_zero() for name, own in random_factors(layer).items()}
    found, x, target = adapt(layer, start, epochs=30)
    with torch.no_grad():
        before = float((layer(x) - target).square().mean())
    assert found.loss_before == pytest.approx(before)
    assert found.loss_after < 0.9 * before
    assert all(bool(own.left.any()) for own in found.factors.values())


@pytest.mark.parametrize("interpolation", [0.0, 0.5])
def test_interpolation_goes_part_of_the_way_in_the_factors(interpolation: float) -> None:
    start = random_factors(Layer())
    whole, *_ = adapt(Layer(), start)
    part, *_ = adapt(Layer(), start, interpolation=interpolation)
    for name, own in start.items():
        expected = torch.lerp(own.left, whole.factors[name].left, interpolation)
        torch.testing.assert_close(part.factors[name].left, expected)


def test_what_is_frozen_stays_at_its_start() -> None:
    start = random_factors(Layer())
    found, *_ = adapt(Layer(), start, frozen=frozenset({"stack"}))
    assert torch.equal(found.factors["stack"].left, start["stack"].left)
    assert not torch.equal(found.factors["weight"].left, start["weight"].left)


@pytest.mark.parametrize("budget", [{}, {"rank": 2}])
@pytest.mark.parametrize("initial", ["tsv", "wudi"])
def test_without_steps_the_adapter_is_the_truncated_start(
    adapters: tuple[Path, dict[str, str]], budget: Any, initial: str, tmp_path: Path
) -> None:
    base, sources = adapters
    own = {"initial": initial, "rest": initial, "epochs": 0}
    found = merge(base, sources, tmp_path / "fda", as_adapter=True, **own, **budget)
    expected = merge(base, sources, tmp_path / "start", initial, as_adapter=True, **budget)
    assert found.report is not None and expected.report is not None
    states = [load_file(merged.folder / "adapter_model.safetensors") for merged in (found, expected)]
    for module in [own.module for own in expected.report.modules if "layer." in own.module]:
        path = f"base_model.model.{module}"
        products = [state[f"{path}.lora_B.weight"] @ state[f"{path}.lora_A.weight"] for state in states]
        assert relative(*products) < 1e-4


@pytest.mark.parametrize("budget", [{}, {"rank": 2}, {"rank": 8}])
def test_adapted_factors_are_the_adapter(adapters: tuple[Path, dict[str, str]], budget: Any, tmp_path: Path) -> None:
    base, sources = adapters
    merged = merge(base, sources, tmp_path / "out", as_adapter=True, **budget)
    assert merged.report is not None
    blocks = [own for own in merged.report.modules if "layer." in own.module]
    assert blocks
    assert all(own.error == 0 and own.rank <= budget.get("rank", 8) for own in blocks)
    state = load_file(merged.folder / "adapter_model.safetensors")
    for own in blocks:
        path = f"base_model.model.{own.module}"
        dense = state[f"{path}.lora_B.weight"] @ state[f"{path}.lora_A.weight"]
        assert own.norm == pytest.approx(float(dense.norm()), rel=1e-5)
    plan = hf_fda.plan(str(base), sources, "fda", tmp_path / "plan", as_adapter=True, **SMALL, **budget)
    assert plan.ranks.keys() == {f"{own.module}.weight" for own in blocks}
    assert "thin factors of rank" in str(plan)
    assert "thin factors of rank" in (merged.folder / "README.md").read_text()


def test_a_full_checkpoint_is_what_the_adapter_makes_of_the_base(
    adapters: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    base, sources = adapters
    options = {"parametrization": "factors"}
    thin = merge(base, sources, tmp_path / "thin", as_adapter=True, **options)
    whole = merge(base, sources, tmp_path / "whole", **options)
    assert thin.tasks == whole.tasks
    for task in thin.tasks or [None]:
        assert relative(outputs(thin.load(task), "bert"), outputs(whole.load(task), "bert")) < 1e-5
    start, found = (load_file(folder / "model.safetensors") for folder in (base, whole.folder))
    untouched = [name for name in start if "query" in name or "key" in name]
    assert untouched
    assert all(torch.equal(start[name], found[name]) for name in untouched)
    norms = [name for name in start if "LayerNorm.weight" in name and "encoder" in name]
    assert not any(torch.equal(start[name], found[name]) for name in norms)


def test_full_fine_tunes_are_adapted_within_a_rank_but_not_without(tmp_path: Path) -> None:
    base = make_base("llama")
    base.save_pretrained(tmp_path / "base")
    sources = {}
    for seed in (1, 2):
        fine_tune(base, seed=seed).save_pretrained(tmp_path / f"of{seed}")
        sources[f"of{seed}"] = str(tmp_path / f"of{seed}")
    small = {"num_tokens": 1}
    merged = merge(tmp_path / "base", sources, tmp_path / "out", as_adapter=True, rank=4, **small)
    assert merged.report is not None
    adapted = [own for own in merged.report.modules if ".mlp." in own.module]
    assert adapted
    assert all(own.rank == 4 and own.error == 0 for own in adapted)
    plain = PeftModel.from_pretrained(copy.deepcopy(base), merged.folder)
    assert outputs(plain, "llama").isfinite().all()
    exact = hf_fda.plan(str(tmp_path / "base"), sources, "fda", tmp_path / "exact", as_adapter=True, **SMALL)
    assert not exact.ranks
    assert exact.arguments["options"]["parametrization"] == "coefficients"
    with pytest.raises(hf_fda.InputError, match=r"'of1' is no adapter.*as_adapter=True"):
        merge(tmp_path / "base", sources, tmp_path / "no", parametrization="factors", **small)


def test_another_rank_adapts_anew_and_the_same_does_nothing(
    adapters: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    base, sources = adapters
    merge(base, sources, tmp_path / "out", as_adapter=True, rank=2)
    weights = tmp_path / "out/adapter_model.safetensors"
    first, stamp = weights.read_bytes(), weights.stat().st_mtime_ns
    merge(base, sources, tmp_path / "out", as_adapter=True, rank=2)
    assert weights.stat().st_mtime_ns == stamp
    merge(base, sources, tmp_path / "out", as_adapter=True, rank=3)
    assert weights.read_bytes() != first
    merge(base, sources, tmp_path / "out", as_adapter=True, rank=2)
    assert weights.read_bytes() == first
    fresh = merge(base, sources, tmp_path / "fresh", as_adapter=True, rank=3)
    again = merge(base, sources, tmp_path / "out", as_adapter=True, rank=3)
    assert files(fresh.folder) == files(again.folder)


def _merge(base: Path, sources: dict[str, str], output: Path) -> None:
    merge(base, sources, output, as_adapter=True, rank=2)


def test_two_processes_make_the_bytes_of_one(adapters: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    base, sources = adapters
    _merge(base, sources, tmp_path / "one")
    fork(_merge, base, sources, tmp_path / "two", processes=2)
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_the_order_of_sources_does_not_matter(adapters: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    base, sources = adapters
    found = []
    for name, order in (("there", sources), ("back", dict(reversed(sources.items())))):
        merged = merge(base, order, tmp_path / name, as_adapter=True, rank=2, epochs=1, batch_size=128)
        found.append(outputs(merged.load(merged.tasks[0] if merged.tasks else None), "bert"))
    assert relative(*found) < 1e-3


def test_thin_factors_need_less_memory(adapters: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    wide = {"r": 2, "target_modules": ["query", "value", "dense"]}
    from conftest import make_model

    base = make_model("bert", hidden_size=256, intermediate_size=1024)
    base.save_pretrained(tmp_path / "wide")
    source = save(base, LoraConfig(**wide), tmp_path / "own")
    options = {**SMALL, "initial": "task_arithmetic", "device": "cpu"}
    needs = [
        hf_fda.plan(str(tmp_path / "wide"), [str(source)], "fda", parametrization=kind, **options).peak_memory_bytes
        for kind in ("factors", "coefficients")
    ]
    assert needs[0] <= needs[1]
