"""Merged adapters: what plain PEFT loads is what was merged, within what the report says."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from adapters import KINDS, make_base, outputs, relative, save, train
from conftest import fine_tune, make_model
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification, LlamaForSequenceClassification

import hf_fda
from hf_fda.adapters.saving import adapter_tensors
from hf_fda.cli import main
from hf_fda.lowrank import Budget, factorise
from hf_fda.merge_methods import method_class

CASES = [
    *(("bert", kind) for kind in KINDS if kind != "embedding-dora"),
    *((family, kind) for family in ("llama", "gpt2", "vit", "t5") for kind in ("plain", "rslora", "modules_to_save")),
    *(("gpt2", kind) for kind in ("dora", "lora_bias", "bias-all", "embedding", "pissa")),
    *(("llama", kind) for kind in ("dora", "patterns", "layers", "olora", "loha", "lokr", "ia3", "vera", "oft")),
    ("llama", "embedding"),  # which PEFT saves with the base's own
]


def merge(base: Path, sources: Any, output: Path, **arguments: Any) -> Any:
    sources = {name: str(folder) for name, folder in sources.items()}
    return hf_fda.merge(str(base), sources, output=output, quiet=True, as_adapter=True, **arguments)


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_one_adapter_comes_back_with_its_own_function(family: str, kind: str, tmp_path: Path) -> None:
    base = make_base(family)
    base.save_pretrained(tmp_path / "base")
    adapter = save(base, KINDS[kind](family), tmp_path / "adapter")
    merged = merge(tmp_path / "base", {"own": adapter}, tmp_path / "merged", method="task_arithmetic", scaling=1.0)
    expected = outputs(PeftModel.from_pretrained(copy.deepcopy(base), adapter), family)
    if (family, kind) != ("bert", "bias-all"):  # moves the head too, which is kept beside the adapter
        plain = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "merged")
        assert relative(outputs(plain, family), expected) <= 1e-5
    loaded = merged.load("own" if merged.tasks else None)
    assert relative(outputs(loaded, family), expected) <= 1e-5
    assert merged.report.error < 1e-5


@pytest.mark.parametrize(
    "method", ["linear", "task_arithmetic", "tsv", "isotropic", "wudi", "iso_cts", "ace", "passthrough"]
)
def test_a_merged_adapter_is_the_merged_model(method: str, tmp_path: Path) -> None:
    base = make_base("llama")
    base.save_pretrained(tmp_path / "base")
    sources = {
        kind: save(base, KINDS[kind]("llama"), tmp_path / kind, seed)
        for seed, kind in list(enumerate(("patterns", "plain", "pissa")))[: method_class(method).max_sources]
    }
    adapter = merge(tmp_path / "base", sources, tmp_path / "thin", method=method)
    named = {name: str(folder) for name, folder in sources.items()}
    whole = hf_fda.merge(str(tmp_path / "base"), named, output=tmp_path / "whole", quiet=True, method=method)
    expected = outputs(whole.load(), "llama")
    found = outputs(PeftModel.from_pretrained(copy.deepcopy(base), adapter.folder), "llama")
    assert relative(outputs(base, "llama"), expected) > 1e-2
    assert relative(found, expected) < (1e-5 if method != "wudi" else 2e-2)


@pytest.mark.parametrize("budget", [{"rank": 2}, {"energy": 0.9}])
def test_a_budget_cuts_as_little_as_can_be_and_the_report_says_how_much(budget: Any, tmp_path: Path) -> None:
    base = make_base("llama")
    base.save_pretrained(tmp_path / "base")
    sources = {
        kind: save(base, KINDS[kind]("llama"), tmp_path / kind, seed) for seed, kind in enumerate(("plain", "rslora"))
    }
    exact = merge(tmp_path / "base", sources, tmp_path / "exact", method="linear")
    cut = merge(tmp_path / "base", sources, tmp_path / "cut", method="linear", **budget)
    assert exact.report.error < 1e-6
    whole, left = 0.0, 0.0
    exact_state, cut_state = (load_file(m.folder / "adapter_model.safetensors") for m in (exact, cut))
    for own in cut.report.modules:
        path = f"base_model.model.{own.module}"
        dense = exact_state[f"{path}.lora_B.weight"] @ exact_state[f"{path}.lora_A.weight"]
        kept = cut_state[f"{path}.lora_B.weight"] @ cut_state[f"{path}.lora_A.weight"]
        values = torch.linalg.svdvals(dense.double())
        best = float(values[own.rank :].square().sum().sqrt() / values.norm())
        assert own.error == pytest.approx(best, abs=1e-6)
        assert relative(kept, dense) == pytest.approx(best, abs=1e-5)
        if "rank" in budget:
            assert own.rank == budget["rank"]
        else:
            assert own.error**2 <= 1 - budget["energy"] + 1e-6
            smaller = values[own.rank - 1 :].square().sum() / values.square().sum()
            assert float(smaller) > 1 - budget["energy"]
        whole, left = whole + float(dense.square().sum()), left + float((dense - kept).square().sum())
    assert cut.report.error == pytest.approx((left / whole) ** 0.5, rel=1e-3)


def test_exact_factors_keep_many_small_directions_but_not_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(300, 300, generator=generator, dtype=torch.float64))[0] for _ in range(2))
    values = torch.full((300,), 1e-5, dtype=torch.float64)
    values[0] = 1.0
    small = factorise((u * values @ v).float(), Budget(), 300)
    assert small.product.rank == 300
    assert small.error < 1e-5
    thin = factorise(u[:, :5].float() @ v[:5].float(), Budget(), 300)
    assert thin.product.rank == 5
    assert thin.error < 1e-5


def test_fda_merges_adapters_into_one(tmp_path: Path) -> None:
    whole = make_base("bert")
    whole.bert.save_pretrained(tmp_path / "base")
    sources, models = {}, {}
    for labels in (2, 3):
        model = make_model("bert", num_labels=labels)
        model.bert.load_state_dict(whole.bert.state_dict())
        models[f"of{labels}"] = model
        config = LoraConfig(r=3, target_modules=["value", "output.dense"], task_type="SEQ_CLS")
        sources[f"of{labels}"] = save(model, config, tmp_path / f"of{labels}", labels)
    options = {"num_anchors": 4, "num_tokens": 3, "steps": 3, "epochs": 2}
    merged = merge(tmp_path / "base", sources, tmp_path / "merged", method="fda", **options)
    assert merged.tasks == ["of2", "of3"]
    assert [merged.load(task).base_model.model.num_labels for task in merged.tasks] == [2, 3]
    assert all(outputs(merged.load(task), "bert").isfinite().all() for task in merged.tasks)
    assert (tmp_path / "merged/anchors/of2/anchors.json").is_file()
    with pytest.raises(hf_fda.InputError, match="say which: of2, of3"):
        merged.load()


def test_a_full_fine_tune_becomes_an_adapter(tmp_path: Path) -> None:
    base = make_base("llama")
    base.save_pretrained(tmp_path / "base")
    tuned = fine_tune(base, seed=2)
    tuned.save_pretrained(tmp_path / "tuned")
    folders = [str(tmp_path / name) for name in ("base", "tuned")]
    exact = hf_fda.extract(*folders, tmp_path / "exact", quiet=True)
    found = outputs(PeftModel.from_pretrained(copy.deepcopy(base), exact.folder), "llama")
    assert relative(found, outputs(tuned, "llama")) < 1e-5
    command = ["extract", "--base", folders[0], "--source", folders[1], "--output", str(tmp_path / "cut")]
    assert main([*command, "--quiet"]) == 2  # neither rank nor energy
    assert main([*command, "--rank", "4", "--quiet"]) == 0
    cut = hf_fda.Merged(tmp_path / "cut").report
    assert cut is not None
    assert {own.rank for own in cut.modules} == {4}
    for own in cut.modules:
        task = tuned.get_submodule(own.module).weight - base.get_submodule(own.module).weight
        values = torch.linalg.svdvals(task.detach().double())
        assert own.error == pytest.approx(float(values[4:].norm() / values.norm()), abs=1e-5)


def test_large_matrices_are_decomposed_at_random_nearly_as_well() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(1100, 60, generator=generator))[0] for _ in range(2))
    values = torch.logspace(0, -3, 60)
    found = factorise((left * values) @ right.mT, Budget(rank=20), limit=1100)
    best = float(values[20:].norm() / values.norm())
    assert found.product.rank == 20
    assert found.error == pytest.approx(best, rel=1e-3)
    stack = torch.stack([(left * values) @ right.mT, (left * values[:30].repeat_interleave(2)) @ right.mT])
    both = factorise(stack, Budget(rank=20), limit=1100)
    of_each = [factorise(matrix, Budget(rank=20), limit=1100) for matrix in stack]
    left_out = sum((own.error * own.norm) ** 2 for own in of_each) ** 0.5
    assert both.product.left.shape == (2, 1100, 20)
    assert both.error * both.norm == pytest.approx(left_out, rel=1e-3)
    kept = factorise((left * values) @ right.mT, Budget(rank=40, energy=0.99), limit=1100)
    assert kept.error**2 <= 0.01
    assert kept.product.rank == int((values.square().cumsum(0) / values.square().sum() < 0.99).sum()) + 1


def test_the_same_call_does_no_work_twice_and_makes_the_same_bytes(tmp_path: Path) -> None:
    base = make_base("llama")
    base.save_pretrained(tmp_path / "base")
    sources = {"own": save(base, KINDS["plain"]("llama"), tmp_path / "own")}
    first = merge(tmp_path / "base", sources, tmp_path / "first", method="tsv")
    weights = tmp_path / "first/adapter_model.safetensors"
    before, stamp = weights.read_bytes(), weights.stat().st_mtime_ns
    merge(tmp_path / "base", sources, tmp_path / "first", method="tsv")
    assert weights.stat().st_mtime_ns == stamp
    again = hf_fda.merge(**yaml_of(first.folder), output=tmp_path / "again", quiet=True)
    assert (again.folder / "adapter_model.safetensors").read_bytes() == before
    merge(tmp_path / "base", sources, tmp_path / "first", method="tsv", rank=1)
    assert weights.read_bytes() != before


def yaml_of(folder: Path) -> dict[str, Any]:
    given = yaml.safe_load((folder / "merge_config.yaml").read_text())
    return {**given.pop("options"), **given}


def test_a_plan_says_how_large_the_adapter_may_get_and_why(tmp_path: Path) -> None:
    base = make_base("llama")
    base.save_pretrained(tmp_path / "base")
    sources = {kind: str(save(base, KINDS[kind]("llama"), tmp_path / kind)) for kind in ("plain", "rslora", "dora")}
    thin = hf_fda.plan(
        str(tmp_path / "base"), {"a": sources["plain"], "b": sources["rslora"]}, "linear", as_adapter=True
    )
    thick = hf_fda.plan(str(tmp_path / "base"), sources, "linear", as_adapter=True)
    cut = hf_fda.plan(str(tmp_path / "base"), sources, "linear", as_adapter=True, rank=2)
    assert [plan.adapter.top_rank for plan in (thin, thick, cut) if plan.adapter] == [6, 32, 2]
    assert "not of low rank" in str(thick) and "'dora'" in str(thick)
    assert "not of low rank" not in str(thin) and "not of low rank" not in str(cut)
    merged = merge(tmp_path / "base", {"own": Path(sources["plain"])}, tmp_path / "out", method="linear", rank=2)
    size = (merged.folder / "adapter_model.safetensors").stat().st_size
    assert size / 2 < cut.disk_bytes / 2 <= size


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"rank": 0}, ["rank", "at least 1"]),
        ({"rank": 33}, ["rank 33", "at most 32"]),
        ({"energy": 1.5}, ["energy", "fraction"]),
        ({"as_adapter": False, "rank": 3}, ["rank", "as_adapter=True"]),
    ],
)
def test_bad_budgets_are_refused(arguments: Any, said: list[str], tmp_path: Path) -> None:
    base = make_base("llama")
    base.save_pretrained(tmp_path / "base")
    own = save(base, KINDS["plain"]("llama"), tmp_path / "own")
    with pytest.raises(hf_fda.InputError) as caught:
        hf_fda.merge(
            str(tmp_path / "base"), [str(own)], "linear", tmp_path / "out", **{"as_adapter": True, **arguments}
        )
    assert all(words in str(caught.value) for words in said)
    assert not (tmp_path / "out").exists()


def test_adapters_of_different_task_types_do_not_become_one(tmp_path: Path) -> None:
    base = make_base("llama")
    base.model.save_pretrained(tmp_path / "base")
    config = {"r": 2, "target_modules": ["q_proj"]}
    save(base, LoraConfig(**config, task_type="CAUSAL_LM"), tmp_path / "speaker")
    classifier = LlamaForSequenceClassification(base.config)
    classifier.model.load_state_dict(base.model.state_dict())
    save(classifier, LoraConfig(**config, task_type="SEQ_CLS"), tmp_path / "judge")
    sources = {name: tmp_path / name for name in ("speaker", "judge")}
    with pytest.raises(hf_fda.InputError, match="'speaker' is of a LlamaForCausalLM, 'judge' of a LlamaForSeq"):
        merge(tmp_path / "base", sources, tmp_path / "out", method="linear")
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_names_another_base_is_warned_of(tmp_path: Path) -> None:
    base = make_base("llama")
    base.save_pretrained(tmp_path / "base")
    for name in ("base", "other"):
        config = LoraConfig(r=2, target_modules=["q_proj"], base_model_name_or_path=f"somewhere/{name}")
        model = train(base, config, seed=1)
        model.peft_config["default"].base_model_name_or_path = f"somewhere/{name}"
        model.save_pretrained(tmp_path / f"of-{name}")
        plan = hf_fda.plan(str(tmp_path / "base"), [str(tmp_path / f"of-{name}")], "linear", tmp_path / "out")
        warned = [note for note in plan.notes if "somewhere/other" in note and "trained on" in note]
        assert bool(warned) == (name == "other")


def test_an_adapter_of_a_whole_classifier_serves_its_own_class(
    classifiers: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    base, folders = classifiers
    adapter = hf_fda.extract(base, folders["three"], tmp_path / "out", energy=1.0, quiet=True)
    expected = outputs(BertForSequenceClassification.from_pretrained(folders["three"]), "bert")
    assert adapter.tasks == ["three"]
    assert relative(outputs(adapter.load("three"), "bert"), expected) < 1e-5


def test_an_adapter_and_a_whole_model_in_one_folder_replace_each_other(tmp_path: Path) -> None:
    base = make_base("llama")
    base.save_pretrained(tmp_path / "base")
    own = {"own": str(save(base, KINDS["plain"]("llama"), tmp_path / "own"))}
    for as_adapter in (False, True, False):
        hf_fda.merge(str(tmp_path / "base"), own, "cat", tmp_path / "out", as_adapter=as_adapter, quiet=True)
        names = {path.name for path in (tmp_path / "out").iterdir()}
        whole, thin = {"config.json", "model.safetensors"}, {"adapter_config.json", "adapter_model.safetensors"}
        assert (thin if as_adapter else whole) <= names
        assert not (whole if as_adapter else thin) & names
        assert ("adapter_report.json" in names) == as_adapter


@pytest.mark.parametrize("as_adapter", [False, True])
def test_another_seed_makes_a_random_merge_anew(as_adapter: bool, tmp_path: Path) -> None:
    base = make_base("llama")
    base.save_pretrained(tmp_path / "base")
    own = {"own": str(save(base, KINDS["plain"]("llama"), tmp_path / "own"))}
    made = []
    for seed in (0, 1, 0):
        options = {"as_adapter": as_adapter, "density": 0.5, "seed": seed, "quiet": True}
        hf_fda.merge(str(tmp_path / "base"), own, "dare_linear", tmp_path / "out", **options)
        name = "adapter_model.safetensors" if as_adapter else "model.safetensors"
        made.append((tmp_path / "out" / name).read_bytes())
    assert made[0] == made[2] != made[1]


@pytest.mark.parametrize("only", [False, True])
def test_a_norm_called_norm_comes_whole_with_all_that_peft_takes_for_it(only: bool, tmp_path: Path) -> None:
    base: Any = make_base("llama").model  # bare: no prefix tells its last norm from the ends of the others' names
    base.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"])
    adapter = save(base, config, tmp_path / "own")
    if only:  # as of another tool, which tells whole names
        path = adapter / "adapter_model.safetensors"
        untrained = base.state_dict()
        tensors = load_file(path)
        for name in tensors:
            plain = name.removeprefix("base_model.model.")
            if plain in untrained and plain != "norm.weight":
                tensors[name] = untrained[plain].clone()
        save_file(tensors, path)
    merged = merge(tmp_path / "base", {"own": adapter}, tmp_path / "out", method="task_arithmetic", scaling=1.0)
    ids = torch.arange(1, 8)[None]
    with torch.no_grad():
        states = [
            PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()(ids).last_hidden_state
            for folder in (adapter, merged.folder)
        ]
    assert relative(states[1], states[0]) <= 1e-5


def test_what_peft_takes_for_a_whole_module_is_whole_or_refused(tmp_path: Path) -> None:
    base: Any = make_base("llama").model
    base.save_pretrained(tmp_path / "base")
    adapter = save(base, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"]), tmp_path / "own")
    plan = hf_fda.plan(str(tmp_path / "base"), [str(adapter)], "linear", as_adapter=True).adapter
    assert plan is not None
    last = tuple(target for target in plan.targets if target.name == "norm.weight")
    alone = dataclasses.replace(plan, targets=last)
    tensors = adapter_tensors(alone, {}, {"norm.weight": torch.ones(32)}, lambda name: base.state_dict()[name])
    norms = [f"base_model.model.{name}" for name in base.state_dict() if name.endswith("norm.weight")]
    assert sorted(tensors) == sorted(norms)
    assert len(norms) == 5


def snippet_of(folder: Path, base: Path) -> dict[str, Any]:
    """The names that the card's usage snippet defines, run with its placeholders filled in."""
    card = (folder / "README.md").read_text()
    assert str(folder.parent) not in card
    assert "base_model" not in yaml.safe_load(card.split("---")[1])
    code = card.split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(code.replace("PATH_OR_HUB_ID", str(folder)).replace("PATH_TO_BASE", str(base)), names)
    return names


def test_the_snippet_in_the_card_of_a_language_model_runs(tmp_path: Path) -> None:
    base = make_base("llama")
    base.save_pretrained(tmp_path / "base")
    sources = {kind: save(base, KINDS[kind]("llama"), tmp_path / kind) for kind in ("plain", "rslora")}
    merged = merge(tmp_path / "base", sources, tmp_path / "out", method="tsv")
    base_folder = (tmp_path / "base").rename(tmp_path / "elsewhere")
    model = snippet_of(merged.folder, base_folder)["model"]
    expected = outputs(hf_fda.load(merged.folder, base=base_folder), "llama")
    assert relative(outputs(model, "llama"), expected) <= 1e-6
    assert "| rank | exact |" in (merged.folder / "README.md").read_text()


def test_the_snippet_in_the_card_of_adapters_with_heads_runs(tmp_path: Path) -> None:
    whole = make_base("bert")
    whole.bert.save_pretrained(tmp_path / "base")
    sources = {}
    for labels in (2, 3):
        model = make_model("bert", num_labels=labels)
        model.bert.load_state_dict(whole.bert.state_dict())
        config = LoraConfig(r=3, target_modules=["value"], task_type="SEQ_CLS")
        sources[f"of{labels}"] = save(model, config, tmp_path / f"of{labels}", labels)
    merged = merge(tmp_path / "base", sources, tmp_path / "out", method="linear", rank=2)
    expected = outputs(merged.load("of2"), "bert")
    base_folder = (tmp_path / "base").rename(tmp_path / "elsewhere")
    model = snippet_of(merged.folder, base_folder)["model"]
    assert relative(outputs(model, "bert"), expected) <= 1e-6
    assert "| rank | 2 |" in (merged.folder / "README.md").read_text()


def test_what_only_anchors_change_is_in_the_merged_adapter(tmp_path: Path) -> None:
    base = make_base("bert")
    base.save_pretrained(tmp_path / "base")
    fine_tune(base, 1).save_pretrained(tmp_path / "tuned")
    adapter = save(base, KINDS["plain"]("bert"), tmp_path / "adapter")
    options: dict[str, Any] = {"num_anchors": 4, "num_tokens": 2, "steps": 2, "quiet": True}
    anchors = hf_fda.FunctionalDualAnchors.construct(str(tmp_path / "base"), str(tmp_path / "tuned"), **options)
    anchors.save_pretrained(tmp_path / "anchors")
    sources = {"own": str(adapter), "other": tmp_path / "anchors"}
    options |= {"epochs": 5, "adaptation_learning_rate": 1e-3}
    whole = hf_fda.merge(str(tmp_path / "base"), sources, output=tmp_path / "whole", **options)
    merged = hf_fda.merge(str(tmp_path / "base"), sources, output=tmp_path / "merged", as_adapter=True, **options)
    expected = outputs(whole.load("own"), "bert")
    assert relative(outputs(merged.load("own"), "bert"), expected) <= 1e-5
    assert relative(outputs(base, "bert"), expected) > 1e-3


def test_anchors_are_made_of_an_adapter(tmp_path: Path) -> None:
    base = make_base("bert")
    base.save_pretrained(tmp_path / "base")
    own = save(base, KINDS["dora"]("bert"), tmp_path / "own")
    options = {"num_anchors": 3, "num_tokens": 2, "steps": 1}
    anchors = hf_fda.FunctionalDualAnchors.construct(str(tmp_path / "base"), str(own), quiet=True, **options)
    assert len(anchors.blocks) == 2
