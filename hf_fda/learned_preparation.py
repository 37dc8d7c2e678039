"""Coefficients of task vectors learnt on rows of data, before the weights that they make are written."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path

from torch import Tensor

from hf_fda.checkpoint.alignment import AlignedSource
from hf_fda.coefficients import COEFFICIENTS, Coefficients, Seen
from hf_fda.data.rows import Kind
from hf_fda.divergence.coefficients import MergedParameters
from hf_fda.divergence.groups import group
from hf_fda.divergence.learning import Learned, Learning, LearningTask, learn
from hf_fda.divergence.objectives import Divergence, Entropy, Objective
from hf_fda.divergence.outputs import open_outputs, record
from hf_fda.divergence.task_models import source_model, task_model
from hf_fda.merge_methods import MethodConfig
from hf_fda.merge_methods.divmerge import DivMergeConfig
from hf_fda.merge_methods.learned import LearnedConfig
from hf_fda.merge_methods.task_arithmetic import TaskArithmeticConfig
from hf_fda.preparation import Preparation
from hf_fda.running import Run
from hf_fda.stages import Piece
from hf_fda.store import WORK, digest, key_of
from hf_fda.version import versions
from hf_fda.writing_targets import writing_pieces

OUTPUTS = f"{WORK}/outputs"
"""Where the sources' answers lie until the coefficients are learnt."""


class LearnedPreparation(Preparation):
    """Records the sources' answers on their rows where these are compared with, and learns the coefficients.

    Args:
        run: of a plan by a method that learns coefficients.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        assert isinstance(self.plan.config, LearnedConfig)
        self.config = self.plan.config
        self.sources = self.plan.inputs.weighted

    @property
    def count(self) -> int:
        """As `Preparation.count`."""
        return len(writing_pieces(self.run)) + len(self._recordings()) + 1

    def stages(self, wanted: Container[str]) -> Iterator[Sequence[Piece]]:
        """As `Preparation.stages`: every source's answers, then the coefficients."""
        learning = Piece("learn coefficients", COEFFICIENTS, self._key, 1.0, self._learning)
        before = [writing_pieces(self.run), self._recordings()]
        if self.run.finished([learning])[0]:
            for _ in range(sum(map(len, before))):
                self.run.progress.finish("what an earlier run finished")
        else:
            yield from before
        yield [learning]

    def key(self, name: str) -> str | None:
        """As `Preparation.key`: of all coefficients."""
        return self._key

    def settled(self, name: str, config: MethodConfig) -> MethodConfig:
        """As `Preparation.settled`: the sum of the task vectors with the coefficients learnt for them."""
        if not isinstance(config, LearnedConfig):
            return config
        return TaskArithmeticConfig(scaling=1.0, weights=self.coefficients.of_tensor(name))

    @cached_property
    def coefficients(self) -> Coefficients:
        """What was learnt; all stages are done."""
        return Coefficients.read(self.plan.output / COEFFICIENTS)

    @cached_property
    def _key(self) -> str:
        facts = self.config.options(), self._merged, self.run.fingerprints, self.run.data_prints, self.plan.seed
        return key_of("coefficients", *facts, versions())

    @cached_property
    def _merged(self) -> list[str]:
        """The base's names of the tensors that have coefficients."""
        known = self.plan.result.base_names
        recipes = self.plan.result.recipes.items()
        return [known[name] for name, recipe in recipes if isinstance(recipe.config, LearnedConfig)]

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

    def _learning(self) -> Callable[[Path], str]:
        config = self.config
        parameters = MergedParameters(
            self.plan.inputs.base,
            self.sources,
            self._merged,
            config.granularity,
            config.scaling,
            config.task_vectors,
            self.plan.device,
        )
        tasks = [self._task(source, parameters) for source in self.sources]
        learned = learn(
            parameters,
            tasks,
            self._objective([task.rows.kind for task in tasks]),
            self._how(),
            self.plan.seed,
            lambda step, value: self.run.progress.now(f"learn coefficients, step {step}", value),
        )
        text = self._found(learned, parameters).text()

        def write(path: Path) -> str:
            path.write_text(text, encoding="utf-8")
            return sha256(text.encode()).hexdigest()

        return write

    def _found(self, learned: Learned, parameters: MergedParameters) -> Coefficients:
        layout, groups = self.plan.inputs.base.layout, parameters.groups
        in_blocks = group(layout, list(groups.of), "block")
        block_of = {groups.names[number]: in_blocks.names[in_blocks.of[name]] for name, number in groups.of.items()}
        measured = (
            f"{self.config.divergence} divergence, nats" if isinstance(self.config, DivMergeConfig) else "entropy, nats"
        )
        return Coefficients(
            sources=learned.tasks,
            groups=learned.groups,
            values=tuple(tuple(row) for row in learned.coefficients.tolist()),
            group_of=dict(groups.of),
            block_of=block_of if self.config.granularity != "task" else dict.fromkeys(groups.names, "all"),
            objective=measured,
            history=tuple(Seen(look.step, look.objective) for look in learned.history),
            best_step=learned.best,
        )

    def _how(self) -> Learning:
        config = self.config
        bounds = None
        if config.lower is not None or config.upper is not None:
            infinite = float("inf")
            low = -infinite if config.lower is None else config.lower
            bounds = (low, infinite if config.upper is None else config.upper)
        return Learning(
            steps=config.steps,
            learning_rate=config.learning_rate,
            batch_size=config.batch_size,
            order=config.order,
            bounds=bounds,
            held_out=config.held_out,
            every=config.every,
            patience=config.patience,
            task_weights=config.source_weights(),
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
