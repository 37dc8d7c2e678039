"""Merge random Llama-shaped checkpoints in bfloat16 by this package and by mergekit, each in whole processes.

    python3 -m venv mergekit && mergekit/bin/pip install mergekit==0.1.5
    python examples/benchmarks/mergekit_speed.py --mergekit mergekit/bin/mergekit-yaml [--small] [--work DIR]

Both read the same files, write shards of 500 MB, run in turn, and use all cores. Printed for each method: wall and
processor seconds and peak memory of both (the smallest of all rounds), their ratios, and the seconds to copy the bytes
that a linear merge reads and writes. The full size (1.1 billion parameters) needs 12 GB of disk.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from child import Usage, measured
from random_llama import SHARD_BYTES, llama, write_random

from hf_fda.merge_methods import methods

DENSITY = 0.5

METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "ties": {"density": DENSITY},
    "dare_ties": {"density": DENSITY},
    "slerp": {"t": 0.5},
}


def ours(work: Path, method: str, sources: list[str], output: Path) -> list[str]:
    """The command of this package."""
    base, others = (sources[0], sources[1:]) if method == "slerp" else ("base", sources)  # as mergekit reads it
    words = [sys.executable, "-m", "hf_fda.cli", "merge", "--method", method, "--base", str(work / base)]
    for name in others:
        words += ["--source", f"{name}={work / name}"]
    words += ["--dtype", "bfloat16", "--max-shard-bytes", str(SHARD_BYTES), "--output", str(output), "--quiet"]
    return words + [word for name, value in METHODS[method].items() for word in (f"--{name}", str(value))]


def theirs(program: str, work: Path, method: str, sources: list[str], output: Path) -> list[str]:
    """The command of mergekit, with its configuration written."""
    options, base = METHODS[method], str(work / "base")
    own: dict[str, Any] = {"density": DENSITY} if "density" in options else {}
    models = [{"model": str(work / name), "parameters": {"weight": 1.0, **own}} for name in sources]
    config: dict[str, Any] = {"merge_method": method, "models": models, "dtype": "bfloat16"}
    if method == "slerp":
        config |= {"models": [{"model": str(work / name)} for name in sources], "parameters": options}
        config["base_model"] = str(work / sources[0])
    elif method != "linear":
        config["base_model"] = base
    path = work / f"{method}.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return [program, str(path), str(output), "--lazy-unpickle", "--out-shard-size", str(SHARD_BYTES), "--quiet"]


def copying(work: Path, sources: list[str]) -> Usage:
    """Read all sources, and write as much as one."""
    command = f"cp -r {work / sources[0]} {work / 'copied'}"
    for name in sources[1:]:
        command += f" && cat {work / name}/*.safetensors > {os.devnull}"
    found = measured(["bash", "-c", command])
    shutil.rmtree(work / "copied")
    return found


def best(usages: list[Usage]) -> Usage:
    """The least of each, over the rounds."""
    return Usage(*(min(getattr(usage, name) for usage in usages) for name in ("wall", "processor", "peak")))


def compare(work: Path, program: str, method: str, sources: list[str], rounds: int) -> list[Usage]:
    """This package, mergekit and the copy, in turn, `rounds` times."""
    output = work / "merged"
    runs: list[list[Usage]] = [[], [], []]
    threads = {"OMP_NUM_THREADS": str(os.cpu_count())}
    for _ in range(rounds):
        for own, command in enumerate(
            (ours(work, method, sources, output), theirs(program, work, method, sources, output))
        ):
            time.sleep(1)
            runs[own].append(measured(command, threads))
            shutil.rmtree(output)
        runs[2].append(copying(work, sources))
    return [best(own) for own in runs]


def main() -> None:
    """Print a table, one row for each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", required=True, help="its command mergekit-yaml")
    parser.add_argument("--work", type=Path, help="a folder for the checkpoints; kept, and used again")
    parser.add_argument("--small", action="store_true", help="checkpoints of 30 million parameters")
    parser.add_argument("--sources", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=[name for name in METHODS if name in methods()])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        names = [f"source{number}" for number in range(arguments.sources)]
        for seed, name in enumerate(["base", *names]):
            if not (work / name).is_dir():
                write_random(work / name, llama(512, 4, 16000) if arguments.small else llama(), seed)
        compared = [word for what in ("seconds", "of processors", "peak MB") for word in (what, "mergekit", "ratio")]
        print("| " + " | ".join(["method", *compared, "copy"]) + " |\n" + "| --- " * 11 + "|")
        for method in arguments.methods:
            used = names[:2] if method == "slerp" else names
            own, other, copied = compare(work, arguments.mergekit, method, used, arguments.rounds)
            cells = [method]
            for field, scale in (("wall", 1.0), ("processor", 1.0), ("peak", 1e6)):
                mine, its = getattr(own, field) / scale, getattr(other, field) / scale
                cells += [f"{mine:.1f}", f"{its:.1f}", f"{mine / its:.2f}"]
            print("| " + " | ".join([*cells, f"{copied.wall:.1f}"]) + " |", flush=True)


if __name__ == "__main__":
    main()
