"""Accuracy against the number of sources and against the CPU time spent, as tables and as one picture.

    python examples/benchmarks/curves.py --checkpoints DIR --tasks DIR [--seeds 0 1 2] [--output curves.svg]

Folders as in `arena.py`; accuracy on test rows. Sources: for each number from two up, the first so many fine-tunes in
each of three cyclic orders (with another seed each). Seconds: FDA on anchors alone with fewer and more steps of
construction and passes of adaptation, beside its defaults and methods in parameter space; in one process, with the
first seed. In the work folder of `arena.py` its anchors are used.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import scoring
from scoring import Rows, average, spread

import hf_fda

ON_ANCHORS = "fda on anchors alone"
"""The method that is tried with several budgets."""

METHODS: dict[str, dict[str, Any]] = {
    "task_arithmetic 0.4": {"method": "task_arithmetic", "scaling": 0.4},
    "tsv 1.0": {"method": "tsv"},
    "tsv 1.2": {"method": "tsv", "scaling": 1.2},
    "isotropic 3.0": {"method": "isotropic", "scaling": 3.0},
    ON_ANCHORS: {"method": "fda", "data": "anchors"},
    "fda": {"method": "fda", "data": "synthetic"},
}
BUDGETS: dict[str, dict[str, Any]] = {
    "10 steps, 5 passes": {"steps": 10, "epochs": 5},
    "15 steps, 10 passes": {"steps": 15, "epochs": 10},
    "25 steps, 20 passes": {"steps": 25, "epochs": 20},
    "75 steps, 20 passes": {"steps": 75, "epochs": 20},
}


class Merges:
    """Merges in a work folder, made once.

    Args:
        work: where they go.
        rows: what they are judged on, and where the checkpoints lie.
    """

    def __init__(self, work: Path, rows: Rows) -> None:
        self.work, self.rows = work, rows

    def score(self, names: Sequence[str], seed: int, arguments: dict[str, Any], **given: Any) -> tuple[float, float]:
        """Average accuracy over the tasks merged, and CPU-seconds."""
        tag = "-".join([*names, *(f"{key}{value}" for key, value in sorted(arguments.items())), str(seed)])
        base, sources = str(self.rows.checkpoints / "base"), {name: str(self.rows.checkpoints / name) for name in names}
        start = time.process_time()
        merged = hf_fda.merge(base, sources, output=self.work / tag, seed=seed, quiet=True, **arguments, **given)
        seconds = time.process_time() - start
        return average({name: self.rows.score(merged.load(task=name), name) for name in names}).accuracy, seconds

    def anchors(self, names: Sequence[str], seed: int) -> dict[str, str]:
        """The anchors of fine-tunes, which do not depend on what else is merged; those of `arena.py` if there."""
        folders = {name: self.work / f"anchors-seed{seed}/anchors" / name for name in names}
        for name, folder in folders.items():
            if (folder / "anchors.json").is_file():
                continue
            base, source = str(self.rows.checkpoints / "base"), str(self.rows.checkpoints / name)
            hf_fda.FunctionalDualAnchors.construct(base, source, output=folder, seed=seed, quiet=True)
        return {name: str(folder) for name, folder in folders.items()}


def by_sources(merges: Merges, seeds: Sequence[int]) -> dict[str, dict[int, list[float]]]:
    """Accuracies by method and number of sources."""
    names = merges.rows.names
    found: dict[str, dict[int, list[float]]] = {label: {} for label in METHODS}
    for count in range(2, len(names) + 1):
        for turn, seed in enumerate(seeds):
            start = turn * len(names) // len(seeds)
            chosen = sorted((names * 2)[start : start + count])
            for label, arguments in METHODS.items():
                given = {"anchors": merges.anchors(chosen, seed)} if arguments["method"] == "fda" else {}
                accuracy, _ = merges.score(chosen, seed, arguments, **given)
                found[label].setdefault(count, []).append(accuracy)
    return found


def by_seconds(merges: Merges, seed: int) -> dict[str, list[tuple[float, float]]]:
    """CPU-seconds and accuracies by method or budget."""
    names = merges.rows.names
    whole = {label: arguments for label, arguments in METHODS.items() if label != ON_ANCHORS}
    budgets = {f"{ON_ANCHORS}, {label}": {**METHODS[ON_ANCHORS], **budget} for label, budget in BUDGETS.items()}
    found: dict[str, list[tuple[float, float]]] = {}
    for label, arguments in {**whole, **budgets}.items():
        accuracy, seconds = merges.score(names, seed, arguments)
        found.setdefault(label, []).append((seconds, accuracy))
    return found


def draw(
    sources: dict[str, dict[int, list[float]]], seconds: dict[str, list[tuple[float, float]]], output: Path
) -> None:
    """Both curves beside each other."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "hf_fda"
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for label, points in sources.items():
        counts = list(points)
        means = [statistics.mean(points[count]) for count in counts]
        left.plot(counts, means, "o-" if label.startswith("fda") else "o--", label=label)
    left.set(xlabel="sources merged", ylabel="average test accuracy", xticks=list(next(iter(sources.values()))))
    figure.legend(loc="outside lower center", ncols=len(sources))
    budgets = [found for label, found in seconds.items() if label.endswith("passes")]
    line = [tuple(statistics.mean(column) for column in zip(*found, strict=True)) for found in budgets]
    right.plot(*zip(*line, strict=True), "o-", color=f"C{list(sources).index(ON_ANCHORS)}")
    for number, label in enumerate(sources):
        if label in seconds:
            right.plot(*seconds[label][0], "o", color=f"C{number}")
    right.set(xlabel="CPU-seconds of the merge", xscale="log")
    figure.savefig(output, metadata={"Date": None})


def main() -> None:
    """Parse, merge, print, draw."""
    parser = scoring.parser(__doc__, "curves", limit=1000, seeds=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("curves.svg"), help="the picture (default curves.svg)")
    options = parser.parse_args()
    rows = Rows(options.checkpoints, options.tasks, "test", options.limit)
    merges = Merges(options.work, rows)
    seconds = by_seconds(merges, options.seeds[0])
    print("| merge | accuracy | CPU-seconds |\n| --- | --- | --- |", flush=True)
    for label, found in seconds.items():
        accuracies = spread([accuracy for _, accuracy in found])
        print(f"| {label} | {accuracies} | {statistics.mean(taken for taken, _ in found):.0f} |", flush=True)
    sources = by_sources(merges, options.seeds)
    counts = list(next(iter(sources.values())))
    print("\n| sources | " + " | ".join(map(str, counts)) + " |\n|" + " --- |" * (len(counts) + 1))
    for label, points in sources.items():
        print("| " + " | ".join([label, *(spread(points[count]) for count in counts)]) + " |")
    draw(sources, seconds, options.output)


if __name__ == "__main__":
    main()
