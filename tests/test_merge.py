"""Merges end to end: every method on every kind of model, and properties that all merges have."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from checks import FAST, METHODS, assert_good, assert_near, assert_same, files, loaded, merge, weights
from conftest import FAMILIES, fine_tune, make_model
from safetensors.torch import load_file, save_file

import hf_fda

Library = Callable[[str], tuple[Path, list[Path]]]
MODELS = ["llama", "qwen2-moe", "vit", "clip-vision", "clip-image", "t5", "gpt2", "qwen2", "bert"]


# -- every method on every kind of model -------------------------------------------------------------------------------
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_a_merge_loads_with_plain_transformers_and_runs(
    family: str, method: str, library: Library, tmp_path: Path
) -> None:
    base, sources = library(family)
    merged = merge(base, sources, method, tmp_path / "merged", **METHODS[method])
    assert_good(family, merged.folder)
    assert weights(merged.folder).keys() == weights(base).keys()


@pytest.mark.parametrize("family", [*MODELS, "clip", "gemma3", "mixtral"])
def test_a_merge_by_anchors_loads_with_plain_transformers_and_runs(
    family: str, library: Library, tmp_path: Path
) -> None:
    base, sources = library(family)
    merged = merge(base, sources, "fda", tmp_path / "merged")
    assert_good(family, merged.folder)
    before, after = weights(base), weights(merged.folder)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 99}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ODD_BLOCKS: dict[str, Callable[[], Any]] = {
    "a bias of positions for each head": lambda: t.BloomForCausalLM(
        t.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=99)
    ),
    "buffers that are saved": lambda: t.ApertusForCausalLM(t.ApertusConfig(**SIZES, **HEADS, **IDS)),
    "a router that returns more than a tensor": lambda: t.PhimoeForCausalLM(
        t.PhimoeConfig(**SIZES, **HEADS, **IDS, num_local_experts=4)
    ),
}


@pytest.mark.parametrize("what", ODD_BLOCKS)
def test_blocks_with_unusual_parts_are_merged_by_anchors(what: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = ODD_BLOCKS[what]().eval()
    base.save_pretrained(tmp_path / "base")
    sources = {f"source{seed}": fine_tune(base, seed=seed) for seed in (1, 2)}
    for name, source in sources.items():
        source.save_pretrained(tmp_path / name)
    merged = hf_fda.merge(
        tmp_path / "base", {name: tmp_path / name for name in sources}, method="fda", quiet=True, **FAST,
        output=tmp_path / "merged",
    )  # fmt: skip
    before, after = weights(tmp_path / "base"), weights(merged.folder)
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved >= {
        name for name, _ in base.named_parameters() if name in before and (".layers.1." in name or ".h.1." in name)
    }
    assert all(value.isfinite().all() for value in after.values())


@pytest.mark.parametrize(
    ("family", "start"),
    [
        *(("llama", start) for start in METHODS),
        ("vit", "tsv"),
        ("gpt2", "isotropic"),
        ("qwen2-moe", "tsv"),
        ("t5", "wudi"),
    ],
)
def test_adaptation_may_start_from_another_merge(family: str, start: str, library: Library, tmp_path: Path) -> None:
    base, sources = library(family)
    initial = {"method": start, **METHODS[start]}
    moved = merge(base, sources, "fda", tmp_path / "moved", initial=initial, rest=initial)
    assert_good(family, moved.folder)
    plain = weights(merge(base, sources, start, tmp_path / "plain", **METHODS[start]).folder)
    assert any(not torch.equal(plain[name], tensor) for name, tensor in weights(moved.folder).items())
    still = merge(base, sources, "fda", tmp_path / "moved", initial=initial, rest=initial, epochs=0)
    assert_near(weights(still.folder), plain)


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


@pytest.mark.parametrize(
    ("initialization", "distance"), [("weights", "mse"), ("gaussian", "cosine"), ("gaussian", "mae")]
)
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
    options = {"initial": "task_arithmetic", "rest": "linear", "parametrization": None}
    by_name = merge(base, sources, "fda", tmp_path / "name", **options)
    assert files(by_object.folder) == files(by_name.folder)


@pytest.mark.parametrize("family", ["bert", "vit", "llama"])
def test_the_defaults_bring_each_block_nearer_to_every_source(
    family: str, library: Library, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """From where adaptation starts; anchors are few here, passes too."""
    base, sources = library(family)
    small = {"num_anchors": 8, "steps": 10, "epochs": 10}
    caplog.set_level("DEBUG", logger="hf_fda")
    merged = hf_fda.merge(base, sources, output=tmp_path / "merged", device="cpu", quiet=True, **small)
    assert_good(family, merged.folder)
    found = [re.search(r"distance (\S+) before, (\S+) after", record.getMessage()) for record in caplog.records]
    distances = [(float(one[1]), float(one[2])) for one in found if one]
    assert len(distances) == 2
    assert all(after < before for before, after in distances)


# -- properties --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("method", "options"), [("task_arithmetic", {"scaling": 1.0}), ("linear", {"weights": [1.0]})])
def test_one_source_of_weight_one_gives_that_source(
    family: str, method: str, options: dict[str, Any], library: Library, tmp_path: Path
) -> None:
    base, (source, _) = library(family)
    merged = merge(base, [source], method, tmp_path / "merged", heads="merge", **options)
    assert_same(weights(merged.folder), weights(source))


@pytest.mark.parametrize("family", ["bert", "roberta", "vit", "clip-image"])
def test_one_source_with_its_own_head_is_that_source(family: str, library: Library, tmp_path: Path) -> None:
    base, (source, _) = library(family)
    merged = merge(base, {"task": source}, "task_arithmetic", tmp_path / "merged", scaling=1)
    assert_same(merged.load("task").state_dict(), loaded(source).state_dict())


@pytest.mark.parametrize("family", MODELS)
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
    left, right = weights(one.folder), weights(two.folder)
    for name in left:  # a tie between two float32 numbers may fall to either
        torch.testing.assert_close(left[name], right[name], rtol=1.2e-7, atol=1e-12)


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


@pytest.mark.parametrize(
    ("family", "method", "options"),
    [
        *(("qwen2-moe", method, METHODS[method]) for method in ("task_arithmetic", "tsv", "wudi")),
        ("llama", "wudi", {"solver": "closed_form"}),
        *((family, "fda", {}) for family in ("bert", "qwen2-moe", "t5")),
        ("vit", "fda", {"initial": "task_arithmetic", "rest": "linear", "initialization": "gaussian"}),
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
    blocks = [files(merged.folder / "anchors/a/blocks") for merged in (one, two)]
    assert blocks[0].keys() == blocks[1].keys()
    assert all(blocks[0][name] != blocks[1][name] for name in blocks[0])


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
@pytest.mark.parametrize("family", ["llama", "vit"])
def test_a_source_equal_to_the_base_gives_no_nan(method: str, family: str, library: Library, tmp_path: Path) -> None:
    base, _ = library(family)
    merged = merge(base, {"same": base}, method, tmp_path / "merged", **METHODS.get(method, {}))
    found = weights(merged.folder)
    assert all(bool(tensor.isfinite().all()) for tensor in found.values())
    for name, tensor in weights(base).items():  # Adam makes small steps of rounding noise
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-4)
    if method in ("task_arithmetic", "linear"):
        assert_same(found, weights(base))


def test_a_source_equal_to_the_base_beside_others_adds_nothing(library: Library, tmp_path: Path) -> None:
    base, (source, _) = library("llama")
    with_it = merge(base, {"a": source, "same": base}, "task_arithmetic", tmp_path / "with")
    without = merge(base, {"a": source}, "task_arithmetic", tmp_path / "without")
    assert_same(weights(with_it.folder), weights(without.folder))
    for method, options in (("fda", {}), ("wudi", {"solver": "closed_form"})):
        both = merge(base, {"a": source, "same": base}, method, tmp_path / method, **options)
        assert_good("llama", both.folder)


# -- what goes in ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["task_arithmetic", "fda"])
@pytest.mark.parametrize("family", ["qwen2-moe", "vit", "qwen2"])
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


def rename(folder: Path, change: Callable[[str], str]) -> None:
    """Rename the tensors in a folder's weight file."""
    tensors = {change(name): tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def old_norms(name: str) -> str:
    """The name that a layer norm's tensor had in checkpoints of BERT's time."""
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


@pytest.mark.parametrize(
    ("family", "old"), [("bert", old_norms), ("gpt2", lambda name: name.removeprefix("transformer."))]
)
@pytest.mark.parametrize("method", ["linear", "fda"])
def test_a_base_with_names_of_old_merges_with_new_sources(
    family: str, old: Callable[[str], str], method: str, library: Library, tmp_path: Path
) -> None:
    base, sources = library(family)
    shutil.copytree(base, tmp_path / "old")
    rename(tmp_path / "old", old)
    assert weights(tmp_path / "old").keys() != weights(base).keys()
    merged = merge(tmp_path / "old", sources, method, tmp_path / "merged")
    assert_good(family, merged.folder)
    assert_same(weights(merged.folder), weights(merge(base, sources, method, tmp_path / "new").folder))


def test_a_sharded_source_merges_as_a_single_file(library: Library, tmp_path: Path) -> None:
    base, (source, _) = library("qwen2-moe")
    loaded(source).save_pretrained(tmp_path / "one", max_shard_size="20KB")
    assert len(list((tmp_path / "one").glob("*.safetensors"))) > 1
    sharded = merge(base, [tmp_path / "one"], "tsv", tmp_path / "sharded")
    single = merge(base, [source], "tsv", tmp_path / "single")
    assert_same(weights(sharded.folder), weights(single.folder))
