"""Anchors left by a merge: opened, constructed again, merged again, loaded as a dataset."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import FAST, assert_same, files, merge, weights
from conftest import fine_tune, make_model
from safetensors.torch import load_file

import hf_fda
from hf_fda.cli import main

Library = Callable[[str], tuple[Path, list[Path]]]


Merge = tuple[Path, dict[str, Path], hf_fda.Merged]


@pytest.fixture(scope="module")
def with_anchors(library: Library, tmp_path_factory: pytest.TempPathFactory) -> Merge:
    """A base, its sources, and their merge by anchors."""
    base, (one, two) = library("bert")
    sources = {"one": one, "two": two}
    return base, sources, merge(base, sources, "fda", tmp_path_factory.mktemp("anchors") / "merged")


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
        assert anchors.info.base["id"] == base.name
        assert anchors.info.source["id"] == source.name
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


@pytest.mark.parametrize("given_as", [Path, str, hf_fda.FunctionalDualAnchors.from_pretrained])
def test_anchors_made_before_are_used_again(
    given_as: Callable[[Path], Any], with_anchors: Merge, tmp_path: Path
) -> None:
    base, sources, merged = with_anchors
    anchors = {task: given_as(merged.folder / "anchors" / task) for task in sources}
    assert not hf_fda.plan(base, sources, "fda", tmp_path / "again", anchors=anchors, **FAST).constructions
    again = merge(base, sources, "fda", tmp_path / "again", anchors=anchors)
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
        with pytest.raises(hf_fda.InputError, match=r"'one' is anchors only.*base"):
            merge(base, anchors, "fda", tmp_path / "again", **options)
    with pytest.raises(hf_fda.InputError, match=r"'one' is anchors only.*'tsv' needs its weights"):
        merge(base, anchors, "tsv", tmp_path / "again")


def test_anchors_of_another_unit_are_refused(with_anchors: Merge, tmp_path: Path) -> None:
    base, sources, merged = with_anchors
    with pytest.raises(hf_fda.InputError, match=r"anchors of 'one'.*unit"):
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
    words += ["--base", str(base), "--source", str(sources["one"]), "--output", str(tmp_path / "anchors")]
    assert main(["anchors", *words, "--device", "cpu", "--quiet"]) == 0
    assert files(tmp_path / "anchors") == files(merged.folder / "anchors/one")


@pytest.mark.parametrize("how", ["beside", "alone", "opened", "beside and opened"])
def test_running_merge_config_with_given_anchors_again_gives_the_same_bytes(
    how: str, with_anchors: Merge, tmp_path: Path
) -> None:
    base, sources, merged = with_anchors
    folders = {task: merged.folder / "anchors" / task for task in sources}
    opened = {task: hf_fda.FunctionalDualAnchors.from_pretrained(folder) for task, folder in folders.items()}
    given: dict[str, Any] = {
        "beside": {"sources": sources, "anchors": folders},
        "alone": {"sources": folders},
        "opened": {"sources": opened},
        "beside and opened": {"sources": sources, "anchors": opened},
    }[how]
    first = merge(base, method="fda", output=tmp_path / "first", **given)
    assert main(["merge", str(first.folder / "merge_config.yaml"), "--output", str(tmp_path / "again"), "--quiet"]) == 0
    assert files(tmp_path / "again") == files(first.folder)
