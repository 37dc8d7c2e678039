"""Merges end to end: every method on every kind of model, properties, heads, anchors, and what the folder holds."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
import yaml
from conftest import FAMILIES, IMAGE, TEXT, fine_tune, make_model
from safetensors.torch import load_file
from torch import Tensor

import hf_fda
from hf_fda.blocks.discovery import example_inputs
from hf_fda.cli import main

Library = Callable[[str], tuple[Path, list[Path]]]
FAST: dict[str, Any] = {"num_anchors": 4, "steps": 3, "epochs": 2}
BERT: dict[str, Any] = {**TEXT, "max_position_embeddings": 40}
MODELS = ["llama", "qwen2-moe", "vit", "clip-vision", "clip-image", "t5", "gpt2", "qwen2", "bert"]
METHODS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {},
    "linear": {},
    "tsv": {},
    "wudi": {"steps": 3},
    "isotropic": {},
}
STARTS: dict[str, dict[str, Any]] = {name: options for name, options in METHODS.items() if name != "wudi"}
STARTS["wudi"] = {"initial": {"method": "wudi", "steps": 3}}


def merge(base: Any, sources: Any, method: str, output: Path, **options: Any) -> hf_fda.Merged:
    """A small merge on the CPU."""
    small = FAST if method == "fda" else {}
    return hf_fda.merge(base, sources, method, output, device="cpu", quiet=True, **{**small, **options})


def weights(folder: Path) -> dict[str, Tensor]:
    """All tensors in a folder's weight files."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but the records of work."""
    paths = [path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


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


# -- every method on every kind of model -----------------------------------------------------------------------------


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


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_a_merge_loads_with_plain_transformers_and_runs(
    family: str, method: str, library: Library, tmp_path: Path
) -> None:
    base, sources = library(family)
    merged = merge(base, sources, method, tmp_path / "merged", **METHODS[method])
    assert_good(family, merged.folder)
    assert weights(merged.folder).keys() == weights(base).keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merge_by_anchors_loads_with_plain_transformers_and_runs(
    family: str, library: Library, tmp_path: Path
) -> None:
    base, sources = library(family)
    merged = merge(base, sources, "fda", tmp_path / "merged")
    assert_good(family, merged.folder)
    before, after = weights(base), weights(merged.folder)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("family", ["bert", "vit", "llama", "gpt2", "qwen2-moe", "t5"])
@pytest.mark.parametrize("start", ["task_arithmetic", "linear", "tsv", "wudi", "isotropic"])
def test_adaptation_may_start_from_another_merge(family: str, start: str, library: Library, tmp_path: Path) -> None:
    base, sources = library(family)
    initial = {"method": start, **METHODS[start]}
    merged = merge(base, sources, "fda", tmp_path / "fda", initial=initial)
    assert_good(family, merged.folder)
    still = merge(base, sources, "fda", tmp_path / "still", initial=initial, rest=initial, epochs=0, unit="block")
    plain = merge(base, sources, start, tmp_path / "plain", **METHODS[start])
    assert_near(weights(still.folder), weights(plain.folder))


@pytest.mark.parametrize(
    ("family", "unit"),
    [
        ("llama", ["self_attn", "mlp"]),
        ("qwen2-moe", "mlp"),
        ("gpt2", "block"),
        ("gpt2", ["attn", "mlp"]),
        ("vit", "mlp"),
        ("clip-vision", ["self_attn", "mlp"]),
        ("clip-image", "mlp"),
        ("bert", "attention"),
        ("clip", "mlp"),
    ],
)
def test_any_submodules_may_be_the_units(family: str, unit: Any, library: Library, tmp_path: Path) -> None:
    base, sources = library(family)
    merged = merge(base, sources, "fda", tmp_path / "merged", unit=unit)
    assert_good(family, merged.folder)
    before, after = weights(base), weights(merged.folder)
    parts = [f".{part}." for part in ([unit] if isinstance(unit, str) else unit) if part != "block"]
    for name in before:
        if parts and family != "vit" and not any(part in name for part in parts):
            assert torch.equal(before[name], after[name])


@pytest.mark.parametrize("initialization", ["weights", "gaussian"])
@pytest.mark.parametrize("distance", ["cosine", "mse", "mae"])
def test_every_initialisation_and_distance_merges(
    initialization: str, distance: str, library: Library, tmp_path: Path
) -> None:
    base, sources = library("bert")
    merged = merge(
        base,
        sources,
        "fda",
        tmp_path / "merged",
        initialization=initialization,
        distance=distance,
        adaptation_distance=distance,
    )
    assert_good("bert", merged.folder)


def test_wudi_in_closed_form_merges(library: Library, tmp_path: Path) -> None:
    base, sources = library("llama")
    assert_good("llama", merge(base, sources, "wudi", tmp_path / "merged", solver="closed_form").folder)


@pytest.mark.parametrize("family", ["llama", "vit", "bert", "gpt2", "t5"])
def test_auto_classes_load_the_merged_body(family: str, library: Library, tmp_path: Path) -> None:
    base, sources = library(family)
    merged = merge(base, sources, "task_arithmetic", tmp_path / "merged")
    body = t.AutoModel.from_pretrained(merged.folder)
    own = loaded(merged.folder).base_model.state_dict()
    for name, tensor in body.state_dict().items():
        if name in own:
            assert torch.equal(tensor, own[name])


def test_the_method_may_be_a_config_object(library: Library, tmp_path: Path) -> None:
    base, sources = library("bert")
    config = hf_fda.FDAConfig(**FAST, initial="task_arithmetic", rest="linear")
    by_object = hf_fda.merge(base, sources, config, tmp_path / "object", device="cpu", quiet=True)
    by_name = merge(base, sources, "fda", tmp_path / "name", initial="task_arithmetic", rest="linear")
    assert files(by_object.folder) == files(by_name.folder)


# -- properties ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("method", "options"), [("task_arithmetic", {"scaling": 1.0}), ("linear", {"weights": [1.0]})])
def test_one_source_of_weight_one_gives_that_source(
    family: str, method: str, options: dict[str, Any], library: Library, tmp_path: Path
) -> None:
    base, (source, _) = library(family)
    merged = merge(base, [source], method, tmp_path / "merged", heads="merge", **options)
    if method == "task_arithmetic" and family in ("bert", "roberta", "vit", "clip-image"):
        assert_same(
            merge(base, [source], method, tmp_path / "merged", heads="merge", **options).load().state_dict(),
            {**loaded(source).state_dict()},
        )
    assert_same(weights(merged.folder), weights(source))


@pytest.mark.parametrize("family", ["bert", "roberta", "vit", "clip-image"])
def test_one_source_with_its_own_head_is_that_source(family: str, library: Library, tmp_path: Path) -> None:
    base, (source, _) = library(family)
    merged = merge(base, {"task": source}, "task_arithmetic", tmp_path / "merged", scaling=1)
    assert_same(merged.load("task").state_dict(), loaded(source).state_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_scaling_zero_gives_the_base(family: str, library: Library, tmp_path: Path) -> None:
    base, sources = library(family)
    assert_same(weights(merge(base, sources, "task_arithmetic", tmp_path / "merged", scaling=0).folder), weights(base))


@pytest.mark.parametrize("method", ["tsv", "wudi", "isotropic"])
def test_scaling_zero_of_matrix_methods_gives_the_base(method: str, library: Library, tmp_path: Path) -> None:
    base, sources = library("qwen2-moe")
    merged = merge(base, sources, method, tmp_path / "merged", scaling=0, **METHODS[method])
    assert_same(weights(merged.folder), weights(base))


@pytest.mark.parametrize("family", ["vit", "llama"])
def test_no_epochs_from_the_base_give_the_base(family: str, library: Library, tmp_path: Path) -> None:
    base, sources = library(family)
    assert_same(weights(merge(base, sources, "fda", tmp_path / "merged", epochs=0).folder), weights(base))


@pytest.mark.parametrize("family", ["llama", "qwen2-moe", "vit"])
def test_task_arithmetic_is_what_its_formula_says(family: str, library: Library, tmp_path: Path) -> None:
    base, sources = library(family)
    held, one, two = (weights(folder) for folder in (base, *sources))
    merged = merge(
        base,
        dict(zip(["a", "b"], sources, strict=True)),
        "task_arithmetic",
        tmp_path / "merged",
        scaling=0.5,
        weights={"b": 3, "a": 1},
    )
    expected = {
        name: (
            held[name].double() + 0.5 * ((one[name].double() - held[name]) + 3 * (two[name].double() - held[name]))
        ).float()
        for name in held
    }
    found = weights(merged.folder)
    after = {"vit.layernorm.weight", "vit.layernorm.bias", "classifier.weight", "classifier.bias"}
    for name in expected:
        torch.testing.assert_close(found[name], held[name] if name in after else expected[name], rtol=0, atol=1e-7)


@pytest.mark.parametrize("method", ["task_arithmetic", "linear"])
@pytest.mark.parametrize("family", ["llama", "qwen2-moe", "bert"])
def test_the_order_of_sources_does_not_matter(
    method: str, family: str, saved: Callable[..., tuple[Path, list[Path]]], tmp_path: Path
) -> None:
    base, (a, b, c) = saved(family, 3)
    factors = {"a": 0.2, "b": 0.7, "c": 0.4}
    one = merge(base, {"a": a, "b": b, "c": c}, method, tmp_path / "abc", weights=factors)
    two = merge(base, {"c": c, "a": a, "b": b}, method, tmp_path / "cab", weights=factors)
    assert_same(weights(one.folder), weights(two.folder))


@pytest.mark.parametrize("method", ["tsv", "wudi", "isotropic"])
def test_the_order_of_sources_matters_to_no_matrix_method(method: str, library: Library, tmp_path: Path) -> None:
    base, (a, b) = library("llama")
    one = merge(base, {"a": a, "b": b}, method, tmp_path / "ab", **METHODS[method])
    two = merge(base, {"b": b, "a": a}, method, tmp_path / "ba", **METHODS[method])
    assert_near(weights(one.folder), weights(two.folder))


def test_anchors_of_a_source_do_not_depend_on_the_others(library: Library, tmp_path: Path) -> None:
    base, (a, b) = library("bert")
    both = merge(base, {"a": a, "b": b}, "fda", tmp_path / "ab")
    turned = merge(base, {"b": b, "a": a}, "fda", tmp_path / "ba")
    alone = merge(base, {"a": a}, "fda", tmp_path / "a")
    assert files(both.folder / "anchors") == files(turned.folder / "anchors")
    assert files(both.folder / "anchors/a") == files(alone.folder / "anchors/a")


@pytest.mark.parametrize("family", ["bert", "llama", "qwen2-moe", "vit"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("task_arithmetic", {}),
        ("tsv", {}),
        ("wudi", {"steps": 3}),
        ("isotropic", {}),
        ("fda", {}),
        ("fda", {"initial": "task_arithmetic", "rest": "linear", "initialization": "gaussian"}),
    ],
)
def test_the_same_merge_makes_the_same_bytes(
    family: str, method: str, options: dict[str, Any], library: Library, tmp_path: Path
) -> None:
    base, sources = library(family)
    one = merge(base, sources, method, tmp_path / "one", seed=3, **options)
    two = merge(base, sources, method, tmp_path / "some/where/else", seed=3, **options)
    assert files(one.folder) == files(two.folder)


def test_another_seed_makes_other_anchors(library: Library, tmp_path: Path) -> None:
    base, (source, _) = library("bert")
    one = merge(base, {"a": source}, "fda", tmp_path / "one", seed=0)
    two = merge(base, {"a": source}, "fda", tmp_path / "two", seed=1)
    assert (
        files(one.folder / "anchors")["a/index/anchors.parquet"]
        != files(two.folder / "anchors")["a/index/anchors.parquet"]
    )


def test_running_again_changes_nothing(library: Library, tmp_path: Path) -> None:
    base, sources = library("llama")
    first = files(merge(base, sources, "fda", tmp_path / "merged").folder)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "merged").rglob("*.safetensors")}
    assert files(merge(base, sources, "fda", tmp_path / "merged").folder) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "merged").rglob("*.safetensors")} == times


def test_another_method_in_the_same_folder_replaces_the_first(
    classifiers: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    base, tasks = classifiers
    merge(base, tasks, "linear", tmp_path / "merged", max_shard_bytes=20_000)
    merge(base, {"two": tasks["two"]}, "task_arithmetic", tmp_path / "merged")
    fresh = merge(base, {"two": tasks["two"]}, "task_arithmetic", tmp_path / "fresh")
    assert files(tmp_path / "merged") == files(fresh.folder)


@pytest.mark.parametrize("method", [*METHODS, "fda"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_source_equal_to_the_base_gives_no_nan(method: str, family: str, library: Library, tmp_path: Path) -> None:
    base, _ = library(family)
    merged = merge(base, {"same": base}, method, tmp_path / "merged", **METHODS.get(method, {}))
    found = weights(merged.folder)
    assert all(bool(tensor.isfinite().all()) for tensor in found.values())
    assert_near(found, weights(base))
    if method in ("task_arithmetic", "linear"):
        assert_same(found, weights(base))


def test_a_source_equal_to_the_base_beside_others_adds_nothing(library: Library, tmp_path: Path) -> None:
    base, (source, _) = library("llama")
    with_it = merge(base, {"a": source, "same": base}, "task_arithmetic", tmp_path / "with")
    without = merge(base, {"a": source}, "task_arithmetic", tmp_path / "without")
    assert_same(weights(with_it.folder), weights(without.folder))
    assert_good("llama", merge(base, {"a": source, "same": base}, "fda", tmp_path / "fda").folder)
    assert_good(
        "llama", merge(base, {"a": source, "same": base}, "wudi", tmp_path / "wudi", solver="closed_form").folder
    )


# -- what goes in ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["task_arithmetic", "fda"])
@pytest.mark.parametrize("family", ["bert", "qwen2-moe", "vit", "qwen2", "clip"])
def test_models_in_memory_merge_as_their_files_do(method: str, family: str, library: Library, tmp_path: Path) -> None:
    base, sources = library(family)
    by_file = merge(base, dict(zip(["a", "b"], sources, strict=True)), method, tmp_path / "files")
    model = make_model(family)
    models = {name: fine_tune(model, seed=seed) for name, seed in (("a", 1), ("b", 2))}
    in_memory = merge(model, models, method, tmp_path / "memory")
    assert_same(weights(in_memory.folder), weights(by_file.folder))
    assert in_memory.tasks == by_file.tasks


@pytest.mark.parametrize("family", ["vit", "qwen2-moe", "llama"])
def test_models_that_were_loaded_merge_as_their_files_do(family: str, library: Library, tmp_path: Path) -> None:
    base, sources = library(family)
    by_file = merge(base, sources, "linear", tmp_path / "files")
    by_model = merge(loaded(base), [loaded(source) for source in sources], "linear", tmp_path / "models")
    assert_same(weights(by_model.folder), weights(by_file.folder))


def test_models_in_memory_are_left_as_they_are(tmp_path: Path) -> None:
    base = make_model("qwen2")
    source = fine_tune(base, seed=1)
    states = [{name: value.clone() for name, value in model.state_dict().items()} for model in (base, source)]
    configs = [model.config.to_dict() for model in (base, source)]
    merge(base, [source], "fda", tmp_path / "merged")
    for model, state, config in zip((base, source), states, configs, strict=True):
        assert_same(model.state_dict(), state)
        assert model.config.to_dict() == config
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_sources_of_a_list_are_named_after_their_folders(library: Library, tmp_path: Path) -> None:
    base, sources = library("bert")
    assert merge(base, sources, "linear", tmp_path / "list").tasks == ["one", "two"]
    named = merge(base, {"first": sources[0], "second": sources[1]}, "linear", tmp_path / "dict")
    assert named.tasks == ["first", "second"]


def test_sources_below_a_folder_with_an_at_sign_keep_their_names(library: Library, tmp_path: Path) -> None:
    import shutil

    base, sources = library("bert")
    folders = [Path(shutil.copytree(source, tmp_path / "me@home" / source.name)) for source in sources]
    merged = merge(base, folders, "linear", tmp_path / "merged")
    assert merged.tasks == ["one", "two"]
    assert_same(weights(merged.folder), weights(merge(base, sources, "linear", tmp_path / "plain").folder))


def test_paths_may_be_words(library: Library, tmp_path: Path) -> None:
    base, sources = library("bert")
    by_word = hf_fda.merge(
        str(base), [f"{source}{os.sep}" for source in sources], "linear", str(tmp_path / "words"), quiet=True
    )
    assert by_word.tasks == ["one", "two"]
    assert by_word.folder == tmp_path / "words"


@pytest.mark.parametrize("method", ["task_arithmetic", "fda"])
def test_base_and_sources_may_differ_in_stored_type(method: str, tmp_path: Path) -> None:
    base = make_model("llama")
    base.save_pretrained(tmp_path / "base")
    fine_tune(base, seed=1).bfloat16().save_pretrained(tmp_path / "half")
    merged = merge(tmp_path / "base", [tmp_path / "half"], method, tmp_path / "merged")
    assert_good("llama", merged.folder)
    if method == "task_arithmetic":
        one = merge(tmp_path / "base", [tmp_path / "half"], method, tmp_path / "one", scaling=1)
        half = {name: tensor.float() for name, tensor in weights(tmp_path / "half").items()}
        assert_same(weights(one.folder), half)


def test_a_sharded_source_merges_as_a_single_file(library: Library, tmp_path: Path) -> None:
    base, (source, _) = library("qwen2-moe")
    loaded(source).save_pretrained(tmp_path / "one", max_shard_size="20KB")
    assert len(list((tmp_path / "one").glob("*.safetensors"))) > 1
    sharded = merge(base, [tmp_path / "one"], "tsv", tmp_path / "sharded")
    single = merge(base, [source], "tsv", tmp_path / "single")
    assert_same(weights(sharded.folder), weights(single.folder))


# -- plan ------------------------------------------------------------------------------------------------------------


def test_a_plan_tells_what_will_be_done_and_writes_nothing(
    classifiers: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    base, tasks = classifiers
    plan = hf_fda.plan(base, tasks, "fda", tmp_path / "merged", device="cpu", **FAST)
    text = str(plan)
    assert "BertModel" in text
    assert "6 constructions, 2 adaptations" in text
    for task, folder in tasks.items():
        assert f"{task}: {folder}" in text
        assert f"task_heads/{task}" in text
        assert f"anchors/{task}" in text
    for word in ("memory", "disk", "num_anchors=4", "config.json", "merge_config.yaml", "README.md"):
        assert word in text
    assert plan.peak_memory_bytes > 0
    assert plan.disk_bytes > 0
    assert [unit.name for unit in plan.units] == ["encoder.layer.0", "encoder.layer.1"]
    assert not (tmp_path / "merged").exists()


def test_a_plan_reads_no_weights(library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("hf_fda.checkpoint.reader.read_tensor", refuse)
    base, sources = library("qwen2-moe")
    for method in ("fda", "tsv"):
        hf_fda.plan(base, sources, method, tmp_path / "merged")


@pytest.mark.parametrize("method", ["fda", "linear"])
def test_a_merge_writes_what_its_plan_says(
    method: str, classifiers: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    base, tasks = classifiers
    options = FAST if method == "fda" else {}
    plan = hf_fda.plan(base, tasks, method, tmp_path / "merged", max_shard_bytes=40_000, **options)
    merged = merge(base, tasks, method, tmp_path / "merged", max_shard_bytes=40_000)
    for shard in plan.shards:
        found = load_file(merged.folder / shard.file)
        assert {name: tuple(value.shape) for name, value in found.items()} == {
            name: spec.shape for name, spec in shard.specs.items()
        }
    top = {path.name for path in merged.folder.iterdir() if path.name != ".cache"}
    expected = {"config.json", "merge_config.yaml", "README.md", "model.safetensors.index.json", "task_heads"}
    assert top == expected | {shard.file for shard in plan.shards} | ({"anchors"} if method == "fda" else set())
    size = sum(len(content) for name, content in files(merged.folder).items() if name.endswith(".safetensors"))
    assert plan.disk_bytes > 0.5 * size


def test_methods_are_listed_with_their_options() -> None:
    known = hf_fda.methods()
    assert {"fda", *METHODS} <= known.keys()
    assert "arXiv" in known["fda"].paper
    assert {"scaling", "weights"} <= {option.name for option in known["task_arithmetic"].options}


# -- task heads ------------------------------------------------------------------------------------------------------


def assert_heads(merged: hf_fda.Merged, tasks: dict[str, Path], prefix: str, own: tuple[str, ...]) -> None:
    """Each task loads with the tensors named `own` of its source and everything else of the merged body."""
    body = merged.load().state_dict()
    body = {name.removeprefix(f"{prefix}."): value for name, value in body.items()}
    assert merged.tasks == sorted(tasks)
    for task, folder in tasks.items():
        source, model = loaded(folder), merged.load(task)
        assert type(model) is type(source)
        assert model.config.id2label == source.config.id2label
        assert not model.training
        theirs = source.state_dict()
        assert model.state_dict().keys() == theirs.keys()
        for name, value in model.state_dict().items():
            short = name.removeprefix(f"{prefix}.")
            expected = theirs[name] if short.startswith(own) else body[short]
            assert torch.equal(value, expected), (task, name)
        assert bool(outputs(model).isfinite().all())


@pytest.mark.parametrize("method", ["task_arithmetic", "tsv", "fda"])
def test_classifiers_of_a_bare_encoder_keep_their_own_heads(
    method: str, classifiers: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    base, tasks = classifiers
    merged = merge(base, tasks, method, tmp_path / "merged")
    assert type(loaded(merged.folder)) is t.BertModel
    assert_heads(merged, tasks, "bert", ("pooler.", "classifier."))
    assert merged.load("three").config.num_labels == 3


def test_a_merged_folder_is_loaded_by_its_path_too(classifiers: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    base, tasks = classifiers
    merged = merge(base, tasks, "linear", tmp_path / "merged")
    for folder in (merged.folder, str(merged.folder)):
        assert_same(hf_fda.load(folder, task="four").state_dict(), merged.load("four").state_dict())
        assert_same(hf_fda.load(folder).state_dict(), loaded(merged.folder).state_dict())


def test_loading_takes_arguments_of_from_pretrained(classifiers: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    base, tasks = classifiers
    merged = merge(base, tasks, "linear", tmp_path / "merged")
    for task in (None, "two"):
        model = merged.load(task, dtype=torch.bfloat16, attn_implementation="eager")
        assert model.dtype == torch.bfloat16
        assert model.config._attn_implementation == "eager"


def test_an_unknown_task_is_refused_and_the_nearest_suggested(
    classifiers: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    base, tasks = classifiers
    merged = merge(base, tasks, "linear", tmp_path / "merged")
    with pytest.raises(hf_fda.InputError, match="no head for task 'thre': did you mean 'three'"):
        merged.load("thre")
    other = merge(base, {"bare": base}, "linear", tmp_path / "bare")
    with pytest.raises(hf_fda.InputError, match="no task heads"):
        other.load("bare")


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_heads_are_kept_where_the_base_has_one_of_its_own(family: str, library: Library, tmp_path: Path) -> None:
    base, sources = library(family)
    tasks = dict(zip(["a", "b"], sources, strict=True))
    merged = merge(base, tasks, "task_arithmetic", tmp_path / "merged")
    assert_heads(merged, tasks, family, ("pooler.", "classifier."))
    held, found = weights(base), weights(merged.folder)
    for name in held:
        if "classifier" in name or "pooler" in name:
            assert torch.equal(held[name], found[name])  # the folder itself holds the base's


def save_fine_tunes(base: Any, folder: Path, **classes: tuple[Any, dict[str, Any]]) -> dict[str, Path]:
    """Models of other classes on fine-tunes of a base's body: `name=(class, changes of the config)`."""
    tasks = {}
    for number, (task, (model_class, changes)) in enumerate(classes.items(), 1):
        config = type(base.config)(**{**base.config.to_dict(), "architectures": None, **changes})
        torch.manual_seed(number)
        model = model_class(config).eval()
        body = fine_tune(base, seed=number).base_model.state_dict()
        model.base_model.load_state_dict(
            {name: value for name, value in body.items() if name in model.base_model.state_dict()}
        )
        model.save_pretrained(folder / task)
        tasks[task] = folder / task
    return tasks


def test_heads_of_different_kinds_are_kept_side_by_side(tmp_path: Path) -> None:
    base = t.BertModel(t.BertConfig(**BERT)).eval()
    base.save_pretrained(tmp_path / "base")
    tasks = save_fine_tunes(
        base,
        tmp_path,
        sentence=(t.BertForSequenceClassification, {"num_labels": 3}),
        token=(t.BertForTokenClassification, {"num_labels": 5}),
        question=(t.BertForQuestionAnswering, {}),
    )
    merged = merge(tmp_path / "base", tasks, "fda", tmp_path / "merged")
    assert_heads(merged, tasks, "bert", ("pooler.", "classifier.", "qa_outputs."))


@pytest.mark.parametrize("method", ["tsv", "fda"])
def test_classifiers_of_a_masked_language_model_keep_their_heads(method: str, tmp_path: Path) -> None:
    base = make_model("bert-mlm")
    base.save_pretrained(tmp_path / "base")
    tasks = save_fine_tunes(
        base,
        tmp_path,
        two=(t.BertForSequenceClassification, {"num_labels": 2}),
        three=(t.BertForSequenceClassification, {"num_labels": 3}),
    )
    merged = merge(tmp_path / "base", tasks, method, tmp_path / "merged")
    assert type(loaded(merged.folder)) is t.BertForMaskedLM
    assert_heads(merged, tasks, "bert", ("pooler.", "classifier."))


@pytest.mark.parametrize("method", ["task_arithmetic", "fda"])
@pytest.mark.parametrize("bare", [True, False])
def test_image_classifiers_keep_their_heads(method: str, bare: bool, tmp_path: Path) -> None:
    config = t.ViTConfig(**IMAGE)
    torch.manual_seed(0)
    base = (t.ViTModel if bare else t.ViTForImageClassification)(config).eval()
    base.save_pretrained(tmp_path / "base")
    tasks = save_fine_tunes(
        base,
        tmp_path,
        digits=(t.ViTForImageClassification, {"num_labels": 10}),
        shapes=(t.ViTForImageClassification, {"num_labels": 4}),
    )
    merged = merge(tmp_path / "base", tasks, method, tmp_path / "merged")
    assert type(loaded(merged.folder)) is type(base)
    assert_heads(merged, tasks, "vit", ("layernorm.", "classifier."))


@pytest.mark.parametrize("kind", ["vision", "whole"])
@pytest.mark.parametrize("method", ["linear", "fda"])
def test_clip_image_classifiers_keep_their_heads(kind: str, method: str, tmp_path: Path) -> None:
    whole = make_model("clip")
    base = whole if kind == "whole" else make_model("clip-vision")
    base.save_pretrained(tmp_path / "base")
    vision = whole.vision_model if kind == "whole" else base
    tasks = {}
    for number, (task, labels) in enumerate({"digits": 10, "shapes": 4}.items(), 1):
        config = t.CLIPConfig(**{**whole.config.to_dict(), "architectures": None, "num_labels": labels})
        torch.manual_seed(number)
        model = t.CLIPForImageClassification(config).eval()
        model.vision_model.load_state_dict(fine_tune(vision, seed=number).state_dict())
        model.save_pretrained(tmp_path / task)
        tasks[task] = tmp_path / task
    merged = merge(tmp_path / "base", tasks, method, tmp_path / "merged")
    assert_heads(merged, tasks, "vision_model", ("post_layernorm.", "classifier."))
    if kind == "whole":
        before, after = weights(tmp_path / "base"), weights(merged.folder)
        for name in before:
            if name.startswith("text_"):
                assert torch.equal(before[name], after[name])


@pytest.mark.parametrize("method", ["task_arithmetic", "fda"])
def test_a_whole_clip_beside_one_of_its_towers_merges(method: str, tmp_path: Path) -> None:
    base = make_model("clip")
    base.save_pretrained(tmp_path / "base")
    fine_tune(base, seed=1).save_pretrained(tmp_path / "whole")
    torch.manual_seed(0)
    tower = make_model("clip-vision")
    tower.load_state_dict(fine_tune(base.vision_model, seed=2).state_dict())
    tower.save_pretrained(tmp_path / "tower")
    merged = merge(tmp_path / "base", [tmp_path / "whole", tmp_path / "tower"], method, tmp_path / "merged")
    assert_good("clip", merged.folder)


@pytest.mark.parametrize(("family", "head"), [("llama", "score."), ("qwen2", "score."), ("gpt2", "score.")])
def test_classifiers_of_a_language_model_keep_their_heads(family: str, head: str, tmp_path: Path) -> None:
    base = make_model(family)
    base.save_pretrained(tmp_path / "base")
    model_class = {
        "llama": t.LlamaForSequenceClassification,
        "qwen2": t.Qwen2ForSequenceClassification,
        "gpt2": t.GPT2ForSequenceClassification,
    }[family]
    tasks = save_fine_tunes(
        base,
        tmp_path,
        two=(model_class, {"num_labels": 2, "pad_token_id": 0}),
        three=(model_class, {"num_labels": 3, "pad_token_id": 0}),
    )
    merged = merge(tmp_path / "base", tasks, "fda", tmp_path / "merged")
    loaded(merged.folder)
    prefix = base.base_model_prefix
    assert_heads(merged, tasks, prefix, ("norm.", "ln_f.", head))


def test_heads_of_one_task_may_be_averaged(tmp_path: Path) -> None:
    base = t.BertModel(t.BertConfig(**BERT)).eval()
    base.save_pretrained(tmp_path / "base")
    classifier = (t.BertForSequenceClassification, {"num_labels": 3})
    tasks = save_fine_tunes(base, tmp_path, one=classifier, two=classifier)
    merged = merge(tmp_path / "base", tasks, "task_arithmetic", tmp_path / "merged", heads="merge")
    assert merged.tasks == []
    assert not (merged.folder / "task_heads").exists()
    model = loaded(merged.folder)
    assert type(model) is t.BertForSequenceClassification
    assert model.config.num_labels == 3
    one, two = (loaded(folder).state_dict() for folder in tasks.values())
    for name, value in model.state_dict().items():
        if "pooler" in name or "classifier" in name:
            torch.testing.assert_close(value, (one[name] + two[name]) / 2, rtol=1e-5, atol=1e-7)


def test_heads_of_different_shape_are_not_averaged(classifiers: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    base, tasks = classifiers
    with pytest.raises(hf_fda.InputError, match=r"heads='merge'.*'three'.*shapes or labels.*heads='keep'"):
        merge(base, tasks, "linear", tmp_path / "merged", heads="merge")
    assert not (tmp_path / "merged").exists()


def test_heads_of_different_labels_are_not_averaged(tmp_path: Path) -> None:
    base = t.BertModel(t.BertConfig(**BERT)).eval()
    base.save_pretrained(tmp_path / "base")
    tasks = save_fine_tunes(
        base,
        tmp_path,
        one=(t.BertForSequenceClassification, {"id2label": {0: "no", 1: "yes"}}),
        two=(t.BertForSequenceClassification, {"id2label": {0: "yes", 1: "no"}}),
    )
    with pytest.raises(hf_fda.InputError, match=r"heads='merge'.*labels"):
        merge(tmp_path / "base", tasks, "linear", tmp_path / "merged", heads="merge")


def test_heads_of_different_kinds_are_not_averaged(tmp_path: Path) -> None:
    base = t.BertModel(t.BertConfig(**BERT)).eval()
    base.save_pretrained(tmp_path / "base")
    tasks = save_fine_tunes(
        base,
        tmp_path,
        one=(t.BertForSequenceClassification, {"num_labels": 2}),
        two=(t.BertForTokenClassification, {"num_labels": 2}),
    )
    with pytest.raises(hf_fda.InputError, match=r"heads='merge'.*kinds"):
        merge(tmp_path / "base", tasks, "linear", tmp_path / "merged", heads="merge")


@pytest.mark.parametrize("method", ["linear", "fda"])
@pytest.mark.parametrize("family", ["llama", "bert-mlm", "gpt2", "qwen2"])
def test_language_models_of_a_bare_base_make_a_language_model(family: str, method: str, tmp_path: Path) -> None:
    base = make_model(family)
    sources = [fine_tune(base, seed=seed) for seed in (1, 2)]
    base.base_model.save_pretrained(tmp_path / "base")
    for name, source in zip("ab", sources, strict=True):
        source.save_pretrained(tmp_path / name)
    merged = merge(tmp_path / "base", [tmp_path / "a", tmp_path / "b"], method, tmp_path / "merged")
    assert merged.tasks == []
    loaded(merged.folder)
    model, report = type(base).from_pretrained(merged.folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    assert bool(outputs(model.eval()).isfinite().all())
    if method == "linear":
        states = [source.state_dict() for source in sources]
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, (states[0][name] + states[1][name]) / 2, rtol=1e-5, atol=1e-7)


# -- types, shards, files beside the weights -------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["task_arithmetic", "fda"])
def test_weights_may_be_written_in_bfloat16(method: str, library: Library, tmp_path: Path) -> None:
    base, sources = library("qwen2-moe")
    half = merge(base, sources, method, tmp_path / "half", dtype="bfloat16")
    full = merge(base, sources, method, tmp_path / "full")
    assert_same(weights(half.folder), {name: value.bfloat16() for name, value in weights(full.folder).items()})
    assert loaded(half.folder).dtype == torch.bfloat16
    assert loaded(full.folder).dtype == torch.float32


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["tsv", "fda"])
def test_auto_writes_the_type_of_the_base(stored: torch.dtype, method: str, tmp_path: Path) -> None:
    base = make_model("llama").to(stored)
    base.save_pretrained(tmp_path / "base")
    fine_tune(base.float(), seed=1).save_pretrained(tmp_path / "source")
    merged = merge(tmp_path / "base", [tmp_path / "source"], method, tmp_path / "merged", dtype="auto")
    assert {value.dtype for value in weights(merged.folder).values()} == {stored}
    assert loaded(merged.folder).dtype == stored


def test_a_half_precision_merge_loads_its_heads_in_half_precision(
    classifiers: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    base, tasks = classifiers
    merged = merge(base, tasks, "linear", tmp_path / "merged", dtype="bfloat16")
    assert {parameter.dtype for parameter in merged.load("two").parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("family", ["qwen2-moe", "vit"])
@pytest.mark.parametrize("method", ["tsv", "fda"])
def test_small_shards_come_with_an_index(family: str, method: str, library: Library, tmp_path: Path) -> None:
    base, sources = library(family)
    sharded = merge(base, sources, method, tmp_path / "sharded", max_shard_bytes=20_000)
    single = merge(base, sources, method, tmp_path / "single")
    index = json.loads((sharded.folder / "model.safetensors.index.json").read_text())
    names = {file.name for file in sharded.folder.glob("*.safetensors")}
    assert len(names) > 1
    assert set(index["weight_map"].values()) == names
    assert index["weight_map"].keys() == weights(sharded.folder).keys()
    assert not (single.folder / "model.safetensors.index.json").exists()
    assert_same(weights(sharded.folder), weights(single.folder))
    assert_good(family, sharded.folder)
    assert_same(sharded.load().state_dict(), single.load().state_dict())


def test_shards_load_with_task_heads(classifiers: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    base, tasks = classifiers
    merged = merge(base, tasks, "linear", tmp_path / "merged", max_shard_bytes=20_000)
    assert_heads(merged, tasks, "bert", ("pooler.", "classifier."))


def make_tokenizer(folder: Path) -> t.PreTrainedTokenizerFast:
    """A tokenizer of a few words, saved to a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1, "good": 2, "bad": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = t.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]")
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_the_tokenizer_of_the_base_is_copied(classifiers: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    base, tasks = classifiers
    tokenizer = make_tokenizer(base)
    merged = merge(base, tasks, "linear", tmp_path / "merged")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (merged.folder / name).read_bytes() == (base / name).read_bytes()
    found = t.AutoTokenizer.from_pretrained(merged.folder)
    assert found("good bad what")["input_ids"] == tokenizer("good bad what")["input_ids"] == [2, 3, 0]


def test_the_image_processor_of_the_base_is_copied(library: Library, tmp_path: Path) -> None:
    base = make_model("vit")
    base.save_pretrained(tmp_path / "base")
    facts = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
    (tmp_path / "base/preprocessor_config.json").write_text(json.dumps(facts))
    merged = merge(tmp_path / "base", library("vit")[1], "linear", tmp_path / "merged")
    assert json.loads((merged.folder / "preprocessor_config.json").read_text()) == facts


def test_the_generation_settings_of_the_base_are_copied(library: Library, tmp_path: Path) -> None:
    base, sources = library("llama")
    merged = merge(base, sources, "linear", tmp_path / "merged")
    name = "generation_config.json"
    assert (merged.folder / name).read_bytes() == (base / name).read_bytes()


def test_the_card_states_how_the_model_was_made(classifiers: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    base, tasks = classifiers
    merged = merge(base, tasks, "fda", tmp_path / "merged")
    text = (merged.folder / "README.md").read_text()
    metadata = yaml.safe_load(text.split("---")[1])
    assert {"merge", "hf_fda", "fda"} <= set(metadata["tags"])
    for word in (
        str(base),
        *map(str, tasks.values()),
        "num_anchors",
        "unknown",
        "hf-fda merge",
        *hf_fda.methods()["fda"].paper.split(),
    ):
        assert word in text
    for package in ("torch", "transformers"):
        assert package in text


# -- rest ------------------------------------------------------------------------------------------------------------


def test_rest_base_keeps_the_embeddings_of_the_base(classifiers: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    base, tasks = classifiers
    merged = weights(merge(base, tasks, "fda", tmp_path / "merged", rest="base").folder)
    for name, tensor in weights(base).items():
        assert torch.equal(tensor, merged[name]) == name.startswith(("embeddings.", "pooler."))


def test_rest_linear_averages_the_embeddings(classifiers: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    base, tasks = classifiers
    merged = weights(merge(base, tasks, "fda", tmp_path / "merged", rest="linear").folder)
    plain = weights(merge(base, tasks, "linear", tmp_path / "linear").folder)
    held = weights(base)
    for name in held:
        if name.startswith("embeddings."):
            assert torch.equal(merged[name], plain[name])
            assert not torch.equal(merged[name], held[name])
        else:
            assert name.startswith("pooler.") == torch.equal(merged[name], held[name])


def test_rest_of_a_language_model_is_all_that_lies_outside_the_blocks(library: Library, tmp_path: Path) -> None:
    base, sources = library("llama")
    rest = {"method": "task_arithmetic", "scaling": 0.3}
    merged = weights(merge(base, sources, "fda", tmp_path / "merged", rest=rest).folder)
    plain = weights(merge(base, sources, "task_arithmetic", tmp_path / "plain", scaling=0.3).folder)
    held = weights(base)
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(merged[name], plain[name])
    assert torch.equal(merged["model.layers.0.self_attn.q_proj.weight"], held["model.layers.0.self_attn.q_proj.weight"])
    assert not torch.equal(merged["model.layers.0.mlp.up_proj.weight"], held["model.layers.0.mlp.up_proj.weight"])


# -- anchors ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def with_anchors(library: Library, tmp_path: Path) -> tuple[Path, dict[str, Path], hf_fda.Merged]:
    """A base, its sources, and their merge by anchors."""
    base, (one, two) = library("bert")
    sources = {"one": one, "two": two}
    return base, sources, merge(base, sources, "fda", tmp_path / "merged")


Merge = tuple[Path, dict[str, Path], hf_fda.Merged]


def assert_same_anchors(left: hf_fda.FunctionalDualAnchors, right: hf_fda.FunctionalDualAnchors) -> None:
    assert left.blocks == right.blocks
    for block in left.blocks:
        a, b = left[block], right[block]
        assert torch.equal(a.anchors, b.anchors)
        assert torch.equal(a.targets, b.targets)
        assert (a.loss, a.steps, a.cosines, a.left_out) == (b.loss, b.steps, b.cosines, b.left_out)


def test_anchors_are_left_in_the_merged_folder(with_anchors: Merge) -> None:
    base, sources, merged = with_anchors
    for task, source in sources.items():
        anchors = hf_fda.FunctionalDualAnchors.from_pretrained(merged.folder / "anchors" / task)
        assert anchors.blocks == ["bert.encoder.layer.0", "bert.encoder.layer.1"]
        assert anchors.info.base["id"] == str(base)
        assert anchors.info.source["id"] == str(source)
        assert anchors.info.seed == 0
        for block in anchors:
            unit = anchors[block]
            assert unit.anchors.shape == unit.targets.shape == (4, 5, 32)
            assert unit.anchors.dtype == unit.targets.dtype == torch.float32
            assert 0 < unit.loss < 2
            assert unit.steps == 3
            assert all(-1 <= cosine <= 1 for cosine in unit.cosines.values())
            assert "attention.self.key.bias" in unit.left_out


def test_constructing_anchors_gives_what_the_merge_left(with_anchors: Merge, tmp_path: Path) -> None:
    base, sources, merged = with_anchors
    left = hf_fda.FunctionalDualAnchors.from_pretrained(merged.folder / "anchors/two")
    in_memory = hf_fda.FunctionalDualAnchors.construct(base, sources["two"], device="cpu", quiet=True, **FAST)
    assert_same_anchors(in_memory, left)
    on_disk = hf_fda.FunctionalDualAnchors.construct(
        base, sources["two"], device="cpu", quiet=True, output=tmp_path / "anchors", **FAST
    )
    assert_same_anchors(on_disk, left)
    assert files(tmp_path / "anchors") == files(merged.folder / "anchors/two")


def test_anchors_of_models_in_memory_are_those_of_their_files(with_anchors: Merge) -> None:
    _, _, merged = with_anchors
    base = make_model("bert")
    anchors = hf_fda.FunctionalDualAnchors.construct(base, fine_tune(base, 1), device="cpu", quiet=True, **FAST)
    assert_same_anchors(anchors, hf_fda.FunctionalDualAnchors.from_pretrained(merged.folder / "anchors/one"))


def test_saved_anchors_are_the_same_when_opened(with_anchors: Merge, tmp_path: Path) -> None:
    base, sources, merged = with_anchors
    built = hf_fda.FunctionalDualAnchors.construct(base, sources["one"], device="cpu", quiet=True, **FAST)
    built.save_pretrained(tmp_path / "first")
    opened = hf_fda.FunctionalDualAnchors.from_pretrained(tmp_path / "first")
    assert_same_anchors(opened, built)
    assert opened.info == built.info
    opened.save_pretrained(tmp_path / "second")
    assert files(tmp_path / "first") == files(tmp_path / "second") == files(merged.folder / "anchors/one")


def test_anchors_made_before_are_used_again(with_anchors: Merge, tmp_path: Path) -> None:
    base, sources, merged = with_anchors
    folders = {task: merged.folder / "anchors" / task for task in sources}
    opened = {task: hf_fda.FunctionalDualAnchors.from_pretrained(folder) for task, folder in folders.items()}
    for name, given in (("folders", folders), ("words", {k: str(v) for k, v in folders.items()}), ("opened", opened)):
        plan = hf_fda.plan(base, sources, "fda", tmp_path / name, anchors=given, **FAST)
        assert not plan.constructions
        again = merge(base, sources, "fda", tmp_path / name, anchors=given)
        assert_same(weights(again.folder), weights(merged.folder))
        assert not (again.folder / "anchors").exists()


def test_anchors_of_one_source_are_used_beside_the_weights_of_another(with_anchors: Merge, tmp_path: Path) -> None:
    base, sources, merged = with_anchors
    again = merge(base, sources, "fda", tmp_path / "again", anchors={"two": merged.folder / "anchors/two"})
    assert_same(weights(again.folder), weights(merged.folder))
    assert [path.name for path in (again.folder / "anchors").iterdir()] == ["one"]


def test_anchors_alone_can_be_merged(with_anchors: Merge, tmp_path: Path) -> None:
    base, sources, merged = with_anchors
    folders = [merged.folder / "anchors" / task for task in sources]
    from_list = merge(base, folders, "fda", tmp_path / "list")
    assert_same(weights(from_list.folder), weights(merged.folder))
    opened = {path.name: hf_fda.FunctionalDualAnchors.from_pretrained(path) for path in folders}
    from_objects = merge(base, opened, "fda", tmp_path / "objects")
    assert_same(weights(from_objects.folder), weights(merged.folder))
    assert from_list.tasks == []


def test_anchors_in_memory_merge_to_the_same_bytes_twice(with_anchors: Merge, tmp_path: Path) -> None:
    base, sources, _ = with_anchors

    def built() -> dict[str, hf_fda.FunctionalDualAnchors]:
        return {
            task: hf_fda.FunctionalDualAnchors.construct(base, source, device="cpu", quiet=True, **FAST)
            for task, source in sources.items()
        }

    one = merge(base, sources, "fda", tmp_path / "one", anchors=built())
    two = merge(base, sources, "fda", tmp_path / "two", anchors=built())
    assert files(one.folder) == files(two.folder)


def test_one_source_may_be_anchors_and_another_weights(with_anchors: Merge, tmp_path: Path) -> None:
    base, sources, merged = with_anchors
    mixed = {"one": sources["one"], "two": merged.folder / "anchors/two"}
    again = merge(base, mixed, "fda", tmp_path / "again")
    assert_same(weights(again.folder), weights(merged.folder))
    assert again.tasks == ["one"]


def test_anchors_alone_need_the_base_as_the_start(with_anchors: Merge, tmp_path: Path) -> None:
    base, _, merged = with_anchors
    anchors = [merged.folder / "anchors/one"]
    for options in ({"initial": "tsv"}, {"rest": "linear"}):
        with pytest.raises(hf_fda.InputError, match="'one' is anchors only.*base"):
            merge(base, anchors, "fda", tmp_path / "again", **options)
    with pytest.raises(hf_fda.InputError, match="'one' is anchors only.*'tsv' needs its weights"):
        merge(base, anchors, "tsv", tmp_path / "again")


def test_anchors_of_another_unit_are_refused(library: Library, with_anchors: Merge, tmp_path: Path) -> None:
    base, sources, merged = with_anchors
    with pytest.raises(hf_fda.InputError, match="anchors of 'one'.*unit"):
        merge(
            base, sources, "fda", tmp_path / "again", anchors={"one": merged.folder / "anchors/one"}, unit="attention"
        )


def test_anchors_of_another_base_are_refused(library: Library, with_anchors: Merge, tmp_path: Path) -> None:
    _, _, merged = with_anchors
    base, _ = library("roberta")
    with pytest.raises(hf_fda.InputError, match=r"another base"):
        merge(base, [merged.folder / "anchors/one"], "fda", tmp_path / "again")


def test_an_unknown_block_is_refused_and_the_nearest_suggested(with_anchors: Merge) -> None:
    _, _, merged = with_anchors
    anchors = hf_fda.FunctionalDualAnchors.from_pretrained(merged.folder / "anchors/one")
    with pytest.raises(KeyError, match=r"bert\.encoder\.layer\.0"):
        anchors["bert.encoder.layer.7"]


def test_anchors_folders_load_as_datasets(with_anchors: Merge, tmp_path: Path) -> None:
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    _, _, merged = with_anchors
    folder = merged.folder / "anchors/one"
    anchors = hf_fda.FunctionalDualAnchors.from_pretrained(folder)
    index = str(folder / "index/anchors.parquet")
    table = load_dataset("parquet", data_files=index, split="train", cache_dir=str(tmp_path / "cache"))
    whole = load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert table.to_list() == whole.to_list()
    assert table["block"] == anchors.blocks
    for row in table:
        unit = anchors[row["block"]]
        assert set(load_file(folder / row["file"])) == {"anchors", "targets"}
        assert tuple(row["shape"]) == tuple(unit.anchors.shape)
        assert row["dtype"] == "float32"
        assert row["loss"] == unit.loss
        assert row["steps"] == unit.steps


def test_the_command_constructs_the_same_anchors(with_anchors: Merge, tmp_path: Path) -> None:
    base, sources, merged = with_anchors
    words = [word for name, value in FAST.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    status = main(
        ["anchors", "--base", str(base), "--source", str(sources["one"]), "--output", str(tmp_path / "anchors")]
        + ["--device", "cpu", "--quiet", *words]
    )
    assert status == 0
    assert files(tmp_path / "anchors") == files(merged.folder / "anchors/one")


# -- merge_config.yaml -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("task_arithmetic", {"scaling": 0.25, "weights": {"two": 1, "three": 2, "four": 0.5}}),
        ("linear", {"weights": [1, 2, 3], "normalize": False}),
        ("wudi", {"solver": "closed_form"}),
        ("tsv", {"rank_fraction": 0.5, "dtype": "bfloat16", "max_shard_bytes": 30_000}),
        ("fda", {"seed": 5}),
        (
            "fda",
            {"initial": "tsv", "scaling": 0.8, "rest": "linear", "unit": ["attention", "output"], "patience": None},
        ),
        ("fda", {"initial": {"method": "linear", "weights": {"two": 1, "three": 2, "four": 0.5}}}),
    ],
)
def test_running_merge_config_again_gives_the_same_bytes(
    method: str, options: dict[str, Any], classifiers: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    base, tasks = classifiers
    merged = merge(base, tasks, method, tmp_path / "merged", **options)
    again = tmp_path / "again"
    config = str(merged.folder / "merge_config.yaml")
    assert main(["merge", config, "--output", str(again), "--quiet"]) == 0
    assert files(again) == files(merged.folder)


def test_running_merge_config_with_given_anchors_again_gives_the_same_bytes(
    with_anchors: Merge, tmp_path: Path
) -> None:
    base, sources, merged = with_anchors
    folders = {task: merged.folder / "anchors" / task for task in sources}
    for name, arguments in {
        "beside": {"sources": sources, "anchors": folders},
        "alone": {"sources": folders},
        "opened": {"sources": {k: hf_fda.FunctionalDualAnchors.from_pretrained(v) for k, v in folders.items()}},
    }.items():
        first = merge(base, method="fda", output=tmp_path / name, **arguments)
        again = tmp_path / f"{name}-again"
        assert main(["merge", str(first.folder / "merge_config.yaml"), "--output", str(again), "--quiet"]) == 0
        assert files(again) == files(first.folder)


def test_the_command_overrules_the_configuration(library: Library, tmp_path: Path) -> None:
    base, sources = library("bert")
    first = merge(base, sources, "task_arithmetic", tmp_path / "first", scaling=0.3)
    config = str(first.folder / "merge_config.yaml")
    words = ["--scaling", "0.7", "--dtype", "bfloat16", "--output", str(tmp_path / "second"), "--quiet"]
    assert main(["merge", config, *words]) == 0
    direct = merge(base, sources, "task_arithmetic", tmp_path / "direct", scaling=0.7, dtype="bfloat16")
    assert files(tmp_path / "second") == files(direct.folder)


def test_the_command_does_what_the_function_does(library: Library, tmp_path: Path) -> None:
    base, sources = library("bert")
    words = ["merge", "--base", str(base), "--source", f"a={sources[0]}", "--source", f"b={sources[1]}"]
    words += ["--method", "fda", "--initial", "task_arithmetic", "--scaling=0.3", "--unit", "attention,output"]
    words += ["--num-anchors", "4", "--steps=3", "--epochs", "2", "--seed", "7", "--device", "cpu", "--quiet"]
    assert main([*words, "--output", str(tmp_path / "command")]) == 0
    tasks = {"a": sources[0], "b": sources[1]}
    options: dict[str, Any] = {"initial": "task_arithmetic", "scaling": 0.3, "unit": ["attention", "output"], "seed": 7}
    by_function = merge(base, tasks, "fda", tmp_path / "function", **options)
    assert files(tmp_path / "command") == files(by_function.folder)
