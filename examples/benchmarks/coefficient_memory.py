"""Measure what the gradient of merging coefficients costs in memory, on random Llama-shaped models of some widths.

    python examples/benchmarks/coefficient_memory.py [--work DIR] [--layers 4 8 16] [--hidden 768] [--sources 2]

Each backward pass runs in a process of its own (on Linux). Printed are the peaks of that process above what it held
before the forward pass: of the activations alone (gradients go through all layers to the embeddings' outputs, and no
parameter's is made), of the same with a gradient for every coefficient (each parameter's gradient becomes inner
products and is dropped), and of a plain backward pass, which keeps the gradients of all parameters.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

from memory import make, resident

MODES = ("activations", "coefficients", "plain")
ROWS, TOKENS = 2, 64


def measure(queue: Any, base: Path, sources: list[Path], mode: str) -> None:
    """One backward pass: bytes above what the process held before, and the bytes of the largest tensor."""
    import torch

    from hf_fda.divergence.coefficients import MergedParameters
    from hf_fda.divergence.task_models import task_model
    from hf_fda.inputs import open_inputs

    torch.set_num_threads(1)
    inputs = open_inputs(base, sources)
    parameters = MergedParameters(inputs.base, inputs.weighted, inputs.base.names, "tensor")
    if mode == "plain":
        for name, tensor in parameters.tensors.items():  # the same values, without what consumes their gradients
            parameters.tensors[name] = torch.nn.Parameter(tensor.data)
    model: Any = task_model(inputs.weighted[0], parameters.tensors, torch.device("cpu"))
    embedded: list[torch.Tensor] = []
    model.get_input_embeddings().register_forward_hook(lambda _module, _args, output: embedded.append(output))
    ids = torch.randint(1, model.config.vocab_size, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))

    def run() -> None:
        loss = model(input_ids=ids, use_cache=False).logits.logsumexp(-1).mean()
        if mode == "activations":
            torch.autograd.grad(loss, embedded.pop())
        else:
            loss.backward()

    run()  # what is made on first use
    model.zero_grad(set_to_none=True)
    embedded.clear()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    run()
    queue.put((max(resident("VmHWM") - before, 0), max(tensor.nbytes for tensor in parameters.tensors.values())))


def main() -> None:
    """Make checkpoints, run backward passes, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("coefficient_memory"))
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--sources", type=int, default=2)
    options = parser.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed goes back at once, so that the peak is of tensors
    context = multiprocessing.get_context("spawn")

    def child(target: Any, *arguments: Any) -> None:
        process = context.Process(target=target, args=arguments)
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"{target.__name__}{arguments[-2:]} failed with exit status {process.exitcode}")

    print("| layers | activations, MB | with coefficients' gradients, MB | more, MB | largest tensor, MB | plain, MB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for layers in options.layers:
        folders = [options.work / f"model{number}" for number in range(options.sources + 1)]
        for number, folder in enumerate(folders):
            child(make, folder, layers, options.hidden, number)
        peaks, largest = {}, 0
        for mode in MODES:
            queue = context.SimpleQueue()
            child(measure, queue, folders[0], folders[1:], mode)
            peaks[mode], largest = queue.get()
        more = peaks["coefficients"] - peaks["activations"]
        numbers = (peaks["activations"], peaks["coefficients"], more, largest, peaks["plain"])
        print(f"| {layers} | " + " | ".join(f"{number / 1e6:.1f}" for number in numbers) + " |", flush=True)
        shutil.rmtree(options.work)


if __name__ == "__main__":
    main()
