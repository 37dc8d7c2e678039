"""Compare merges that look at data, on real fine-tuned encoders and real test rows, each in a process of its own.

    python examples/benchmarks/data_methods.py --checkpoints DIR --tasks DIR [--split test] [--seeds 0 1 2]
        [--rows 128 1000] [--only NAME ...] [--curve FILE.svg]

Folders as in `arena.py`. The merges get rows of the training files without their labels, sampled by the seed. Every
merge keeps the sources' own heads (pooler and classifier). Printed: accuracy by task and on average, the divergence
from what the fine-tunes answer (nats), CPU-seconds and the peak memory of the merge's process; for more than one seed
the mean and standard deviation. With `--curve` also how far the average accuracy falls below that of the fine-tunes as
there are more of them: for each number from two up, the first so many in each of three cyclic orders, as a table and
as a picture.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import scoring
from arena import in_process, merge_row, slug
from scoring import Rows, Score, average, spread

PLAIN: dict[str, dict[str, Any]] = {
    "task_arithmetic 0.4": {"method": "task_arithmetic", "scaling": 0.4},
    "task_arithmetic 0.5": {"method": "task_arithmetic", "scaling": 0.5},
    "ties": {"method": "ties", "density": 0.2},
    "tsv": {"method": "tsv"},
}
AS_PUBLISHED = {"method": "divmerge", "initial": "task_arithmetic"}
LOOKING: dict[str, dict[str, Any]] = {
    **{
        f"divmerge {granularity} {divergence}": {
            "method": "divmerge",
            "granularity": granularity,
            "divergence": divergence,
        }
        for granularity in ("task", "block", "tensor")
        for divergence in ("jensen-shannon", "forward-kl", "reverse-kl")
    },
    **{
        f"task vectors, divmerge {granularity}": {**AS_PUBLISHED, "granularity": granularity}
        for granularity in ("task", "block", "tensor")
    },
    "adamerging task": {"method": "adamerging", "granularity": "task"},
    "adamerging tensor": {"method": "adamerging", "granularity": "tensor"},
    "regmean": {"method": "regmean"},
    "regmean_pp": {"method": "regmean_pp"},
    "fisher": {"method": "fisher"},
    "distill": {"method": "distill"},
    "fda data": {"method": "fda"},
    "fda mixed": {"method": "fda", "with_data": "mixed"},
}
WITHOUT_DATA: dict[str, dict[str, Any]] = {
    **{
        f"anchors, divmerge {granularity}": {"method": "divmerge", "granularity": granularity, "data": "anchors"}
        for granularity in ("task", "block", "tensor")
    },
    **{
        f"synthetic, {method}": {"method": method, "data": "synthetic"}
        for method in ("divmerge", "adamerging", "regmean", "regmean_pp", "fisher", "fda", "distill")
    },
}
CURVE = (
    "task_arithmetic 0.4",
    "ties",
    "tsv",
    "adamerging tensor",
    "task vectors, divmerge tensor",
    "divmerge tensor jensen-shannon",
)
"""What the curve is drawn of."""

MAX_LENGTH = 64


class Table:
    """Merges in a work folder, made once, and their scores.

    Args:
        work: where they go.
        rows: what they are judged on, and where the checkpoints lie.
        tasks: holds the training files.
    """

    def __init__(self, work: Path, rows: Rows, tasks: Path) -> None:
        self.work, self.rows, self.tasks = work, rows, tasks

    def data(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The training rows of tasks, of which only the text is named."""
        pairs = {name: "text_pair" in scoring.read_rows(self.tasks, name, "train")[0] for name in names}
        return {
            name: {
                "path": str(self.tasks / f"{name}.train.jsonl"),
                "columns": ["text", "text_pair"] if pairs[name] else ["text"],
            }
            for name in names
        }

    def merged(
        self, label: str, arguments: dict[str, Any], names: Sequence[str], seed: int, count: int | None
    ) -> tuple[dict[str, Score], float, float]:
        """One merge's scores, its CPU-seconds and its peak bytes."""
        given = {**arguments, "seed": seed}
        if count is not None:
            given |= {"data": self.data(names), "rows": count, "max_length": MAX_LENGTH}
        output = self.work / slug(f"{label} {'-'.join(names)} {count}", seed)
        seconds, peak = in_process(merge_row, self.rows.checkpoints, list(names), output, given)
        import hf_fda

        merged = hf_fda.Merged(output)
        return {name: self.rows.score(merged.load(task=name), name) for name in names}, seconds, peak


def show(label: str, count: str, runs: Sequence[tuple[dict[str, Score], float, float]], names: Sequence[str]) -> None:
    """Print one row of the table."""
    cells = [f"{statistics.mean(run[0][name].accuracy for run in runs):.3f}" for name in names]
    averages = [average(run[0]) for run in runs]
    cells += [spread([own.accuracy for own in averages]), spread([own.divergence for own in averages])]
    cells += [f"{statistics.mean(run[1] for run in runs):.0f}", f"{max(run[2] for run in runs) / 1e6:.0f}"]
    print("| " + " | ".join([label, count, *cells]) + " |", flush=True)


def curve(table: Table, seeds: Sequence[int], count: int) -> dict[str, dict[int, list[float]]]:
    """How far the average accuracy lies below the fine-tunes', by method and number of sources."""
    names = table.rows.names
    own = {name: table.rows.score(table.rows.fine_tune(name), name).accuracy for name in names}
    found: dict[str, dict[int, list[float]]] = {label: {} for label in CURVE}
    for number in range(2, len(names) + 1):
        for turn, seed in enumerate(seeds):
            start = turn * len(names) // len(seeds)
            chosen = sorted((names * 2)[start : start + number])
            for label in CURVE:
                arguments = {**PLAIN, **LOOKING}[label]
                scores, _, _ = table.merged(label, arguments, chosen, seed, count if label in LOOKING else None)
                fallen = statistics.mean(own[name] - scores[name].accuracy for name in chosen)
                found[label].setdefault(number, []).append(fallen)
    return found


def draw(found: dict[str, dict[int, list[float]]], output: Path) -> None:
    """The curve."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "hf_fda"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for label, points in found.items():
        counts = list(points)
        axes.plot(counts, [100 * statistics.mean(points[number]) for number in counts], "o-", label=label)
    axes.set(xlabel="sources merged", ylabel="points of test accuracy below the fine-tunes", xticks=counts)
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(output, metadata={"Date": None})


def main() -> None:
    """Parse, merge, score, print."""
    parser = scoring.parser(__doc__, "data_methods", limit=1000, seeds=[0, 1, 2])
    parser.add_argument("--split", choices=("train", "test"), default="test")
    parser.add_argument("--rows", type=int, nargs="+", default=[128, 1000], help="unlabelled rows a task")
    parser.add_argument("--only", nargs="+", default=[], help="rows whose name begins with one of these")
    parser.add_argument("--curve", type=Path, help="draw the curve into this file")
    options = parser.parse_args()
    rows = Rows(options.checkpoints, options.tasks, options.split, options.limit)
    table = Table(options.work, rows, options.tasks)
    print(f"{options.split} rows: " + ", ".join(f"{name} {len(labels)}" for name, labels in rows.labels.items()))
    header = ["merge", "rows", *rows.names, "average", "divergence", "CPU-seconds", "peak MB"]
    print("| " + " | ".join(header) + " |\n|" + " --- |" * len(header), flush=True)

    def wanted(label: str) -> bool:
        return not options.only or any(label.startswith(part) for part in options.only)

    for label, arguments in PLAIN.items():
        if wanted(label):
            show(label, "", [table.merged(label, arguments, rows.names, 0, None)], rows.names)
    for label, arguments in LOOKING.items():
        for count in options.rows if wanted(label) else ():
            runs = [table.merged(label, arguments, rows.names, seed, count) for seed in options.seeds]
            show(label, str(count), runs, rows.names)
    for label, arguments in WITHOUT_DATA.items():
        if wanted(label):
            runs = [table.merged(label, arguments, rows.names, seed, None) for seed in options.seeds]
            show(label, "", runs, rows.names)
    if options.curve is not None:
        found = curve(table, options.seeds, options.rows[0])
        counts = list(next(iter(found.values())))
        print("\n| sources | " + " | ".join(map(str, counts)) + " |\n|" + " --- |" * (len(counts) + 1))
        for label, points in found.items():
            print("| " + " | ".join([label, *(spread(points[number]) for number in counts)]) + " |")
        draw(found, options.curve)


if __name__ == "__main__":
    main()
