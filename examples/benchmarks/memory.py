"""Measure the peak memory of merges of random Llama-shaped checkpoints as the number of layers grows.

    python examples/benchmarks/memory.py [--work DIR] [--layers 4 8 16] [--hidden 1024] [--methods ties ...]

Each merge runs in a process of its own (on Linux). Printed: the peak of that process above what it held before the
merge, the plan's estimate of the same, and beside them what holding the base and all sources whole would take.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "task_arithmetic": {},
    "ties": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "tsv": {},
    "fda from base": {"method": "fda", "num_anchors": 256, "steps": 3, "epochs": 1},
    "fda from tsv": {"method": "fda", "initial": "tsv", "num_anchors": 256, "steps": 3, "epochs": 1},
}


def make(folder: Path, layers: int, hidden: int, seed: int) -> None:
    """A random Llama-shaped checkpoint; the same embeddings and head size whatever the number of layers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        vocab_size=1000,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def resident(field: str) -> int:
    """Resident bytes of this process: "VmRSS" now, "VmHWM" at most since the last reset."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def measure(queue: Any, base: Path, sources: list[Path], output: Path, options: dict[str, Any]) -> None:
    """One merge: bytes above what the process held before, and the plan's estimate."""
    import gc

    import hf_fda
    from hf_fda.engine import run

    first = base.parent / "first"  # two layers of the same width: what is loaded and kept on first use
    hf_fda.merge(base.parent / "small0", [base.parent / "small1"], output=first, quiet=True, **options)
    shutil.rmtree(first)
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    plan = hf_fda.plan(base, sources, output=output, **options)
    run(plan, quiet=True)
    queue.put((max(resident("VmHWM") - before, 0), plan.peak_memory_bytes))


def main() -> None:
    """Make checkpoints, merge them, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("memory"))
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--sources", type=int, default=2)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")

    print("| method | layers | all models whole, MB | peak of the merge, MB | plan's estimate, MB |")
    print("| --- | --- | --- | --- | --- |")
    for layers in options.layers:
        folders = [options.work / f"model{number}" for number in range(options.sources + 1)]
        shapes = [(folder, layers, options.hidden) for folder in folders]
        shapes += [(options.work / f"small{number}", 2, options.hidden) for number in range(2)]
        for number, shape in enumerate(shapes):
            making = context.Process(target=make, args=(*shape, number))
            making.start()
            making.join()
        whole = sum(path.stat().st_size for folder in folders for path in folder.glob("*.safetensors"))
        for name in options.methods:
            queue: Any = context.Queue()
            given = {"method": name, **METHODS[name]}
            output = options.work / "merged"
            merging = context.Process(target=measure, args=(queue, folders[0], folders[1:], output, given))
            merging.start()
            merging.join()
            if merging.exitcode:
                raise SystemExit(f"{name} failed with exit status {merging.exitcode}")
            held, estimate = queue.get()
            print(f"| {name} | {layers} | {whole / 1e6:.0f} | {held / 1e6:.0f} | {estimate / 1e6:.0f} |", flush=True)
            shutil.rmtree(output)
        shutil.rmtree(options.work)


if __name__ == "__main__":
    main()
