"""Compare merges of real fine-tuned encoders on real test rows, each merge in a process of its own.

    python examples/benchmarks/arena.py --checkpoints DIR --tasks DIR [--split test] [--seeds 0 1 2] [--only NAME ...]

`--checkpoints` holds a folder `base` and one folder for each fine-tune, named after its task; `--tasks` holds
`TASK.train.jsonl` and `TASK.test.jsonl` with `text`, perhaps `text_pair`, and `label`. Every row keeps the sources'
own heads (pooler and classifier), so that rows differ in the merged body alone. Printed: accuracy by task and on
average, the divergence from what the fine-tunes answer (nats), CPU-seconds of the merge (for FDA: of construction and
of adaptation), and the peak memory of its process. Anchors do not depend on where adaptation starts, so all FDA rows
of one seed share theirs. No row of the table looks at data: the last ones are on synthetic rows.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from pathlib import Path
from typing import Any

import scoring
from scoring import Rows, Score, average, spread

STARTS: dict[str, dict[str, Any]] = {
    "base": {"initial": "base"},
    "task_arithmetic 0.3": {"initial": "task_arithmetic", "scaling": 0.3},
    "tsv 1.0": {"initial": "tsv"},
    "wudi iterative": {"initial": "wudi"},
    "isotropic 1.0": {"initial": "isotropic", "scaling": 1.0},
    "isotropic 3.0": {"initial": "isotropic", "scaling": 3.0},
}
"""Where FDA starts from."""
SEEDED = ("fda", "distill")


def table_rows(settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every row of the table: its name and what `hf_fda.merge` gets."""
    rows: dict[str, dict[str, Any]] = {}
    for scaling in (0.3, 0.4, 0.5):
        rows[f"task_arithmetic {scaling}"] = {"method": "task_arithmetic", "scaling": scaling}
    for scaling in (1.0, 1.2):
        rows[f"tsv {scaling}"] = {"method": "tsv", "scaling": scaling}
    for solver in ("iterative", "closed_form"):
        rows[f"wudi {solver}"] = {"method": "wudi", "solver": solver}
    for scaling in (1.0, 1.5, 2.0, 3.0):
        rows[f"isotropic {scaling}"] = {"method": "isotropic", "scaling": scaling}
    for start, options in STARTS.items():
        rows[f"fda on anchors alone, from {start}"] = {"method": "fda", "data": "anchors", **options, **settings}
    for start, options in STARTS.items():
        rows[f"fda from {start}"] = {"method": "fda", "data": "synthetic", **options, **settings}
    rows["distill on synthetic rows"] = {"method": "distill", "data": "synthetic"}
    return rows


def merge_row(queue: Any, checkpoints: Path, names: list[str], output: Path, arguments: dict[str, Any]) -> None:
    """One merge, in a process of its own: CPU-seconds and peak bytes go into the queue."""
    import hf_fda
    from hf_fda.spending import peak_bytes

    start = time.process_time()
    sources = {name: str(checkpoints / name) for name in names}
    hf_fda.merge(str(checkpoints / "base"), sources, output=output, quiet=True, **arguments)
    seconds = time.process_time() - start
    queue.put((seconds, peak_bytes()))


def in_process(function: Any, *arguments: Any) -> tuple[float, float]:
    """Run a function in a fresh process and take its figures."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=function, args=(queue, *arguments))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"a merge failed with exit status {process.exitcode}")
    return queue.get()


def main() -> None:
    """Parse, merge, score, print."""
    parser = scoring.parser(__doc__, "arena", limit=1000, seeds=[0])
    parser.add_argument("--split", choices=("train", "test"), default="test")
    parser.add_argument("--only", nargs="+", default=[], help="rows whose name begins with one of these")
    parser.add_argument("--sources", nargs="+", help="merge these fine-tunes only")
    parser.add_argument("--set", nargs="*", default=[], metavar="OPTION=VALUE", help="more options of the FDA rows")
    options = parser.parse_args()

    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    rows = Rows(options.checkpoints, options.tasks, options.split, options.limit, options.sources)
    print(f"{options.split} rows: " + ", ".join(f"{name} {len(labels)}" for name, labels in rows.labels.items()))
    header = ["merge", *rows.names, "average", "divergence", "CPU-seconds", "peak MB"]
    print("| " + " | ".join(header) + " |\n|" + " --- |" * len(header), flush=True)

    def show(label: str, runs: list[dict[str, Score]], seconds: str = "", memory: str = "") -> None:
        cells = [f"{statistics.mean(run[name].accuracy for run in runs):.3f}" for name in rows.names]
        averages = [average(run) for run in runs]
        cells += [spread([own.accuracy for own in averages]), spread([own.divergence for own in averages])]
        print("| " + " | ".join([label, *cells, seconds, memory]) + " |", flush=True)

    individual, untouched = {}, {}
    base = AutoModel.from_pretrained(options.checkpoints / "base")
    for name in rows.names:
        model = rows.fine_tune(name)
        individual[name] = rows.score(model, name)
        model.bert.embeddings, model.bert.encoder = base.embeddings, base.encoder
        untouched[name] = rows.score(model, name)
    show("individual fine-tunes", [individual])
    show("base encoder, own heads", [untouched])

    settings = dict(item.split("=", 1) for item in options.set)
    for label, arguments in table_rows(settings).items():
        if options.only and not any(label.startswith(part) for part in options.only):
            continue
        runs, seconds, peaks = [], [], []
        for seed in options.seeds if arguments["method"] in SEEDED else [0]:
            figures, peak = run_row(options, rows.names, label, arguments, seed)
            runs.append(rows.score_merged(options.work / slug(label, seed)))
            seconds.append(figures)
            peaks.append(peak)
        shown = " + ".join(f"{statistics.mean(column):.1f}" for column in zip(*seconds, strict=True))
        show(label, runs, shown, f"{max(peaks) / 1e6:.0f}")


def slug(label: str, seed: int) -> str:
    """A folder name for a row."""
    return label.replace(" ", "-").replace(",", "") + f"-seed{seed}"


def run_row(
    options: argparse.Namespace, names: list[str], label: str, arguments: dict[str, Any], seed: int
) -> tuple[list[float], float]:
    """Do one row's merge; CPU-seconds (construction apart from the rest, for FDA) and peak bytes."""
    output = options.work / slug(label, seed)
    if arguments["method"] != "fda":
        seconds, peak = in_process(merge_row, options.checkpoints, names, output, {**arguments, "seed": seed})
        return [seconds], peak
    shared = options.work / slug("anchors", seed)
    figures = shared / "seconds.json"
    if not figures.is_file():
        only = {**arguments, "initial": "base", "epochs": 0, "data": "anchors", "seed": seed}
        only.pop("scaling", None)
        seconds, peak = in_process(merge_row, options.checkpoints, names, shared, only)
        figures.write_text(json.dumps([seconds, peak]))
    construction, construction_peak = json.loads(figures.read_text())
    anchors = {name: str(shared / "anchors" / name) for name in names}
    seconds, peak = in_process(
        merge_row, options.checkpoints, names, output, {**arguments, "anchors": anchors, "seed": seed}
    )
    return [construction, seconds], max(construction_peak, peak)


if __name__ == "__main__":
    main()
