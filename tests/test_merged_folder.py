"""What a plan promises and a merged folder holds: weights of each type, files beside them, a merge to run again."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
import yaml
from checks import FAST, METHODS, assert_good, assert_same, files, loaded, merge, weights
from conftest import fine_tune, make_model
from safetensors.torch import load_file

import hf_fda
from hf_fda.block_losses import LOSSES, LOSSES_PICTURE
from hf_fda.cli import main

Library = Callable[[str], tuple[Path, list[Path]]]


# -- plan --------------------------------------------------------------------------------------------------------------


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
    for word in ("memory", "disk", "num_anchors=4", "config.json", "merge_config.yaml", "README.md", "card.json"):
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
    expected = {
        "config.json",
        "merge_config.yaml",
        "README.md",
        "card.json",
        "model.safetensors.index.json",
        "task_heads",
    }
    fitted = {"anchors", LOSSES, LOSSES_PICTURE} if method == "fda" else set()
    assert top == expected | {shard.file for shard in plan.shards} | fitted
    size = sum(len(content) for name, content in files(merged.folder).items() if name.endswith(".safetensors"))
    assert plan.disk_bytes > 0.5 * size


def test_methods_are_listed_with_their_options() -> None:
    known = hf_fda.methods()
    assert {"fda", *METHODS} <= known.keys()
    assert "arXiv" in known["fda"].paper
    assert {"scaling", "weights"} <= {option.name for option in known["task_arithmetic"].options}


# -- types, shards, files beside the weights ---------------------------------------------------------------------------


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
    names = [base.name, *(folder.name for folder in tasks.values())]
    words = [*names, "num_anchors", "unknown", "hf-fda merge", "torch", "transformers"]
    for word in [*words, hf_fda.methods()["fda"].paper]:
        assert word in text
    assert str(base.parent) not in text


# -- rest --------------------------------------------------------------------------------------------------------------


def test_rest_base_keeps_the_embeddings_of_the_base(classifiers: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    base, tasks = classifiers
    merged = weights(merge(base, tasks, "fda", tmp_path / "merged", rest="base").folder)
    for name, tensor in weights(base).items():
        kept = name.startswith(("embeddings.", "pooler.")) or name.endswith("key.bias")
        assert torch.equal(tensor, merged[name]) == kept


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
            kept = name.startswith("pooler.") or name.endswith("key.bias")
            assert kept == torch.equal(merged[name], held[name])


@pytest.mark.parametrize("unit", ["mlp", "block"])
def test_rest_of_a_language_model_is_all_that_lies_outside_the_blocks(
    unit: str, library: Library, tmp_path: Path
) -> None:
    base, sources = library("llama")
    rest = {"method": "task_arithmetic", "scaling": 0.3}
    merged = weights(merge(base, sources, "fda", tmp_path / "merged", rest=rest, unit=unit).folder)
    plain = weights(merge(base, sources, "task_arithmetic", tmp_path / "plain", scaling=0.3).folder)
    held = weights(base)
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(merged[name], plain[name])
    query = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(merged[query], held[query]) == (unit == "mlp")
    assert not torch.equal(merged["model.layers.0.mlp.up_proj.weight"], held["model.layers.0.mlp.up_proj.weight"])


# -- merge_config.yaml -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("task_arithmetic", {"scaling": 0.25, "weights": {"two": 1, "three": 2, "four": 0.5}}),
        ("linear", {"weights": [1, 2, 3], "normalize": False}),
        ("wudi", {"solver": "closed_form"}),
        ("tsv", {"rank_fraction": 0.5, "dtype": "bfloat16", "max_shard_bytes": 30_000}),
        ("fda", {"seed": 5}),
        ("fda", {"initial": "tsv", "scaling": 0.8, "rest": "linear", "unit": ["attention", "output"]}),
        ("fda", {"patience": None}),
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
    words += ["--rest", "base", "--parametrization", "parameters"]
    words += ["--num-anchors", "4", "--steps=3", "--epochs", "2", "--seed", "7", "--device", "cpu", "--quiet"]
    assert main([*words, "--output", str(tmp_path / "command")]) == 0
    tasks = {"a": sources[0], "b": sources[1]}
    options: dict[str, Any] = {"initial": "task_arithmetic", "scaling": 0.3, "unit": ["attention", "output"], "seed": 7}
    by_function = merge(base, tasks, "fda", tmp_path / "function", **options)
    assert files(tmp_path / "command") == files(by_function.folder)


def test_what_is_merged_says_what_it_is(classifiers: Any, tmp_path: Path) -> None:
    base, sources = classifiers
    given = (base, sources, "ties", tmp_path / "<out>")
    plan = hf_fda.plan(*given, device="cpu")
    assert plan._repr_html_().count("<tr>") == len(str(plan).splitlines()) - 1
    merged = hf_fda.merge(*given, device="cpu", quiet=True)
    for text in (repr(merged), merged._repr_html_()):
        assert all(word in text for word in ("ties", *sources, "whole model"))
    assert "&lt;out&gt;" in merged._repr_html_() and "<out>" not in plan._repr_html_()
    assert "not finished" in repr(hf_fda.Merged(tmp_path / "nothing"))


def test_the_card_says_what_the_run_took_also_when_it_is_made_again(classifiers: Any, tmp_path: Path) -> None:
    base, sources = classifiers
    given = (base, sources, "ties", tmp_path / "out")
    card = hf_fda.merge(*given, device="cpu", quiet=True).folder / "README.md"
    text = card.read_text(encoding="utf-8")
    took = re.search(r"It took ([\d.]+) seconds on .* thread.*; the process held at most ([\d,]+) MB", text)
    assert took is not None and float(took[1]) < 100 and int(took[2].replace(",", "")) > 50
    assert "went on" not in text
    hf_fda.merge(*given, device="cpu", quiet=True)  # nothing to do
    assert card.read_text(encoding="utf-8") == text
    (tmp_path / "out" / "model.safetensors").unlink()
    hf_fda.merge(*given, device="cpu", quiet=True)
    assert "It took" in card.read_text(encoding="utf-8")


def test_the_card_says_what_the_model_does_and_in_which_languages(saved: Any, tmp_path: Path) -> None:
    base, (one, two) = saved("llama", 2)
    (one / "README.md").write_text("---\nlanguage: [en, de]\n---\n", encoding="utf-8")
    (two / "README.md").write_text("---\nlanguage: en\n---\n", encoding="utf-8")
    merged = hf_fda.merge(base, [one, two], "linear", tmp_path / "out", device="cpu", quiet=True)
    metadata = yaml.safe_load((merged.folder / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert metadata["pipeline_tag"] == "text-generation"
    assert metadata["language"] == ["en", "de"]
