"""Compare what a plan says a merge will take with what it takes: memory, disk and time.

    python examples/benchmarks/plan_accuracy.py [--work DIR] [--hidden 1024 --layers 4] [--methods M ...]

Random Llama-shaped checkpoints in bfloat16; each merge runs in a process of its own (on Linux), which has merged a
small model before, so that libraries are loaded. Printed for each method: the plan's estimate, what was measured, and
their ratio.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from memory import resident
from random_llama import llama, write_random

import hf_fda
from hf_fda.engine import run

METHODS: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("linear", "task_arithmetic", "slerp", "nuslerp", "multislerp", "karcher", "model_stock")},
    **{name: {"density": 0.5} for name in ("ties", "dare_ties", "della", "magnitude_prune")},
    **{name: {} for name in ("breadcrumbs", "sce", "nearswap", "arcee_fusion")},
    **{name: {} for name in ("tsv", "isotropic", "iso_cts", "wudi")},
    "fda": {"num_anchors": 256, "steps": 10, "epochs": 3},
}

ONE_SOURCE = ("slerp", "nearswap", "arcee_fusion")
"""They merge a source into the base."""


def measure(queue: Any, work: Path, method: str, options: dict[str, Any]) -> None:
    """One merge: (estimate, measured) of bytes of memory, bytes of disk and seconds."""
    count = 1 if method in ONE_SOURCE else 2
    for size in ("small", "large"):
        folders, output = [work / f"{size}{number}" for number in range(3)], work / "merged"
        gc.collect()
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        plan = hf_fda.plan(
            folders[0], folders[1 : count + 1], method, output=output, dtype="auto", processes=1, **options
        )
        start = time.perf_counter()
        run(plan, quiet=True)
        seconds = time.perf_counter() - start
        disk = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
        shutil.rmtree(output)
    memory = max(resident("VmHWM") - before, 1)
    assert plan.time is not None
    queue.put([(plan.peak_memory_bytes, memory), (plan.disk_bytes, disk), (plan.time.seconds, seconds)])


def main() -> None:
    """Make checkpoints, merge them, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="a folder for the checkpoints; kept, and used again")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        for number in range(3):
            for size, layers in (("small", 1), ("large", options.layers)):
                if not (work / f"{size}{number}").is_dir():
                    write_random(
                        work / f"{size}{number}", llama(options.hidden, layers, options.vocabulary), 7 + number
                    )
        print(f"{os.cpu_count()} cores\n")
        words = [word for what in ("memory, MB", "disk, MB", "seconds") for word in (what, "measured", "ratio")]
        print("| " + " | ".join(["method", *words]) + " |\n" + "| --- " * 10 + "|")
        for name in options.methods:
            queue: Any = context.Queue()
            merging = context.Process(target=measure, args=(queue, work, name, METHODS[name]))
            merging.start()
            merging.join()
            if merging.exitcode:
                raise SystemExit(f"{name} failed with exit status {merging.exitcode}")
            cells = [name]
            for (said, taken), scale, places in zip(queue.get(), (1e6, 1e6, 1), (0, 0, 2), strict=True):
                cells += [f"{said / scale:.{places}f}", f"{taken / scale:.{places}f}", f"{said / taken:.2f}"]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
