"""The page of `what_anchors_are.py`: its pictures, its tables, and which claims hold, all from what was measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from what_anchors_are_runs import (
    ALIGNED,
    CENTRED,
    FACTS,
    Points,
    Runs,
    cells_of,
    curves_of,
    ends_of,
    gap_and_gain,
    read_runs,
    variants_of,
    verdict,
)

from hf_fda.analysis import Landscape, Projected
from hf_fda.analysis.charts import Axes, Chart
from hf_fda.analysis.maps import landscape_chart
from hf_fda.drawing import COLOURS, DASHES, MARKERS, legend, ordered_colours

PAGE, PICTURES = "what_anchors_are.md", "pictures"


TITLES = {
    "arena": "Real encoders (MiniLM-L6, English texts)",
    "demo": "The demo's vision tasks (a small ViT, digits)",
}

HEAD = """# What anchors are

Functional dual anchors (arXiv 2510.21223) rest on four claims. Here each is checked on checkpoints, by
`examples/what_anchors_are.py`, which writes this page from what it measures. Anchors are looked at in the first, the
middle and the last block of two tasks, 64 anchors each, built in 40 steps by *adamw* (as published) and by *muon* (the
package's default), from *weights* (sampled rows) and from *gaussian* noise. A cell is one seed, one task, one block.
"States" are hidden states of 40 training rows in the fine-tune itself; k is a sixteenth of the width. Merges (claims 3
and 4) are of muon's anchors, 32 of each block and task, adapted from the base (or from task arithmetic, where that is
said); what the package does by default starts from a better merge and is measured in `examples/benchmarks`.
A claim is said to hold where it does in at least 90 % of the cells, and not to hold where it does in at most 10 %; a ±
is the standard deviation over cells, of losses and accuracies over seeds. The cells of one seed share their models.
"""


def write_page(work: Path, output: Path) -> Path:
    """Write the page and its pictures.

    Args:
        work: with what was measured, as JSON.
        output: where to.
    """
    (output / PICTURES).mkdir(parents=True, exist_ok=True)
    parts = [HEAD]
    for setting, title in TITLES.items():
        anchors, merges = (read_runs(work, setting, part) for part in ("anchors", "merges"))
        if anchors and merges:
            seeds = ", ".join(map(str, anchors)), ", ".join(map(str, merges))
            parts.append(f"\n## {title}\n\nSeeds of claims 1 and 2: {seeds[0]}; of merges: {seeds[1]}.\n")
            parts.append(_summary(anchors, merges))
            parts += [_spectra(setting, anchors, output), _alignment(setting, anchors, output)]
            parts += [_walk(setting, merges, output), _starts(anchors, merges)]
    path = output / PAGE
    path.write_text("\n".join(parts), encoding="utf-8")
    return path


def _summary(anchors: Runs, merges: Runs) -> str:
    """Which claims hold, in one table."""

    def pooled(optimizer: str, name: str) -> str:
        starts = (variant for variant in variants_of(anchors) if variant.startswith(optimizer))
        pairs = [ends_of(own, name) for variant in starts for own, _ in cells_of(anchors, variant)]
        return verdict([end > start for start, end in pairs])

    both = "adamw", "muon"
    walked = [true(run) for true in FACTS.values() for run in merges.values()]
    gap, gain = gap_and_gain(merges)
    rows = [
        ["1. the spectrum grows a long tail", *(pooled(own, "exponent") for own in both)],
        ["2. states lie in the anchors' main directions", *(pooled(own, ALIGNED[0]) for own in both)],
        ["2. anchors lie in the states' main directions", *(pooled(own, ALIGNED[1]) for own in both)],
        ["2. induced gradients point as those of states", *(pooled(own, ALIGNED[2]) for own in both)],
        ["3. adapting walks to the joint optimum", "", f"{sum(walked)} of {len(walked)} statements below are true"],
        ["4. the start does not matter to the merge", "", f"{gap:.1f} points apart, of {gain:.1f} gained"],
    ]
    return _table(["claim: more so at the end of construction", "adamw", "muon (the default)"], rows) + "\n"


def _spread(values: Sequence[float], digits: int = 2) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _panels(
    name: str,
    title: str,
    panels: Mapping[str, tuple[Axes, Mapping[str, Points], Mapping[str, float]]],
    ordered: bool = False,
    columns: int = 2,
) -> Chart:
    """Several small charts of lines beside each other, with one legend; references are level lines by name."""
    rows = math.ceil(len(panels) / columns)

    def paint(figure: Any) -> None:
        places = figure.subplots(rows, columns, squeeze=False).flatten()
        for own, (label, (axes, series, levels)) in zip(places, panels.items(), strict=True):
            colours = ordered_colours(len(series)) if ordered else COLOURS
            for number, (line, (x, y)) in enumerate(series.items()):
                mark = None if ordered else MARKERS[number]
                own.plot(x, y, color=colours[number], marker=mark, label=line)
            for number, (line, value) in enumerate(levels.items()):
                own.axhline(value, color="#555555", linestyle=DASHES[1 + number], linewidth=1.2, label=line)
            own.set(xlabel=axes.x, ylabel=axes.y, title=label)
            own.set_xscale("log" if axes.log_x else "linear")
            own.set_yscale("log" if axes.log_y else "linear")
        figure.suptitle(title, size=11)
        legend(figure, places[0])

    found = [
        (label, line, x, y)
        for label, (_, series, _levels) in panels.items()
        for line, points in series.items()
        for x, y in zip(*points, strict=True)
    ]
    return Chart(name, title, "", ("panel", "line", "x", "y"), tuple(found), paint, (7.4, 0.9 + 2.9 * rows))


def _shown(chart: Chart, output: Path) -> str:
    chart.write(output / PICTURES)
    (output / PICTURES / f"{chart.name}.png").unlink()
    return f"![{chart.title}]({PICTURES}/{chart.name}.svg)\n"


def _spectra(setting: str, runs: Runs, output: Path) -> str:
    """Claim 1."""
    axes = Axes("rank of the singular value", "share of the largest", log_x=True, log_y=True)
    first = next(iter(runs.values()))["spectra"]
    panels: dict[str, Any] = {
        variant: (
            axes,
            {f"step {step}": ([1.0 + 4 * n for n in range(len(own))], own) for step, own in curves.items()},
            {},
        )
        for variant, curves in first.items()
    }
    pictures = [
        _panels(
            f"{setting}-spectra-{optimizer}",
            f"Anchors of one block on the way, {optimizer}",
            {variant: own for variant, own in panels.items() if variant.startswith(optimizer)},
            ordered=True,
        )
        for optimizer in ("adamw", "muon")
    ]
    step = "construction step"
    ways: dict[str, Any] = {
        "Effective rank": (Axes(step, "directions"), curves_of(runs, "rank"), {}),
        "Tail exponent": (Axes(step, "exponent a of rank^-a"), curves_of(runs, "exponent"), {}),
    }
    rows = []
    for variant in first:
        cells = [own for own, _ in cells_of(runs, variant)]
        ranks, tails = ([ends_of(own, name) for own in cells] for name in ("rank", "exponent"))
        longer = verdict([end > start for start, end in tails])
        columns = [[pair[place] for pair in pairs] for pairs in (ranks, tails) for place in (0, 1)]
        rows.append([variant, *(_spread(own, 1 if n < 2 else 2) for n, own in enumerate(columns)), longer])
    head = [
        "construction",
        "effective rank, start",
        "end",
        "tail exponent, start",
        "end",
        "that it is steeper at the end",
    ]
    return "\n".join(
        [
            "### 1. Anchors evolve to a long-tailed spectrum\n",
            "A longer tail is a larger exponent of the power law through the singular values (ranks 2 to half the "
            "rank); a flat spectrum has the exponent zero and the largest effective rank.\n",
            _table(head, rows) + "\n",
            *(_shown(picture, output) for picture in pictures),
            _shown(_panels(f"{setting}-ranks", "Spectra over construction, mean of all cells", ways), output),
        ]
    )


def _alignment(setting: str, runs: Runs, output: Path) -> str:
    """Claim 2."""
    step = "construction step"
    variants = variants_of(runs)
    limits = [limit for variant in variants for _, limit in cells_of(runs, variant)]
    levels = {
        "random subspace": limits[0]["random"],
        "most that k directions hold": statistics.mean(one["most"][CENTRED] for one in limits),
    }
    panels: dict[str, Any] = {
        "States on anchors": (Axes(step, "share of squared norm"), curves_of(runs, ALIGNED[0]), levels),
        "Anchors on states": (
            Axes(step, "share of squared norm"),
            curves_of(runs, ALIGNED[1]),
            {"random subspace": limits[0]["random"]},
        ),
        "Induced gradients": (Axes(step, "mean cosine by parameter"), curves_of(runs, ALIGNED[2]), {}),
    }
    rows, verdicts = [], []
    for variant in variants:
        figures = [[ends_of(own, name) for own, _ in cells_of(runs, variant)] for name in ALIGNED]
        verdicts.append([variant, *(verdict([end > start for start, end in own]) for own in figures)])
        rows.append([variant, *(_spread([pair[place] for pair in own]) for own in figures for place in (0, 1))])
    head = ["construction", *(f"{name}, {when}" for name in ALIGNED for when in ("start", "end"))]
    chart = _panels(f"{setting}-alignment", "Alignment with real states, mean of all cells", panels, columns=3)
    k, d = limits[0]["k"], limits[0]["d"]
    return "\n".join(
        [
            "### 2. They align step by step with the main directions of real data\n",
            f"Share of the states' squared norm in the anchors' top {k} of {d} directions (a random subspace holds "
            f"{limits[0]['random']:.3f}), the reverse, and the cosine between the gradients that both induce.\n",
            _table(head, rows) + "\n",
            "Whether each is larger at the end than at the start:\n",
            _table(["construction", *ALIGNED], verdicts) + "\n",
            _shown(chart, output),
        ]
    )


def _walk(setting: str, runs: Runs, output: Path) -> str:
    """Claim 3."""
    first = next(iter(runs.values()))
    seen = Landscape(
        tuple(first["x"]),
        tuple(first["y"]),
        {task: tuple(map(tuple, grid)) for task, grid in first["losses"].items()},
        {name: Projected(**own) for name, own in first["points"].items()},
        {name: tuple(Projected(**one) for one in own) for name, own in first["paths"].items()},
    )
    title = "Mean cross entropy on training rows, first seed"
    chart = landscape_chart(f"{setting}-landscape", title, "", seen, "cross entropy (nats)")
    rows = []
    for label, true in FACTS.items():
        found = [true(run) for run in runs.values()]
        rows.append(
            [label, "yes" if all(found) else "no" if not any(found) else "in part", f"{sum(found)}/{len(found)}"]
        )
    losses = [
        ["base", _spread([run["line"]["0.0"] for run in runs.values()], 3)],
        ["task arithmetic, best scaling", _spread([min(run["line"].values()) for run in runs.values()], 3)],
        ["task arithmetic, scaling 1", _spread([run["line"]["1.0"] for run in runs.values()], 3)],
        *(
            [f"adapted {start}", _spread([run["walked"][start][-1] for run in runs.values()], 3)]
            for start in first["walked"]
        ),
        ["lowest on the plane's grid", _spread([run["lowest"][2] for run in runs.values()], 3)],
    ]
    return "\n".join(
        [
            "### 3. Adapting with them walks toward the joint optimum, task vectors drift away\n",
            "Looks after 1, 2, 5, 10 and 20 passes of adaptation at a constant step size; task arithmetic at scalings "
            "0 to 1. The joint optimum is the lowest mean loss on the plane through the base, task arithmetic 0.3 and "
            "the merge adapted from the base; the other path lies off that plane and is drawn where it projects to.\n",
            _table(["", "seeds agree", ""], rows) + "\n",
            _table(["mean cross entropy on training rows (nats)", ""], losses) + "\n",
            _shown(chart, output),
        ]
    )


def _gaps(anchors: Runs) -> list[list[str]]:
    """How far apart anchors from weights and from noise are, before and after construction."""
    rows = []
    for optimizer in ("adamw", "muon"):
        starts = [list(cells_of(anchors, f"{optimizer} from {start}")) for start in ("weights", "gaussian")]
        for name in ("rank", "exponent", "states on anchors", "gradients"):
            pairs = [[ends_of(own, name) for own, _ in cells] for cells in starts]
            digits = 1 if name == "rank" else 2
            means = [[statistics.mean(own) for own in zip(*found, strict=True)] for found in pairs]
            apart = [f"{abs(one - other):.{digits}f}" for one, other in zip(*means, strict=True)]
            ends = [_spread([end for _, end in found], digits) for found in pairs]
            rows.append([f"{optimizer}, {name}", *ends, *apart])
        losses = [[own["loss"] for own, _ in cells] for cells in starts]
        gap = abs(statistics.mean(losses[0]) - statistics.mean(losses[1]))
        rows.append([f"{optimizer}, construction loss", *map(_spread, losses), "", f"{gap:.2f}"])
    return rows


def _starts(anchors: Runs, merges: Runs) -> str:
    """Claim 4."""
    accuracies = {
        name: [100 * run["accuracy"][name] for run in merges.values()] for name in ("base", "weights", "gaussian")
    }
    gap, gain = gap_and_gain(merges)
    head = ["", "end, from weights", "end, from gaussian", "gap at the start", "gap at the end"]
    return "\n".join(
        [
            "### 4. It hardly depends on where anchors start\n",
            f"Merges adapted from the base with anchors that started from weights and from noise: {gap:.1f} points "
            f"of average test accuracy apart at most, of {gain:.1f} that anchors from weights gain over the base. The "
            "gap between both starts in what anchors are, before and after construction:\n",
            _table(head, _gaps(anchors)) + "\n",
            _table(
                ["average test accuracy (%), own heads", "base", "from weights", "from gaussian"],
                [["", *(_spread(own, 1) for own in accuracies.values())]],
            )
            + "\n",
        ]
    )
