"""How far a unit is from what its sources do, on real hidden states, on anchors, or on both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_fda.anchors.distance import distance
from hf_fda.anchors.metric import read_metric, shift_metric
from hf_fda.blocks.capture import UnitCall
from hf_fda.errors import RunError
from hf_fda.merge_methods.fda import AdaptationDistance
from hf_fda.shared_sum import SharedSum
from hf_fda.states.lessons import Lesson
from hf_fda.states.unit_states import Ragged
from hf_fda.statistics.sensitivity import Sensitivity

FORWARD = 32
"""Rows, of about the same length, that run together where nothing is learned."""

WINDOW = 4
"""Parts of rows that are sorted by length among each other."""


@dataclass(frozen=True)
class Examples:
    """What a unit shall do for one source: n rows of inputs, the call that belongs to them, and the source's outputs.

    `factor` is the metric of errors (d', d') of distance "shift".
    """

    inputs: Ragged
    targets: Ragged
    call: UnitCall
    factor: Tensor | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    def reach(self, rows: Tensor) -> int | None:
        """How many positions a call on some rows needs; None for all.

        Args:
            rows: (b,) numbers, on the CPU.
        """
        return None if self.call.along is None else int(self.inputs.lengths[rows].max())


@torch.no_grad()
def outputs(module: nn.Module, inputs: Ragged, call: UnitCall) -> Ragged:
    """What a unit gives on all rows, at their real positions."""
    places, values = [], []
    for part in inputs.lengths.argsort(stable=True).split(FORWARD):
        positions = None if call.along is None else int(inputs.lengths[part].max())
        rows, needed = part.to(inputs.places.device), call if positions is None else call.cut(positions)
        real = inputs.real_at(rows, positions)
        places.append(inputs.places[rows, :positions][real])
        values.append(needed.at(rows)(module, inputs.at(rows, positions))[real])
    in_order = torch.cat(places).argsort()
    return Ragged.of(torch.cat(values)[in_order], inputs.real)


def shown(base: nn.Module, source: nn.Module, lesson: Lesson, power: float | None) -> Examples | None:
    """The examples of one source on real hidden states; None where it does there what the base does.

    Args:
        base: the base's unit, which gives the shift.
        source: the source's unit.
        lesson: on the device of both.
        power: of the metric of distance "shift" (`shift_metric`); None for another distance.
    """
    own = lesson.own
    found = matched(base, own.inputs, own.call, outputs(source, own.inputs, own.call), power, lesson.read)
    if found is None or lesson.merged is None:
        return found
    return Examples(lesson.merged.inputs, found.targets, lesson.merged.call, found.factor)


def matched(
    base: nn.Module,
    inputs: Ragged,
    call: UnitCall,
    targets: Ragged,
    power: float | None,
    read: Sensitivity | None = None,
) -> Examples | None:
    """As `shown`, where the targets are known. What the source's answers do not depend on is not matched."""
    before = outputs(base, inputs, call)
    if read is not None:
        before, targets = before.only(read.positions), targets.only(read.positions)
    shift = targets.values[:-1] - before.values[:-1]
    if not bool(shift.any()):
        return None
    factor = None if power is None else shift_metric(shift, power)
    if factor is not None and read is not None:
        factor = read_metric(factor, shift, read.fisher)
    return Examples(inputs, targets, call, factor)


@dataclass(frozen=True)
class Share:
    """What a batch has of one of several examples: its number, rows (b,) of it on the device, and how many of their
    positions there are (None: all, or another process's)."""

    number: int
    rows: Tensor
    positions: int | None


def alike(rows: Tensor, lengths: Tensor, count: int) -> list[Tensor]:
    """Rows in about equal parts of similar lengths, in random order where the rows are in one.

    Runs of `WINDOW` parts are sorted by length, and the parts then come in the order of their first rows.

    Args:
        rows: (n,) numbers, on the CPU.
        lengths: of all rows.
        count: how many parts there are at most.
    """
    size = -(-len(rows) // count)
    place = {row: number for number, row in enumerate(rows.tolist())}
    parts: list[Tensor] = []
    for window in rows.split(size * WINDOW):
        parts += window[lengths[window].argsort(stable=True)].split(size)
    return sorted(parts, key=lambda part: place[int(part[0])])


class StatesObjective:
    """How far a unit's outputs are from the targets of all sources, on rows of different lengths.

    Only real positions count. A row counts by its positions against the mean number of its examples, so that in the
    metric of a shift the base's own unit costs 1 a row for every source, as it does on anchors.

    Args:
        kind: "shift", "cosine", "mse" or "mae", as `hf_fda.anchors.Objective`.
        examples: of all sources; of one there may be several (on its anchors, and on its rows). None where there are
            none, or where another process has them.
        items: the item of `adding` that each belongs to; all to one if None.
        adding: which process evaluates what; one alone if None.

    Raises:
        RunError: when inputs or targets are not finite.
        PeerError: when another process ended or failed.
    """

    def __init__(
        self,
        kind: AdaptationDistance,
        examples: Sequence[Examples | None],
        items: Sequence[int] | None = None,
        adding: SharedSum | None = None,
    ) -> None:
        self.kind: AdaptationDistance = kind
        self.adding = adding or SharedSum.alone()
        self.leaf = [self.adding.leaves[item] for item in items or [0] * len(examples)]
        own = {number: found for number, found in enumerate(examples) if found is not None}
        for found in own.values():
            if not bool(found.inputs.values.isfinite().all()) or not bool(found.targets.values.isfinite().all()):
                raise RunError("hidden states or targets are not finite; check the sources' weights and rows")
        self.examples = own
        self.device = next((found.inputs.values.device for found in own.values()), torch.device("cpu"))
        sizes = torch.zeros(len(examples), 2, dtype=torch.int64)
        for number, found in own.items():
            sizes[number] = torch.tensor([len(found), found.targets.values[:-1].numel()])
        sizes = self.adding.total(sizes)
        self.entries = int(sizes[:, 1].sum())
        self.source = torch.repeat_interleave(sizes[:, 0])
        self.row = torch.cat([torch.arange(size) for size in sizes[:, 0].tolist()])

    def __len__(self) -> int:
        return len(self.row)

    @property
    def divisor(self) -> int:
        """What the summed distance is divided by for its mean: rows, or entries for "mse" and "mae"."""
        return self.entries if self.kind in ("mse", "mae") else len(self)

    def batches(self, order: Tensor, batch_size: int) -> list[list[Share]]:
        """Rows in some order, cut into batches that all sources have their shares in; each share has rows of similar
        lengths, so that little is computed on what rows are filled up with."""
        count = -(-len(self) // batch_size)
        found: list[list[Share]] = [[] for _ in range(count)]
        for number in self.source.unique().tolist():
            rows, own = self.row[order[self.source[order] == number]], self.examples.get(number)
            parts = alike(rows, torch.zeros_like(rows) if own is None else own.inputs.lengths, count)
            for place, part in enumerate(parts):
                share = Share(number, part.to(self.device), None if own is None else own.reach(part))
                found[place * count // len(parts)].append(share)
        return [batch for batch in found if batch]

    def terms(self, batch: Sequence[Share]) -> dict[int, list[Share]]:
        """As `Aim.terms`."""
        found: dict[int, list[Share]] = {}
        for share in batch:
            found.setdefault(self.leaf[share.number], []).append(share)
        return found

    def evaluate(self, module: nn.Module, call: UnitCall, part: Sequence[Share]) -> Tensor:
        """The distance summed over a part of a batch (over all entries, for "mse" and "mae").

        Args:
            module: the unit.
            call: unused: each source's examples have their own.
            part: from `terms`.
        """
        together: dict[tuple[int, int | None], list[Share]] = {}
        for share in part:  # anchors of all sources are called alike
            together.setdefault((id(self.examples[share.number].call), share.positions), []).append(share)
        return torch.stack([self._distances(module, shares) for shares in together.values()]).sum()

    def _distances(self, module: nn.Module, shares: Sequence[Share]) -> Tensor:
        """The distance summed over shares of one call and as many positions, which run together."""
        whole, positions = self.examples[shares[0].number].call, shares[0].positions
        call = (whole if positions is None else whole.cut(positions)).at(torch.cat([share.rows for share in shares]))
        inputs = torch.cat([self.examples[share.number].inputs.at(share.rows, positions) for share in shares])
        outputs = call(module, inputs).split([len(share.rows) for share in shares])
        return torch.stack([self._distance(*pair) for pair in zip(shares, outputs, strict=True)]).sum()

    def _distance(self, share: Share, output: Tensor) -> Tensor:
        own, rows, positions = self.examples[share.number], share.rows, share.positions
        target = own.targets.at(rows, positions)
        real = own.targets.real_at(rows, positions)
        if self.kind == "cosine":
            return distance("cosine", output * real[..., None], target) * len(rows)
        error = (output - target)[real]
        if self.kind == "mae":
            return error.abs().sum()
        if self.kind == "mse":
            return error.square().sum()
        assert own.factor is not None
        return (error @ own.factor).square().sum() * (len(own) / own.targets.count)
