"""What each choice in the merge by functional dual anchors alone is worth, on real encoders and training rows.

    python examples/benchmarks/ablation.py --checkpoints DIR --tasks DIR [--seeds 0 1 2] [--only NAME ...]

Folders as in `arena.py`. One option at a time differs from the defaults; merges that agree in all options of
construction share their anchors. Printed, as mean and standard deviation over seeds: the average accuracy, the average
divergence from what the tasks' own fine-tunes answer (nats; it moves less by chance than accuracy), and seconds.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from pathlib import Path
from typing import Any

import scoring
from scoring import Rows, average, spread

import hf_fda
from hf_fda.merge_methods.fda import CONSTRUCTION_FIELDS, FDAConfig

START: dict[str, Any] = {"initial": "tsv"}
VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "initial: base": {"initial": "base"},
    "initial: task_arithmetic 0.3": {"initial": "task_arithmetic", "scaling": 0.3},
    "initial: tsv 1": {"initial": "tsv"},
    "initial: tsv 1.2": {"initial": "tsv", "scaling": 1.2},
    "initial: wudi": {"initial": "wudi"},
    "initial: isotropic 1": {"initial": "isotropic", "scaling": 1.0},
    "initial: isotropic 2": {"initial": "isotropic", "scaling": 2.0},
    "initial: isotropic 4": {"initial": "isotropic", "scaling": 4.0},
    "initial: tsv 1, distance: mse": {**START, "adaptation_distance": "mse"},
    "initial: tsv 1, distance: cosine": {**START, "adaptation_distance": "cosine"},
    "initial: tsv 1, power: 0": {**START, "metric_power": 0.0},
    "initial: tsv 1, interpolation: 1": {**START, "interpolation": 1.0},
    "interpolation: 0": {"interpolation": 0.0},
    "interpolation: 0.25": {"interpolation": 0.25},
    "interpolation: 0.75": {"interpolation": 0.75},
    "interpolation: 1": {"interpolation": 1.0},
    "distance: mse": {"adaptation_distance": "mse"},
    "distance: cosine": {"adaptation_distance": "cosine"},
    "power: 0": {"metric_power": 0.0},
    "power: 0.25": {"metric_power": 0.25},
    "power: 1": {"metric_power": 1.0},
    "epochs: 5": {"epochs": 5},
    "epochs: 60": {"epochs": 60},
    "step size: 0.01": {"adaptation_learning_rate": 1e-2},
    "step size: 0.1": {"adaptation_learning_rate": 1e-1},
    "schedule: constant": {"adaptation_schedule": "constant"},
    "parameters, step size 1e-4": {"parametrization": "parameters", "epochs": 20, "adaptation_learning_rate": 1e-4},
    "initialization: the other one": {"initialization": "other"},
    "steps: 0": {"steps": 0},
    "steps: 15": {"steps": 15},
    "steps: 100": {"steps": 100},
    "optimizer: adamw, 100 steps": {"optimizer": "adamw", "steps": 100, "patience": None},
    "attention and MLP apart": {"unit": ("attention", "intermediate.dense", "output")},
    "anchors: 16": {"num_anchors": 16},
    "anchors: 192": {"num_anchors": 192},
    "tokens: 1": {"num_tokens": 1},
    "tokens: 16": {"num_tokens": 16},
    "no position embeddings": {"position_embeddings": False},
}


def main() -> None:
    """Parse, merge, score, print."""
    parser = scoring.parser(__doc__, "ablation", limit=400, seeds=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=[], help="variants whose name contains one of these")
    options = parser.parse_args()
    rows = Rows(options.checkpoints, options.tasks, "train", options.limit)
    print("| variant | accuracy | divergence | construction, s | adaptation, s |\n|" + " --- |" * 5, flush=True)
    for label, variant in VARIANTS.items():
        if options.only and not any(part in label for part in options.only):
            continue
        scores, times = [], []
        for seed in options.seeds:
            output, seconds = merged(options.work, rows, filled(variant), seed)
            scores.append(average(rows.score_merged(output)))
            times.append(seconds)
        cells = [label, spread([score.accuracy for score in scores]), spread([score.divergence for score in scores])]
        cells += [f"{statistics.mean(column):.0f}" for column in zip(*times, strict=True)]
        print("| " + " | ".join(cells) + " |", flush=True)


def filled(variant: dict[str, Any]) -> dict[str, Any]:
    """A variant's options."""
    if variant.get("initialization") == "other":
        default = FDAConfig().initialization
        return {**variant, "initialization": "weights" if default == "gaussian" else "gaussian"}
    return dict(variant)


def merged(work: Path, rows: Rows, options: dict[str, Any], seed: int) -> tuple[Path, tuple[float, float]]:
    """A merge's folder, and the seconds of construction and of the rest; what is there is not made again."""
    building = {name: value for name, value in options.items() if name in CONSTRUCTION_FIELDS}
    anchors = work / f"anchors-{digest(building)}-{seed}"
    sources = {name: str(rows.checkpoints / name) for name in rows.names}
    construction = 0.0
    for name, source in sources.items():
        record = anchors / f"{name}.json"
        if not record.is_file():
            start = time.perf_counter()
            hf_fda.FunctionalDualAnchors.construct(
                str(rows.checkpoints / "base"), source, output=anchors / name, seed=seed, quiet=True, **building
            )
            record.write_text(json.dumps(time.perf_counter() - start), encoding="utf-8")
        construction += json.loads(record.read_text(encoding="utf-8"))
    output = work / f"merge-{digest(options)}-{seed}"
    given = {name: str(anchors / name) for name in sources}
    start = time.perf_counter()
    hf_fda.merge(
        str(rows.checkpoints / "base"),
        sources,
        output=output,
        data="anchors",
        anchors=given,
        seed=seed,
        quiet=True,
        **options,
    )
    return output, (construction, time.perf_counter() - start)


def digest(options: dict[str, Any]) -> str:
    """A short name for options."""
    return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:8]


if __name__ == "__main__":
    main()
