"""RegMean before its weights are written: the Gram matrices of every source's layers on its rows."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from functools import cached_property
from pathlib import Path

from hf_fda.checkpoint.alignment import AlignedSource
from hf_fda.checkpoint.writer import save_tensors
from hf_fda.costs import active_entries
from hf_fda.merge_methods import MethodConfig
from hf_fda.merge_methods.regmean import RegMeanConfig, SettledRegMean
from hf_fda.plans import Plan
from hf_fda.preparing.interface import Preparation
from hf_fda.preparing.targets import writing_pieces
from hf_fda.running import Run
from hf_fda.stages import Piece
from hf_fda.statistics.grams import GramFiles, gram_of
from hf_fda.statistics.layers import Group, gram_bytes, group_layers, layer_weights
from hf_fda.statistics.passes import input_grams
from hf_fda.store import WORK, key_of
from hf_fda.version import versions

STATISTICS = f"{WORK}/statistics"
"""Where what was found out on rows lies until the weights are written."""


def merged_layers(plan: Plan) -> list[str]:
    """The base's names of the weights of linear layers that a plan merges by RegMean or RegMean++."""
    return layer_weights(plan.inputs.base, configs_of(plan))


def configs_of(plan: Plan) -> dict[str, RegMeanConfig]:
    """By the base's names of the tensors that a plan merges by RegMean or RegMean++, the options for each."""
    result = plan.result
    found = {name: recipe.config for name, recipe in result.recipes.items()}
    return {result.base_names[name]: own for name, own in found.items() if isinstance(own, RegMeanConfig)}


class RegMeanPreparation(Preparation):
    """Sums up the Gram matrices of every source, in passes over its rows that do not depend on each other.

    Args:
        run: of a plan by "regmean".
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        assert isinstance(self.plan.config, RegMeanConfig)
        self.config = self.plan.config
        self.base, self.sources = self.plan.inputs.base, self.plan.inputs.weighted
        self.weights = merged_layers(self.plan)
        self.groups = group_layers(self.base, self.weights)

    @property
    def count(self) -> int:
        """As `Preparation.count`."""
        return len(writing_pieces(self.run)) + len(self.sources) * len(self.groups)

    def stages(self, wanted: Container[str]) -> Iterator[Sequence[Piece]]:
        """As `Preparation.stages`: all passes at once, but for layers that are written."""
        needed = [group for group in self.groups if any(name in wanted for name in group.weights)]
        for _ in range((len(self.groups) - len(needed)) * len(self.sources)):
            self.run.progress.finish("what an earlier run finished")
        yield writing_pieces(self.run) if needed else []
        yield [self._piece(source, group) for source in self.sources for group in needed]

    def key(self, name: str) -> str | None:
        """As `Preparation.key`: of the rows."""
        return key_of("grams", self.run.data_prints) if name in self.weights else None

    def settled(self, name: str, config: MethodConfig) -> MethodConfig:
        """As `Preparation.settled`: least squares on the Gram matrices where there are some, else the mean."""
        if not isinstance(config, RegMeanConfig):
            return config
        grams = gram_of(self._found, name, config.normalize) if name in self.weights else None
        return config.mean() if grams is None else SettledRegMean(**vars(config), grams=grams)

    @cached_property
    def _found(self) -> list[GramFiles]:
        """The Gram matrices of every source; all stages are done."""
        places = [[self.plan.output / self._file(source, group) for group in self.groups] for source in self.sources]
        return [GramFiles([path for path in paths if path.exists()]) for paths in places]

    def _file(self, source: AlignedSource, group: Group) -> str:
        return f"{STATISTICS}/{source.name}/grams-{group.name}.safetensors"

    def _piece(self, source: AlignedSource, group: Group) -> Piece:
        what = f"inputs of {source.name}, {group.blocks[-1] if group.blocks else 'the rest'}"

        def make() -> Callable[[Path], str]:
            rows = self.run.rows(source.name)
            report = lambda batch: self.run.progress.now(f"{what}, batch {batch + 1}")  # noqa: E731
            tensors = input_grams(source, group, rows, self.plan.device, report)
            return lambda path: save_tensors(path, tensors)

        prints = self.run.fingerprints[source.name], self.run.data_prints[source.name]
        key = key_of("grams", group.weights, prints, versions())
        end = self.base.names.index(group.weights[-1]) + 1
        cost = active_entries(self.base, self.base.names[:end]) + gram_bytes(self.base, group.weights) / 4
        return Piece(what, self._file(source, group), key, cost, make)
