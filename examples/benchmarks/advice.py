"""The first choice of `hf_fda.advise` beside the best row of the measured table: encoders, digits, adapters.

    python examples/benchmarks/advice.py --checkpoints DIR [--tasks DIR] [--adapters DIR] [--work DIR] [--try]

`--checkpoints` holds a folder `base` and one for each fine-tune (as for `arena.py`), `--adapters` a folder for each
adapter of that base (the `--work` of `examples/adapters.py`). The digits' models are those of `hf-fda demo`, trained in
`--work` unless they are there. The rules see weights alone. With `--try` the short list is merged and scored on rows
that are no test rows: the last `--rows` of `TASK.train.jsonl` in `--tasks` (which the adapters were not trained on, but
the encoders were), and the demo's validation images. Printed: both choices, the figures that their rows have in the
measured tables, which are of test rows, and the table's best row; then what was looked at.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tables import best_row, number, table_with
from torch.utils.data import DataLoader

import hf_fda
from hf_fda.advising.advice import Recommendation
from hf_fda.demo import Settings
from hf_fda.demo.tasks import TASKS, load_rows
from hf_fda.demo.training import make_models


@dataclass(frozen=True)
class Case:
    """One merge to be advised on, with its held-out rows (None: nothing is tried)."""

    name: str
    base: str
    sources: dict[str, str]
    held: dict[str, Any] | None
    arguments: dict[str, Any]


def encoders(options: argparse.Namespace) -> Case:
    """Full fine-tunes of one encoder."""
    folders = _folders(options.checkpoints, "config.json")
    return Case("encoders", str(options.checkpoints / "base"), folders, _rows(options, folders), {})


def adapters(options: argparse.Namespace) -> Case:
    """Adapters of the same encoder, merged into one of rank 16."""
    folders = _folders(options.adapters, "adapter_config.json")
    rows = _rows(options, folders)
    return Case(
        "adapters", str(options.checkpoints / "base"), folders, rows, {"as_adapter": True, "rank": options.rank}
    )


def digits(options: argparse.Namespace) -> Case:
    """The models of the demo, of seed 0."""
    images = load_rows(0)
    torch.set_num_threads(1)
    base, tuned = make_models(options.work / "digits/models", images.train, Settings(), 0, print)
    held: dict[str, Any] | None = None
    if options.tried:
        held = {}
        for task, disguise in TASKS.items():
            seen = images.validation.seen_as(disguise)
            rows = [{"pixel_values": own, "labels": label} for own, label in zip(seen.images, seen.labels, strict=True)]
            held[task] = DataLoader(rows, batch_size=64)  # type: ignore[arg-type]
    return Case("digits", str(base), {task: str(folder) for task, folder in tuned.items()}, held, {"device": "cpu"})


def _folders(place: Path, holding: str) -> dict[str, str]:
    """The sources in a folder, by name."""
    found = sorted(own.parent for own in place.glob(f"*/{holding}") if own.parent.name != "base")
    return {own.name: str(own) for own in found}


def _rows(options: argparse.Namespace, tasks: dict[str, str]) -> dict[str, Any] | None:
    """The last rows of the training files."""
    if not options.tried:
        return None
    found = {}
    for task in tasks:
        lines = (options.tasks / f"{task}.train.jsonl").read_text(encoding="utf-8").splitlines()
        found[task] = [json.loads(line) for line in lines[-options.rows :]]
    return found


def compare(label: str, one: Recommendation) -> str:
    """A row: a choice and its figure in the table, beside the best."""
    cell = one.cells[0]
    table = table_with(cell)
    best, scale = best_row(table, cell.column), 1 if number(cell.value) > 1 else 100
    own, top = number(table[cell.row][cell.column]) * scale, number(table[best][cell.column]) * scale
    verdict = "yes" if top - own <= 1 + 1e-9 else "no"
    return f"| {label} | {one.label} | {cell.row} | {own:.1f} | {best} | {top:.1f} | {top - own:.1f} | {verdict} |"


def main() -> None:
    """Advise on each case, and print it beside its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, required=True, help="base and fine-tunes, as for arena.py")
    parser.add_argument("--tasks", type=Path, help="TASK.train.jsonl, for --try")
    parser.add_argument("--adapters", type=Path, help="adapters of the same base, by examples/adapters.py")
    parser.add_argument("--work", type=Path, default=Path("advice"), help="merges and the demo's models")
    parser.add_argument("--try", dest="tried", action="store_true", help="try the short lists, on no test rows")
    parser.add_argument("--rows", type=int, default=500, help="held-out rows a task at most (default 500)")
    parser.add_argument("--rank", type=int, default=16, help="of the merged adapter (default 16)")
    options = parser.parse_args()
    if options.tried and options.tasks is None:
        parser.error("--try needs rows: --tasks DIR")
    cases = [encoders(options), digits(options)]
    if options.adapters is not None:
        cases.append(adapters(options))
    lines, shown = [], []
    for case in cases:
        advice = hf_fda.advise(
            case.base, case.sources, try_data=case.held, output=options.work / case.name / "tried", **case.arguments
        )
        first = min(advice.recommendations, key=lambda one: one.place)
        lines.append(compare(f"{case.name}, by the rules", first))
        if case.held is not None:
            lines.append(compare(f"{case.name}, tried", advice.first))
        shown.append(f"{case.name}: {advice}")
    header = ("case", "first choice", "its row", "points", "best row", "points", "below it", "within one point")
    print("| " + " | ".join(header) + " |\n|" + " --- |" * len(header))
    print("\n".join(lines), "\n\n".join(shown), sep="\n\n")


if __name__ == "__main__":
    main()
