"""Fisher merging before its weights are written: the diagonal Fisher information of every source on its rows."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from hf_fda.checkpoint.alignment import AlignedSource
from hf_fda.checkpoint.header import read_header, read_tensor
from hf_fda.checkpoint.writer import save_tensors
from hf_fda.merge_methods import MethodConfig
from hf_fda.merge_methods.fisher import FisherConfig, SettledFisher
from hf_fda.preparing.interface import Preparation
from hf_fda.preparing.regmean import STATISTICS
from hf_fda.preparing.targets import writing_pieces
from hf_fda.randomness import random_stream
from hf_fda.running import Run
from hf_fda.stages import Piece
from hf_fda.statistics.fishers import SQUARES, diagonal_fisher
from hf_fda.store import key_of
from hf_fda.version import versions


class FisherPreparation(Preparation):
    """Finds the diagonal Fisher information of every source, each in one piece.

    Args:
        run: of a plan by "fisher".
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        assert isinstance(self.plan.config, FisherConfig)
        self.config = self.plan.config
        self.base, self.sources = self.plan.inputs.base, self.plan.inputs.weighted
        result = self.plan.result
        by_fisher = [name for name, recipe in result.recipes.items() if isinstance(recipe.config, FisherConfig)]
        merged = [result.base_names[name] for name in by_fisher]
        self.names = [name for name in merged if self.base.dtype(name).is_floating_point]

    @property
    def count(self) -> int:
        """As `Preparation.count`."""
        return len(writing_pieces(self.run)) + len(self.sources)

    def stages(self, wanted: Container[str]) -> Iterator[Sequence[Piece]]:
        """As `Preparation.stages`: all sources at once, where any tensor is still to be written."""
        if any(name in wanted for name in self.names):
            yield writing_pieces(self.run)
            yield [self._piece(source) for source in self.sources]

    def key(self, name: str) -> str | None:
        """As `Preparation.key`: of the rows, and of what is drawn."""
        return key_of("fisher", self.names, self.run.data_prints, self.plan.seed)

    def settled(self, name: str, config: MethodConfig) -> MethodConfig:
        """As `Preparation.settled`: the mean weighted by the Fisher information."""
        if not isinstance(config, FisherConfig):
            return config
        found = [self._read(source) for source in self.sources]

        def read(entries: slice) -> list[Tensor]:
            return [own(name, entries) for own in found]

        return SettledFisher(**vars(config), read=read) if name in self.names else config.mean()

    @cached_property
    def _readers(self) -> dict[str, Callable[[str, slice], Tensor]]:
        return {source.name: self._reader(source) for source in self.sources}

    def _read(self, source: AlignedSource) -> Callable[[str, slice], Tensor]:
        return self._readers[source.name]

    def _reader(self, source: AlignedSource) -> Callable[[str, slice], Tensor]:
        """Reads some entries of a source's Fisher information; zero where the source lacks the tensor."""
        path = self.plan.output / self._file(source)
        entries = read_header(path)
        norm = float(read_tensor(path, entries[SQUARES])) ** 0.5 if self.config.normalize else 1.0

        def read(name: str, part: slice) -> Tensor:
            if name not in entries:
                return torch.zeros(part.stop - part.start)
            return read_tensor(path, entries[name], part).div_(norm or 1.0)

        return read

    def _file(self, source: AlignedSource) -> str:
        return f"{STATISTICS}/{source.name}/fisher.safetensors"

    def _piece(self, source: AlignedSource) -> Piece:
        what = f"Fisher information of {source.name}"

        def make() -> Callable[[Path], str]:
            rows = self.run.rows(source.name)
            tensors = diagonal_fisher(
                source,
                self.names,
                rows,
                self.plan.device,
                self.config.samples,
                random_stream(self.plan.seed, "fisher", source.name),
                lambda row: self.run.progress.now(f"{what}, row {row + 1} of {len(rows)}"),
            )
            return lambda path: save_tensors(path, tensors)

        prints = self.run.fingerprints[source.name], self.run.data_prints[source.name]
        key = key_of("fisher", self.names, prints, self.config.samples, self.plan.seed, versions())
        return Piece(what, self._file(source), key, 1.0, make)
