"""Measure what each tensor of a checkpoint of many small ones costs (the experts of a mixture), as their number grows.

    python examples/benchmarks/tensors.py [--work DIR] [--tensors 1250 2500 5000] [--method linear]

Each merge is a whole process. Printed: processor seconds of planning and of merging, each above what the smallest
checkpoint takes, and milliseconds for each tensor more.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from child import measured
from random_llama import mixtral, write_random


def command(work: Path, number: int, method: str, verb: str) -> list[str]:
    """Plan or merge two sources."""
    folders = [work / f"{number}-{model}" for model in range(3)]
    words = [sys.executable, "-m", "hf_fda.cli", verb, "--method", method, "--base", str(folders[0])]
    for folder in folders[1:]:
        words += ["--source", str(folder)]
    return [*words, "--dtype", "auto", "--output", str(work / f"{number}-{method}")]


def main() -> None:
    """Print a table, one row for each number of tensors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--tensors", type=int, nargs="+", default=[1250, 2500, 5000])
    parser.add_argument("--method", default="linear")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        print(
            "| tensors | plan s | merge s | peak MB | plan, ms a tensor | merge, ms a tensor |\n" + "| --- " * 6 + "|"
        )
        first: tuple[int, float, float] | None = None
        for wanted in arguments.tensors:
            held = [write_random(work / f"{wanted}-{model}", mixtral(wanted), model) for model in range(3)]
            planned = measured(command(work, wanted, arguments.method, "plan"))
            merged = measured(command(work, wanted, arguments.method, "merge"))
            cells = [str(held[0]), f"{planned.processor:.1f}", f"{merged.processor:.1f}", f"{merged.peak / 1e6:.0f}"]
            if first is None:
                first = held[0], planned.processor, merged.processor
            else:
                more = (held[0] - first[0]) / 1000
                cells += [f"{(own - before) / more:.2f}" for own, before in
                          ((planned.processor, first[1]), (merged.processor, first[2]))]  # fmt: skip
            print("| " + " | ".join(cells + [""] * (6 - len(cells))) + " |", flush=True)


if __name__ == "__main__":
    main()
