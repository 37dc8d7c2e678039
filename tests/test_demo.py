"""The demo, with a small budget: real images, real training, every merge."""

from __future__ import annotations

import builtins
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_fda
from hf_fda.demo import DemoResult, Settings, run_demo
from hf_fda.demo.merges import VARIANTS
from hf_fda.demo.table import NOTE, Row, format_table
from hf_fda.demo.tasks import TASKS, load_rows, shuffled

SMALL = Settings(base_epochs=5, fine_tune_epochs=2, steps=1, num_anchors=8, epochs=1)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DemoResult]:
    output = tmp_path_factory.mktemp("demo") / "out"
    with redirect_stdout(StringIO()) as printed:
        result = run_demo(output, quiet=True, settings=SMALL)
    assert printed.getvalue() == f"{result}\n"  # quiet: the table only
    return output, result


def test_rows_cover_every_method_and_are_accuracies(demo: tuple[Path, DemoResult]) -> None:
    rows = demo[1].rows
    labels = [row.label for row in rows]
    assert labels[:2] == ["individual models", "base with own heads"]
    assert all(any(label.startswith(name) for label in labels) for name in (*VARIANTS, "fda"))
    assert len(set(labels)) == len(labels)
    for row in rows:
        assert list(row.test) == list(TASKS)
        assert all(0 <= value <= 1 for value in (*row.test.values(), row.validation))


def test_individual_models_have_learned_their_tasks(demo: tuple[Path, DemoResult]) -> None:
    assert min(demo[1].rows[0].test.values()) > 0.3  # chance is 0.1


def test_every_merge_loads_for_every_task(demo: tuple[Path, DemoResult]) -> None:
    images = load_rows(0).test.images[:4]
    for row in demo[1].rows[1:]:
        assert row.folder is not None
        for task in TASKS:
            assert hf_fda.load(row.folder, task=task)(pixel_values=images).logits.shape == (4, 10)


def test_best_is_chosen_on_validation_rows_and_anchors_stay(demo: tuple[Path, DemoResult]) -> None:
    output, result = demo
    merged = [row for row in result.rows if row.folder is not None]
    assert result.best == max(merged, key=lambda row: row.validation).folder
    first = next(row for row in merged if row.label.startswith("fda"))
    assert first.folder is not None
    for task in TASKS:
        assert len(hf_fda.FunctionalDualAnchors.from_pretrained(first.folder / "anchors" / task)) == 4
    assert (first.folder / "README.md").is_file()
    assert "individual models" in (output / "demo.txt").read_text()


def test_second_run_reuses_models_and_measures_the_same(
    demo: tuple[Path, DemoResult], capsys: pytest.CaptureFixture[str]
) -> None:
    output, first = demo
    made = {path: path.stat().st_mtime_ns for path in output.glob("models/*/model.safetensors")}
    assert len(made) == 1 + len(TASKS)
    again = run_demo(output, settings=SMALL)
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert [row.test for row in again.rows] == [row.test for row in first.rows]
    assert "training" not in capsys.readouterr().out.split("individual models")[0]


def test_parts_share_no_image() -> None:
    digits = load_rows(3)
    parts = [{tuple(image.flatten().tolist()) for image in rows.images} for rows in digits.__dict__.values()]
    assert [len(rows.labels) for rows in digits.__dict__.values()] == [1000, 297, 500]
    assert not (parts[0] & parts[2]) and not (parts[1] & parts[2]) and not (parts[0] & parts[1])


def test_shuffling_moves_whole_blocks() -> None:
    images = torch.arange(64.0).view(1, 1, 8, 8)
    moved = shuffled(images)
    assert sorted(moved.flatten().tolist()) == sorted(images.flatten().tolist())
    block = moved[0, 0, :2, :2]
    assert (block - block[0, 0]).tolist() == [[0, 1], [8, 9]]


def test_table_shows_percent() -> None:
    text = format_table([Row("linear", {"a": 0.5, "b": 1.0}, 0.7, 0.25)])
    assert text.splitlines()[2].split() == ["linear", "50.0", "100.0", "75.0", "0.2"]
    assert text.endswith(NOTE)


def test_missing_sklearn_says_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(hf_fda.InputError, match="hf-fda\\[demo\\]"):
        run_demo(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(hf_fda.InputError, match="something else"):
        run_demo(tmp_path, settings=SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]
