"""Compare a whole merge of real encoders by a plain loop with `hf_fda.merge` and its defaults: CPU time and quality.

    python examples/benchmarks/naive_merge.py --checkpoints DIR --tasks DIR [--steps 100] [--epochs 60] [--sources ...]
    python examples/benchmarks/naive_merge.py --checkpoints DIR --tasks DIR --extrapolate --steps 5

The plain merge is the published form written down directly. For every source and block: 64 anchors of five tokens from
rows of the source block's weights plus the source's position embeddings, moved by AdamW at 1e-2 in float32, autograd
building the gradients of all parameters, the anchors of the lowest loss kept. Then for every block, from TSV-M, Adam at
1e-2 on a coefficient of every entry of every task vector, squared error summed over 128 anchors of all sources mixed.
Embeddings by task arithmetic at 0.4. Both merges are scored on the same rows with every fine-tune's own head (see
arena.py for the folders) and run one after the other in this process; seconds are of the process's CPU time.

--extrapolate measures `--steps` construction steps of three units and one epoch of one block, and prints what 1,200
steps (as published) and `--epochs` epochs of everything would take: such figures are marked as extrapolated.
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from adaptation import PlainAdam
from construction import plain_loop
from scoring import Rows, Score, average
from torch import Tensor, nn

from hf_fda.anchors.initialization import sample_rows
from hf_fda.blocks import UnitCall, find_blocks
from hf_fda.merge_methods.tsv import TSVConfig
from hf_fda.streaming.tensorwise import apply_method

ANCHORS, TOKENS, BATCH, LAMBDA, PUBLISHED_STEPS = 64, 5, 128, 0.4, 1200
Pair = tuple[Tensor, Tensor]


class PlainMerge:
    """The plain merge of the fine-tunes of one base.

    Args:
        rows: names the fine-tunes and loads them.
        seed: of the anchors' start and the order of batches.
    """

    def __init__(self, rows: Rows, seed: int) -> None:
        from transformers import AutoModel

        torch.manual_seed(seed)
        eager: dict[str, Any] = {"attn_implementation": "eager", "dtype": torch.float32}  # has second derivatives
        self.base: Any = AutoModel.from_pretrained(rows.checkpoints / "base", **eager).eval()
        self.sources: dict[str, Any] = {
            name: AutoModel.from_pretrained(rows.checkpoints / name, **eager).eval() for name in rows.names
        }
        self.blocks = find_blocks(self.base)
        self.call = UnitCall()

    def construct(self, name: str, block: str, steps: int) -> Pair:
        """Anchors (n, T, d) of one block for one source after so many steps, and their targets."""
        source = self.sources[name].get_submodule(block)
        size = self.base.config.hidden_size
        weights = [own.detach() for own in source.parameters() if own.ndim == 2 and own.shape[1] == size]
        start = sample_rows(torch.cat(weights), ANCHORS * TOKENS, torch.default_generator).view(ANCHORS, TOKENS, size)
        table = self.sources[name].embeddings.position_embeddings
        first = 0 if table.padding_idx is None else table.padding_idx + 1
        offset = table.weight[first : first + TOKENS].detach()
        call = self.call

        def shifted(module: nn.Module, x: Tensor) -> Tensor:
            return call(module, x + offset)

        loop = plain_loop(self.base.get_submodule(block), source, shifted, start)
        best, lowest = start, math.inf
        for _ in range(steps):
            x, loss = next(loop)
            if float(loss) < lowest:
                best, lowest = x, float(loss)
        with torch.no_grad():
            return best + offset, call(source, best + offset)

    def adapt(self, block: str, found: list[Pair], epochs: int) -> nn.Module:
        """One block fitted to the targets of all sources, from TSV-M."""
        base = self.base.get_submodule(block)
        own = [dict(source.get_submodule(block).named_parameters()) for source in self.sources.values()]
        module = copy.deepcopy(base).requires_grad_(True)
        starts, tasks = [], []
        for path, parameter in base.named_parameters():
            theta = parameter.detach()
            tasks.append([source[path].detach() - theta for source in own])
            role = "linear" if theta.ndim == 2 else "other"
            starts.append(theta + apply_method(TSVConfig(), theta, tasks[-1], role))  # type: ignore[arg-type]
        parameters = list(module.parameters())
        for parameter, start in zip(parameters, starts, strict=True):
            parameter.data.copy_(start)
        stepper = PlainAdam([parameter.data for parameter in parameters], starts, tasks, initial=0.0)
        anchors, targets = (torch.cat(parts) for parts in zip(*found, strict=True))
        for _ in range(epochs):
            for batch in torch.randperm(len(anchors)).split(BATCH):
                loss = (self.call(module, anchors[batch]) - targets[batch]).square().sum()
                stepper.step(list(torch.autograd.grad(loss, parameters, materialize_grads=True)))
        return module

    def embeddings(self) -> nn.Module:
        """The embeddings by task arithmetic."""
        merged = copy.deepcopy(self.base.embeddings)
        with torch.no_grad():
            for name, parameter in merged.named_parameters():
                theta = self.base.embeddings.get_parameter(name)
                for source in self.sources.values():
                    parameter.add_(source.embeddings.get_parameter(name) - theta, alpha=LAMBDA)
        return merged

    def merge(self, steps: int, epochs: int) -> tuple[Any, dict[str, float]]:
        """The merged bare model, and CPU-seconds by stage."""
        begin = time.process_time()
        found = {block: [self.construct(name, block, steps) for name in self.sources] for block in self.blocks}
        constructed = time.process_time()
        merged = copy.deepcopy(self.base)
        for block in self.blocks:
            adapted = self.adapt(block, found[block], epochs).state_dict()
            merged.get_submodule(block).load_state_dict(adapted)
        merged.embeddings.load_state_dict(self.embeddings().state_dict())
        return merged, {"construction": constructed - begin, "adaptation": time.process_time() - constructed}

    def extrapolate(self, steps: int, epochs: int) -> dict[str, float]:
        """CPU-seconds by stage that the published number of steps would take, from a few steps of three units."""
        last = len(self.blocks) - 1
        name = next(iter(self.sources))
        self.construct(name, self.blocks[0], 2)  # the first calls of a process are slower

        def spent(work: Any) -> float:
            begin = time.process_time()
            work()
            return time.process_time() - begin

        chosen = [self.blocks[at] for at in (0, last // 2, last)]
        each = sum(spent(lambda block=block: self.construct(name, block, steps)) for block in chosen) / len(chosen)
        pairs = [self.construct(name, chosen[0], 1) for name in self.sources]
        start, one = (spent(lambda count=count: self.adapt(chosen[0], pairs, count)) for count in (0, 1))
        units = len(self.blocks) * len(self.sources)
        return {
            "construction": each / steps * PUBLISHED_STEPS * units,
            "adaptation": (start + (one - start) * epochs) * len(self.blocks),
        }


def score_plain(rows: Rows, merged: Any) -> dict[str, Score]:
    """Scores of a bare merged model, with the pooler and the classifier of each task's fine-tune."""
    scores = {}
    for name in rows.names:
        model = rows.fine_tune(name)
        model.base_model.embeddings.load_state_dict(merged.embeddings.state_dict())
        model.base_model.encoder.load_state_dict(merged.encoder.state_dict())
        scores[name] = rows.score(model, name)
    return scores


def package_merge(rows: Rows, seed: int, settings: dict[str, Any]) -> tuple[dict[str, Score], float]:
    """Scores and CPU-seconds of `hf_fda.merge`, with its defaults but for some options."""
    import hf_fda

    with tempfile.TemporaryDirectory() as folder:
        base = str(rows.checkpoints / "base")
        sources = {name: str(rows.checkpoints / name) for name in rows.names}
        begin = time.process_time()
        hf_fda.merge(base, sources, output=f"{folder}/merged", seed=seed, device="cpu", quiet=True, **settings)
        seconds = time.process_time() - begin
        return rows.score_merged(Path(folder) / "merged"), seconds


def show(label: str, scores: dict[str, Score]) -> None:
    """Print the quality of a merge."""
    mean = average(scores)
    each = ", ".join(f"{name} {score.accuracy:.3f}" for name, score in scores.items())
    print(f"{label}: accuracy {mean.accuracy:.3f} ({each}), divergence {mean.divergence:.3f} nats", flush=True)


def main() -> None:
    """Merge in both ways, print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, required=True, help="folders `base` and one for each task")
    parser.add_argument("--tasks", type=Path, required=True, help="rows by task")
    parser.add_argument("--sources", nargs="+", help="merge these fine-tunes only")
    parser.add_argument("--steps", type=int, default=100, help="of the plain construction")
    parser.add_argument("--epochs", type=int, default=60, help="of the plain adaptation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=1000, help="test rows a task at most")
    parser.add_argument("--set", nargs="*", default=[], metavar="OPTION=VALUE", help="also merge with other options")
    parser.add_argument("--extrapolate", action="store_true", help="only time a few plain steps")
    options = parser.parse_args()

    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # a bare model leaves the heads of the fine-tunes out
    rows = Rows(options.checkpoints, options.tasks, "test", options.limit, options.sources)
    merges: dict[str, dict[str, Any]] = {"on anchors alone": {"data": "anchors"}, "defaults": {}}
    if options.set:
        merges[", ".join(options.set)] = dict(item.split("=", 1) for item in options.set)
    own: dict[str, float] = {}
    for label, settings in merges.items():
        scores, own[label] = package_merge(rows, options.seed, settings)
        print(f"hf_fda.merge, {label}: {own[label]:.1f} CPU-seconds")
        show(f"hf_fda.merge, {label}", scores)
    plain = PlainMerge(rows, options.seed)
    if options.extrapolate:
        seconds, mark = plain.extrapolate(options.steps, options.epochs), "EXTRAPOLATED "
        what = f"{PUBLISHED_STEPS} steps, {options.epochs} epochs, from {options.steps} steps of three units"
    else:
        merged, seconds = plain.merge(options.steps, options.epochs)
        mark, what = "", f"{options.steps} steps, {options.epochs} epochs"
    whole = sum(seconds.values())
    stages = ", ".join(f"{stage} {value:.1f}" for stage, value in seconds.items())
    print(f"{mark}plain merge, {what}: {whole:.1f} CPU-seconds ({stages})")
    if not options.extrapolate:
        show("plain merge", score_plain(rows, merged))
    for name, spent in own.items():
        print(f"{mark}plain / hf_fda.merge, {name} = {whole / spent:.2f}", flush=True)


if __name__ == "__main__":
    main()
