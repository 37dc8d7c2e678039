"""A merge that is killed goes on where it stopped, redoes only what it must, and ends in the same bytes."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import files as contents

import hf_fda
from hf_fda.errors import RunError
from hf_fda.store import WORK, Filled, Store

SETTINGS: dict[str, Any] = {
    "method": "fda",
    "initial": "task_arithmetic",
    "num_anchors": 8,
    "steps": 20,
    "epochs": 5,
    "max_shard_bytes": 20_000,
    "quiet": True,
    "device": "cpu",
}


def times(folder: Path, pattern: str) -> dict[str, int]:
    """When each matching file was written."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.glob(pattern)}


def merge(base: Path, sources: dict[str, Path], output: Path, **changes: Any) -> None:
    """The merge under test."""
    torch.set_num_threads(1)
    hf_fda.merge(base, sources, output=output, **{**SETTINGS, **changes})


def test_killed_five_times_it_ends_in_the_same_bytes(classifiers: Any, tmp_path: Path) -> None:
    base, sources = classifiers
    merge(base, sources, tmp_path / "undisturbed")
    start = time.monotonic()
    merge(base, sources, tmp_path / "again")
    duration = time.monotonic() - start
    output, chance = tmp_path / "killed", random.Random(0)
    context = multiprocessing.get_context("fork")
    killed = 0
    for _ in range(5):
        process = context.Process(target=merge, args=(base, sources, output))
        process.start()
        time.sleep(chance.uniform(0.05, 0.6) * duration)
        if process.is_alive():
            os.kill(process.pid or 0, signal.SIGKILL)
            killed += 1
        process.join()
        if (output / "config.json").exists():  # what looks finished is finished
            assert contents(output) == contents(tmp_path / "undisturbed")
    assert killed
    merge(base, sources, output)
    assert contents(output) == contents(tmp_path / "undisturbed")


def test_a_finished_merge_is_not_done_again(classifiers: Any, tmp_path: Path) -> None:
    base, sources = classifiers
    merge(base, sources, tmp_path / "out")
    before = times(tmp_path / "out", "model*.safetensors"), times(tmp_path / "out", "anchors/*/blocks/*")
    merge(base, sources, tmp_path / "out")
    assert before == (times(tmp_path / "out", "model*.safetensors"), times(tmp_path / "out", "anchors/*/blocks/*"))


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_only_a_damaged_anchors_file_is_made_again(classifiers: Any, tmp_path: Path, damage: str) -> None:
    base, sources = classifiers
    output = tmp_path / "out"
    merge(base, sources, output)
    whole, before = contents(output), times(output, "anchors/*/blocks/*")
    victim = output / "anchors" / "three" / "blocks" / "encoder.layer.1.safetensors"
    data = bytearray(victim.read_bytes())
    if damage == "flipped":
        data[-5] ^= 1
    if damage == "truncated":
        data = data[:-100]
    victim.unlink() if damage == "missing" else victim.write_bytes(data)
    merge(base, sources, output)
    after = times(output, "anchors/*/blocks/*")
    assert contents(output) == whole
    assert {name for name in before if before[name] != after[name]} == {str(victim.relative_to(output))}


def test_a_damaged_weight_file_is_made_again(classifiers: Any, tmp_path: Path) -> None:
    base, sources = classifiers
    output = tmp_path / "out"
    merge(base, sources, output)
    whole, before = contents(output), times(output, "anchors/*/blocks/*")
    victim = sorted(output.glob("model-*.safetensors"))[2]
    data = bytearray(victim.read_bytes())
    data[-3] ^= 8
    victim.write_bytes(data)
    merge(base, sources, output)
    assert contents(output) == whole
    assert times(output, "anchors/*/blocks/*") == before


def test_a_changed_setting_of_adaptation_keeps_the_anchors(classifiers: Any, tmp_path: Path) -> None:
    base, sources = classifiers
    output = tmp_path / "out"
    merge(base, sources, output)
    whole, before = contents(output), times(output, "anchors/*/blocks/*")
    merge(base, sources, output, epochs=6)
    assert times(output, "anchors/*/blocks/*") == before
    now = contents(output)
    assert any(now[name] != whole[name] for name in whole if name.startswith("model-"))
    merge(base, sources, tmp_path / "fresh", epochs=6)
    assert contents(output) == contents(tmp_path / "fresh")


def test_fewer_weight_files_leave_none_of_the_old_behind(classifiers: Any, tmp_path: Path) -> None:
    base, sources = classifiers
    output = tmp_path / "out"
    merge(base, sources, output)
    merge(base, sources, output, max_shard_bytes=10**9)
    assert [path.name for path in output.glob("model*")] == ["model.safetensors"]


def test_a_retrained_source_is_constructed_again(classifiers: Any, tmp_path: Path) -> None:
    base, sources = classifiers
    output = tmp_path / "out"
    merge(base, sources, output)
    before = times(output, "anchors/*/blocks/*")
    weights = sources["two"] / "model.safetensors"
    os.utime(weights, ns=(weights.stat().st_atime_ns, weights.stat().st_mtime_ns + 10**9))
    merge(base, sources, output)
    after = times(output, "anchors/*/blocks/*")
    assert {name.split("/")[1] for name in before if before[name] != after[name]} == {"two"}


def test_a_loss_that_is_not_finite_stops_with_the_block_named(classifiers: Any, tmp_path: Path) -> None:
    base, sources = classifiers
    with pytest.raises(RunError, match=r"encoder\.layer\.0.*two.*learning_rate"):
        merge(base, sources, tmp_path / "out", learning_rate=1e30)
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_full_disk_on_the_way_is_named_and_the_merge_goes_on_later(
    classifiers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, sources = classifiers
    real = Store.fill

    def full(self: Store, name: str, key: str, writer: Any) -> Filled:
        def failing(path: Path) -> None:
            raise OSError(28, "No space left on device")

        return real(self, name, key, failing if "layer.1" in name else writer)

    monkeypatch.setattr(Store, "fill", full)
    with pytest.raises(RunError, match="no space left"):
        merge(base, sources, tmp_path / "out")
    monkeypatch.setattr(Store, "fill", real)
    merge(base, sources, tmp_path / "out")
    merge(base, sources, tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    assert not list((tmp_path / "out" / WORK).glob("partial/*"))
