"""How well blocks were fitted: what a merge keeps of it, and what its card shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

import hf_fda
from hf_fda.anchors.files import INDEX, PICTURE, read_index
from hf_fda.block_losses import LOSSES, LOSSES_PICTURE, BlockLoss, BlockLosses
from hf_fda.errors import RunError

Library = Callable[[str], tuple[Path, list[Path]]]

FAST = {"num_anchors": 4, "num_tokens": 2, "steps": 3, "epochs": 3, "device": "cpu", "quiet": True}


def named(sources: list[Path]) -> dict[str, str]:
    """The sources by their tasks' names."""
    return {f"task{number}": str(path) for number, path in enumerate(sources)}


def test_a_merge_tells_the_losses_of_its_anchors_and_what_adaptation_left(library: Library, tmp_path: Path) -> None:
    base, sources = library("bert")
    merged = hf_fda.merge(base, named(sources), output=tmp_path / "m", **FAST)
    losses = merged.block_losses
    assert losses is not None and losses.sources == tuple(named(sources))
    for task in losses.sources:
        index = {row["block"]: row["loss"] for row in read_index(tmp_path / "m" / "anchors" / task / INDEX)}
        assert {row.block: row.construction[task] for row in losses.rows} == index
    assert all(row.before is not None and row.after is not None and row.after < row.before for row in losses.rows)
    card = (tmp_path / "m" / "README.md").read_text(encoding="utf-8")
    assert all(" | ".join(row) in card for row in losses.table())
    assert f"({LOSSES_PICTURE})" in card
    assert (tmp_path / "m" / LOSSES_PICTURE).read_bytes().startswith(b"\x89PNG")


def test_a_run_with_nothing_to_do_keeps_them(library: Library, tmp_path: Path) -> None:
    base, sources = library("bert")
    hf_fda.merge(base, named(sources), output=tmp_path / "m", **FAST)
    before = (tmp_path / "m" / LOSSES).read_bytes()
    hf_fda.merge(base, named(sources), output=tmp_path / "m", **FAST)
    assert (tmp_path / "m" / LOSSES).read_bytes() == before


def test_other_settings_in_the_same_folder_write_them_anew(library: Library, tmp_path: Path) -> None:
    base, sources = library("bert")
    first = hf_fda.merge(base, named(sources), output=tmp_path / "m", **FAST).block_losses
    second = hf_fda.merge(base, named(sources), output=tmp_path / "m", **{**FAST, "epochs": 5}).block_losses
    assert first is not None and second is not None
    assert [row.construction for row in first.rows] == [row.construction for row in second.rows]
    assert all(one.after != other.after for one, other in zip(first.rows, second.rows, strict=True))


def test_a_merge_that_fits_no_blocks_leaves_none_of_an_earlier_one(library: Library, tmp_path: Path) -> None:
    base, sources = library("bert")
    hf_fda.merge(base, named(sources), output=tmp_path / "m", **FAST)
    merged = hf_fda.merge(base, named(sources), method="linear", output=tmp_path / "m", device="cpu", quiet=True)
    assert merged.block_losses is None
    assert not (tmp_path / "m" / LOSSES_PICTURE).exists()
    assert "blocks were fitted" not in (tmp_path / "m" / "README.md").read_text(encoding="utf-8")


def test_anchors_that_were_given_tell_their_own_losses(library: Library, tmp_path: Path) -> None:
    base, sources = library("bert")
    options = {name: FAST[name] for name in ("num_anchors", "num_tokens", "steps", "device", "quiet")}
    anchors = hf_fda.FunctionalDualAnchors.construct(base, sources[0], output=tmp_path / "a", **options)
    merged = hf_fda.merge(base, {"task0": anchors, "task1": sources[1]}, output=tmp_path / "m", **FAST)
    assert merged.block_losses is not None
    index = {row["block"]: row["loss"] for row in anchors.index}
    assert {row.block: row.construction["task0"] for row in merged.block_losses.rows} == index
    card = (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    assert f"({PICTURE})" in card
    assert (tmp_path / "a" / PICTURE).is_file()


def test_what_is_not_known_stays_empty() -> None:
    losses = BlockLosses((BlockLoss("b", {"x": 0.5}), BlockLoss("c", {}, 0.5, 0.25)))
    assert losses.titles == ("block", "x", "distance before", "distance after")
    assert losses.table() == [("b", "0.5", "", ""), ("c", "", "0.5", "0.25")]
    assert [row.left for row in losses.rows] == [None, 0.5]


@pytest.mark.parametrize("text", ["", "[]", '{"rows": [{"blok": 1}]}'])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / LOSSES).write_text(text, encoding="utf-8")
    with pytest.raises(RunError, match=LOSSES):
        BlockLosses.read(tmp_path / LOSSES)


def test_pictures_do_not_change_the_weights(library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, sources = library("bert")
    hf_fda.merge(base, named(sources), output=tmp_path / "with", **FAST)
    for module in ("findings", "card_record", "anchors.files"):
        monkeypatch.setattr(f"hf_fda.{module}.can_draw", lambda: False)
    hf_fda.merge(base, named(sources), output=tmp_path / "without", **FAST)
    assert not list((tmp_path / "without").rglob("*.png"))
    assert "png" not in (tmp_path / "without" / "README.md").read_text(encoding="utf-8")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("with", "without"))
    assert all(one[name].equal(other[name]) for name in one)
