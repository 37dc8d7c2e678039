"""Anchors that are published: what lies beside them, half precision, the card, and merges from them alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import FAST, assert_same, files, loaded, merge, weights
from conftest import fine_tune, make_model
from huggingface_hub import DatasetCard
from safetensors.torch import load_file

import hf_fda
from hf_fda.cli import main

Library = Callable[[str], tuple[Path, list[Path]]]
Classifiers = tuple[Path, dict[str, Path]]
Anchors = hf_fda.FunctionalDualAnchors

AT_HAND: dict[str, Any] = {"initial": "base", "parametrization": "parameters", "rest": None}


def construct(base: Any, source: Any, output: Path | None = None, **options: Any) -> Anchors:
    return Anchors.construct(base, source, device="cpu", quiet=True, output=output, **{**FAST, **options})


def published(base: Path, sources: dict[str, Path], folder: Path, **options: Any) -> dict[str, Path]:
    """Anchors folders of all sources with everything beside them."""
    for task, source in sources.items():
        construct(base, source, folder / task, include_rest=True, **options)
    return {task: folder / task for task in sources}


@pytest.fixture(params=["folders", "memory"])
def skills(request: pytest.FixtureRequest, classifiers: Classifiers, tmp_path: Path) -> dict[str, Any]:
    """Anchors of three classifiers with their rests and heads."""
    base, sources = classifiers
    both: dict[str, Any] = {"include_rest": True, "include_head": True}
    if request.param == "memory":
        return {task: construct(base, source, **both) for task, source in sources.items()}
    return {
        task: construct(base, source, tmp_path / "anchors" / task, **both).folder for task, source in sources.items()
    }


# -- merges from anchors alone ---------------------------------------------------------------------------------------


def test_a_merge_from_anchors_alone_equals_that_with_the_sources_at_hand(
    skills: dict[str, Any], classifiers: Classifiers, tmp_path: Path
) -> None:
    base, sources = classifiers
    alone = merge(base, skills, "fda", tmp_path / "alone", **AT_HAND)
    whole = merge(base, sources, "fda", tmp_path / "whole", **AT_HAND)
    assert (alone.folder / "model.safetensors").read_bytes() == (whole.folder / "model.safetensors").read_bytes()
    assert files(alone.folder / "task_heads") == files(whole.folder / "task_heads")
    assert alone.tasks == whole.tasks == sorted(sources)
    assert_same(alone.load("three").state_dict(), whole.load("three").state_dict())


@pytest.mark.parametrize("family", ["llama", "qwen2", "vit", "clip-vision", "t5", "bert-mlm"])
def test_families_merge_from_anchors_alone_as_with_the_sources(family: str, library: Library, tmp_path: Path) -> None:
    base, folders = library(family)
    sources = {"one": folders[0], "two": folders[1]}
    anchors = published(base, sources, tmp_path / "anchors", unit="block")
    options = {**AT_HAND, "unit": "block"}
    alone = merge(base, anchors, "fda", tmp_path / "alone", **options)
    assert_same(weights(alone.folder), weights(merge(base, sources, "fda", tmp_path / "whole", **options).folder))
    loaded(alone.folder)


@pytest.mark.parametrize("rest", [{"method": "linear"}, {"method": "task_arithmetic", "scaling": 1.0}])
def test_what_lies_outside_the_blocks_is_merged_by_any_method(
    rest: dict[str, Any], classifiers: Classifiers, tmp_path: Path
) -> None:
    base, sources = classifiers
    tuned = hf_fda.load(sources["two"])
    tuned.bert.embeddings.load_state_dict(hf_fda.load(base).embeddings.state_dict())
    tuned.save_pretrained(tmp_path / "half")
    two = {"half": tmp_path / "half", "three": sources["three"]}
    anchors = published(base, two, tmp_path / "anchors")
    assert not any("embeddings" in name for name in Anchors.from_pretrained(anchors["half"]).info.rest or ())
    options = {**AT_HAND, "rest": rest}
    alone = merge(base, anchors, "fda", tmp_path / "alone", **options, heads="keep")
    assert_same(weights(alone.folder), weights(merge(base, two, "fda", tmp_path / "whole", **options).folder))


def test_sources_and_anchors_mix(skills: dict[str, Any], classifiers: Classifiers, tmp_path: Path) -> None:
    base, sources = classifiers
    mixed = merge(base, {**sources, "three": skills["three"]}, "fda", tmp_path / "mixed", **AT_HAND)
    whole = merge(base, sources, "fda", tmp_path / "whole", **AT_HAND)
    assert_same(weights(mixed.folder), weights(whole.folder))
    assert files(mixed.folder / "task_heads") == files(whole.folder / "task_heads")


def test_the_rest_is_left_where_it_is_not_wanted_or_one_source_has_none(
    skills: dict[str, Any], classifiers: Classifiers, tmp_path: Path
) -> None:
    base, sources = classifiers
    bare = construct(base, sources["two"])
    own = weights(base)
    with_rest = merge(base, skills, "fda", tmp_path / "with", **AT_HAND)
    without = merge(base, skills, "fda", tmp_path / "without", **{**AT_HAND, "rest": "base"})
    mixed = merge(base, {**skills, "two": bare}, "fda", tmp_path / "mixed", **AT_HAND)
    name = "embeddings.word_embeddings.weight"
    assert not torch.equal(weights(with_rest.folder)[name], own[name])
    assert torch.equal(weights(without.folder)[name], own[name])
    assert torch.equal(weights(mixed.folder)[name], own[name])
    assert mixed.tasks == ["four", "three"]
    with pytest.raises(hf_fda.InputError, match=r"'two' is anchors only.*rest must then be"):
        merge(base, {**skills, "two": bare}, "fda", tmp_path / "no", rest="linear")


def test_running_merge_config_of_anchors_again_gives_the_same_bytes(classifiers: Classifiers, tmp_path: Path) -> None:
    base, sources = classifiers
    anchors = published(base, sources, tmp_path / "anchors", include_head=True)
    first = merge(base, anchors, "fda", tmp_path / "first", **AT_HAND)
    words = ["merge", str(first.folder / "merge_config.yaml"), "--output", str(tmp_path / "again"), "--quiet"]
    assert main(words) == 0
    assert files(tmp_path / "again") == files(first.folder)


def test_heads_beside_anchors_are_not_averaged(
    skills: dict[str, Any], classifiers: Classifiers, tmp_path: Path
) -> None:
    with pytest.raises(hf_fda.InputError, match=r"heads='merge'.*anchors only"):
        merge(classifiers[0], skills, "fda", tmp_path / "merged", heads="merge")


def test_only_what_differs_from_the_base_lies_in_the_rest(classifiers: Classifiers, tmp_path: Path) -> None:
    base, sources = classifiers
    tuned = hf_fda.load(sources["two"])
    own = hf_fda.load(base).state_dict()
    for name, value in tuned.bert.state_dict().items():
        if "word_embeddings" not in name:
            value.copy_(own[name])
    tuned.save_pretrained(tmp_path / "words")
    anchors = construct(base, tmp_path / "words", tmp_path / "anchors", include_rest=True)
    assert anchors.info.rest == ("embeddings.word_embeddings.weight",)
    stored = load_file(tmp_path / "anchors/rest.safetensors")
    assert torch.equal(stored["embeddings.word_embeddings.weight"], tuned.bert.embeddings.word_embeddings.weight)


def test_a_source_without_a_head_gives_none(library: Library, tmp_path: Path) -> None:
    base, (one, _) = library("llama")
    with pytest.raises(hf_fda.InputError, match=r"LlamaForCausalLM, which has no task head"):
        construct(base, one, tmp_path / "anchors", include_head=True)
    assert not (tmp_path / "anchors").exists()


def test_saved_anchors_keep_what_lies_beside_them(skills: dict[str, Any], tmp_path: Path) -> None:
    given = skills["two"]
    anchors = given if isinstance(given, Anchors) else Anchors.from_pretrained(given)
    anchors.save_pretrained(tmp_path / "first")
    Anchors.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    assert files(tmp_path / "first") == files(tmp_path / "second")
    assert {"rest.safetensors", "task_head/model.safetensors", "task_head/config.json"} <= set(
        files(tmp_path / "first")
    )


def test_the_command_puts_rest_and_head_beside_the_anchors(classifiers: Classifiers, tmp_path: Path) -> None:
    base, sources = classifiers
    words = [
        "--base",
        str(base),
        "--source",
        str(sources["two"]),
        "--output",
        str(tmp_path / "told"),
        "--device",
        "cpu",
    ]
    options = [word for name, value in FAST.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    extra = ["--with-rest", "--with-head", "--dtype", "bfloat16", "--quiet"]
    assert main(["anchors", *words, *extra, *options]) == 0
    construct(base, sources["two"], tmp_path / "called", include_rest=True, include_head=True, dtype="bfloat16")
    assert files(tmp_path / "told") == files(tmp_path / "called")


# -- another base ----------------------------------------------------------------------------------------------------


def test_anchors_of_another_revision_of_the_base_are_refused_unless_forced(
    classifiers: Classifiers, tmp_path: Path
) -> None:
    base, sources = classifiers
    anchors = {"two": construct(base, sources["two"], tmp_path / "anchors")}
    fine_tune(hf_fda.load(base), seed=7, size=1e-4).save_pretrained(tmp_path / "later")
    with pytest.raises(hf_fda.InputError, match=r"'two'.*another revision of the base.*'base'.*later.*force"):
        hf_fda.plan(tmp_path / "later", anchors, output=tmp_path / "merged", device="cpu")
    assert not (tmp_path / "merged").exists()
    forced = merge(tmp_path / "later", anchors, "fda", tmp_path / "merged", force=True)
    words = ["merge", str(forced.folder / "merge_config.yaml"), "--output", str(tmp_path / "again"), "--quiet"]
    assert main(words) == 0
    assert files(tmp_path / "again") == files(forced.folder)
    assert (
        main(["merge", "--base", str(tmp_path / "later"), "--source", str(tmp_path / "anchors"), "--output", "x"]) == 2
    )


def test_the_same_base_elsewhere_is_the_same(classifiers: Classifiers, tmp_path: Path) -> None:
    base, sources = classifiers
    anchors = {"two": construct(base, sources["two"], tmp_path / "anchors")}
    hf_fda.load(base).save_pretrained(tmp_path / "copy", max_shard_size="20kB")
    one = merge(tmp_path / "copy", anchors, "fda", tmp_path / "one")
    two = merge(hf_fda.load(base), anchors, "fda", tmp_path / "held")
    assert_same(weights(one.folder), weights(two.folder))


# -- half precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_the_nearest_and_measured(dtype: str, classifiers: Classifiers, tmp_path: Path) -> None:
    base, sources = classifiers
    whole = construct(base, sources["two"], epochs=30, adaptation_learning_rate=1e-3)
    options: dict[str, Any] = {"epochs": 30, "adaptation_learning_rate": 1e-3, "dtype": dtype}
    half = construct(base, sources["two"], tmp_path / "half", **options)
    kind = getattr(torch, dtype)
    for block in whole:
        stored = load_file(tmp_path / "half" / f"blocks/{block}.safetensors")
        assert torch.equal(stored["anchors"], whole[block].anchors.to(kind))
        assert torch.equal(stored["targets"], whole[block].targets.to(kind))
        assert torch.equal(half[block].targets, stored["targets"].float())
        rounding = half.info.rounding[block]
        assert 0 < rounding["change"] < 0.5
        assert rounding["left"] < 0.9
        assert rounding["left_stored"] == pytest.approx(rounding["left"], abs=0.02)
    assert half.info.dtype == dtype
    assert construct(base, sources["two"], **options).info == half.info
    card = (tmp_path / "half/README.md").read_text(encoding="utf-8")
    assert f"stored as {dtype}" in card
    assert f"| {half.blocks[0]} | {100 * half.info.rounding[half.blocks[0]]['change']:.3g} %" in card
    half.save_pretrained(tmp_path / "again")
    first, again = files(tmp_path / "half"), files(tmp_path / "again")
    assert first == again


def test_the_measured_change_is_that_of_the_merge(classifiers: Classifiers, tmp_path: Path) -> None:
    base, sources = classifiers
    how = {"epochs": 20, "adaptation_learning_rate": 1e-3}
    construct(base, sources["two"], tmp_path / "float32", **how)
    half = construct(base, sources["two"], tmp_path / "float16", dtype="float16", **how)
    found = {
        dtype: weights(merge(base, {"two": tmp_path / dtype}, "fda", tmp_path / f"merged-{dtype}", **how).folder)
        for dtype in ("float32", "float16")
    }
    own = weights(base)
    for block in half.blocks:
        names = [name for name in own if name.startswith(f"{block}.")]
        moved, apart = (
            torch.cat([(found[left][name] - right[name]).flatten() for name in names]).norm()
            for left, right in (("float32", own), ("float16", found["float32"]))
        )
        assert float(apart / moved) == pytest.approx(half.info.rounding[block]["change"], rel=1e-3)


def test_saving_in_half_precision_measures_on_the_base(classifiers: Classifiers, tmp_path: Path) -> None:
    base, sources = classifiers
    whole = construct(base, sources["two"])
    with pytest.raises(hf_fda.InputError, match=r"measured on the base.*base=\.\.\."):
        whole.save_pretrained(tmp_path / "half", dtype="bfloat16")
    with pytest.raises(hf_fda.InputError, match=r"not what the anchors were constructed from"):
        whole.save_pretrained(tmp_path / "half", dtype="bfloat16", base=fine_tune(hf_fda.load(base), 5))
    with pytest.raises(hf_fda.InputError, match=r"dtype 'bfloat61'.*bfloat16"):
        whole.save_pretrained(tmp_path / "half", dtype="bfloat61", base=base)
    assert not (tmp_path / "half").exists()
    whole.save_pretrained(tmp_path / "half", dtype="bfloat16", base=base, device="cpu")
    half = Anchors.from_pretrained(tmp_path / "half")
    assert set(half.info.rounding) == set(half.blocks)
    with pytest.raises(hf_fda.InputError, match=r"stored as bfloat16 already"):
        half.save_pretrained(tmp_path / "more", dtype="float16", base=base)


def test_what_float16_cannot_hold_is_refused(classifiers: Classifiers, tmp_path: Path) -> None:
    base, sources = classifiers
    whole = construct(base, sources["two"])
    block = whole.blocks[0]
    large = {**{name: whole[name] for name in whole}, block: replace(whole[block], targets=whole[block].targets + 1e5)}
    with pytest.raises(hf_fda.RunError, match=r"too large for float16"):
        Anchors(whole.info, large).save_pretrained(tmp_path / "half", dtype="float16", base=base, device="cpu")
    assert not (tmp_path / "half/anchors.json").exists()


# -- the card and the table ------------------------------------------------------------------------------------------


def test_the_card_says_what_the_anchors_are_and_no_path_of_this_machine(
    classifiers: Classifiers, tmp_path: Path
) -> None:
    base, sources = classifiers
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n", encoding="utf-8")
    (sources["two"] / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    construct(base, sources["two"], tmp_path / "anchors", include_rest=True, include_head=True, seed=3)
    text = (tmp_path / "anchors/README.md").read_text(encoding="utf-8")
    for path in (tmp_path / "anchors").rglob("*"):
        if path.is_file() and ".cache" not in path.parts:
            assert str(tmp_path).encode() not in path.read_bytes()
    card = DatasetCard(text)
    assert card.data.configs == [{"config_name": "default", "data_files": "index/anchors.parquet"}]
    assert card.data.license is None
    for said in ("apache-2.0", "mit", "Seed 3", "num_anchors | 4", "rest.safetensors", "task_head/", "a local model"):
        assert said in text
    same = "---\nlicense: mit\n---\n"
    (base / "README.md").write_text(same, encoding="utf-8")
    construct(base, sources["two"], tmp_path / "again")
    assert DatasetCard.load(tmp_path / "again/README.md").data.license == "mit"


def test_the_usage_in_the_card_runs(classifiers: Classifiers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, sources = classifiers
    construct(base, sources["two"], tmp_path / "anchors", include_head=True, num_tokens=2)
    text = (tmp_path / "anchors/README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    code = code.replace("PATH_OR_DATASET_ID", str(tmp_path / "anchors")).replace("PATH_TO_BASE", str(base))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["model"].classifier.out_features == 2


def test_the_index_is_a_useful_table(classifiers: Classifiers, tmp_path: Path) -> None:
    from datasets import load_dataset

    base, sources = classifiers
    anchors = construct(base, sources["two"], tmp_path / "anchors", include_rest=True, include_head=True)
    table = load_dataset(str(tmp_path / "anchors"), split="train", cache_dir=str(tmp_path / "cache"))
    assert table["block"] == anchors.blocks
    assert table.column_names[:5] == ["block", "file", "shape", "target_shape", "dtype"]
    for row in table:
        assert row["bytes"] == (tmp_path / "anchors" / row["file"]).stat().st_size
        assert row["loss"] == anchors[row["block"]].loss
    assert anchors.index == table.to_list()


def test_anchors_show_their_blocks(classifiers: Classifiers, tmp_path: Path) -> None:
    base, sources = classifiers
    held = construct(base, sources["two"], include_head=True)
    held.save_pretrained(tmp_path / "anchors")
    opened = Anchors.from_pretrained(tmp_path / "anchors")
    for anchors in (held, opened):
        for text in (repr(anchors), anchors._repr_html_()):
            for block in anchors:
                assert block in text
                assert f"{anchors[block].loss:.4f}" in text
            assert "4 x 5 x 32" in text
            assert "two from base, 2 blocks, with task head" in text
    (tmp_path / "anchors/index/anchors.parquet").unlink()
    assert all(block in repr(opened) and block in opened._repr_html_() for block in opened)
    many = replace(held.info, units=tuple(f"layer.{number}" for number in range(30)))
    units = {name: held[held.blocks[0]] for name in many.units}
    assert "and 18 more blocks" in repr(Anchors(many, units))


def test_a_manifest_that_says_less_is_read(classifiers: Classifiers, tmp_path: Path) -> None:
    base, sources = classifiers
    construct(base, sources["two"], tmp_path / "anchors")
    path = tmp_path / "anchors/anchors.json"
    facts = json.loads(path.read_text(encoding="utf-8"))
    old = {name: value for name, value in facts.items() if name not in ("dtype", "rounding", "rest", "head")}
    old |= {"base": {"id": str(base), "commit": None, "class": "BertModel"}}
    path.write_text(json.dumps(old), encoding="utf-8")
    anchors = Anchors.from_pretrained(tmp_path / "anchors")
    merge(base, {"two": anchors}, "fda", tmp_path / "merged")
    anchors.save_pretrained(tmp_path / "saved")
    assert str(tmp_path) not in (tmp_path / "saved/README.md").read_text(encoding="utf-8")


def test_a_model_in_memory_is_named_without_a_path(tmp_path: Path) -> None:
    base = make_model("bert")
    base.save_pretrained(tmp_path / "secret/base")
    again = type(base).from_pretrained(tmp_path / "secret/base")
    anchors = construct(again, fine_tune(again, 1), tmp_path / "anchors")
    assert "secret" not in (tmp_path / "anchors/anchors.json").read_text(encoding="utf-8")
    assert anchors.info.base["commit"] is None
