"""What a merge of large decoders costs, on paper: arithmetic, traffic, memory and hours, from shapes alone.

    python examples/benchmarks/cost_model.py [--models 7B 13B 70B] [--sources 2 8 32] [--gpus 1 8 64] [--tflops 495] ...

Nothing here is measured on a GPU. Shapes are those of Llama-2, options the package's defaults for decoders.
- Products: `hf_fda.costs`, as the package's own predictions. Muon's orthogonalisation is added, in full float32.
- Traffic through device memory: every tensor that an operation takes or gives is counted once, by running both stages
  on a small MLP with two numbers of tokens. No reuse in caches is assumed.
- Memory: `hf_fda.estimate`. Files: each tensor as often as the engine reads and writes it.
- Rates: by default a data sheet's nominal ones (NVIDIA H100 SXM: TF32 without sparsity, float32, HBM3), times the share
  of a plain product's rate that `construct_unit` reaches on one core of the CPU at hand. That a GPU reaches the same
  share is an assumption; gpu.py measures what it does reach. Disk, start of an operation and decompositions are plainly
  assumed. Products and traffic are taken one after the other.
- Hours: units are spread as the package spreads them; files come through one disk that all GPUs share.
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from math import ceil
from types import SimpleNamespace
from typing import Any

import torch
from construction import seconds
from gpu import CALL, ceiling, construct, counted, decoder_mlp, fine_tune, start_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_fda import costs, estimate
from hf_fda.anchors import Moves, Objective, adapt_unit
from hf_fda.anchors.grouping import construction_bytes
from hf_fda.blocks import Unit, family_of, find_units
from hf_fda.checkpoint.layout import ModelLayout
from hf_fda.merge_methods import FDAConfig, MethodConfig
from hf_fda.prediction import makespan

SHAPES = {"7B": (4096, 11008, 32, 32), "13B": (5120, 13824, 40, 40), "70B": (8192, 28672, 80, 8)}
"""Width, width inside the MLP, blocks, key-value heads."""


@dataclass(frozen=True)
class Passes:
    """How often a step reads or writes every parameter, and the linear outputs of every token."""

    parameters: float
    activations: float


class Traffic(TorchDispatchMode):
    """Counts the bytes of all tensors that operations take and give; views move nothing."""

    moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            self.moved += sum(leaf.numel() * leaf.element_size() for leaf in tensors)
        return result


def count_passes(stage: str) -> Passes:
    """The passes of one step of "construction" or "adaptation", from an MLP of 64 x 172 with two numbers of tokens."""
    options = SimpleNamespace(hidden=64, intermediate=172, device="cpu")
    base = decoder_mlp(options)  # type: ignore[arg-type]
    source = fine_tune(base, 0)
    step: dict[int, float] = {}
    for tokens in (256, 512):
        start = start_of(source, tokens, 1, 0)
        runs = []
        for steps in (1, 2):
            with Traffic() as traffic:
                if stage == "construction":
                    construct(base, source, start, FDAConfig(steps=steps), "highest")
                else:
                    adapt(fine_tune(base, 1), start, steps)
            runs.append(traffic.moved)
        step[tokens] = runs[1] - runs[0]
    width = 4 * (2 * 172 + 64)
    slope = (step[512] - step[256]) / 256
    return Passes((step[256] - 256 * slope) / (4 * 3 * 64 * 172), slope / width)


def adapt(module: Any, x: Tensor, steps: int) -> None:
    """So many steps of adaptation, of all tokens each."""
    objective = Objective("mse", [x], [torch.zeros_like(x)])
    scales = {name: torch.ones_like(value) for name, value in module.named_parameters()}
    settings: dict[str, Any] = {"learning_rate": 1e-2, "schedule": "linear", "batch_size": len(x)}
    adapt_unit(module, CALL, objective, Moves(scales), epochs=steps, generator=torch.Generator(), **settings)


def measured_efficiency() -> float:
    """The share of a large float32 product's rate that `construct_unit` reaches on this CPU, on an MLP of width 512."""
    options = SimpleNamespace(hidden=512, intermediate=1376, device="cpu")
    base = decoder_mlp(options)  # type: ignore[arg-type]
    source, steps = fine_tune(base, 0), 10
    start = start_of(source, 1024, 1, 0)
    flops, few = counted(base, source, start, 1), FDAConfig(steps=1)
    flops = counted(base, source, start, steps + 1) - flops
    spent = [
        seconds(lambda config=config: construct(base, source, start, config, "highest"), start.device)  # type: ignore[misc]
        for config in (few, dataclasses.replace(few, steps=steps + 1), few)
    ]
    return flops / (spent[1] - spent[2]) / ceiling(1536, torch.float32, "highest", start.device)


class Model:
    """A decoder's shapes with the package's config for so many sources, and one of its units, which are all alike."""

    def __init__(self, name: str, sources: int) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        width, middle, blocks, heads = SHAPES[name]
        sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": middle, "num_hidden_layers": blocks}
        sizes |= {"num_attention_heads": width // 128, "num_key_value_heads": heads}
        layout = ModelLayout(LlamaConfig(**sizes), LlamaForCausalLM)
        config = FDAConfig().with_sources([f"source{number}" for number in range(sources)], True)
        self.config = config.for_family(family_of(layout), width)
        self.base: Any = SimpleNamespace(layout=layout, config=layout.config)
        self.sources, self.blocks, self.width = sources, blocks, width
        self.unit: Unit = find_units(layout, self.config.unit or ())[0]
        self.tokens = (self.config.num_anchors or 0) * (self.config.num_tokens or 0)
        self.moved = int(costs.active_entries(self.base, self.unit.tensors))
        self.outputs = costs.outputs(self.base, self.unit.tensors)
        self.entries = sum(torch.Size(layout.shapes[own]).numel() for own in layout.names)

    def muon(self) -> float:
        """FLOPs in full float32 of one unit's orthogonalisations: 17 products of the smaller side, and two with X."""
        small, large = sorted((self.tokens, self.width))
        return (self.config.steps or 0) * 2.0 * (17 * small**3 + 2 * small**2 * large)

    def construction(self, passes: Passes) -> costs.Work:
        """Constructing one unit for one source, without Muon's products."""
        steps = self.config.steps or 0
        work = costs.construction(self.base, self.config, self.unit)
        each = passes.parameters * self.moved + passes.activations * self.tokens * self.outputs
        return dataclasses.replace(work, moved=steps * 4 * each, files=0)

    def adaptation(self, passes: Passes) -> costs.Work:
        """Adapting one unit to all sources, without its start."""
        apart = dataclasses.replace(self.config, initial="base")
        work = costs.adaptation(self.base, apart, self.unit, self.sources)
        epochs, anchors = self.config.epochs or 0, (self.config.num_anchors or 0) * self.sources
        steps = epochs * ceil(anchors / (self.config.batch_size or 1))
        each = epochs * passes.activations * self.tokens * self.sources * self.outputs
        return dataclasses.replace(work, moved=4 * (steps * passes.parameters * self.moved + each), files=0)

    def start(self) -> float:
        """FLOPs of merging one unit in parameter space, where adaptation starts."""
        assert isinstance(self.config.initial, MethodConfig)
        works = [costs.merging(self.base, self.config.initial, name, self.sources) for name in self.unit.tensors]
        return sum(work.flops for work in works)

    def files(self, stored: int) -> tuple[float, float]:
        """Bytes read and written, weights on disk having `stored` bytes, the merged model four.

        Of a source the blocks are read twice (construction, adaptation) and all else once; of the base the blocks once
        for each source and twice for adaptation. Anchors with targets and adapted units are written and read once.
        """
        inside, between = self.blocks * self.moved, 4.0 * self.blocks * self.moved
        between += 4.0 * 2 * self.blocks * self.sources * self.tokens * self.width
        read = stored * (self.sources * (self.entries + inside) + self.entries + (self.sources + 1) * inside)
        return read + between, 4 * self.entries + between

    def memory(self) -> tuple[int, int]:
        """Peak bytes on the device of constructing and of adapting one unit."""
        inputs: Any = SimpleNamespace(base=self.base, sources=range(self.sources))
        constructing = construction_bytes(inputs.base, self.config, self.unit)
        return constructing, estimate.adaptation_bytes(inputs, self.config, self.unit, {})


def parts_of(model: Model, passes: dict[str, Passes], options: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Seconds of constructing one unit and of adapting one, by what they go to."""
    share, full = options.efficiency, options.float32_tflops * 1e12
    works = model.construction(passes["construction"]), model.adaptation(passes["adaptation"])
    first, second = works
    return {
        "products": (first.flops / share / options.tflops / 1e12, second.flops / share / options.tflops / 1e12),
        "orthogonalisation": (model.muon() / share / full, 0.0),
        "traffic": (first.moved / options.bandwidth / 1e9, second.moved / options.bandwidth / 1e9),
        "starting operations": (first.calls * options.launch * 1e-6, second.calls * options.launch * 1e-6),
        "decompositions": (0.0, model.start() / full / options.decomposition),
    }


def row(model: Model, passes: dict[str, Passes], options: argparse.Namespace) -> list[str]:
    """The figures of a model and a number of sources, for the table."""
    one, other = (sum(column) for column in zip(*parts_of(model, passes, options).values(), strict=True))
    read, written = model.files(options.stored)
    units, disk = model.blocks * model.sources, (read + written) / options.disk / 1e9
    hours = [
        (makespan([one] * units, gpus) + makespan([other] * model.blocks, gpus) + disk) / 3600 for gpus in options.gpus
    ]
    constructing = units * (model.construction(passes["construction"]).flops + model.muon())
    adapting = model.blocks * (model.adaptation(passes["adaptation"]).flops + model.start())
    figures = [f"{constructing / 1e18:.2g}", f"{adapting / 1e18:.2g}", f"{read / 1e12:.2g}", f"{written / 1e12:.2g}"]
    peaks = [f"{peak / 1e9:.0f}" for peak in model.memory()]
    return [str(model.sources), *figures, *peaks, *(f"{own:.2g}" for own in hours)]


def spent_row(model: Model, passes: dict[str, Passes], options: argparse.Namespace) -> list[str]:
    """What the hours on one GPU go to, in percent."""
    parts = parts_of(model, passes, options)
    seconds_of = {name: model.blocks * (model.sources * one + other) for name, (one, other) in parts.items()}
    seconds_of["files"] = sum(model.files(options.stored)) / options.disk / 1e9
    whole = sum(seconds_of.values())
    return [str(model.sources), *(f"{own / whole:.0%}" for own in seconds_of.values())]


def table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """Print a table."""
    print(f"\n{title}\n\n| " + " | ".join(header) + " |\n|" + " --- |" * len(header))
    for cells in rows:
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    """Print what is assumed, and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--sources", nargs="+", type=int, default=[2, 8, 32])
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--tflops", type=float, default=495, help="nominal, of products while anchors move (TF32)")
    parser.add_argument("--float32-tflops", type=float, default=67, help="nominal, of full float32 products")
    parser.add_argument("--efficiency", type=float, help="share of these reached; measured on this CPU if left out")
    parser.add_argument("--decomposition", type=float, default=0.02, help="share that a decomposition reaches, assumed")
    parser.add_argument("--bandwidth", type=float, default=3350, help="GB/s of device memory, nominal")
    parser.add_argument("--disk", type=float, default=2, help="GB/s of the disk that all share, assumed")
    parser.add_argument("--launch", type=float, default=5, help="microseconds to start an operation, assumed")
    parser.add_argument("--stored", type=int, default=2, help="bytes of a weight in the checkpoints")
    options = parser.parse_args()
    torch.set_num_threads(1)
    passes = {stage: count_passes(stage) for stage in ("construction", "adaptation")}
    for stage, own in passes.items():
        print(f"counted, {stage} step: {own.parameters:.1f} passes over parameters, {own.activations:.1f} over outputs")
    if options.efficiency is None:
        options.efficiency = measured_efficiency()
        print("measured on one core of this CPU: ", end="")
    print(f"efficiency {options.efficiency:.2f}")
    print(
        f"assumed: {options.tflops:g} TFLOP/s (float32 {options.float32_tflops:g}), {options.bandwidth:g} GB/s, ",
        end="",
    )
    print(f"disk {options.disk:g} GB/s, {options.launch:g} us an operation, decompositions {options.decomposition:g}")
    models = [(name, Model(name, sources)) for name in options.models for sources in options.sources]
    header = ["model", "sources", "construction EFLOP", "adaptation EFLOP", "read TB", "written TB"]
    header += ["peak of construction GB", "of adaptation GB", *(f"hours, {gpus} GPU" for gpus in options.gpus)]
    table("Costs", header, [[name, *row(model, passes, options)] for name, model in models])
    header = ["model", "sources", "products", "orthogonalisation", "traffic", "starting operations"]
    header += ["decompositions", "files"]
    table(
        "What the hours on one GPU go to",
        header,
        [[name, *spent_row(model, passes, options)] for name, model in models],
    )


if __name__ == "__main__":
    main()
