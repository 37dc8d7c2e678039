"""Measure how much faster two processes on two cores make a merge than one process on one core.

    python examples/benchmarks/processes.py [--work DIR] [--hidden 512] [--layers 4] [--sources 3] [--rounds 2]
    python examples/benchmarks/processes.py --checkpoints DIR [--work DIR] [--rounds 2]

A BERT-shaped base and its fine-tunes are made from a configuration, with random weights, and merged by FDA on anchors
with so many steps that arithmetic dominates. `--checkpoints` merges real ones with the defaults of `hf_fda.merge`
instead: a folder `base` and one for each fine-tune; text encoders are then merged block after block. Each merge is a
command of its own under `torchrun`, with one thread a process, and pinned to as many cores as it has processes (on
Linux). What is compared is the wall time of the merge itself, from the call in processes that have started until the
result is published; the whole command is printed beside it. The rounds alternate, the best of each kind counts, and the
two results are compared byte by byte. Other work on the machine lowers the ratio, so its load is printed, and beside
the wall time the processor time of the busiest process, which other work hardly touches: its ratio says how evenly the
work was shared and what sharing cost.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

STEPS: dict[str, Any] = {"num_anchors": 64, "steps": 30, "patience": None, "epochs": 20, "initial": "task_arithmetic"}


def make(folder: Path, hidden: int, layers: int, sources: int) -> None:
    """A random BERT-shaped base and its fine-tunes."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        vocab_size=1000,
    )
    model = BertModel(config)
    model.save_pretrained(folder / "base")
    for number in range(sources):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn(parameter.shape))
        model.save_pretrained(folder / f"source{number}")


def settings(folder: Path) -> dict[str, Any]:
    """What random checkpoints are merged with: as many weight files as several processes can share."""
    size = sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors"))
    return {"max_shard_bytes": size // 8, **STEPS}


def work(folder: Path, output: Path, options: dict[str, Any]) -> None:
    """One process's part: merge, and let the main one write how many seconds it took."""
    import hf_fda
    from hf_fda.processes import leave, together

    with together("cpu") as team:
        team.wait()
        start, busy = time.perf_counter(), time.process_time()
        sources = sorted(path.parent for path in folder.glob("*/config.json") if path.parent.name != "base")
        hf_fda.merge(folder / "base", sources, output=output, device="cpu", quiet=True, **options)
        seconds = time.perf_counter() - start
        busiest = max(team.gather(time.process_time() - busy))
        if team.main:
            output.with_suffix(".seconds").write_text(f"{seconds} {busiest}", encoding="utf-8")
    leave()


def measure(given: list[str], output: Path, processes: int) -> tuple[float, float, float]:
    """Seconds of a merge on so many cores, processor seconds of its busiest process, seconds of the whole command."""
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", __file__]
    if shutil.which("taskset"):
        cores = sorted(os.sched_getaffinity(0))[:processes]
        command = ["taskset", "--cpu-list", ",".join(map(str, cores)), *command]
    start = time.perf_counter()
    words = [*command, *given, "--output", str(output)]
    subprocess.run(words, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    whole = time.perf_counter() - start
    seconds, busiest = map(float, output.with_suffix(".seconds").read_text(encoding="utf-8").split())
    return seconds, busiest, whole


def same(one: Path, two: Path) -> bool:
    """Whether two merges are the same, byte by byte."""
    names = [[path.relative_to(root) for path in root.rglob("*.safetensors")] for root in (one, two)]
    return set(names[0]) == set(names[1]) and not any(filecmp.cmpfiles(one, two, map(str, names[0]), False)[1:])


def main() -> None:
    """Make checkpoints, merge them on one core and on two, print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("processes"))
    parser.add_argument("--checkpoints", type=Path, help="merge these with the defaults")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--sources", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = options.checkpoints or options.work / "models"
    if options.output is not None:  # one of the processes of a measured merge
        work(folder, options.output, {} if options.checkpoints else settings(folder))
        return
    if not options.checkpoints:
        make(folder, options.hidden, options.layers, options.sources)
    options.work.mkdir(parents=True, exist_ok=True)
    given = ["--checkpoints", str(folder)] if options.checkpoints else ["--work", str(options.work)]
    best: dict[int, tuple[float, ...]] = {}
    for _ in range(options.rounds):
        for processes in (1, 2):
            before = os.getloadavg()[0]
            found = measure(given, options.work / f"merged{processes}", processes)
            text = "{:.1f} s, busiest process {:.1f} s, whole command {:.1f} s".format(*found)
            print(f"{processes} on as many cores: {text}, load before {before:.2f}", flush=True)
            best[processes] = tuple(map(min, best.get(processes, found), found))
    print(f"same bytes: {same(options.work / 'merged1', options.work / 'merged2')}")
    ratios = [one / two for one, two in zip(best[1], best[2], strict=True)]
    print("ratio: {:.2f} (busiest process {:.2f}, whole command {:.2f})".format(*ratios))
    shutil.rmtree(options.work)


if __name__ == "__main__":
    main()
