"""Compare merges of real fine-tuned encoders on real test rows, each merge in a process of its own.

    python examples/benchmarks/arena.py --checkpoints DIR --tasks DIR [--split test] [--seeds 0 1 2] [--only NAME ...]

`--checkpoints` holds a folder `base` and one folder for each fine-tune, named after its task; `--tasks` holds
`TASK.train.jsonl` and `TASK.test.jsonl` with `text`, perhaps `text_pair`, and `label`. Every row keeps the sources'
own heads (pooler and classifier), so that rows differ in the merged body alone. Printed: accuracy by task and on
average, seconds of the merge (for FDA: of construction and of adaptation), and the peak memory of its process.
Anchors do not depend on where adaptation starts, so all FDA rows of one initialisation and seed share theirs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from pathlib import Path
from typing import Any

STARTS: dict[str, dict[str, Any]] = {
    "base": {"initial": "base"},
    "task_arithmetic": {"initial": "task_arithmetic", "scaling": 0.3},
    "tsv": {"initial": "tsv"},
    "wudi": {"initial": "wudi"},
}


def table_rows(settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every row of the table: its name and what `hf_fda.merge` gets."""
    rows: dict[str, dict[str, Any]] = {}
    for scaling in (0.2, 0.3, 0.4, 0.5):
        rows[f"task_arithmetic {scaling}"] = {"method": "task_arithmetic", "scaling": scaling}
    for scaling in (1.0, 1.2):
        rows[f"tsv {scaling}"] = {"method": "tsv", "scaling": scaling}
    for solver in ("iterative", "closed_form"):
        rows[f"wudi {solver}"] = {"method": "wudi", "solver": solver}
    for scaling in (1.0, 1.5):
        rows[f"isotropic {scaling}"] = {"method": "isotropic", "scaling": scaling}
    for initialization in ("weights", "gaussian"):
        for start, options in STARTS.items():
            rows[f"fda from {start}, {initialization}"] = {
                "method": "fda",
                "initialization": initialization,
                **settings,
                **options,
            }
    return rows


def read_rows(tasks: Path, task: str, split: str, limit: int) -> list[dict[str, Any]]:
    """The first `limit` rows of a task."""
    with open(tasks / f"{task}.{split}.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file][:limit]


def accuracy(model: Any, tokenizer: Any, rows: list[dict[str, Any]], batch: int = 64) -> float:
    """Fraction of rows whose label the model gives; 64 tokens at most."""
    import torch

    right = 0
    model.eval()
    rows = sorted(rows, key=lambda row: len(row["text"]) + len(row.get("text_pair", "")))  # little padding
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        pairs = [row["text_pair"] for row in part] if "text_pair" in part[0] else None
        texts = [row["text"] for row in part]
        inputs = tokenizer(texts, pairs, truncation=True, max_length=64, padding=True, return_tensors="pt")
        with torch.no_grad():
            guess = model(**inputs).logits.argmax(-1)
        right += int((guess == torch.tensor([row["label"] for row in part])).sum())
    return right / len(rows)


def merge_row(queue: Any, checkpoints: Path, names: list[str], output: Path, arguments: dict[str, Any]) -> None:
    """One merge, in a process of its own: seconds and peak bytes go into the queue."""
    import hf_fda

    start = time.perf_counter()
    sources = {name: str(checkpoints / name) for name in names}
    hf_fda.merge(str(checkpoints / "base"), sources, output=output, quiet=True, **arguments)
    seconds = time.perf_counter() - start
    queue.put((seconds, peak_bytes()))


def peak_bytes() -> int:
    """Peak resident bytes of this process. (On Linux `ru_maxrss` would start from the parent's.)"""
    status = Path("/proc/self/status")
    if status.is_file():
        lines = status.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, required=True)
    parser.add_argument("--tasks", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("arena"), help="where merges go (default arena/)")
    parser.add_argument("--split", choices=("train", "test"), default="test")
    parser.add_argument("--limit", type=int, default=1000, help="rows a task at most")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of the FDA rows")
    parser.add_argument("--steps", type=int, default=100, help="construction steps")
    parser.add_argument("--epochs", type=int, default=60, help="passes of adaptation")
    parser.add_argument("--only", nargs="+", default=[], help="rows whose name contains one of these")
    parser.add_argument("--set", nargs="*", default=[], metavar="OPTION=VALUE", help="more options of the FDA rows")
    options = parser.parse_args()

    from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    import hf_fda

    logging.disable_progress_bar()
    names = sorted(path.name for path in options.checkpoints.iterdir() if path.is_dir() and path.name != "base")
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoints / "base")
    data = {name: read_rows(options.tasks, name, options.split, options.limit) for name in names}
    print(f"{options.split} rows: " + ", ".join(f"{name} {len(rows)}" for name, rows in data.items()))
    header = ["merge", *names, "average", "seconds", "peak MB"]
    print("| " + " | ".join(header) + " |\n|" + " --- |" * len(header), flush=True)

    def show(label: str, runs: list[list[float]], seconds: str = "", memory: str = "") -> None:
        means = [statistics.mean(column) for column in zip(*runs, strict=True)]
        averages = [statistics.mean(run) for run in runs]
        spread = f" ± {statistics.stdev(averages):.3f}" if len(runs) > 1 else ""
        cells = [f"{value:.3f}" for value in means] + [
            f"{statistics.mean(averages):.3f}{spread}",
            seconds,
            memory,
        ]
        print("| " + " | ".join([label, *cells]) + " |", flush=True)

    individual, untouched = [], []
    base = AutoModel.from_pretrained(options.checkpoints / "base")
    for name in names:
        model = AutoModelForSequenceClassification.from_pretrained(options.checkpoints / name)
        individual.append(accuracy(model, tokenizer, data[name]))
        model.bert.embeddings, model.bert.encoder = base.embeddings, base.encoder
        untouched.append(accuracy(model, tokenizer, data[name]))
    show("individual fine-tunes", [individual])
    show("base encoder, own heads", [untouched])

    fda = {"steps": options.steps, "patience": None, "epochs": options.epochs}
    fda.update(item.split("=", 1) for item in options.set)
    for label, arguments in table_rows(fda).items():
        if options.only and not any(part in label for part in options.only):
            continue
        runs, seconds, peaks = [], [], []
        for seed in options.seeds if arguments["method"] == "fda" else [0]:
            figures, scores = run_row(options, names, label, arguments, seed)
            merged = hf_fda.Merged(options.work / slug(label, seed))
            runs.append([accuracy(merged.load(task=name), tokenizer, data[name]) for name in names])
            seconds.append(figures)
            peaks.append(scores)
        shown = " + ".join(f"{statistics.mean(column):.1f}" for column in zip(*seconds, strict=True))
        show(label, runs, shown, f"{max(peaks) / 1e6:.0f}")


def slug(label: str, seed: int) -> str:
    """A folder name for a row."""
    return label.replace(" ", "-").replace(",", "") + f"-seed{seed}"


def run_row(
    options: argparse.Namespace, names: list[str], label: str, arguments: dict[str, Any], seed: int
) -> tuple[list[float], float]:
    """Do one row's merge; seconds (construction apart from the rest, for FDA) and peak bytes."""
    output = options.work / slug(label, seed)
    if arguments["method"] != "fda":
        seconds, peak = in_process(merge_row, options.checkpoints, names, output, arguments)
        return [seconds], peak
    shared = options.work / slug(f"anchors {arguments['initialization']}", seed)
    figures = shared / "seconds.json"
    if not figures.is_file():
        only = {**arguments, "initial": "base", "epochs": 0, "seed": seed}
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
