"""Compare merges of a small decoder family on real text (`decoder_family.py`, which also trains it).

    python examples/benchmarks/decoders.py --tasks DIR --work DIR [--families 0 1] [--seeds 0 1 2] [--only NAME ...]

`--tasks` holds `TASK.train.jsonl` and `TASK.test.jsonl` with `text` and `label`. Printed for each merge: by task and
on average the accuracy of the label's word and the nats per token of the text, and the seconds of the merge (for FDA:
of construction and of adaptation). There are no task heads: one merged model answers for every task. FDA merges
blocks; embeddings, last norm and output layer come from task arithmetic. Anchors do not depend on where adaptation
starts, so all FDA rows of one seed share theirs. How well a method does depends on the fine-tunes, so of several
families the means are printed, too, and by how much FDA raises each start in each of them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from decoder_family import WORDS, Rows, Score, evaluate, make_family, open_model, open_rows, open_tokenizer

import hf_fda
from hf_fda.merge_methods.fda import CONSTRUCTION_FIELDS

SCALINGS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0)
STARTS: dict[str, dict[str, Any]] = {
    "base": {"initial": "base"},
    "task_arithmetic 0.3": {"initial": "task_arithmetic", "scaling": 0.3},
    "tsv 1.0": {"initial": "tsv"},
    "wudi iterative": {"initial": "wudi"},
    "isotropic 1.0": {"initial": "isotropic", "scaling": 1.0},
    "isotropic 3.0": {"initial": "isotropic", "scaling": 3.0},
}


def table_rows(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Every row of the table: its name and what `hf_fda.merge` gets."""
    rows: dict[str, dict[str, Any]] = {}
    for scaling in SCALINGS:
        rows[f"task_arithmetic {scaling}"] = {"method": "task_arithmetic", "scaling": scaling}
    for scaling in (1.0, 1.2):
        rows[f"tsv {scaling}"] = {"method": "tsv", "scaling": scaling}
    for solver in ("iterative", "closed_form"):
        rows[f"wudi {solver}"] = {"method": "wudi", "solver": solver}
    for scaling in (1.0, 2.0, 3.0):
        rows[f"isotropic {scaling}"] = {"method": "isotropic", "scaling": scaling}
    settings = dict(item.split("=", 1) for item in options.set)
    for start, initial in STARTS.items():
        rows[f"fda from {start}"] = {"method": "fda", **initial, **settings}
    return {name: row for name, row in rows.items() if not options.only or any(part in name for part in options.only)}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=Path, required=True, help="the rows")
    parser.add_argument("--work", type=Path, default=Path("decoders"), help="family and merges (default decoders/)")
    parser.add_argument("--sources", nargs="+", choices=list(WORDS), default=list(WORDS), help="fine-tunes to merge")
    parser.add_argument("--families", type=int, nargs="+", default=[0], help="seeds of their training")
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--limit", type=int, default=1000, help="rows a task at most")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of the FDA rows")
    parser.add_argument("--only", nargs="+", default=[], help="rows whose name contains one of these")
    parser.add_argument("--set", nargs="*", default=[], metavar="OPTION=VALUE", help="more options of the FDA rows")
    return parser.parse_args()


class Arena:
    """One family, its rows and what is printed about its merges."""

    def __init__(self, options: argparse.Namespace, family: int) -> None:
        folder = options.work / f"family{family}"
        self.work = folder / "merges" / "-".join(options.sources)
        self.base, tuned = make_family(folder, options.tasks, family, say=print)
        self.tuned = {task: tuned[task] for task in options.sources}
        self.tokenizer = open_tokenizer(self.base)
        self.rows: dict[str, Rows] = {}
        for task in self.tuned:
            rows = open_rows(options.tasks, task, options.split)
            self.rows[task] = Rows(task, rows.texts[: options.limit], rows.labels[: options.limit])

    def merge(self, output: Path, arguments: dict[str, Any]) -> float:
        """Merge all fine-tunes; seconds."""
        start = time.perf_counter()
        sources = {task: str(folder) for task, folder in self.tuned.items()}
        hf_fda.merge(str(self.base), sources, output=output, quiet=True, **arguments)
        return time.perf_counter() - start

    def folder(self, label: str, arguments: dict[str, Any]) -> Path:
        """A folder for a merge: another one for other arguments."""
        digest = hashlib.sha256(json.dumps(arguments, sort_keys=True).encode()).hexdigest()[:8]
        return self.work / f"{label.replace(' ', '-').replace(',', '')}-{digest}"

    def anchors(self, arguments: dict[str, Any]) -> tuple[dict[str, str], float]:
        """The folders of anchors for an FDA row, made where they are not there yet, and the seconds that took."""
        kept = ("method", "seed", *CONSTRUCTION_FIELDS)
        only = {name: value for name, value in arguments.items() if name in kept}
        only |= {"initial": "base", "epochs": 0, "rest": "base"}
        shared = self.folder("anchors", only)
        figures = shared / "seconds.json"
        if not figures.is_file():
            seconds = self.merge(shared, only)
            figures.write_text(json.dumps(seconds), encoding="utf-8")
        return {task: str(shared / "anchors" / task) for task in self.tuned}, json.loads(figures.read_text())

    def scores(self, model: Any) -> dict[str, Score]:
        """A model's score on every task."""
        return {task: evaluate(model, self.tokenizer, rows) for task, rows in self.rows.items()}

    def show(self, label: str, runs: list[dict[str, Score]], seconds: str = "") -> Means:
        """Print a row: means over runs, and the spread of the averages; gives accuracy and nats."""
        accuracies = [[run[task].accuracy for task in self.rows] for run in runs]
        losses = [[run[task].loss for task in self.rows] for run in runs]
        cells = [label]
        for table in (accuracies, losses):
            averages = [statistics.mean(run) for run in table]
            spread = f" ± {statistics.stdev(averages):.3f}" if len(runs) > 1 else ""
            cells += [f"{statistics.mean(column):.3f}" for column in zip(*table, strict=True)]
            cells.append(f"{statistics.mean(averages):.3f}{spread}")
        print_row(*cells, seconds)
        accuracy, nats = (statistics.mean(map(statistics.mean, table)) for table in (accuracies, losses))
        return accuracy, nats


Means = tuple[float, float]
"""Of a merge, over tasks and seeds: accuracy, and nats per token."""


def print_row(*cells: str) -> None:
    """One row of a table."""
    print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    """Train, merge, score, print."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    options = parse()
    families = [run_family(options, family) for family in options.families]
    if len(families) > 1:
        print_means(families)


def run_family(options: argparse.Namespace, family: int) -> dict[str, Means]:
    """All merges of one family: what is printed, and the means by the rows' names."""
    arena = Arena(options, family)
    counts = ", ".join(f"{task} {len(rows.texts)}" for task, rows in arena.rows.items())
    print(f"family {family}, {options.split} rows: {counts}")
    header = ["merge", *arena.rows, "accuracy", *(f"{task} nats" for task in arena.rows), "nats", "seconds"]
    print_row(*header)
    print("|" + " --- |" * len(header))
    found = {"individual fine-tunes": arena.show("individual fine-tunes", [own_scores(arena)])}
    found["base"] = arena.show("base", [arena.scores(open_model(arena.base))])
    for label, arguments in table_rows(options).items():
        runs, times = [], []
        for seed in options.seeds if arguments["method"] == "fda" else [0]:
            arguments = {**arguments, "seed": seed}
            parts, given = [], {}
            if arguments["method"] == "fda":
                given["anchors"], construction = arena.anchors(arguments)
                parts.append(construction)
            output = arena.folder(label, arguments)
            parts.append(arena.merge(output, {**arguments, **given}))
            runs.append(arena.scores(hf_fda.load(output)))
            times.append(parts)
        seconds = " + ".join(f"{statistics.mean(column):.1f}" for column in zip(*times, strict=True))
        found[label] = arena.show(label, runs, seconds)
    return found


def print_means(families: list[dict[str, Means]]) -> None:
    """The means over families, with their spread, and how much more accurate FDA is than each start in each family."""
    print("\nover all families:")
    print_row("merge", "accuracy", "nats", "lift of accuracy", "by family")
    print("|" + " --- |" * 5)
    for label in families[0]:
        accuracies, nats = zip(*(found[label] for found in families), strict=True)
        start = label.removeprefix("fda from ")
        pairs = [(found[label][0], found[start][0]) for found in families if start != label and start in found]
        lifts = [own - before for own, before in pairs]
        shown = [_spread(lifts), ", ".join(f"{lift:+.3f}" for lift in lifts)] if lifts else ["", ""]
        print_row(label, _spread(accuracies), _spread(nats), *shown)


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def own_scores(arena: Arena) -> dict[str, Score]:
    """Each fine-tune's score on its own task."""
    return {
        task: evaluate(open_model(folder), arena.tokenizer, arena.rows[task]) for task, folder in arena.tuned.items()
    }


if __name__ == "__main__":
    main()
