"""Adapters of single parameters (stacks of experts): merged into checkpoints, and into adapters for plain PEFT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import make_base, outputs, relative, save, train
from conftest import fine_tune
from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict

import hf_fda

STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
FAMILIES = ("qwen3-moe", "mixtral", "qwen2-moe")


def config(**options: Any) -> LoraConfig:
    """An adapter of attention and both stacks."""
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "target_parameters": STACKS, **options})


def merge(base: Path, sources: Any, output: Path, *arguments: Any, **options: Any) -> hf_fda.Merged:
    sources = {name: str(folder) for name, folder in sources.items()}
    return hf_fda.merge(str(base), sources, *arguments, output=output, quiet=True, as_adapter=True, **options)


@pytest.mark.parametrize(
    "targets",
    [STACKS, STACKS[:1], STACKS[1:], ["mlp.gate.weight"], ["mlp.gate.weight", *STACKS]],
    ids=["both", "first", "second", "router", "all"],
)
def test_one_adapter_comes_back_with_its_own_function(targets: list[str], tmp_path: Path) -> None:
    base = make_base("qwen3-moe")
    base.save_pretrained(tmp_path / "base")
    own = config(target_parameters=targets, target_modules=["q_proj"] if len(targets) > 1 else None, lora_alpha=5)
    adapter = save(base, own, tmp_path / "adapter")
    merged = merge(tmp_path / "base", {"own": adapter}, tmp_path / "out", "task_arithmetic", scaling=1.0)
    expected = outputs(PeftModel.from_pretrained(copy.deepcopy(base), adapter), "qwen3-moe")
    assert relative(outputs(base, "qwen3-moe"), expected) > 1e-3
    plain = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out")
    assert relative(outputs(plain, "qwen3-moe"), expected) <= 1e-5
    assert relative(outputs(merged.load(), "qwen3-moe"), expected) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["task_arithmetic", "tsv"])
def test_a_merged_adapter_is_the_merged_model(family: str, method: str, tmp_path: Path) -> None:
    base = make_base(family)
    base.save_pretrained(tmp_path / "base")
    sources = {f"of{rank}": str(save(base, config(r=rank), tmp_path / f"of{rank}", rank)) for rank in (1, 2)}
    adapter = merge(tmp_path / "base", sources, tmp_path / "thin", method)
    whole = hf_fda.merge(str(tmp_path / "base"), sources, method, tmp_path / "whole", quiet=True)
    expected = outputs(whole.load(), family)
    found = outputs(PeftModel.from_pretrained(copy.deepcopy(base), adapter.folder), family)
    assert relative(outputs(base, family), expected) > 1e-3
    assert relative(found, expected) < 1e-5
    assert adapter.report is not None
    assert adapter.report.error < 1e-5
    modules = {own.module: own.rank for own in adapter.report.modules}
    assert modules["model.layers.0.mlp.experts.down_proj"] == 3
    again = merge(tmp_path / "base", {"own": adapter.folder}, tmp_path / "again", "task_arithmetic", scaling=1.0)
    assert relative(outputs(again.load(), family), expected) < 1e-5


@pytest.mark.parametrize("budget", [{"rank": 2}, {"energy": 0.9}])
def test_a_budget_holds_for_each_expert_and_the_report_says_what_is_left_out(budget: Any, tmp_path: Path) -> None:
    base = make_base("qwen3-moe")
    base.save_pretrained(tmp_path / "base")
    tuned = fine_tune(base, seed=2)
    tuned.save_pretrained(tmp_path / "tuned")
    cut = hf_fda.extract(str(tmp_path / "base"), str(tmp_path / "tuned"), tmp_path / "cut", quiet=True, **budget)
    loaded: Any = PeftModel.from_pretrained(copy.deepcopy(base), cut.folder)
    wrappers = {name: own for name, own in loaded.named_modules() if hasattr(own, "parameter_name")}
    assert cut.report is not None
    reports = {own.module: own for own in cut.report.modules}
    assert len(wrappers) == 4
    for path, wrapper in wrappers.items():
        name = path.removeprefix("base_model.model.").replace(".base_layer", "") + f".{wrapper.parameter_name}"
        module, _, part = name.rpartition(".")
        tensors = [getattr(model.get_submodule(module), part).detach().double() for model in (base, tuned)]
        task = tensors[1] - tensors[0]
        values = torch.linalg.svdvals(task)
        rank = reports[name].rank
        best = float(values[:, rank:].square().sum().sqrt() / values.norm())
        assert reports[name].error == pytest.approx(best, abs=1e-5)
        assert relative(wrapper.get_delta_weight("default").double(), task) == pytest.approx(best, abs=1e-5)
        if "rank" in budget:
            assert rank == 2
        else:
            kept = values[:, :rank].square().sum(-1) / values.square().sum(-1)
            assert float(kept.min()) >= budget["energy"] - 1e-6


def test_adapters_in_memory_merge_beside_each_other() -> None:
    base = make_base("qwen3-moe")
    model: Any = train(base, config(), seed=1)
    model.add_adapter("second", config(r=3))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if ".second" in name:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = {"default": 0.7, "second": -0.4}
    report = hf_fda.merge_adapters(model, list(weights), "mixed", "linear", weights=weights, normalize=False)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert report.error < 1e-5
    stacks = [own for own in model.modules() if hasattr(own, "parameter_name")]
    assert len(stacks) == 4
    for wrapper in stacks:
        expected = sum(weight * wrapper.get_delta_weight(name) for name, weight in weights.items())
        assert relative(wrapper.get_delta_weight("mixed"), expected) < 1e-5
    assert get_peft_model_state_dict(model, adapter_name="mixed")


def test_fda_merges_experts_into_an_adapter(tmp_path: Path) -> None:
    base = make_base("qwen3-moe")
    base.save_pretrained(tmp_path / "base")
    sources = {f"of{rank}": save(base, config(r=rank), tmp_path / f"of{rank}", rank) for rank in (1, 2)}
    options = {"num_anchors": 8, "num_tokens": 1, "steps": 3, "epochs": 2}
    merged = merge(tmp_path / "base", sources, tmp_path / "out", "fda", **options)
    assert merged.report is not None
    assert {own.rank for own in merged.report.modules if "experts" in own.module} == {3}
    assert outputs(merged.load(), "qwen3-moe").isfinite().all()


def test_biases_and_single_parameters_do_not_become_one_adapter(tmp_path: Path) -> None:
    base = make_base("qwen2-moe")
    base.save_pretrained(tmp_path / "base")
    sources = {
        "stacks": save(base, config(), tmp_path / "stacks"),
        "biases": save(base, LoraConfig(r=2, target_modules=["q_proj"], bias="all"), tmp_path / "biases"),
    }
    with pytest.raises(hf_fda.InputError, match=r"biases \(.*q_proj.bias.*single parameters"):
        merge(tmp_path / "base", sources, tmp_path / "out", "linear")
    assert not (tmp_path / "out").exists()
