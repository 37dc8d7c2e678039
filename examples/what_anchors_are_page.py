"""The page of `what_anchors_are.py`: its pictures, its tables, and which claims hold, all from what was measured."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_fda.analysis import Landscape, Projected
from hf_fda.analysis.charts import Axes, Chart
from hf_fda.analysis.drawing import COLOURS, DASHES, MARKERS, legend, ordered_colours
from hf_fda.analysis.maps import landscape_chart

PAGE, PICTURES = "what_anchors_are.md", "pictures"
CENTRED = 0
"""Which of a pair of figures is shown: 0 of the vectors as they are, 1 less their mean."""

HOLDS, FAILS = 0.9, 0.1
"""Shares of the cells (a seed, a task, a block) from which on, and up to which, a claim is said to hold or not."""

Points = tuple[list[float], list[float]]
Runs = Mapping[int, Mapping[str, Any]]
"""What was measured, by seed."""

TITLES = {
    "arena": "Real encoders (MiniLM-L6, English texts)",
    "demo": "The demo's vision tasks (a small ViT, digits)",
}

HEAD = """# What anchors are

Functional dual anchors (arXiv 2510.21223) rest on four claims. Here each is checked on checkpoints, by
`examples/what_anchors_are.py`, which writes this page from what it measures. Anchors are looked at in the first, the
middle and the last block of two tasks, 64 anchors each, built in 40 steps by *adamw* (as published) and by *muon* (the
package's default), from *weights* (sampled rows) and from *gaussian* noise. A cell is one seed, one task, one block.
"States" are hidden states of 40 training rows in the fine-tune itself; k is a sixteenth of the width.
A claim is said to hold where it does in at least 90 % of the cells, and not to hold where it does in at most 10 %.
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
        anchors, merges = (_runs(work, setting, part) for part in ("anchors", "merges"))
        if anchors and merges:
            parts.append(f"\n## {title}\n\nSeeds: {', '.join(map(str, anchors))}.\n")
            parts += [_spectra(setting, anchors, output), _alignment(setting, anchors, output)]
            parts += [_walk(setting, merges, output), _starts(anchors, merges)]
    path = output / PAGE
    path.write_text("\n".join(parts), encoding="utf-8")
    return path


def _runs(work: Path, setting: str, part: str) -> dict[int, dict[str, Any]]:
    files = sorted(work.glob(f"{setting}-{part}-*.json"))
    return {int(file.stem.rpartition("-")[2]): json.loads(file.read_text(encoding="utf-8")) for file in files}


def _cells(runs: Runs, variant: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """What a variant's anchors were after each step, and the limits, cell by cell."""
    for run in runs.values():
        for task, blocks in run["variants"][variant].items():
            for block, own in blocks.items():
                yield own, run["limits"][task][block]


def _figure(own: Mapping[str, Any], step: str, name: str) -> float:
    value = own["steps"][step][name]
    return float(value[CENTRED] if isinstance(value, list) else value)


def _ends(own: Mapping[str, Any], name: str) -> tuple[float, float]:
    """A figure at the start and at the end."""
    steps = list(own["steps"])
    return _figure(own, steps[0], name), _figure(own, steps[-1], name)


def _verdict(true: Sequence[bool]) -> str:
    share = sum(true) / len(true)
    word = "holds" if share >= HOLDS else "does not hold" if share <= FAILS else "holds in part"
    return f"{word} ({sum(true)} of {len(true)} cells)"


def _spread(values: Sequence[float], digits: int = 2) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _curves(runs: Runs, name: str) -> dict[str, Points]:
    """A figure over construction steps, by variant: the mean over all cells."""
    found = {}
    for variant in next(iter(runs.values()))["variants"]:
        cells = [own for own, _ in _cells(runs, variant)]
        steps = list(cells[0]["steps"])
        means = [statistics.mean(_figure(own, step, name) for own in cells) for step in steps]
        found[variant] = [float(step) for step in steps], means
    return found


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
        legend(figure, places[0], 3)

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
    panels = {
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
    ways = {
        "Effective rank": (Axes(step, "directions"), _curves(runs, "rank"), {}),
        "Tail exponent": (Axes(step, "exponent a of rank^-a"), _curves(runs, "exponent"), {}),
    }
    rows, said = [], []
    for variant in first:
        cells = [own for own, _ in _cells(runs, variant)]
        ranks, tails = ([_ends(own, name) for own in cells] for name in ("rank", "exponent"))
        longer = _verdict([end > start for start, end in tails])
        said.append(f"{variant}: {longer}")
        columns = [[pair[place] for pair in pairs] for pairs in (ranks, tails) for place in (0, 1)]
        rows.append([variant, *(_spread(own, 1 if n < 2 else 2) for n, own in enumerate(columns)), longer])
    head = ["construction", "effective rank, start", "end", "tail exponent, start", "end", "steeper at the end"]
    return "\n".join(
        [
            "### 1. Anchors evolve to a long-tailed spectrum\n",
            "A longer tail is a larger exponent of the power law through the singular values (ranks 2 to half the "
            "rank), and a smaller effective rank. " + "; ".join(said) + ".\n",
            _table(head, rows) + "\n",
            *(_shown(picture, output) for picture in pictures),
            _shown(_panels(f"{setting}-ranks", "Spectra over construction, mean of all cells", ways), output),
        ]
    )


def _alignment(setting: str, runs: Runs, output: Path) -> str:
    """Claim 2."""
    step = "construction step"
    variants = list(next(iter(runs.values()))["variants"])
    limits = [limit for variant in variants for _, limit in _cells(runs, variant)]
    levels = {
        "random subspace": limits[0]["random"],
        "most that k directions hold": statistics.mean(one["most"][CENTRED] for one in limits),
    }
    names = "states on anchors", "anchors on states"
    panels: dict[str, Any] = {
        "States on anchors": (Axes(step, "share of squared norm"), _curves(runs, names[0]), levels),
        "Anchors on states": (
            Axes(step, "share of squared norm"),
            _curves(runs, names[1]),
            {"random subspace": limits[0]["random"]},
        ),
        "Induced gradients": (Axes(step, "mean cosine by parameter"), _curves(runs, "gradients"), {}),
    }
    rows, said = [], []
    for variant in variants:
        cells = [own for own, _ in _cells(runs, variant)]
        figures = [[_ends(own, name) for own in cells] for name in (*names, "gradients")]
        nearer, pulled = (_verdict([end > start for start, end in figures[n]]) for n in (0, 2))
        said.append(f"{variant}: {nearer}; of gradients it {pulled}")
        rows.append([variant, *(_spread([pair[place] for pair in own]) for own in figures for place in (0, 1))])
    head = ["construction", *(f"{name}, {when}" for name in (*names, "gradients") for when in ("start", "end"))]
    chart = _panels(f"{setting}-alignment", "Alignment with real states, mean of all cells", panels, columns=3)
    k, d = limits[0]["k"], limits[0]["d"]
    return "\n".join(
        [
            "### 2. They align step by step with the main directions of real data\n",
            f"Share of the states' squared norm in the anchors' top {k} of {d} directions (a random subspace holds "
            f"{limits[0]['random']:.3f}), the reverse, and the cosine between the gradients that both induce. That "
            "states lie more in the anchors' directions at the end than at the start: " + "; ".join(said) + ".\n",
            _table(head, rows) + "\n",
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
    facts: dict[str, Callable[[Mapping[str, Any]], bool]] = {
        "adapting from the base lowers the loss at every look": lambda run: _falls(run["walked"]["from the base"]),
        "adapting from task arithmetic lowers it at every look": lambda run: _falls(
            [run["line"]["0.3"], *run["walked"]["from task arithmetic"]]
        ),
        "adapting from the base comes nearer to the plane's lowest point": _nearer,
        "adapting from the base ends below task arithmetic at its best scaling": lambda run: (
            run["walked"]["from the base"][-1] < min(run["line"].values())
        ),
        "adapting from task arithmetic ends below it": lambda run: (
            run["walked"]["from task arithmetic"][-1] < min(run["line"].values())
        ),
        "task arithmetic drifts away: its loss rises again before scaling 1": lambda run: (
            run["line"]["1.0"] > min(run["line"].values())
        ),
    }
    for label, true in facts.items():
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


def _falls(losses: Sequence[float]) -> bool:
    return all(after < before for before, after in itertools.pairwise(losses))


def _nearer(run: Mapping[str, Any]) -> bool:
    x, y, _ = run["lowest"]
    path = run["paths"]["adapting from the base"]
    away = [math.dist((own["x"], own["y"]), (x, y)) for own in path]
    return away[-1] < away[0]


def _starts(anchors: Runs, merges: Runs) -> str:
    """Claim 4."""
    rows = []
    for optimizer in ("adamw", "muon"):
        for name in ("rank", "exponent", "states on anchors", "gradients"):
            cells = {
                start: [_ends(own, name) for own, _ in _cells(anchors, f"{optimizer} from {start}")]
                for start in ("weights", "gaussian")
            }
            digits = 1 if name == "rank" else 2
            apart = [
                abs(
                    statistics.mean(pair[place] for pair in cells["weights"])
                    - statistics.mean(pair[place] for pair in cells["gaussian"])
                )
                for place in (0, 1)
            ]
            ends = [_spread([end for _, end in own], digits) for own in cells.values()]
            rows.append([f"{optimizer}, {name}", *ends, *(f"{one:.{digits}f}" for one in apart)])
        losses = [
            [own["loss"] for own, _ in _cells(anchors, f"{optimizer} from {start}")]
            for start in ("weights", "gaussian")
        ]
        apart = abs(statistics.mean(losses[0]) - statistics.mean(losses[1]))
        rows.append([f"{optimizer}, construction loss", *map(_spread, losses), "", f"{apart:.2f}"])
    accuracies = {
        name: [100 * run["accuracy"][name] for run in merges.values()] for name in ("base", "weights", "gaussian")
    }
    apart = max(abs(a - b) for a, b in zip(accuracies["weights"], accuracies["gaussian"], strict=True))
    gain = statistics.mean(accuracies["weights"]) - statistics.mean(accuracies["base"])
    return "\n".join(
        [
            "### 4. It hardly depends on where anchors start\n",
            f"Merges adapted from the base with anchors that started from weights and from noise: {apart:.1f} points "
            f"of average test accuracy apart at most, of {gain:.1f} that anchors from weights gain over the base. The "
            "gap between both starts in what anchors are, before and after construction:\n",
            _table(["", "end, from weights", "end, from gaussian", "gap at the start", "gap at the end"], rows) + "\n",
            _table(
                ["average test accuracy (%), own heads", "base", "from weights", "from gaussian"],
                [["", *(_spread(own, 1) for own in accuracies.values())]],
            )
            + "\n",
        ]
    )
