"""Rows that enter the merged model where they were, against rows that run through it from the beginning."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fine_tune, make_model
from test_real_states import CPU, rows_for
from torch import Tensor
from torch.utils.data import DataLoader

import hf_fda
from hf_fda.blocks import find_units
from hf_fda.checkpoint.reader import open_checkpoint
from hf_fda.preparing import propagated
from hf_fda.states.recording import StatesRecorder

LAYERS = {"gpt2": "n_layer", "t5": "num_layers"}


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """Where the recorders of merged models let rows in, one after the other."""
    found: list[str | None] = []

    class Noted(StatesRecorder):
        def __init__(self, weights: Any, units: Mapping[str, str], device: Any, entry: str | None = None) -> None:
            found.append(entry)
            super().__init__(weights, units, device, entry)

    monkeypatch.setattr(propagated, "StatesRecorder", Noted)
    return found


def family_of(name: str, folder: Path) -> tuple[Path, dict[str, Path], dict[str, Any]]:
    """A base of four blocks, two fine-tunes of it, and rows for each."""
    base = make_model(name, **{LAYERS.get(name, "num_hidden_layers"): 4}, decoder_start_token_id=0)
    base.save_pretrained(folder / "base")
    sources = {}
    for task, seed in (("one", 1), ("two", 2)):
        fine_tune(base, seed).save_pretrained(folder / task)
        sources[task] = folder / task
    rows = [dict(row) for row in rows_for(name).inputs]
    return folder / "base", sources, {task: DataLoader(rows, batch_size=1) for task in sources}  # type: ignore[arg-type]


def merged(family: tuple[Path, dict[str, Path], dict[str, Any]], output: Path, **options: Any) -> dict[str, Tensor]:
    base, sources, data = family
    settings = {"epochs": 2, "batch_size": 4, "device": "cpu", "quiet": True, **options}
    model = hf_fda.merge(base, sources, "distill", output=output, data=data, **settings).load()
    return dict(model.state_dict())


@pytest.mark.parametrize("name", ["bert", "roberta", "vit", "llama", "gpt2"])
def test_the_merge_is_the_same_and_no_block_runs_again(
    name: str, entries: list[str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = family_of(name, tmp_path)
    found = merged(family, tmp_path / "held")
    blocks = [unit.name for unit in find_units(open_checkpoint(family[1]["one"]).layout, ("block",))]
    assert entries == [None, None] + [block for block in blocks[:-1] for _ in range(2)]
    monkeypatch.setattr(propagated, "HELD_BYTES", 0)
    entries.clear()
    again = merged(family, tmp_path / "anew")
    assert entries == [None] * 8
    assert all(torch.equal(found[name], again[name]) for name in again)


def test_blocks_that_hand_on_more_are_found_out_once(
    entries: list[str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = family_of("deberta-v2", tmp_path)  # whose blocks give tuples
    found = merged(family, tmp_path / "held")
    assert sum(entry is not None for entry in entries) == 2 and len(entries) == 8 + 2
    monkeypatch.setattr(propagated, "HELD_BYTES", 0)
    again = merged(family, tmp_path / "anew")
    assert all(torch.equal(found[name], again[name]) for name in again)


@pytest.mark.parametrize(("name", "options"), [("t5", {}), ("bert", {"unit": ("attention", "output")})])
def test_parts_of_blocks_and_decoders_of_encoders_take_the_whole_way(
    name: str, options: dict[str, Any], entries: list[str | None], tmp_path: Path
) -> None:
    merged(family_of(name, tmp_path), tmp_path / "out", **options)
    assert set(entries) == {None}


def test_what_does_not_fit_is_not_held(
    entries: list[str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = family_of("bert", tmp_path)
    one = (6 + 4) * 8 * 32 * 4  # rows with some that run beside them, positions, width, bytes
    monkeypatch.setattr(propagated, "HELD_BYTES", one)
    merged(family, tmp_path / "out")
    assert [entry is None for entry in entries] == [True, True] + [False, True] * 3


def test_rows_are_followed_only_where_a_block_hands_on_its_output_alone() -> None:
    checkpoint = open_checkpoint(make_model("bert", num_hidden_layers=3))
    first, second = (unit.name for unit in find_units(checkpoint.layout, ("block",))[1:3])
    rows, numbers = rows_for("bert"), list(range(6))
    hidden = StatesRecorder(checkpoint, {first: first}, CPU).follow(rows, numbers, None).hidden
    whole = StatesRecorder(checkpoint, {second: second}, CPU).follow(rows, numbers, None)
    recorder = StatesRecorder(checkpoint, {second: second}, CPU, entry=first)
    found = recorder.follow(rows, numbers, hidden)
    assert found.straight and found.hidden is not None and whole.hidden is not None
    assert torch.equal(found.hidden, whole.hidden)
    assert torch.equal(found.states.inputs.values, whole.states.inputs.values)
    module = recorder.body.get_submodule(second.removeprefix("bert."))

    def between(_module: Any, args: Any, kwargs: Any) -> Any:
        return (2 * args[0], *args[1:]), kwargs

    module.register_forward_pre_hook(between, prepend=True, with_kwargs=True)
    assert not recorder.follow(rows, numbers, hidden).straight


@pytest.mark.parametrize(("name", "straight"), [("bert", True), ("deberta-v2", False)])
def test_a_whole_run_tells_whether_blocks_can_be_left_out(name: str, straight: bool) -> None:
    checkpoint = open_checkpoint(make_model(name, num_hidden_layers=3))
    unit = find_units(checkpoint.layout, ("block",))[2].name
    recorder = StatesRecorder(checkpoint, {unit: unit}, CPU)  # as where an interrupted merge goes on
    assert recorder.follow(rows_for(name), list(range(6)), None).straight is straight
