"""Anchors that are kept on their way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import files

from hf_fda import FunctionalDualAnchors, InputError

SMALL: dict[str, Any] = {"device": "cpu", "num_anchors": 4, "quiet": True}
Library = Callable[[str], tuple[Path, list[Path]]]


def test_snapshots_are_what_fewer_steps_give(library: Library) -> None:
    base, (source, _) = library("bert")
    options: dict[str, Any] = {**SMALL, "optimizer": "adamw", "steps": 3}
    made = FunctionalDualAnchors.construct(base, source, snapshots=[0, 1, 3], **options)
    start = FunctionalDualAnchors.construct(base, source, **{**options, "steps": 0})
    for block in made:
        kept = made.snapshots(block)
        assert list(kept) == [0, 1, 3]
        assert torch.equal(kept[0], start[block].anchors)
        assert not torch.equal(kept[0], kept[1])
        assert kept[3].shape == made[block].anchors.shape


def test_they_lie_beside_the_blocks_and_change_nothing_else(library: Library, tmp_path: Path) -> None:
    base, (source, _) = library("bert")
    plain = FunctionalDualAnchors.construct(base, source, output=tmp_path / "plain", steps=2, **SMALL)
    kept = FunctionalDualAnchors.construct(
        base, source, output=tmp_path / "kept", steps=2, snapshots=[0, 2, 50], **SMALL
    )
    more = files(tmp_path / "kept")
    assert {name for name in more if name.startswith("snapshots/")} == {
        f"snapshots/{block}.safetensors" for block in kept
    }
    assert {name: own for name, own in more.items() if not name.startswith("snapshots/")} == files(tmp_path / "plain")
    assert plain.snapshots(plain.blocks[0]) == {}
    opened = FunctionalDualAnchors.from_pretrained(tmp_path / "kept")
    assert list(opened.snapshots(opened.blocks[1])) == [0, 2]


def test_a_folder_without_them_gets_them(library: Library, tmp_path: Path) -> None:
    base, (source, _) = library("bert")
    for snapshots in ([], [1]):
        made = FunctionalDualAnchors.construct(
            base, source, output=tmp_path / "a", steps=2, snapshots=snapshots, **SMALL
        )
    assert all(list(made.snapshots(block)) == [1] for block in made)
    made.save_pretrained(tmp_path / "copy")
    copy = FunctionalDualAnchors.from_pretrained(tmp_path / "copy")
    assert torch.equal(copy.snapshots(copy.blocks[0])[1], made.snapshots(made.blocks[0])[1])


@pytest.mark.parametrize("step", [-1, 1.5, True, "3"])
def test_what_is_no_number_of_steps(library: Library, step: Any) -> None:
    base, (source, _) = library("bert")
    with pytest.raises(InputError, match="no number of steps"):
        FunctionalDualAnchors.construct(base, source, snapshots=[step], **SMALL)


def test_a_damaged_file_is_named(library: Library, tmp_path: Path) -> None:
    base, (source, _) = library("bert")
    made = FunctionalDualAnchors.construct(base, source, output=tmp_path / "a", steps=1, snapshots=[1], **SMALL)
    path = tmp_path / "a/snapshots" / f"{made.blocks[0]}.safetensors"
    path.write_bytes((tmp_path / "a/blocks" / f"{made.blocks[0]}.safetensors").read_bytes())
    with pytest.raises(InputError, match="holds no snapshots"):
        made.snapshots(made.blocks[0])
