"""What is seen in anchors: their spectra, how they came about, and where those of several sources pull alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from hf_fda.analysis.charts import Axes, Chart, lines, table
from hf_fda.analysis.forecasts import Forecast, seconds_of
from hf_fda.analysis.gradients import anchor_gradients
from hf_fda.analysis.interference import Words, interference_charts
from hf_fda.analysis.report import Section
from hf_fda.analysis.similarities import gram
from hf_fda.analysis.spectra import Spectrum, spectrum
from hf_fda.analysis.subspaces import projection_energy
from hf_fda.anchors.builder import AnchorBuilder
from hf_fda.anchors.container import FunctionalDualAnchors
from hf_fda.anchors.making import builder_of
from hf_fda.checkpoint.interface import Checkpoint
from hf_fda.checkpoint.likeness import likeness
from hf_fda.devices import release_memory
from hf_fda.errors import InputError
from hf_fda.merge_methods.fda import FDAConfig
from hf_fda.merge_methods.registry import resolve_method
from hf_fda.progress import Progress

SHARE = 16
"""Anchors are compared in their top d / 16 directions."""

COMPARED = 2
"""Spectra that take as long as comparing the directions of one source with those of another."""

GRADIENTS = Words(
    "gradient-interference",
    "Cosines of the gradients that anchors induce",
    "Over all blocks: below zero, two sources pull the base in opposite directions.",
    "Induced gradients by block",
    "induced gradients",
    "block",
)

COPIES = 4
"""Float64 copies of a block's anchors that its decomposition holds."""


@dataclass
class AnchorsSeen:
    """What was found, by source and block."""

    spectra: dict[str, dict[str, Spectrum]] = field(default_factory=dict)
    losses: dict[str, dict[str, float]] = field(default_factory=dict)
    steps: dict[str, dict[str, dict[int, Spectrum]]] = field(default_factory=dict)
    overlaps: dict[str, Tensor] = field(default_factory=dict)
    products: dict[str, Tensor] = field(default_factory=dict)


class AnchorsAnalysis:
    """Looks at the anchors of one source or several, with one block of each in memory at a time.

    Args:
        anchors: by source.
        base: what they were constructed from, for the gradients that they induce; None leaves these out.
        device: where to compute gradients.

    Raises:
        InputError: when the base is another one.
    """

    def __init__(
        self, anchors: Mapping[str, FunctionalDualAnchors], base: Checkpoint | None, device: torch.device
    ) -> None:
        self.anchors, self.device = dict(anchors), device
        first = next(iter(self.anchors.values()))
        self.blocks = [block for block in first if all(block in own for own in self.anchors.values())]
        if not self.blocks:
            raise InputError(f"anchors of {', '.join(self.anchors)} have no block in common; look at them one by one")
        self.builder = None if base is None else _builder(first, base, device)

    def forecast(self) -> Forecast:
        """What `run` will take: the first block's spectrum is computed once."""
        names = list(self.anchors)
        first = self.anchors[names[0]][self.blocks[0]].anchors
        each = seconds_of(lambda: _spectrum(names[0], self.blocks[0], first))
        kept = sum(len(self.anchors[name].snapshots(self.blocks[0])) for name in names)
        compared = COMPARED * len(names) ** 2 if len(names) > 1 else 0
        memory = (COPIES * 8 + 4 * len(names)) * first.numel()
        if self.builder is not None:
            unit = self.builder.units[0]
            memory += 4 * (len(names) + 3) * sum(prod(self.builder.base.shape(name)) for name in unit.tensors)
        return Forecast(each * len(self.blocks) * (len(names) + kept + compared), memory)

    def run(self, progress: Progress) -> AnchorsSeen:
        """Look at every block."""
        seen = AnchorsSeen()
        for block in self.blocks:
            progress.now(f"anchors of {block}")
            self._look(block, seen)
            release_memory()
            progress.finish(f"anchors of {block}")
        return seen

    def _look(self, block: str, seen: AnchorsSeen) -> None:
        gradients: dict[str, dict[str, Tensor]] = {}
        held: dict[str, Tensor] = {}
        for name, own in self.anchors.items():
            unit = own[block]
            held[name] = unit.anchors
            seen.spectra.setdefault(name, {})[block] = _spectrum(name, block, unit.anchors)
            seen.losses.setdefault(name, {})[block] = unit.loss
            kept = {step: _spectrum(name, block, anchors) for step, anchors in own.snapshots(block).items()}
            if kept:
                seen.steps.setdefault(name, {})[block] = kept
            if self.builder is not None and unit.moves and len(self.anchors) > 1:
                gradients[name] = self._gradients(self.builder, block, unit.anchors, unit.targets, list(unit.cosines))
        if len(held) > 1:
            seen.overlaps[block] = _overlaps(list(held.values()))
        common = [name for name in next(iter(gradients.values()), {}) if all(name in own for own in gradients.values())]
        if len(gradients) == len(self.anchors) and common:
            parts = ([own[name] for own in gradients.values()] for name in common)
            seen.products[block] = gram(parts, len(gradients))

    def _gradients(
        self, builder: AnchorBuilder, block: str, anchors: Tensor, targets: Tensor, names: list[str]
    ) -> dict[str, Tensor]:
        unit = next(unit for unit in builder.units if unit.name == block)
        module, call = builder.load(builder.base.read, unit), builder.capture.calls[block]
        chosen = names or [name for name, _ in module.named_parameters()]
        x, aim = anchors.to(self.device), targets.to(self.device)
        return anchor_gradients(module, call, x, aim, chosen, builder.config.distance)


def _builder(anchors: FunctionalDualAnchors, base: Checkpoint, device: torch.device) -> AnchorBuilder:
    """What calls the base's units as construction did."""
    config = resolve_method("fda", anchors.info.config)
    assert isinstance(config, FDAConfig)
    builder = builder_of(base, config, device, anchors.info.seed)
    names = [name for unit in builder.units for name in unit.tensors]
    known = {unit.name for unit in builder.units}
    stated = anchors.info.base.get("likeness")
    if not known >= set(anchors.blocks) or (stated is not None and stated != likeness(base, names)):
        raise InputError(f"base: {base.id} is not what the anchors were constructed from ('{anchors.info.base['id']}')")
    return builder


def _spectrum(name: str, block: str, anchors: Tensor) -> Spectrum:
    """As `spectrum`, with whose anchors they are in what is refused."""
    try:
        return spectrum(anchors)
    except InputError as error:
        raise InputError(f"anchors of '{name}', block '{block}': {error}") from None


def _overlaps(anchors: list[Tensor]) -> Tensor:
    """(K, K): the share of each source's anchors in the top directions of each other's."""
    least = min(min(own.shape[-1], own.numel() // own.shape[-1]) for own in anchors)
    k = max(1, min(least, anchors[0].shape[-1] // SHARE))
    return torch.tensor([[projection_energy(own, other, [k]).shares[0] for other in anchors] for own in anchors])


def sections(seen: AnchorsSeen) -> list[Section]:
    """What was found, as charts."""
    spectra = [_spectra_chart(name, own) for name, own in seen.spectra.items()]
    return [
        Section(
            "Spectra of the anchors",
            "Singular values of all anchor tokens of a block (n T x d, not centred). How they fall depends on the "
            "optimizer of construction: muon makes all directions of a step alike, and so the spectrum flat.",
            (*spectra, *_summaries(seen)),
        ),
        Section("How construction changed them", "Kept on the way by `snapshots`.", tuple(_step_charts(seen))),
        Section("Sources compared", "", tuple(_comparisons(seen))),
    ]


def _spectra_chart(name: str, own: Mapping[str, Spectrum]) -> Chart:
    series = {block: _curve(found) for block, found in own.items()}
    return lines(
        f"spectra-{name}",
        f"Anchors of {name}: singular values",
        "Each line is a block; values are shares of the block's largest.",
        Axes("rank of the singular value", "share of the largest", log_x=True, log_y=True),
        series,
        order="block",
    )


def _curve(found: Spectrum) -> tuple[list[float], list[float]]:
    """Ranks and shares of the values that are more than rounding."""
    shares = [share for share in found.shares if share > 1e-6]
    return [float(rank) for rank in range(1, len(shares) + 1)], shares


def _summaries(seen: AnchorsSeen) -> list[Chart]:
    def by_block(values: Mapping[str, Mapping[str, float]]) -> dict[str, tuple[list[float], list[float]]]:
        return {name: ([float(n) for n in range(len(own))], list(own.values())) for name, own in values.items()}

    ranks = {name: {block: own.effective_rank for block, own in found.items()} for name, found in seen.spectra.items()}
    tails = {
        name: {block: own.tail.exponent for block, own in found.items() if own.tail is not None}
        for name, found in seen.spectra.items()
    }
    charts = [
        lines(
            "effective-rank",
            "Effective rank of the anchors",
            "Exponential of the entropy of the singular values (Roy and Vetterli 2007).",
            Axes("block, from the first", "effective rank (directions)"),
            by_block(ranks),
        )
    ]
    if all(tails.values()):
        one = next(own.tail for found in seen.spectra.values() for own in found.values() if own.tail is not None)
        charts.append(
            lines(
                "tail-exponent",
                "Tail exponent of the anchors",
                f"Slope of log singular value over log rank, least squares, ranks {one.first} to half of the rank "
                f"({one.last} in the first block); zero is a flat spectrum.",
                Axes("block, from the first", "exponent a of rank^-a"),
                by_block(tails),
            )
        )
    charts.append(
        lines(
            "construction-loss",
            "Construction loss",
            "Mean over parameters of one minus the cosine between induced gradient and task vector: 0 is perfect, 1 is "
            "no better than chance.",
            Axes("block, from the first", "one minus cosine"),
            by_block(seen.losses),
        )
    )
    return charts


def _step_charts(seen: AnchorsSeen) -> list[Chart]:
    charts = []
    for name, blocks in seen.steps.items():
        ranks = {
            block: ([float(step) for step in own], [found.effective_rank for found in own.values()])
            for block, own in blocks.items()
        }
        charts.append(
            lines(
                f"rank-over-steps-{name}",
                f"Anchors of {name}: effective rank on the way",
                "Each line is a block.",
                Axes("construction step", "effective rank (directions)"),
                ranks,
                order="block",
            )
        )
        middle = list(blocks)[len(blocks) // 2]
        charts.append(
            lines(
                f"spectrum-over-steps-{name}",
                f"Anchors of {name}: {middle} on the way",
                f"Singular values of {middle} after so many construction steps.",
                Axes("rank of the singular value", "share of the largest", log_x=True, log_y=True),
                {f"step {step}": _curve(found) for step, found in blocks[middle].items()},
                order="step",
            )
        )
    return charts


def _comparisons(seen: AnchorsSeen) -> list[Chart]:
    names, charts = list(seen.spectra), []
    if seen.products:
        charts += interference_charts(GRADIENTS, names, list(seen.products.values()))
    if seen.overlaps:
        mean = torch.stack(list(seen.overlaps.values())).mean(0).tolist()
        charts.append(
            table(
                "anchor-overlap",
                "Anchors in each other's main directions",
                f"Share of the row's anchors in the top d / {SHARE} directions of the column's, mean over blocks; a "
                f"random subspace holds {1 / SHARE:.3f}.",
                ("anchors of", "directions of", "share of squared norm"),
                names,
                dict(zip(names, mean, strict=True)),
                limit=1.0,
            )
        )
    return charts
