"""Trimming over the whole task vector of each source: which entries stay is found in two passes over all weights.

The first pass counts magnitudes by coarse bins, the second those in the bin in which a source's cut lies by their exact
values. Counts of the weight files add up, so that every process counts some of them and all find the same cuts.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from hf_fda.checkpoint.header import read_header, read_tensor
from hf_fda.checkpoint.writer import Shard, save_tensors
from hf_fda.preparing.interface import Preparation
from hf_fda.running import Run
from hf_fda.selection import COARSE_BINS, FINE_BINS, Cut, cut_at
from hf_fda.stages import Piece
from hf_fda.store import WORK, key_of
from hf_fda.streaming.footprint import AHEAD_BYTES
from hf_fda.streaming.taskvectors import StoredPart
from hf_fda.streaming.tensorwise import parts_of
from hf_fda.streaming.trimming import NOTHING, bins_of, check_counts, count_coarse, count_fine, kept_of, trims_globally
from hf_fda.streaming.workers import Workers
from hf_fda.version import versions

COUNTS = f"{WORK}/counts"
"""Where the counts of the weight files lie until all are written."""


class GlobalTrim(Preparation):
    """Finds the cuts of one plan.

    Args:
        run: of a plan whose method trims whole task vectors.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.sources = self.plan.inputs.weighted
        self.shards = [shard for shard in self.plan.shards if self._names(shard)]

    @property
    def count(self) -> int:
        """As `Preparation.count`."""
        return 2 * len(self.shards)

    def stages(self, wanted: Container[str]) -> Iterator[Sequence[Piece]]:
        """As `Preparation.stages`: two passes over all weights, where any tensor is still to be written."""
        if not any(name in wanted for shard in self.shards for name in self._names(shard)):
            return
        yield [self._piece(shard, "coarse", count_coarse, COARSE_BINS, ()) for shard in self.shards]
        bins = [coarse for coarse, _ in self._bins()]
        yield [self._piece(shard, "fine", partial(count_fine, coarse=bins), FINE_BINS, bins) for shard in self.shards]
        self.run.vectors.cuts = self._cuts()

    def _cuts(self) -> list[Cut]:
        """For each source which of its entries stay; both passes are done. Of entries that tie all stay."""
        fine = self._total("fine")
        found = [cut_at(coarse, own, inside).bits for (coarse, inside), own in zip(self._bins(), fine, strict=True)]
        return [Cut(bits) if kept else NOTHING for bits, kept in zip(found, self._kept(), strict=True)]

    def _names(self, shard: Shard) -> list[str]:
        """The base's names of the tensors in a weight file that are trimmed."""
        result, base = self.plan.result, self.plan.inputs.base
        names = [name for group in shard.groups for name in group if trims_globally(result.recipes[name].config)]
        return [own for own in map(result.base_names.__getitem__, names) if base.dtype(own).is_floating_point]

    def _kept(self) -> list[int]:
        """For each source how many entries stay."""
        names, shapes = [name for shard in self.shards for name in self._names(shard)], self.plan.inputs.base.shape
        entries = [sum(prod(shapes(name)) for name in names if name in source.tensor_of) for source in self.sources]
        return kept_of(self.plan.config, entries)

    def _bins(self) -> list[tuple[int, int]]:
        counts = self._total("coarse")
        check_counts(counts, [source.name for source in self.sources], "its task vector")
        return bins_of(counts, self._kept())

    def _total(self, kind: str) -> Tensor:
        """The (K, bins) counts of all weight files."""
        paths = [self.plan.output / self._file(shard, kind) for shard in self.shards]
        return torch.stack([read_tensor(path, read_header(path)["counts"]) for path in paths]).sum(0)

    def _file(self, shard: Shard, kind: str) -> str:
        return f"{COUNTS}/{kind}-{shard.file}"

    def _piece(self, shard: Shard, kind: str, count: Callable[..., Tensor], bins: int, inside: Sequence[int]) -> Piece:
        names, device = self._names(shard), self.plan.device

        def make() -> Callable[[Path], str]:
            counts = self._count(
                names, partial(count, device=device), torch.zeros(len(self.sources), bins, dtype=torch.int64)
            )
            return lambda path: save_tensors(path, {"counts": counts})

        key = key_of(kind, names, inside, self.run.fingerprints, versions())
        return Piece(f"{kind} counts of {shard.file}", self._file(shard, kind), key, shard.nbytes, make)

    def _count(self, names: Sequence[str], count: Callable[[StoredPart], Tensor], total: Tensor) -> Tensor:
        """Add up the counts of some tensors."""
        vectors = self.run.vectors
        with Workers() as workers:

            def count_tensor(name: str) -> Tensor:
                parts = parts_of(prod(self.plan.inputs.base.shape(name)))
                counted = lambda part: count(vectors.stored(name, part))  # noqa: E731 (one line, twice)
                each = workers.each(counted, parts) if vectors.in_parts(name) else map(counted, parts)
                return sum(each, torch.zeros_like(total))

            for counts in workers.in_order(count_tensor, names, lambda _: 0, AHEAD_BYTES):
                total += counts
        return total
