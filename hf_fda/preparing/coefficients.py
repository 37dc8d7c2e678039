"""Coefficients of task vectors that are found before the weights that they make are written."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Container, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_fda.coefficients import COEFFICIENTS, Coefficients, Seen
from hf_fda.divergence.groups import Groups, group
from hf_fda.estimate import merged_by_method
from hf_fda.merge_methods import MethodConfig
from hf_fda.merge_methods.learned import LearnedConfig
from hf_fda.preparing.interface import Preparation
from hf_fda.running import Run
from hf_fda.stages import Piece
from hf_fda.store import digest, key_of
from hf_fda.version import versions

NOTHING = 1e-30
"""In the place of a coefficient of zero: what is added is nothing, but the source still counts where the directions of
all are made orthogonal, as it did when the coefficients were learnt."""


class CoefficientPreparation(Preparation):
    """What finds coefficients before the weights that they make are written.

    Args:
        run: of a plan by a method that learns coefficients.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        assert isinstance(self.plan.config, LearnedConfig)
        self.config = self.plan.config
        self.sources = self.plan.inputs.weighted

    @abstractmethod
    def before(self) -> Iterator[Sequence[Piece]]:
        """The stages before the coefficients are learnt."""

    @abstractmethod
    def find(self) -> Coefficients:
        """Learn the coefficients; what is before is done."""

    @abstractmethod
    def facts(self) -> tuple[Any, ...]:
        """What determines the coefficients beside the options and the models, as plain values."""

    def stages(self, wanted: Container[str]) -> Iterator[Sequence[Piece]]:
        """As `Preparation.stages`: what comes before, then the coefficients, where they are not there yet."""
        learning = Piece("learn coefficients", COEFFICIENTS, self._key, 1.0, self._learning)
        if self.run.finished([learning])[0]:
            for _ in range(self.count - 1):
                self.run.progress.finish("what an earlier run finished")
        else:
            yield from self.before()
        yield [learning]

    def key(self, name: str) -> str | None:
        """As `Preparation.key`: of all coefficients."""
        return self._key

    def settled(self, name: str, config: MethodConfig) -> MethodConfig:
        """As `Preparation.settled`: the method whose weights were learnt, with these."""
        if not isinstance(config, LearnedConfig):
            return config
        weights = tuple(value or NOTHING for value in self.coefficients.of_tensor(name))
        return config.learnt(scaling=1.0, weights=weights)

    @cached_property
    def coefficients(self) -> Coefficients:
        """What was learnt; all stages are done."""
        return Coefficients.read(self.plan.output / COEFFICIENTS)

    @cached_property
    def merged(self) -> list[str]:
        """The base's names of the tensors that have coefficients."""
        return merged_by_method(self.plan)

    @cached_property
    def _key(self) -> str:
        facts = self.config.options(), self.merged, self.run.fingerprints, self.plan.seed, *self.facts()
        return key_of("coefficients", *facts, versions())

    def _learning(self) -> Callable[[Path], str]:
        text = self.find().text()

        def write(path: Path) -> str:
            path.write_text(text, encoding="utf-8")
            return digest(path)

        return write

    def named(
        self, values: Tensor, groups: Groups, objective: str, history: Sequence[Seen] = (), best_step: int = 0
    ) -> Coefficients:
        """Coefficients with the names of what they are of.

        Args:
            values: (K, G).
            groups: G groups.
            objective: what was minimised, in words.
            history: how it fell.
            best_step: the step of these coefficients.
        """
        in_blocks = group(self.plan.inputs.base.layout, list(groups.of), "block")
        block_of = {groups.names[number]: in_blocks.names[in_blocks.of[name]] for name, number in groups.of.items()}
        return Coefficients(
            sources=tuple(source.name for source in self.sources),
            groups=groups.names,
            values=tuple(tuple(row) for row in values.tolist()),
            group_of=dict(groups.of),
            block_of=block_of if self.config.granularity != "task" else dict.fromkeys(groups.names, "all"),
            objective=objective,
            history=tuple(history),
            best_step=best_step,
        )
