"""Compare construction with a plain loop that builds every gradient with autograd: time per step, and time to its loss.

    python examples/benchmarks/construction.py BASE SOURCE [--block 2] [--start gaussian] [--tokens 5 32]
    python examples/benchmarks/construction.py --shape roberta [--device cuda] [--tokens 5 32]

The plain loop is the published form: everything trains in both blocks, a cosine per parameter, AdamW at 1e-2, float32.
BASE and SOURCE are checkpoints of one architecture; --shape makes a random block and a random fine-tune of it. Losses
are the mean of 1 - cosine over the matched parameters, of both by one function in full precision. Printed are ratios.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from memory import resident
from torch import Tensor, nn

from hf_fda.anchors import construct_unit
from hf_fda.anchors.builder import linear_weights
from hf_fda.anchors.gradients import find_matched, gradient_cosines, task_vectors
from hf_fda.anchors.initialization import initial_anchors
from hf_fda.anchors.orthogonal import make_stepper
from hf_fda.anchors.precision import matmul_precision
from hf_fda.blocks import UnitCall, capture_calls, find_units, make_unit
from hf_fda.checkpoint import ModelCheckpoint, open_checkpoint
from hf_fda.checkpoint.alignment import align

Block = tuple[nn.Module, nn.Module, UnitCall, list[Tensor]]


def random_model(shape: str, seed: int) -> Any:
    """A one-layer model with random weights: "minilm", "roberta" (base) or "llama" (7B)."""
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, RobertaConfig, RobertaModel

    torch.manual_seed(seed)
    if shape == "llama":
        return LlamaModel(LlamaConfig(num_hidden_layers=1, vocab_size=64)).eval()
    if shape == "roberta":
        return RobertaModel(RobertaConfig(num_hidden_layers=1, vocab_size=64)).eval()
    sizes: dict[str, Any] = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 12}
    return BertModel(BertConfig(num_hidden_layers=1, vocab_size=64, **sizes)).eval()


def load_block(options: argparse.Namespace, tokens: int, device: torch.device) -> Block:
    """Base and source of one block, how to call them, and the source's linear weights."""
    base: Any
    if options.shape:
        model = random_model(options.shape, 0)
        tuned = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter.add_(0.002 * torch.randn_like(parameter))
        base, read = ModelCheckpoint(model, "base"), ModelCheckpoint(tuned, "source").read
    else:
        base = open_checkpoint(options.base)
        read = align(base, open_checkpoint(options.source), "source").read  # type: ignore[assignment]
    unit = find_units(base.layout, ("block",))[0 if options.shape else options.block]
    call = capture_calls(base, [unit], tokens, device).calls[unit.name]
    first, second = (
        make_unit(base.layout, unit, {name: one(name).to(device, torch.float32) for name in unit.tensors}, device)
        for one in (base.read, read)
    )
    return first, second, call, linear_weights(base.layout, unit, second)


def plain_loop(
    base: nn.Module, source: nn.Module, call: Callable[[nn.Module, Tensor], Tensor], start: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """The published loop, one step each time: the anchors before it, and their summed loss (a scalar)."""
    base, source = (copy.deepcopy(module).requires_grad_(True) for module in (base, source))
    own = dict(source.named_parameters())
    parameters = dict(base.named_parameters())
    tasks = [(own[name] - parameter).detach() for name, parameter in parameters.items()]
    x = start.clone().requires_grad_(True)
    optimizer = torch.optim.AdamW([x], lr=1e-2)
    cosine = torch.nn.functional.cosine_similarity
    while True:
        before = x.detach().clone()
        optimizer.zero_grad()
        base.zero_grad()
        source.zero_grad()
        similarity = cosine(call(base, x).flatten(1), call(source, x).flatten(1), dim=1).mean()
        gradients = torch.autograd.grad(similarity, list(parameters.values()), create_graph=True)
        pairs = zip(gradients, tasks, strict=True)
        loss = torch.stack([1 - cosine(gradient.flatten(), task.flatten(), dim=0) for gradient, task in pairs]).sum()
        loss.backward()
        optimizer.step()
        yield before, loss.detach()


def package_loop(block: Block, used: dict[str, Tensor], start: Tensor, precision: Any, kind: Any) -> Iterator[None]:
    """The package's step, endlessly: what `construct_unit` does between its looks at the loss."""
    matcher = find_matched(block[0], block[1], used, block[2], start, "cosine").matcher(*block[:3], "cosine")
    x = start.unsqueeze(0).clone().requires_grad_(True)
    stepper = make_stepper(kind, x, 1e-2, 10**9)
    while True:
        with matmul_precision(precision, start.device):
            (x.grad,) = torch.autograd.grad((1 - matcher(x).mean()) * len(used), x)
            stepper.step()
        yield


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of this process on a CPU, of the wall on another device."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize()
    before = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - before


def peak(work: Callable[[], object], device: torch.device) -> int:
    """Bytes that the work takes at most above what was held before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else what was freed and kept would hide what is taken now
    before = resident("VmRSS")
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")
    work()
    return max(resident("VmHWM") - before, 0)


def compare(options: argparse.Namespace, tokens: int, kind: str, device: torch.device) -> None:
    """Print the two ratios of one block, number of tokens and start."""
    block = load_block(options, tokens, device)
    base, source, call, weights = block
    assert call.size is not None and call.tokens is not None
    generator = torch.Generator().manual_seed(0)
    start = initial_anchors(kind, weights, options.anchors, call.tokens, call.size, generator).to(device)
    used = find_matched(base, source, task_vectors(base, source), call, start, "cosine").tasks
    title = f"{call.tokens} tokens, {kind}"

    memory = peak(lambda: next(plain_loop(base, source, call, start)), device)
    for precision in options.precisions:
        plain = plain_loop(base, source, call, start)
        steps = {name: package_loop(block, used, start, precision, name) for name in ("adamw", "muon")}
        times: dict[str, list[float]] = {"plain": [], "adamw": [], "muon": []}
        for _ in range(options.repeats):
            times["plain"].append(seconds(lambda plain=plain: next(plain), device))  # type: ignore[misc]
            for name, loop in steps.items():
                times[name].append(seconds(lambda loop=loop: next(loop), device))  # type: ignore[misc]
        middle = {name: statistics.median(own[2:]) for name, own in times.items()}
        ratios = ", ".join(f"{middle['plain'] / middle[name]:.2f} ({name})" for name in steps)
        print(f"{title}, {precision}: plain step / own step = {ratios}", flush=True)
    fresh = package_loop(block, used, start, "highest", "muon")
    print(f"{title}: peak of a step, plain {memory / 1e6:.0f} MB, own {peak(lambda: next(fresh), device) / 1e6:.0f} MB")
    if options.steps:
        reach(options, block, used, start, title, device)


def reach(
    options: argparse.Namespace, block: Block, used: dict[str, Tensor], start: Tensor, title: str, device: torch.device
) -> None:
    """Print how many steps, and what part of the plain loop's time, the package needs to the plain loop's loss."""
    base, source, call, _ = block
    plain, spent = plain_loop(base, source, call, start), 0.0

    def advance() -> None:
        for _ in range(options.steps):
            next(plain)

    spent = seconds(advance, device)
    target = float(1 - gradient_cosines(base, source, call, next(plain)[0], used, "cosine").mean())
    for precision in options.precisions:
        for steps in options.own_steps:
            made: list[Any] = []
            settings: dict[str, Any] = {"steps": steps, "learning_rate": 1e-2, "kind": "cosine", "patience": None}
            settings |= {"optimizer": "muon", "precision": precision}
            own = seconds(
                lambda settings=settings, made=made: made.append(  # type: ignore[misc]
                    construct_unit(base, source, call, start, None, **settings)
                ),
                device,
            )
            loss = float(1 - gradient_cosines(base, source, call, made[0].anchors.to(device), used, "cosine").mean())
            print(
                f"{title}, {precision}: loss {target:.4f} after {options.steps} plain steps, "
                f"{loss:.4f} after {steps} own; plain time / own time = {spent / own:.2f}",
                flush=True,
            )
            if loss <= target:
                break


def main() -> None:
    """Read the options, compare each number of tokens and each start."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?")
    parser.add_argument("source", nargs="?")
    parser.add_argument("--block", type=int, default=2)
    parser.add_argument("--shape", choices=["minilm", "roberta", "llama"], help="a random block instead of checkpoints")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--anchors", type=int, default=64)
    parser.add_argument("--tokens", type=int, nargs="+", default=[5, 32])
    parser.add_argument("--start", nargs="+", default=["weights", "gaussian"], choices=["weights", "gaussian"])
    parser.add_argument("--precisions", nargs="+", default=["highest", "medium"], help="of float32 matrix products")
    parser.add_argument("--repeats", type=int, default=12, help="steps timed of each, in turn")
    parser.add_argument("--steps", type=int, default=300, help="of the plain loop; 0: only time steps")
    parser.add_argument("--own-steps", type=int, nargs="+", default=[60, 75, 90, 110], help="tried one after another")
    options = parser.parse_args()
    if not options.shape and not options.source:
        parser.error("name a base and a source, or pass --shape")
    for tokens in options.tokens:
        for kind in options.start:
            compare(options, tokens, kind, torch.device(options.device))


if __name__ == "__main__":
    main()
