"""The same merges by mergekit and by hf_fda, entry by entry.

    python examples/benchmarks/mergekit_parity.py /path/to/python-with-mergekit [--seeds 4] [--only ties slerp]

mergekit wants versions of its own, so that it runs as a process (`mergekit-yaml`, beside the Python that is named) and
hf_fda in this one. The checkpoints are tiny random Llamas, in float32 unless said: a base and three sources; no network
is needed. Without a base, mergekit merges the models themselves; here the base is then a checkpoint of zeros.

Printed: the largest difference of an entry, the norm of all differences as a fraction of the merge's own change
from its base, and the largest difference between this package's merge by options and from mergekit's own file. Of
methods that drop at random, whose random numbers differ, means over seeds and entries are compared: the share of
entries that stay, and how large those of smaller and of larger magnitude come out, each as a fraction of the same merge
without dropping.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

import hf_fda

EXACT = 1e-5
"""Relative differences below this come from rounding alone."""

STEADY = 4.0
"""Means over seeds are equal when they differ by no more than so many of their standard errors."""

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One merge in both programs.

    Args:
        method: its name in both.
        ours: options of hf_fda.
        theirs: shared parameters of mergekit.
        each: mergekit's parameters of each source.
        count: number of sources.
        kind: of the checkpoints: "plain"; "small", which change by 1e-4 instead of 1e-2; "frozen", of which one tensor
            does not change; or "bfloat16".
        base: "base"; "zeros": mergekit gets none; "input": it gets it among the models.
        random: entries are dropped at random.
        why: where the two differ on purpose.
    """

    method: str
    ours: dict[str, Any] = field(default_factory=dict)
    theirs: dict[str, Any] = field(default_factory=dict)
    each: Sequence[dict[str, Any]] = ()
    count: int = 3
    kind: str = "plain"
    base: str = "base"
    random: bool = False
    why: str = ""


WEIGHTS = (0.5, 0.3, -0.4)
DENSITIES = (0.3, 0.5, 0.8)


def weighed(weights: Sequence[float] = WEIGHTS, **others: Sequence[float] | float) -> list[dict[str, Any]]:
    """mergekit's parameters of each source: a weight, and others that may have a value for each."""
    return [
        {"weight": weight, **{name: v[i] if isinstance(v, tuple) else v for name, v in others.items()}}
        for i, weight in enumerate(weights)
    ]


OWN = {"weights": WEIGHTS}
SMALL = "smaller than mergekit's fixed bound of 1e-6; here nothing depends on how far models were tuned"
ROUNDED = "mergekit takes divergences in float32, where they are small differences of large sums; here in float64"

CASES = [
    Case("linear", OWN, each=weighed(), base="zeros"),
    Case("linear", OWN | {"normalize": False}, {"normalize": False}, weighed(), base="zeros"),
    Case("task_arithmetic", OWN | {"scaling": 0.7}, {"lambda": 0.7}, weighed()),
    Case("task_arithmetic", OWN | {"scaling": 1, "normalize": True}, {"normalize": True}, weighed()),
    Case("ties", OWN | {"density": DENSITIES}, each=weighed(density=DENSITIES)),
    Case(
        "ties",
        OWN | {"density": 0.5, "normalize": False, "rescale": True, "scaling": 0.7},
        {"normalize": False, "rescale": True, "lambda": 0.7},
        weighed(density=0.5),
    ),
    Case("breadcrumbs", OWN | {"density": 0.6, "gamma": 0.05}, each=weighed(density=0.6, gamma=0.05)),
    Case(
        "breadcrumbs",
        OWN | {"density": DENSITIES, "gamma": 0.3, "normalize": True, "rescale": True},
        {"normalize": True, "rescale": True},
        weighed(density=DENSITIES, gamma=0.3),
    ),
    Case("breadcrumbs_ties", OWN | {"density": DENSITIES}, each=weighed(density=DENSITIES)),
    Case("dare_linear", OWN | {"density": 1.0}, each=weighed(density=1.0)),
    Case("della", OWN | {"density": 1.0}, each=weighed(density=1.0)),
    Case("sce"),
    Case("sce", {"select_topk": 0.3}, {"select_topk": 0.3}),
    Case("sce", kind="small", why=f"mean squares of task vectors are {SMALL}"),
    Case("model_stock"),
    Case("model_stock", {"filter_wise": True}, {"filter_wise": True}),
    Case("model_stock", kind="small", why=f"products of norms are {SMALL}"),
    Case("slerp", {"t": 0.3}, {"t": 0.3}, count=1, base="input"),
    Case("nuslerp", {"weights": (0.5, 0.2)}, each=weighed((0.5, 0.2)), count=2),
    Case("nuslerp", {"weights": (0.5, 0.2)}, each=weighed((0.5, 0.2)), count=2, base="zeros"),
    Case("nuslerp", {"nuslerp_flatten": False}, {"nuslerp_flatten": False}, weighed((1, 1)), 2),
    Case(
        "nuslerp",
        {"nuslerp_flatten": False, "nuslerp_row_wise": True},
        {"nuslerp_flatten": False, "nuslerp_row_wise": True},
        weighed((1, 1)),
        2,
    ),
    Case("multislerp", {"weights": (0.5, 0.3, 0.4)}, each=weighed((0.5, 0.3, 0.4))),
    Case("multislerp", {"weights": (0.5, 0.3, 0.4)}, each=weighed((0.5, 0.3, 0.4)), base="zeros"),
    Case(
        "multislerp",
        {"weights": (0.5, 0.3, 0.4), "normalize_weights": False},
        {"normalize_weights": False},
        weighed((0.5, 0.3, 0.4)),
    ),
    Case(
        "multislerp",
        {"weights": (0.5, 0.3, 0.4)},
        each=weighed((0.5, 0.3, 0.4)),
        kind="frozen",
        why="mergekit refuses a tensor that no source changes; here it stays as it is",
    ),
    Case("karcher", base="zeros"),
    Case("karcher", {"max_iter": 2, "tol": 1e-3}, {"max_iter": 2, "tol": 1e-3}, base="zeros"),
    Case("nearswap", {"t": 0.005}, {"t": 0.005}, count=1, base="input"),
    Case("arcee_fusion", count=1, base="input", why=f"entries at the threshold: {ROUNDED}"),
    Case("arcee_fusion", count=1, base="input", kind="small", why=ROUNDED),
    Case("passthrough", count=1, base="zeros"),
    Case("passthrough", {"scale": 0.5}, {"scale": 0.5}, count=1, base="zeros"),
    Case("ties", OWN, each=weighed(), kind="bfloat16"),
    Case("slerp", {"t": 0.3}, {"t": 0.3}, count=1, base="input", kind="bfloat16"),
    Case("dare_linear", OWN | {"density": 0.4}, each=weighed(density=0.4), random=True),
    Case(
        "dare_linear", OWN | {"density": 0.4, "rescale": False}, {"rescale": False}, weighed(density=0.4), random=True
    ),
    Case("dare_ties", OWN | {"density": 0.4}, each=weighed(density=0.4), random=True),
    Case("della_linear", OWN | {"density": 0.4}, each=weighed(density=0.4), random=True),
    Case("della", OWN | {"density": 0.4, "epsilon": 0.3}, each=weighed(density=0.4, epsilon=0.3), random=True),
]


def write_checkpoints(folder: Path) -> None:
    """The base, zeros, and three sources of every kind, as folders that plain transformers loads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder / "base")
    for name, tensor in model.state_dict().items():
        tensor.copy_(0 * start[name])
    model.save_pretrained(folder / "zeros")
    for kind, size in (("plain", 1e-2), ("small", 1e-4), ("frozen", 1e-2)):
        common = {name: size * torch.randn_like(tensor) for name, tensor in start.items()}
        for i in range(3):
            for name, tensor in model.state_dict().items():
                own = common[name] + (i + 1) * size * torch.randn_like(tensor)
                frozen = kind == "frozen" and name == "model.norm.weight"
                tensor.copy_(start[name] if frozen else start[name] + own)
            model.save_pretrained(folder / f"{kind}-{i}")
    for name in ("base", "zeros", *(f"plain-{i}" for i in range(3))):
        half = LlamaForCausalLM.from_pretrained(folder / name, dtype=torch.bfloat16)
        half.save_pretrained(folder / "bfloat16" / name)


def paths(case: Case, folder: Path) -> tuple[Path, list[Path]]:
    """The base and the sources of a case."""
    base = "zeros" if case.base == "zeros" else "base"
    if case.kind == "bfloat16":
        return folder / "bfloat16" / base, [folder / "bfloat16" / f"plain-{i}" for i in range(case.count)]
    return folder / base, [folder / f"{case.kind}-{i}" for i in range(case.count)]


def configuration(case: Case, folder: Path) -> dict[str, Any]:
    """The case as mergekit's configuration."""
    base, sources = paths(case, folder)
    each = case.each or [{}] * case.count
    models = [{"model": str(path), "parameters": dict(own)} for path, own in zip(sources, each, strict=True)]
    if case.base == "input":
        models.insert(0, {"model": str(base), "parameters": {}})
    config: dict[str, Any] = {"merge_method": case.method, "models": models, "parameters": case.theirs}
    if case.base != "zeros":
        config["base_model"] = str(base)
    if case.kind == "bfloat16":
        config |= {"dtype": "float32", "out_dtype": "bfloat16"}
    return config


def by_mergekit(python: Path, case: Case, folder: Path, seed: int = 0) -> Tensors | str:
    """The merge by mergekit: its tensors in float32, or the last line of what it says."""
    config = configuration(case, folder)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        (Path(work) / "merge.yaml").write_text(yaml.safe_dump(config))
        settings = ["--random-seed", str(seed), "--no-copy-tokenizer", "--no-write-model-card", "--quiet"]
        words = [str(python.parent / "mergekit-yaml"), f"{work}/merge.yaml", f"{work}/out", *settings]
        variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(words, env=variables | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
        if done.returncode:
            return done.stderr.strip().splitlines()[-1]
        return {name: tensor.float() for name, tensor in load_file(Path(work) / "out" / "model.safetensors").items()}


def by_hf_fda(case: Case, folder: Path, seed: int = 0, **changed: Any) -> Tensors:
    """The merge by hf_fda: its tensors in float32."""
    base, sources = paths(case, folder)
    dtype = "bfloat16" if case.kind == "bfloat16" else "float32"
    options = {**case.ours, **changed}
    with tempfile.TemporaryDirectory(dir=folder) as work:
        output = Path(work) / "out"
        hf_fda.merge(
            str(base),
            [str(path) for path in sources],
            case.method,
            output,
            seed=seed,
            dtype=dtype,
            quiet=True,
            **options,
        )
        return {name: tensor.float() for name, tensor in load_file(output / "model.safetensors").items()}


def by_file(case: Case, folder: Path) -> Tensors:
    """The merge by hf_fda from mergekit's own configuration: its tensors in float32."""
    with tempfile.TemporaryDirectory(dir=folder) as work:
        merged = hf_fda.merge_config(configuration(case, folder), Path(work) / "out", quiet=True)
        return {name: tensor.float() for name, tensor in load_file(merged.folder / "model.safetensors").items()}


def flat(tensors: Tensors) -> Tensor:
    """All entries, in float64."""
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def compare(case: Case, python: Path, folder: Path) -> list[str]:
    """A row of the table."""
    theirs, ours = by_mergekit(python, case, folder), flat(by_hf_fda(case, folder))
    if isinstance(theirs, str):
        return ["", "", "", f"mergekit: {theirs[:60]}"]
    base = flat(load_file(paths(case, folder)[0] / "model.safetensors"))
    found = flat(theirs)
    apart, change = (ours - found).abs(), (found - base).norm()
    relative = float(apart.norm() / change)
    verdict = "equal" if relative < EXACT else "differs"
    if case.kind == "bfloat16" and verdict == "differs" and float((apart / found.abs().clamp_min(1e-9)).max()) < 2**-7:
        verdict = "one unit in the last place"
    if verdict == "differs":
        verdict = f"differs in {int((apart > 1e-3 * change / len(apart) ** 0.5).sum())} of {len(apart)} entries"
    same = float((flat(by_file(case, folder)) - ours).abs().max())
    return [f"{float(apart.max()):.1e}", f"{relative:.1e}", f"{same:.1e}", verdict]


def statistics(merged: Tensor, whole: Tensor) -> Tensor:
    """Of a merge's change, and of the same without dropping: the share of entries that stay; the size of those of
    smaller, and of larger magnitude, as a fraction."""
    larger = whole.abs() > whole.abs().median()
    sizes = [(merged * whole)[part].sum() / whole[part].square().sum() for part in (~larger, larger)]
    return torch.stack([(merged.abs() > 1e-7).double().mean(), *sizes])


def compare_random(case: Case, python: Path, folder: Path, seeds: int) -> list[str]:
    """A row of the table, of a method that drops at random."""
    base = flat(load_file(paths(case, folder)[0] / "model.safetensors"))
    whole = flat(by_hf_fda(case, folder, density=1.0)) - base
    drawn: list[list[Tensor]] = [[], []]
    for seed in range(seeds):
        theirs = by_mergekit(python, case, folder, seed + 1)
        if isinstance(theirs, str):
            return ["", "", "", f"mergekit: {theirs[:60]}"]
        drawn[0].append(statistics(flat(by_hf_fda(case, folder, seed + 1)) - base, whole))
        drawn[1].append(statistics(flat(theirs) - base, whole))
    ours, other = (torch.stack(values) for values in drawn)
    error = ((ours.var(0) + other.var(0)) / seeds).sqrt()
    equal = bool(((ours.mean(0) - other.mean(0)).abs() <= STEADY * error).all())
    sides = [" / ".join(f"{value:.3f}" for value in values.mean(0).tolist()) for values in (ours, other)]
    verdict = "equal on the mean" if equal else "differs on the mean"
    apart = (ours.mean(0) - other.mean(0)).abs().max()
    return [f"{float(apart):.1e}", "", "", f"{verdict}: kept / smaller / larger {sides[0]}, mergekit {sides[1]}"]


def described(case: Case) -> str:
    """The options of a case, and what is special about its checkpoints."""
    words = [f"{name}={value}" for name, value in case.ours.items()]
    if case.count < 3:
        words.append(f"{case.count} source{'s' if case.count > 1 else ''}")
    if case.base == "zeros":
        words.append("no base")
    if case.kind != "plain":
        words.append({"small": "changes of 1e-4", "frozen": "a frozen tensor"}.get(case.kind, case.kind))
    return ", ".join(words)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", type=Path, help="a Python that has mergekit; mergekit-yaml is beside it")
    parser.add_argument("--seeds", type=int, default=4, help="of methods that drop at random")
    parser.add_argument("--only", nargs="*", help="these methods")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="parity-") as work:
        folder = Path(work)
        write_checkpoints(folder)
        print("| method | options | max abs difference | relative | from its file | verdict | why |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for case in CASES:
            if arguments.only and case.method not in arguments.only:
                continue
            if case.random:
                row = compare_random(case, arguments.python, folder, arguments.seeds)
            else:
                row = compare(case, arguments.python, folder)
            print(f"| {' | '.join([case.method, described(case), *row, case.why])} |", flush=True)


if __name__ == "__main__":
    main()
