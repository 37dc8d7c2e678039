"""Coefficients of task vectors learnt on rows of data, before the weights that they make are written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_fda.checkpoint.alignment import AlignedSource
from hf_fda.coefficients import Coefficients, Seen
from hf_fda.data.rows import Kind
from hf_fda.divergence.coefficients import MergedParameters
from hf_fda.divergence.learning import Learning, LearningTask, learn
from hf_fda.divergence.objectives import Divergence, Entropy, Objective
from hf_fda.divergence.outputs import open_outputs, record
from hf_fda.divergence.state import LearningState
from hf_fda.divergence.task_models import source_model, task_model
from hf_fda.merge_methods.divmerge import DivMergeConfig
from hf_fda.merge_methods.learned import LearnedConfig
from hf_fda.preparing.coefficients import CoefficientPreparation
from hf_fda.preparing.targets import writing_pieces
from hf_fda.stages import Piece
from hf_fda.store import WORK, digest, key_of
from hf_fda.version import versions

OUTPUTS = f"{WORK}/outputs"
"""Where the sources' answers lie until the coefficients are learnt."""

STANDS = f"{WORK}/learning/state.safetensors"
"""Where learning stands, as long as it has not ended."""


class LearnedPreparation(CoefficientPreparation):
    """Records the sources' answers on their rows where these are compared with, and learns the coefficients.

    Args:
        run: of a plan by a method that learns coefficients on rows of data.
    """

    @property
    def count(self) -> int:
        """As `Preparation.count`."""
        return len(writing_pieces(self.run)) + len(self._recordings()) + 1

    def before(self) -> Iterator[Sequence[Piece]]:
        """As `CoefficientPreparation.before`: what encoder-decoders write, and every source's answers."""
        yield writing_pieces(self.run)
        yield self._recordings()

    def facts(self) -> tuple[Any, ...]:
        """As `CoefficientPreparation.facts`: the rows."""
        return (self.run.data_prints,)

    # -- the sources' answers --------------------------------------------------------------------------------------

    def _recordings(self) -> list[Piece]:
        if not isinstance(self.config, DivMergeConfig):
            return []
        return [self._recording(self.config, source) for source in self.sources]

    def _recording(self, config: DivMergeConfig, source: AlignedSource) -> Piece:
        what = f"outputs of {source.name}"

        def write(path: Path) -> str:
            rows = self.run.rows(source.name)
            record(
                source_model(source, self.plan.device),
                rows,
                self.plan.device,
                batch_size=config.batch_size,
                precision=config.precision,
                top_k=config.top_k,
                path=path,
                report=lambda done: self.run.progress.now(f"{what}, {done} of {len(rows)} rows"),
            )
            return digest(path)

        own = self.run.fingerprints[source.name], self.run.data_prints[source.name]
        key = key_of("outputs", own, config.precision, config.top_k, config.batch_size, versions())
        return Piece(what, f"{OUTPUTS}/{source.name}.safetensors", key, 1.0, lambda: write)

    # -- the coefficients ------------------------------------------------------------------------------------------

    def find(self) -> Coefficients:
        """As `CoefficientPreparation.find`."""
        config = self.config
        parameters = MergedParameters(
            self.plan.inputs.base,
            self.sources,
            self.merged,
            config.granularity,
            config.start,
            config.task_vectors,
            self.plan.device,
            initial=config.initial,
        )
        tasks = [self._task(source, parameters) for source in self.sources]
        learned = learn(
            parameters,
            tasks,
            self._objective([task.rows.kind for task in tasks]),
            self._how(),
            self.plan.seed,
            lambda step, value: self.run.progress.now(f"learn coefficients, step {step}", value),
            self._keep,
            self._kept(),
        )
        measured = "entropy" if not isinstance(config, DivMergeConfig) else f"{config.divergence} divergence"
        history = [Seen(look.step, look.objective) for look in learned.history]
        return self.named(learned.coefficients, parameters.groups, f"{measured}, nats", history, learned.best)

    def _keep(self, state: LearningState) -> None:
        """Write down where learning stands, from where a run that is broken off goes on."""

        def write(path: Path) -> str:
            state.write(path)
            return digest(path)

        self.run.store.write(STANDS, self._key, write)

    def _kept(self) -> LearningState | None:
        """Where an earlier run stood in learning the same."""
        if not self.run.store.finished(STANDS, self._key):
            return None
        return LearningState.read(self.plan.output / STANDS)

    def _how(self) -> Learning:
        config = self.config
        bounds = None
        if config.lower is not None or config.upper is not None:
            infinite = float("inf")
            low = -infinite if config.lower is None else config.lower
            bounds = (low, infinite if config.upper is None else config.upper)
        rounds = len(self.sources) if config.order == "turn" else 1
        return Learning(
            steps=config.steps * rounds,
            learning_rate=config.learning_rate,
            schedule=config.schedule,
            batch_size=config.batch_size,
            order=config.order,
            bounds=bounds,
            held_out=config.held_out,
            every=config.every * rounds,
            patience=config.patience,
            task_weights=config.source_weights(),
            balance=isinstance(config, DivMergeConfig) and config.balance,
        )

    def _objective(self, kinds: Sequence[Kind]) -> Objective:
        if not isinstance(self.config, DivMergeConfig):
            return Entropy(kinds)
        folder = self.plan.output / OUTPUTS
        outputs = [
            open_outputs(folder / f"{source.name}.safetensors", kind)
            for source, kind in zip(self.sources, kinds, strict=True)
        ]
        return Divergence(self.config.divergence, outputs)

    def _task(self, source: AlignedSource, parameters: MergedParameters) -> LearningTask:
        fixed, others = self._others
        model = task_model(
            source, {**fixed, **parameters.tensors}, self.plan.device, others=others, recompute=self.config.recompute
        )
        return LearningTask(source.name, self.run.rows(source.name), model)

    @cached_property
    def _others(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What is merged by another rule than the coefficients, such as heads of one task: by the base's names, and by
        the sources' own names what the base does not have."""
        result, vectors = self.plan.result, self.run.vectors
        fixed: dict[str, Tensor] = {}
        others: dict[str, Tensor] = {}
        for name, recipe in result.recipes.items():
            if recipe.config is None or isinstance(recipe.config, LearnedConfig):
                continue
            if recipe.rule == "soup":
                others[name] = vectors.soup(name, recipe.config).float().to(self.plan.device)
            else:
                own = result.base_names[name]
                merged = vectors.base.read(own).float() + vectors.merged_task(own, recipe.config)
                fixed[own] = merged.to(self.plan.device)
        return fixed, others
