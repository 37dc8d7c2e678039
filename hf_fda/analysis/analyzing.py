"""Looking at anchors or at a merge: everything that can be seen, drawn, with the numbers, in one report."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_fda.analysis import measuring, of_anchors, of_losses, of_merges, of_states
from hf_fda.analysis.forecasts import Forecast
from hf_fda.analysis.opened import OpenedMerge, open_merge
from hf_fda.analysis.report import Section, write_report
from hf_fda.anchors.container import ON_HUB, FunctionalDualAnchors
from hf_fda.anchors.manifest import MANIFEST
from hf_fda.card_record import ANALYSIS, RECORD, refresh_card
from hf_fda.checkpoint.reader import open_checkpoint
from hf_fda.data.request import Reading, check_number
from hf_fda.devices import resolve_device
from hf_fda.drawing import require_plots
from hf_fda.errors import InputError, few
from hf_fda.plans import readable_size
from hf_fda.prediction import readable_time
from hf_fda.progress import Progress, logger
from hf_fda.spending import Meter, hardware, peak_bytes
from hf_fda.store import WORK


@dataclass(frozen=True)
class Analysis:
    """What an analysis left: a folder with `report.html`, and each picture as PNG and SVG with its numbers as CSV.

    `charts` are the pictures' names, in the report's order.
    """

    folder: Path
    charts: tuple[str, ...]

    @property
    def report(self) -> Path:
        """The report, which needs no other file."""
        return self.folder / "report.html"

    def __str__(self) -> str:
        return f"Report in {self.report}, with {len(self.charts)} pictures and their numbers beside it"


@dataclass(frozen=True)
class Looking:
    """How it is looked: `grid` points on each axis of a landscape, `batch_size` rows at a time, on `device`."""

    grid: int
    batch_size: int
    device: torch.device
    quiet: bool


def analyze(
    folder: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    data: Mapping[str, Any] | None = None,
    *,
    output: str | os.PathLike[str] | None = None,
    base: str | os.PathLike[str] | None = None,
    through: Sequence[str | os.PathLike[str]] = (),
    rows: int = 128,
    grid: int = 9,
    batch_size: int = 16,
    max_length: int = 512,
    device: str | torch.device = "auto",
    seed: int = 0,
    trust_remote_code: bool = False,
    quiet: bool = False,
) -> Analysis:
    """Look at anchors or at a merge, and draw what is seen.

    Of anchors: spectra by block, how construction changed them where snapshots were kept, and of several whether they
    lie in the same directions and, with their base, whether the gradients that they induce pull alike. Of a merge: how
    far each block moved, the cosines of its sources' task vectors, and its anchors where they lie in it; with data also
    what each block's move bought, the landscape of losses around it, and its anchors beside real hidden states. Before
    work starts it is said, as a log line, how much memory and time it will take.

    Args:
        folder: a merged folder or Hub id; an anchors folder or dataset ("datasets/org/name"), or several of one base.
        data: rows by task name, as `hf_fda.evaluate` takes them. Where a mapping names the column of what is right,
            {"path": ..., "label": ...}, the loss is cross entropy (squared error of regressions), else the divergence
            from what the task's own fine-tune answers.
        output: the folder to write; None: `analysis` in the folder that is looked at. The card of a merge shows some of
            the pictures that are there.
        base: what anchors were constructed from, to look at induced gradients; of a merge, where its base is now.
        through: other merged folders of the same base, as with fewer passes: a path to draw on the landscape.
        rows: at most so many rows of a task, a sample by `seed`.
        grid: points on each axis of the landscape.
        batch_size: rows at a time.
        max_length: the most tokens of a text; what is longer is cut.
        device: "auto" or a torch device.
        seed: of the sample of rows.
        trust_remote_code: run model code that comes with the checkpoints.
        quiet: show no progress.

    Returns:
        where the report is.

    Raises:
        InputError: when matplotlib is missing (with the line that installs it), or something cannot be looked at.
        RunError: when a model's answers are not finite.

    Example:
        >>> analyze("merged/", {"sst2": {"path": "sst2.jsonl", "label": "label"}}).report  # doctest: +SKIP
    """
    require_plots()
    for name, value in (("rows", rows), ("grid", grid), ("batch_size", batch_size)):
        check_number(name, value)
    folders = [folder] if isinstance(folder, (str, os.PathLike)) else list(folder)
    if not folders:
        raise InputError("nothing to look at: name a merged folder, or folders of anchors")
    looking = Looking(grid, batch_size, resolve_device(device), quiet)
    target = _target(folders, output)
    meter = Meter()
    if all(map(_holds_anchors, folders)):
        if data or through:
            raise InputError("data and through are for merges; a merge that made its anchors is looked at with both")
        title, facts, found = _of_anchors(folders, base, looking, trust_remote_code)
    else:
        if len(folders) > 1:
            raise InputError("several folders are looked at together only where all hold anchors; one merge at a time")
        opened = open_merge(folders[0], base, trust_remote_code)
        reading = Reading(rows, max_length, seed, trust_remote_code)
        title, facts, found = _of_merge(opened, data or {}, through, reading, looking)
    meter.count([False])
    report = write_report(target, title, [*facts, _spent(meter, looking.device)], found)
    if target.name == ANALYSIS and (target.parent / RECORD).is_file():
        refresh_card(target.parent)
    return Analysis(report.parent, tuple(chart.name for section in found for chart in section.charts))


def _holds_anchors(folder: str | os.PathLike[str]) -> bool:
    return (Path(folder).expanduser() / MANIFEST).is_file() or str(folder).startswith(ON_HUB)


def _target(folders: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str] | None) -> Path:
    """The folder that gets the report."""
    if output is None and (len(folders) > 1 or not Path(folders[0]).expanduser().is_dir()):
        raise InputError("where shall the report go? Name a folder: output=... (--output)")
    target = Path(output) if output is not None else Path(folders[0]) / ANALYSIS
    target = target.expanduser()
    if target.exists() and not target.is_dir():
        raise InputError(f"output '{target}' is a file; choose a folder")
    if target.is_dir() and any(target.iterdir()) and not (target / "report.html").is_file():
        raise InputError(f"output '{target}' holds something else; choose a new or empty folder, or that of a report")
    return target


def _spent(meter: Meter, device: torch.device) -> tuple[str, str]:
    peak = peak_bytes()
    memory = f", {readable_size(peak)} at most with all libraries" if peak is not None else ""
    spending = meter.spending(device, 1) or {}
    return "it took", f"{spending['seconds']} s{memory}, on {hardware(device)}"


Found = tuple[str, list[tuple[str, str]], list[Section]]
"""A report's title, its facts, its sections."""


def _of_anchors(
    folders: Sequence[str | os.PathLike[str]],
    base: str | os.PathLike[str] | None,
    looking: Looking,
    trust_remote_code: bool,
) -> Found:
    anchors = _named([FunctionalDualAnchors.from_pretrained(folder) for folder in folders])
    theta = None if base is None else open_checkpoint(base, trust_remote_code=trust_remote_code, label="base")
    work = of_anchors.AnchorsAnalysis(anchors, theta, looking.device)
    forecast = work.forecast()
    logger.info("%s: %s", few(anchors), forecast)
    with Progress(len(work.blocks), looking.quiet) as progress:
        seen = work.run(progress)
    facts = [("anchors of", ", ".join(anchors)), ("blocks", str(len(work.blocks))), ("foretold", str(forecast))]
    return f"Anchors of {few(anchors)}", facts, of_anchors.sections(seen)


def _named(anchors: Sequence[FunctionalDualAnchors]) -> dict[str, FunctionalDualAnchors]:
    """Anchors by their source, numbered where two are of one."""
    found: dict[str, FunctionalDualAnchors] = {}
    for own in anchors:
        name = Path(str(own.info.source["id"])).name
        known = sum(other == name or other.startswith(f"{name}-") for other in found)
        found[f"{name}-{known + 1}" if known else name] = own
    return found


def _of_merge(
    opened: OpenedMerge, data: Mapping[str, Any], through: Sequence[Any], reading: Reading, looking: Looking
) -> Found:
    if not isinstance(data, Mapping) or hasattr(data, "num_rows"):
        raise InputError("data must be a mapping from task name to its rows")
    if through and not (data and opened.sources):
        raise InputError("through is a path on the landscape, which needs data and the merge's sources")
    rows = measuring.open_task_data(opened, data, reading)
    chosen = of_losses.choose(opened, through) if rows and opened.sources else None
    anchors = None
    if opened.anchors:
        anchors = of_anchors.AnchorsAnalysis(opened.anchors, opened.base, looking.device)
    forecast = of_merges.forecast(opened) + (anchors.forecast() if anchors else Forecast())
    if rows:
        forecast += measuring.forecast(opened, rows, chosen is not None)
        if anchors is not None and anchors.builder is not None:
            aligned = of_states.forecast(anchors.builder, reading.rows or 0, reading.max_length)
            forecast += Forecast(0.0, aligned.memory + opened.nbytes)  # the merged model is still there
    name = str(opened.location.folder or opened.location.id)
    rest = "; what rows of data take is told when a batch has run" if rows else ""
    logger.info("%s: %s%s", name, forecast, rest)
    with Progress(0, looking.quiet) as progress:
        progress.expect(len(opened.groups) + (len(anchors.blocks) if anchors else 0))
        found = [of_merges.section(opened, of_merges.look(opened, progress))]
        if anchors is not None:
            found += of_anchors.sections(anchors.run(progress))
        if rows:
            found += _on_rows(opened, rows, chosen, anchors, looking, progress)
    facts = [
        ("merged folder", name),
        ("base", opened.base.id),
        ("sources", ", ".join(own.name for own in opened.sources) or "not at hand"),
        *((f"rows of {task}", own.opened.shown) for task, own in rows.items()),
        ("foretold", f"{forecast}{', without the time on rows of data' if rows else ''}"),
    ]
    return f"Merge in {Path(name).name}", facts, found


def _on_rows(
    opened: OpenedMerge,
    rows: Mapping[str, measuring.TaskData],
    chosen: of_losses.Chosen | None,
    anchors: of_anchors.AnchorsAnalysis | None,
    looking: Looking,
    progress: Progress,
) -> list[Section]:
    """What is seen on rows of data."""
    work = measuring.prepare(opened, rows, looking.device, looking.batch_size)
    looks = len(opened.groups) + 1 + (looking.grid**2 if chosen is not None else 0)
    logger.info("on rows of data: about %s for %d looks at them", readable_time(work.seconds() * looks), looks)
    builder = anchors.builder if anchors is not None else None
    compared = [own for own in opened.sources if builder and own.name in opened.anchors and own.name in work.losses]
    progress.expect(progress.done + looks - 1 + sum(len(opened.anchors[own.name].blocks) for own in compared))
    found = [of_losses.bought_section(of_losses.bought(opened, work, progress), work.unit)]
    if chosen is not None:
        scratch = (opened.location.folder or Path.cwd()) / WORK  # on a disk that holds such a model
        seen = of_losses.measure(opened, work, chosen, looking.grid, scratch, progress)
        count = sum(len(loss.rows) for loss in work.losses.values())
        found.append(of_losses.landscape_section(seen, work.unit, count))
    aligned = {}
    for source in compared:
        assert builder is not None
        own, shown = opened.anchors[source.name], work.losses[source.name].rows
        aligned[source.name] = of_states.align_task(builder, source, own, shown, progress)
    return [*found, of_states.section(aligned)] if aligned else found
