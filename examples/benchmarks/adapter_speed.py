"""Merge ten adapters of rank 16 into one of rank 32, on the shapes of a 7B Llama: `hf_fda.merge_adapters` and PEFT.

    python examples/benchmarks/adapter_speed.py [--layers 1] [--targets q_proj up_proj down_proj] [--adapters 10]

The merge is the weighted sum of the adapters' changes, cut to its nearest matrix of the rank: PEFT's
`add_weighted_adapter(combination_type="svd")`, here with `svd_full_matrices=False`, its faster form (`--full-matrices`:
its default). Base and adapters are random; the singular values of each adapter fall. Each merge runs in a process of
its own, with one thread unless told otherwise. Printed: seconds of the call, of the wall and of the CPU; peak memory of
the process, and what of it came on top of the loaded model; the distance from the best approximation of the rank on one
module of each target, as a fraction of its Frobenius norm (in float64, from the factors); the ratios of seconds; and,
of `hf_fda.merge_adapters`, the largest tensor that any torch operation made. Linux only.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from arena import in_process
from memory import resident
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

SIZES: dict[str, Any] = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 64}
"""A 7B Llama's, but for the vocabulary."""

OWN, PEFT = "hf_fda.merge_adapters", "PEFT add_weighted_adapter"


def make_model(options: argparse.Namespace) -> Any:
    """A float32 model with adapters "a0", "a1", ... of random weights; the k-th row of each A is scaled by 0.8^k."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(num_hidden_layers=options.layers, **SIZES))
    config = LoraConfig(r=options.source_rank, lora_alpha=32, target_modules=options.targets)
    model: Any = get_peft_model(base, config, "a0")
    for index in range(1, options.adapters):
        model.add_adapter(f"a{index}", LoraConfig(**{**config.to_dict(), "target_modules": options.targets}))
    falling = 0.8 ** torch.arange(options.source_rank)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
            if ".lora_A." in name:
                parameter.mul_(falling[:, None])
    return model


def weights_of(options: argparse.Namespace) -> dict[str, float]:
    """A weight for each adapter, one of them negative."""
    return {f"a{i}": 1.0 - 0.15 * i for i in range(options.adapters)}


def merge_with(kind: str, options: argparse.Namespace) -> Callable[[Any, str], Any]:
    """The call that is timed: of a model and a name for the new adapter."""
    weights = weights_of(options)
    names = list(weights)
    if kind == PEFT:
        return lambda model, name: model.add_weighted_adapter(
            names,
            list(weights.values()),
            name,
            combination_type="svd",
            svd_rank=options.rank,
            svd_full_matrices=options.full_matrices,
        )
    import hf_fda

    return lambda model, name: hf_fda.merge_adapters(
        model, names, name, "linear", rank=options.rank, weights=weights, normalize=False
    )


def measure(queue: Any, kind: str, options: argparse.Namespace) -> None:
    """One merge, in a process of its own: a dictionary of figures goes into the queue."""
    torch.set_num_threads(options.threads)
    model = make_model(options)
    merge = merge_with(kind, options)
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    clock, start = time.process_time(), time.perf_counter()
    merge(model, "merged")
    figures: dict[str, Any] = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - clock}
    figures |= {"peak": resident("VmHWM"), "before": before}
    figures["errors"] = {target: error(model, target, weights_of(options), options.rank) for target in options.targets}
    if kind == OWN:
        with LargestTensor(model) as largest:
            merge(model, "again")
        figures["largest"] = largest.numbers
    queue.put(figures)


def error(model: Any, target: str, weights: dict[str, float], rank: int) -> float:
    """Distance of the merged adapter from the best approximation of its rank, as a fraction of the latter's norm."""
    layer = next(module for name, module in model.named_modules() if name.endswith(f".{target}"))
    parts = [(scaled_left(layer, name) * weight, right(layer, name)) for name, weight in weights.items()]
    q, r = torch.linalg.qr(torch.cat([own for own, _ in parts], dim=1))
    u, s, vh = torch.linalg.svd(r @ torch.cat([own for _, own in parts]), full_matrices=False)
    best = q @ (u[:, :rank] * s[:rank])
    left = torch.cat([best, -scaled_left(layer, "merged")], dim=1)
    across = torch.cat([vh[:rank], right(layer, "merged")])
    core = torch.linalg.qr(left)[1] @ torch.linalg.qr(across.mT)[1].mT
    return float(core.norm() / s[:rank].norm())


def scaled_left(layer: Any, name: str) -> Tensor:
    """B times the scaling, (d_out, r), in float64."""
    return layer.lora_B[name].weight.detach().double() * layer.scaling[name]


def right(layer: Any, name: str) -> Tensor:
    """A, (r, d_in), in float64."""
    return layer.lora_A[name].weight.detach().double()


class LargestTensor(TorchDispatchMode):
    """Watches for the most numbers in one tensor in memory that operations give, other than tensors of the model.

    Memory that is asked for and never written (`aten.empty`) is not counted: Accelerate's `init_empty_weights` asks for
    it on the way to the meta device.

    Args:
        model: what is known already.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.known = {own.untyped_storage()._cdata for own in model.state_dict().values()}
        self.numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and look at what it returns."""
        made = function(*args, **(kwargs or {}))
        for tensor in tensors_in(made) if "empty" not in str(function) else ():
            if tensor.device.type != "meta" and tensor.untyped_storage()._cdata not in self.known:
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // tensor.element_size())
        return made


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in nested lists, tuples and dictionaries."""
    return [own for own in torch.utils._pytree.tree_leaves(value) if isinstance(own, Tensor)]


def main() -> None:
    """Measure both, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--targets", nargs="+", default=["q_proj", "up_proj", "down_proj"])
    parser.add_argument("--adapters", type=int, default=10)
    parser.add_argument("--source-rank", type=int, default=16)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--full-matrices", action="store_true", help="PEFT's default, slower and larger")
    parser.add_argument("--only", choices=["own", "peft"])
    options = parser.parse_args()
    kinds = {"own": [OWN], "peft": [PEFT], None: [OWN, PEFT]}[options.only]
    found: dict[str, Any] = {kind: in_process(measure, kind, options) for kind in kinds}
    modules = f"{options.layers} x ({', '.join(options.targets)})"
    print(f"{options.adapters} adapters on {modules}, {options.threads} thread(s)\n")
    header = ["", "seconds", "CPU seconds", "peak MB", "of it by the merge"]
    header += [f"distance from the best, {target}" for target in options.targets]
    print("| " + " | ".join(header) + " |\n|" + " --- |" * len(header))
    for kind, own in found.items():
        cells = [kind, f"{own['seconds']:.2f}", f"{own['cpu']:.2f}", f"{own['peak'] / 1e6:.0f}"]
        cells.append(f"{(own['peak'] - own['before']) / 1e6:.0f}")
        cells += [f"{own['errors'][target]:.1e}" for target in options.targets]
        print("| " + " | ".join(cells) + " |", flush=True)
    if len(found) == 2:
        longer, cpu = (found[PEFT][unit] / found[OWN][unit] for unit in ("seconds", "cpu"))
        print(f"\nPEFT takes {longer:.0f} times as long, {cpu:.0f} times the CPU time.")
    if OWN in found:
        print(f"The largest tensor that {OWN} makes has {found[OWN]['largest']:,} numbers.")


if __name__ == "__main__":
    main()
