"""The demo from images to table."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from hf_fda.demo.merges import Merge, merges
from hf_fda.demo.settings import Settings
from hf_fda.demo.table import Row, format_table
from hf_fda.demo.tasks import TASKS, Digits, Rows, load_rows
from hf_fda.demo.training import make_models, open_model
from hf_fda.errors import InputError
from hf_fda.merging import merge

MARK = "demo.txt"
"""A file that marks an output folder as the demo's; the table stands in it."""


@dataclass(frozen=True)
class DemoResult:
    """What a demo measured: the table's rows, and the folder of the merge that is best on the validation rows."""

    rows: tuple[Row, ...]
    best: Path

    def __str__(self) -> str:
        return format_table(self.rows)


def run_demo(output: Path, seed: int = 0, quiet: bool = False, settings: Settings | None = None) -> DemoResult:
    """Train a base and fine-tunes on real digits, merge them with every method, print a table of accuracies.

    Args:
        output: gets `models/` (base and fine-tunes) and `merged/` (a folder for each merge; that of the first fda
            row holds the anchors). Interrupted or repeated, the same call takes what is finished.
        seed: of the split, of the training and of the merges.
        quiet: print the table only.
        settings: the budget.

    Returns:
        the rows, individual models first.

    Raises:
        InputError: when scikit-learn is missing or the output folder holds something else.
    """
    settings = settings or Settings()
    digits = load_rows(seed)
    _claim(output)

    def say(text: str) -> None:
        if not quiet:
            print(text, flush=True)

    with _one_thread(), _silent_transformers():
        started = time.monotonic()
        base, tuned = make_models(output / "models", digits.train, settings, seed, say)
        models = {task: open_model(folder) for task, folder in tuned.items()}
        rows = [_row("individual models", models.__getitem__, digits, time.monotonic() - started)]
        anchors: dict[str, Path] = {}
        for entry in merges(settings):
            say(f"merging: {entry.label}")
            row = _merged_row(entry, output / "merged" / entry.folder, base, tuned, anchors, digits, seed, quiet)
            rows.append(row)
            if entry.method == "fda" and not anchors and row.folder is not None:
                anchors = {task: row.folder / "anchors" / task for task in TASKS}
    best = max((row for row in rows if row.folder is not None), key=lambda row: row.validation)
    assert best.folder is not None
    result = DemoResult(tuple(rows), best.folder)
    (output / MARK).write_text(f"{result}\n", encoding="utf-8")
    say("")
    print(result)
    say(f"\nBest merged model, chosen on validation images ({best.label}): {best.folder}\nLoad it with")
    say(f'  import hf_fda\n  model = hf_fda.load("{best.folder}", task="{next(iter(TASKS))}")  # {", ".join(TASKS)}')
    say(f"Anchors of the fda merges, to use again: {next(iter(anchors.values())).parent}")
    return result


@torch.no_grad()
def accuracy(model: Any, rows: Rows) -> float:
    """Fraction of the rows whose digit the model names."""
    return float((model(pixel_values=rows.images).logits.argmax(-1) == rows.labels).float().mean())


def _row(label: str, load: Callable[[str], Any], digits: Digits, seconds: float, folder: Path | None = None) -> Row:
    """Measure the models that `load` gives by task."""
    test, validation = {}, {}
    for task, disguise in TASKS.items():
        model = load(task)
        test[task] = accuracy(model, digits.test.seen_as(disguise))
        validation[task] = accuracy(model, digits.validation.seen_as(disguise))
    return Row(label, test, sum(validation.values()) / len(validation), seconds, folder)


def _merged_row(
    entry: Merge,
    folder: Path,
    base: Path,
    tuned: Mapping[str, Path],
    anchors: Mapping[str, Path],
    digits: Digits,
    seed: int,
    quiet: bool,
) -> Row:
    """Merge and measure."""
    started = time.monotonic()
    shared = dict(anchors) if entry.method == "fda" else {}
    merged = merge(
        base,
        dict(tuned),
        entry.method,
        folder,
        device="cpu",  # too small to gain from another, and the table is then the same with and without a GPU
        seed=seed,
        anchors=shared or None,
        quiet=quiet,
        **entry.options,
    )
    return _row(entry.label, merged.load, digits, time.monotonic() - started, folder)


def _claim(output: Path) -> None:
    """Take an output folder: new, empty, or of an earlier demo."""
    if output.exists() and not output.is_dir():
        raise InputError(f"output '{output}' is a file; choose a folder")
    if output.is_dir() and any(output.iterdir()) and not (output / MARK).is_file():
        raise InputError(f"output '{output}' holds something else; choose a new or empty folder")
    output.mkdir(parents=True, exist_ok=True)
    (output / MARK).touch()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one core: for tensors this small threads wait for each other longer than they work, many times longer
    where something else uses the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _silent_transformers() -> Iterator[None]:
    """Without transformers' own bars for each of many small files."""
    log = transformers.utils.logging
    bars, verbosity = log.is_progress_bar_enabled(), log.get_verbosity()
    log.disable_progress_bar()
    log.set_verbosity_error()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()
