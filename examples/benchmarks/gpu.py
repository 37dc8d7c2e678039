"""Construction on a GPU: against a plain loop on encoder blocks, and as a part of the card's ceiling on a large MLP.

    python examples/benchmarks/gpu.py [--device cuda] [--part encoder|decoder]
    python examples/benchmarks/gpu.py --device cpu --blocks 2 --sources 2 --hidden 32 --intermediate 64 --heads 2 \
        --anchors 8 --plain-steps 10 --steps 5 --matmul 256

encoder: a random encoder of RoBERTa-base's shape and eight fine-tunes of it. The package makes the anchors of all their
blocks with its defaults (`FunctionalDualAnchors.construct`, which reads blocks and constructs several together); the
plain loop (construction.py) runs all its 1,200 steps on one block, which gives its loss and the seconds of a step; what
it would take for all blocks is extrapolated from these.

decoder: one MLP of Llama-2-7B's shape, 8,192 anchors of one token, 200 steps. Products are counted exactly: torch's
FlopCounterMode counts what is dispatched (2 m n k for each product, forward, backward, optimiser) in runs of one and of
two steps; all steps are alike. The ceiling is the best of a few large square products in the same run.

All weights are random; a fine-tune is the base plus a change of rank 16 and a little noise. In both parts losses are
the mean of 1 - cosine over the matched parameters, by one function in full precision.

Precision: `torch.set_float32_matmul_precision` acts on CUDA by one switch. Its documentation: with "high" or "medium"
TensorFloat32 is used, as with `torch.backends.cuda.matmul.allow_tf32 = True`. So on CUDA "medium" is no bfloat16: both
should take the same time, and their ceiling is that of TF32. (On a CPU with bfloat16 units "medium" is bfloat16.) The
orthogonalisation of Muon is in plain float32 whatever is set, and has the ceiling of float32.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
from typing import Any

import torch
from construction import plain_loop, seconds
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hf_fda import FunctionalDualAnchors
from hf_fda.anchors import construct_unit
from hf_fda.anchors.construction import UnitAnchors
from hf_fda.anchors.gradients import find_matched, gradient_cosines, task_vectors
from hf_fda.anchors.initialization import initial_anchors
from hf_fda.anchors.precision import matmul_precision
from hf_fda.anchors.products import product
from hf_fda.blocks import UnitCall
from hf_fda.merge_methods import FDAConfig

RANK, CALL = 16, UnitCall()


def random_encoder(options: argparse.Namespace) -> Any:
    """A random RoBERTa, frozen."""
    from transformers import RobertaConfig, RobertaModel

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": options.hidden or 768, "intermediate_size": options.intermediate or 3072}
    sizes |= {"num_attention_heads": options.heads, "num_hidden_layers": options.blocks, "vocab_size": 8}
    sizes |= {"attn_implementation": "eager"}  # has second derivatives on every device
    return RobertaModel(RobertaConfig(**sizes)).eval().requires_grad_(False)


def decoder_mlp(options: argparse.Namespace) -> nn.Module:
    """A random Llama MLP, frozen, on the device."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=options.hidden or 4096, intermediate_size=options.intermediate or 11008)
    with torch.device(options.device):
        block = LlamaMLP(config)
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=config.initializer_range)
    return block.eval().requires_grad_(False)


def fine_tune(base: Any, seed: int) -> Any:
    """A block, or model, plus a change of rank `RANK` and a little noise."""
    tuned = copy.deepcopy(base)
    generator = torch.Generator(next(base.parameters()).device).manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=generator.device)

    for parameter in tuned.parameters():
        parameter.add_(noise(*parameter.shape), alpha=3e-4)
        if parameter.ndim == 2:
            rows, columns = parameter.shape
            parameter.addmm_(noise(rows, RANK), noise(RANK, columns), alpha=1e-3 / math.sqrt(RANK))
    return tuned


def start_of(source: nn.Module, anchors: int, tokens: int, seed: int) -> Tensor:
    """Where anchors start: rows of the source's weights, (n, T, d)."""
    weights = [parameter for parameter in source.parameters() if parameter.ndim == 2]
    size = weights[0].shape[1]
    start = initial_anchors("weights", weights, anchors, tokens, size, torch.Generator().manual_seed(seed))
    return start.to(weights[0].device)


def construct(base: nn.Module, source: nn.Module, start: Tensor, config: FDAConfig, precision: Any) -> UnitAnchors:
    """The package's construction with a config's settings."""
    return construct_unit(base, source, CALL, start, None, **config.descent() | {"precision": precision})


def plain(base: nn.Module, source: nn.Module, start: Tensor, steps: int, precision: Any) -> tuple[float, float]:
    """Seconds and loss of the plain loop, the anchors of its lowest loss kept."""
    best = [start, torch.full((), math.inf, device=start.device)]

    def work() -> None:
        loop = plain_loop(base, source, CALL, start)
        for _ in range(steps):
            x, loss = next(loop)
            better = loss < best[1]
            best[0], best[1] = torch.where(better, x, best[0]), torch.where(better, loss, best[1])

    with matmul_precision(precision, start.device):
        spent = seconds(work, start.device)
    used = find_matched(base, source, task_vectors(base, source), CALL, start, "cosine").tasks
    return spent, float(1 - gradient_cosines(base, source, CALL, best[0], used, "cosine").mean())


def encoder(options: argparse.Namespace) -> None:
    """All blocks by the package, one by the plain loop; the ratio."""
    device = torch.device(options.device)
    chosen: dict[str, Any] = {"num_anchors": options.anchors, "steps": options.steps}
    config = FDAConfig(**chosen).for_family("encoder", options.hidden or 768)
    count, tokens = config.num_anchors, config.num_tokens
    assert count is not None and tokens is not None
    base, own = random_encoder(options), 0.0
    settings = {**chosen, "position_embeddings": False, "device": device, "quiet": True}
    FunctionalDualAnchors.construct(base, fine_tune(base, -1), **settings)  # the first calls of a process are slower
    losses: list[float] = []
    for number in range(options.sources):
        tuned = fine_tune(base, number)
        made: list[FunctionalDualAnchors] = []

        def work(tuned: Any = tuned, made: Any = made, number: int = number) -> None:
            made.append(FunctionalDualAnchors.construct(base, tuned, seed=number, **settings))

        own += seconds(work, device)
        losses += [made[0][name].loss for name in made[0]]
        print(f"source {number}: loss {statistics.mean(losses[-options.blocks :]):.4f}", flush=True)
    units = len(losses)
    print(f"package: {units} units of {count} x {tokens}, {config.steps} steps, {config.optimizer}, {config.precision}")
    print(f"  {own:.2f} s, {own / units:.3f} s a unit; loss of the first {losses[0]:.4f}, ", end="")
    print(f"mean {statistics.mean(losses):.4f}, largest {max(losses):.4f}")
    models: list[Any] = [base, fine_tune(base, 0)]
    first, source = (copy.deepcopy(model.encoder.layer[0]).to(device) for model in models)
    start = start_of(source, count, tokens, 0)
    plain(first, source, start, 3, "highest")
    for precision in options.plain_precisions:
        spent, loss = plain(first, source, start, options.plain_steps, precision)
        each = spent / options.plain_steps
        whole = each * options.published_steps * units
        print(f"plain loop, {precision}: {options.plain_steps} steps on the first unit, {1000 * each:.2f} ms a step")
        print(f"  EXTRAPOLATED to {options.published_steps} steps of {units} units: {whole:.1f} s")
        print(f"  loss {loss:.4f} (package {losses[0]:.4f}); plain / package = {whole / own:.1f}", flush=True)


def ceiling(size: int, dtype: torch.dtype, precision: Any, device: torch.device) -> float:
    """FLOP/s of the best of a few square products."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def few() -> None:
        for _ in range(5):
            product(a, b)

    with matmul_precision(precision, device):
        few()
        return 5 * 2 * size**3 / min(seconds(few, device) for _ in range(5))


def counted(base: nn.Module, source: nn.Module, start: Tensor, steps: int) -> float:
    """FLOPs of the products of a construction: of one step and of two, the difference repeated."""
    totals = []
    for few in (1, 2):
        with FlopCounterMode(display=False) as counter:
            construct(base, source, start, FDAConfig(steps=few), "highest")
        totals.append(float(counter.get_total_flops()))
    return totals[0] + (steps - 1) * (totals[1] - totals[0])


def decoder(options: argparse.Namespace) -> None:
    """Seconds and FLOP/s of a large MLP's construction against the card's."""
    device = torch.device(options.device)
    anchors, steps = options.anchors or 8192, options.steps or 200
    base = decoder_mlp(options)
    source = fine_tune(base, 0)
    start = start_of(source, anchors, 1, 0)
    limits = {
        "bfloat16": ceiling(options.matmul, torch.bfloat16, "highest", device),
        "high (TF32)": ceiling(options.matmul, torch.float32, "high", device),
        "medium": ceiling(options.matmul, torch.float32, "medium", device),
        "float32": ceiling(options.matmul, torch.float32, "highest", device),
    }
    shown = ", ".join(f"{name} {rate / 1e12:.4g}" for name, rate in limits.items())
    print(f"ceiling, products of {options.matmul} squared, TFLOP/s: {shown}", flush=True)
    flops = counted(base, source, start, steps)
    size, middle = next(base.parameters()).shape[1], next(base.parameters()).shape[0]
    products = flops / steps / (2 * anchors * 3 * size * middle)
    print(f"MLP {size} x {middle}, {anchors} anchors of one token, {steps} steps: {flops / 1e12:.4g} TFLOP, ", end="")
    print(f"{products:.2f} products of all tokens with all weights a step", flush=True)
    config = FDAConfig(steps=steps)
    construct(base, source, start, FDAConfig(steps=3), "high")
    for precision in ("high", "medium"):
        made: list[UnitAnchors] = []

        def work(made: Any = made, precision: Any = precision) -> None:
            made.append(construct(base, source, start, config, precision))

        spent = seconds(work, device)
        rate = flops / spent
        parts = ", ".join(f"{rate / limit:.0%} of {name}" for name, limit in limits.items())
        print(f"{precision}: {spent:.2f} s, loss {made[0].loss:.4f}, {rate / 1e12:.4g} TFLOP/s: {parts}", flush=True)


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--part", choices=["encoder", "decoder"], help="one of them; both if left out")
    parser.add_argument("--hidden", type=int, help="width; of the published model if left out")
    parser.add_argument("--intermediate", type=int, help="width inside the MLP; of the published model if left out")
    parser.add_argument("--heads", type=int, default=12, help="of the encoder's attention")
    parser.add_argument("--blocks", type=int, default=12, help="of the encoder")
    parser.add_argument("--sources", type=int, default=8, help="of the encoder")
    parser.add_argument("--anchors", type=int, help="64 (encoder), 8192 (decoder)")
    parser.add_argument("--steps", type=int, help="the package's: its default (encoder), 200 (decoder)")
    parser.add_argument("--plain-steps", type=int, default=1200, help="that the plain loop really takes on one unit")
    parser.add_argument("--published-steps", type=int, default=1200, help="that its time is extrapolated to")
    parser.add_argument("--plain-precisions", nargs="+", default=["highest", "high"], help="of the plain loop")
    parser.add_argument("--matmul", type=int, default=8192, help="size of the square products of the ceiling")
    options = parser.parse_args()
    name = torch.cuda.get_device_name() if options.device.startswith("cuda") else options.device
    print(f"{name}, torch {torch.__version__}", flush=True)
    for part, work in (("encoder", encoder), ("decoder", decoder)):
        if options.part in (None, part):
            work(options)


if __name__ == "__main__":
    main()
