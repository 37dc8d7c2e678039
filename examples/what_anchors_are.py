"""Check the claims that functional dual anchors rest on (arXiv 2510.21223), on real encoders and on the demo's digits.

    python examples/what_anchors_are.py --checkpoints DIR --tasks DIR [--seeds 0 1 2] [--work DIR] [--output DIR]
    python examples/what_anchors_are.py --demo [--seeds 0 1 2] [--work DIR] [--output DIR]

The claims: (1) anchors evolve to a long-tailed spectrum; (2) step by step they align with the main directions of real
hidden states; (3) adapting with them walks toward the joint optimum, where task vectors drift away; (4) all that hardly
depends on where anchors start. `--checkpoints` holds a folder `base` and one for each fine-tune, named after its task;
`--tasks` holds `TASK.train.jsonl` and `TASK.test.jsonl` with `text`, perhaps `text_pair`, and `label`. The demo trains
its own models. Everything is measured on training rows but the accuracies of claim 4, which are of test rows. What is
measured lies in the work folder as JSON, once for each seed; from all there is a page and its pictures are made.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from what_anchors_are_page import write_page

import hf_fda
from hf_fda.analysis import anchor_gradients, gradient_agreement, projection_energy, spectrum, states_gradients
from hf_fda.analysis.losses import by_labels
from hf_fda.analysis.measuring import Measuring
from hf_fda.analysis.of_losses import Chosen, measure
from hf_fda.analysis.opened import OpenedMerge, open_merge
from hf_fda.analysis.recording import real_states, vectors_of
from hf_fda.analysis.walking import Shared
from hf_fda.anchors.builder import AnchorBuilder
from hf_fda.anchors.making import builder_of
from hf_fda.blocks import Unit
from hf_fda.checkpoint.alignment import AlignedSource, align
from hf_fda.checkpoint.reader import open_checkpoint
from hf_fda.data.rows import TaskRows
from hf_fda.demo.settings import Settings
from hf_fda.demo.tasks import TASKS, load_rows
from hf_fda.demo.training import make_models
from hf_fda.divergence.task_models import logits_of, task_model
from hf_fda.progress import Progress
from hf_fda.states import UnitStates

CPU = torch.device("cpu")
ROWS, TEST_ROWS, LONGEST = 40, 300, 64
"""Training rows and test rows of a task, and tokens of a text, at most."""

STEPS = {"muon": (0, 1, 2, 5, 10, 20, 40), "adamw": (0, 1, 2, 5, 10, 20, 40)}
"""Construction steps that are looked at, by optimizer: muon is the package's default, adamw is published."""

STARTS = ("weights", "gaussian")
LOOKED_AT = 2
"""Tasks whose anchors are looked at step by step, in the first, the middle and the last block."""

MERGED: dict[str, Any] = {"num_anchors": 32, "steps": 30}
"""How the anchors of the merges are made: of all tasks and blocks, and so of fewer."""

PASSES = (1, 2, 5, 10, 20)
"""Passes of adaptation after which a path is looked at."""

SCALINGS = tuple(number / 10 for number in range(11))
GRID = 7


@dataclass(frozen=True)
class Task:
    """A fine-tune's folder and its rows with labels: for measuring, and for the accuracies that are reported."""

    folder: Path
    train: tuple[TaskRows, list[int]]
    test: tuple[TaskRows, list[int]]


@dataclass(frozen=True)
class Setting:
    """A base and its tasks."""

    name: str
    base: Path
    tasks: Mapping[str, Task]


def arena(checkpoints: Path, folder: Path, seed: int) -> Setting:
    """Real encoders on real texts; the seed chooses the training rows."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoints / "base")

    def rows_of(task: str, split: str, count: int) -> tuple[TaskRows, list[int]]:
        with open(folder / f"{task}.{split}.jsonl", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        if split == "train":
            rows = [rows[n] for n in torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count]]
        encoded = [
            tokenizer(row["text"], row.get("text_pair"), truncation=True, max_length=LONGEST) for row in rows[:count]
        ]
        inputs = [{name: torch.tensor(ids) for name, ids in own.items()} for own in encoded]
        return TaskRows(task, "labels", inputs, None, {}, f"{split}{seed}"), [row["label"] for row in rows[:count]]

    names = sorted(path.name for path in checkpoints.iterdir() if path.is_dir() and path.name != "base")
    tasks = {
        name: Task(checkpoints / name, rows_of(name, "train", ROWS), rows_of(name, "test", TEST_ROWS)) for name in names
    }
    return Setting("arena", checkpoints / "base", tasks)


def demo(work: Path, seed: int) -> Setting:
    """Small vision models that the demo trains on digits, by seed."""
    digits = load_rows(seed)
    base, folders = make_models(work / f"demo-models-{seed}", digits.train, Settings(), seed, print)

    def rows_of(task: str, part: Any, count: int) -> tuple[TaskRows, list[int]]:
        own = part.seen_as(TASKS[task])
        inputs = [{"pixel_values": image} for image in own.images[:count]]
        return TaskRows(task, "labels", inputs, None, {}, f"{task}{len(part.labels)}"), own.labels[:count].tolist()

    tasks = {
        name: Task(folder, rows_of(name, digits.train, ROWS), rows_of(name, digits.test, TEST_ROWS))
        for name, folder in folders.items()
    }
    return Setting("demo", base, tasks)


def look_at_anchors(setting: Setting, seed: int, _: Path) -> dict[str, Any]:
    """Claims 1, 2 and 4: anchors of some tasks and blocks step by step, by optimizer and start."""
    base = open_checkpoint(setting.base)
    found: dict[str, Any] = {"variants": {}, "limits": {}, "spectra": {}}
    for task in list(setting.tasks)[:LOOKED_AT]:
        source = align(base, open_checkpoint(setting.tasks[task].folder), task)
        builder = _builder(base, seed, "muon", "weights")
        units = [builder.units[place] for place in (0, len(builder.units) // 2, -1)]
        width = builder.capture.calls[units[0].name].size or 1
        states = real_states(source, units, setting.tasks[task].train[0], width, CPU)
        for unit in units:
            real = vectors_of(states[unit.name])
            k = width // 16
            own = [projection_energy(real, real, [k], centred=centred) for centred in (False, True)]
            limits = {"k": k, "d": width, "random": own[0].expected[0], "most": [one.best[0] for one in own]}
            found["limits"].setdefault(task, {})[unit.name] = limits
            wanted = _real_gradients(builder, source, unit, states[unit.name])
            for optimizer, steps in STEPS.items():
                for start in STARTS:
                    own_builder = _builder(base, seed, optimizer, start)
                    made = own_builder.build(source, unit)
                    seen = {
                        step: _looked(own_builder, source, unit, made.snapshots[step], real, k, wanted)
                        for step in steps
                        if step in made.snapshots
                    }
                    variant = found["variants"].setdefault(f"{optimizer} from {start}", {})
                    variant.setdefault(task, {})[unit.name] = {"loss": made.loss, "steps": seen}
                    if task == next(iter(setting.tasks)) and unit is units[1]:
                        curves = {step: spectrum(own).shares[::4] for step, own in made.snapshots.items()}
                        found["spectra"][f"{optimizer} from {start}"] = curves
            print(f"  {task} {unit.name}", flush=True)
    return found


def _builder(base: Any, seed: int, optimizer: Any, start: Any) -> AnchorBuilder:
    config = hf_fda.FDAConfig(
        steps=STEPS[optimizer][-1], optimizer=optimizer, initialization=start, patience=None, num_anchors=64
    )
    return builder_of(base, config, CPU, seed, STEPS[optimizer])


def _real_gradients(builder: AnchorBuilder, source: AlignedSource, unit: Unit, states: UnitStates) -> dict[str, Tensor]:
    base, tuned = builder.load(builder.base.read, unit), builder.load(source.read, unit)
    return states_gradients(base, tuned, states, [name for name, _ in base.named_parameters()], "cosine")


def _looked(
    builder: AnchorBuilder,
    source: AlignedSource,
    unit: Unit,
    anchors: Tensor,
    real: Tensor,
    k: int,
    wanted: Mapping[str, Tensor],
) -> dict[str, Any]:
    """What anchors are after some steps."""
    base, tuned, call = builder.load(builder.base.read, unit), builder.load(source.read, unit), builder.capture.calls
    with torch.no_grad():
        targets = call[unit.name](tuned, anchors)
    induced = anchor_gradients(base, call[unit.name], anchors, targets, list(wanted), "cosine")
    own, centred = spectrum(anchors), spectrum(anchors, centred=True)
    assert own.tail is not None and centred.tail is not None
    return {
        "rank": [own.effective_rank, centred.effective_rank],
        "exponent": [own.tail.exponent, centred.tail.exponent],
        "fit": [own.tail.fit, centred.tail.fit],
        "states on anchors": [projection_energy(real, anchors, [k], one).shares[0] for one in (False, True)],
        "anchors on states": [projection_energy(anchors, real, [k], one).shares[0] for one in (False, True)],
        "gradients": gradient_agreement(induced, wanted).mean,
    }


def merge(setting: Setting, folder: Path, anchors: Mapping[str, Path], seed: int, **options: Any) -> Path:
    """An FDA merge of all tasks in a folder, from anchors that are there."""
    sources = {name: str(task.folder) for name, task in setting.tasks.items()}
    given = {name: str(path) for name, path in anchors.items()}
    made = {**MERGED, "adaptation_schedule": "constant", **options}
    made |= {"anchors": given, "data": "anchors", "seed": seed, "device": "cpu", "quiet": True}
    hf_fda.merge(str(setting.base), sources, "fda", folder, **made)
    return folder


def look_at_merges(setting: Setting, seed: int, work: Path) -> dict[str, Any]:
    """Claims 3 and 4: the landscape with the paths of adaptation and of task arithmetic, and merges of both starts."""
    anchors: dict[str, dict[str, Path]] = {start: {} for start in STARTS}
    for start in STARTS:
        for name, task in setting.tasks.items():
            anchors[start][name] = work / "anchors" / start / name
            options = {**MERGED, "initialization": start, "output": anchors[start][name]}
            hf_fda.FunctionalDualAnchors.construct(
                str(setting.base), str(task.folder), "cpu", seed, quiet=True, **options
            )
        print(f"  anchors from {start}", flush=True)
    initial: dict[str, dict[str, Any]] = {
        "from the base": {"initial": "base"},
        "from task arithmetic": {"initial": "task_arithmetic", "scaling": 0.3},
    }
    folders = {
        label: [
            merge(setting, work / f"{label.replace(' ', '-')}-{epochs}", anchors["weights"], seed, epochs=epochs, **own)
            for epochs in PASSES
        ]
        for label, own in initial.items()
    }
    other = merge(setting, work / "gaussian", anchors["gaussian"], seed, initial="base", epochs=PASSES[-1])
    print("  merges", flush=True)
    opened = open_merge(folders["from the base"][-1])
    measuring = _measuring(setting, opened)
    return {
        **_landscape(opened, measuring, folders, work),
        "line": {scaling: _at_scaling(opened, measuring, scaling) for scaling in SCALINGS},
        "walked": {label: [_at_merge(opened, measuring, own) for own in paths] for label, paths in folders.items()},
        "accuracy": {
            "base": _accuracy(setting, opened, measuring, None),
            "weights": _accuracy(setting, opened, measuring, folders["from the base"][-1]),
            "gaussian": _accuracy(setting, opened, measuring, other),
        },
    }


def _measuring(setting: Setting, opened: OpenedMerge) -> Measuring:
    """The merged model under every task's head, on training rows."""
    shared = Shared.of(opened.names, opened.merged_tensor, CPU)
    losses = {}
    for name, task in setting.tasks.items():
        losses[name] = by_labels(task_model(opened.model(name), shared.tensors, CPU), *task.train)
    return Measuring(shared, losses, CPU, 16)


def _mean(losses: Mapping[str, float]) -> float:
    return sum(losses.values()) / len(losses)


def _landscape(
    opened: OpenedMerge, measuring: Measuring, folders: Mapping[str, Sequence[Path]], work: Path
) -> dict[str, Any]:
    """Losses over the plane of base, task arithmetic and the adapted merge; both paths of adaptation on it."""

    def arithmetic(name: str, base: Tensor) -> Tensor:
        return 0.3 * opened.summed(name, base)

    first, second = ("task arithmetic 0.3", arithmetic), ("adapted", opened.merged.task)
    path = tuple(opened.another(folder).task for folder in folders["from the base"][:-1])
    other = tuple(opened.another(folder).task for folder in folders["from task arithmetic"])
    whole = Chosen(first, second, (opened.summed, *path, *other))
    with Progress(0, True) as progress:
        seen = measure(opened, measuring, whole, GRID, work, progress)
    ((start, far, *points, end),) = seen.paths.values()
    third = seen.points["task arithmetic 0.3"]
    walked = {
        "task arithmetic to scaling 1": [start, third, far],
        "adapting from the base": [start, *points[: len(path)], end],
        "adapting from task arithmetic": [third, *points[len(path) :]],
    }
    seen = replace(seen, paths={name: tuple(own) for name, own in walked.items()})
    return {
        "x": seen.x,
        "y": seen.y,
        "losses": seen.losses,
        "lowest": seen.lowest,
        "points": {name: vars(own) for name, own in seen.points.items()},
        "paths": {name: [vars(one) for one in own] for name, own in seen.paths.items()},
    }


def _at_scaling(opened: OpenedMerge, measuring: Measuring, scaling: float) -> float:
    """The mean loss of task arithmetic."""

    def read(name: str) -> Tensor:
        base = opened.base_tensor(name)
        return base.add(opened.summed(name, base), alpha=scaling)

    measuring.shared.put(opened.names, read)
    return _mean(measuring())


def _at_merge(opened: OpenedMerge, measuring: Measuring, folder: Path) -> float:
    """The mean loss of another merge."""
    _put(opened, measuring, folder)
    return _mean(measuring())


def _put(opened: OpenedMerge, measuring: Measuring, folder: Path | None) -> None:
    other = None if folder is None else opened.another(folder)

    def read(name: str) -> Tensor:
        base = opened.base_tensor(name)
        return base if other is None else base + other.task(name, base)

    measuring.shared.put(opened.names, read)


@torch.no_grad()
def _accuracy(setting: Setting, opened: OpenedMerge, measuring: Measuring, folder: Path | None) -> float:
    """The mean accuracy on test rows."""
    _put(opened, measuring, folder)
    found = []
    for name, task in setting.tasks.items():
        rows, labels = task.test
        right = [
            int(one) == labels[number]
            for numbers, batch in rows.batches(64)
            for number, one in zip(numbers, logits_of(measuring.losses[name].model, batch).argmax(-1), strict=True)
        ]
        found.append(sum(right) / len(right))
    return sum(found) / len(found)


PARTS = {"anchors": look_at_anchors, "merges": look_at_merges}
"""What is measured of a setting: claims 1, 2 and 4, and claims 3 and 4."""


def main() -> None:
    """Parse, measure what is not measured yet, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, help="folders `base` and one for each task")
    parser.add_argument("--tasks", type=Path, help="TASK.train.jsonl and TASK.test.jsonl")
    parser.add_argument("--demo", action="store_true", help="the demo's vision tasks")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure (default all)")
    parser.add_argument("--work", type=Path, default=Path("what_anchors_are"), help="where work goes")
    parser.add_argument("--output", type=Path, help="where the page goes (default: the work folder)")
    options = parser.parse_args()
    if not options.demo and not (options.checkpoints and options.tasks):
        parser.error("give --checkpoints and --tasks, or --demo")
    from transformers.utils import logging

    logging.disable_progress_bar()
    for seed in options.seeds:
        settings = [lambda seed=seed: demo(options.work, seed)] if options.demo else []
        if options.checkpoints:
            settings.append(lambda seed=seed: arena(options.checkpoints, options.tasks, seed))
        for make in settings:
            start = time.perf_counter()
            setting = make()
            for part in options.parts:
                file = options.work / f"{setting.name}-{part}-{seed}.json"
                if file.is_file():
                    continue
                print(f"{setting.name}, {part}, seed {seed}", flush=True)
                own = options.work / f"{setting.name}-{seed}"
                own.mkdir(parents=True, exist_ok=True)
                found = PARTS[part](setting, seed, own)
                file.write_text(json.dumps(found), encoding="utf-8")
                print(f"  {time.perf_counter() - start:.0f} s", flush=True)
    print(write_page(options.work, options.output or options.work))


if __name__ == "__main__":
    main()
