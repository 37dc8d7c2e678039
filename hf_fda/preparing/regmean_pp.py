"""RegMean++ before its weights are written: block by block, on inputs that the blocks merged before give.

A step is one block. First every source's rows go through the block that was merged last, from what the blocks before it
gave out, into the source's own block, whose inner layers' inputs give the Gram matrices; then the block is merged by
RegMean. So a step's first layers see the merged model's hidden states, and its later layers what the source's own
weights of this block make of them. The paper says that features come from the merged model's layers before; inside of
a block it is taken this way, as its layers are merged at once. Rows begin with the mean of the sources' embeddings.
The layers after the last block (a language model's head) are a step of their own; those before the first are averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from hf_fda.blocks import find_blocks, regions
from hf_fda.checkpoint.alignment import AlignedSource
from hf_fda.checkpoint.header import read_header, read_tensor
from hf_fda.checkpoint.writer import save_tensors
from hf_fda.merge_methods import MethodConfig
from hf_fda.merge_methods.regmean import FoundRegMean, RegMeanConfig, RegMeanPlusConfig, SettledRegMean
from hf_fda.preparing.interface import Preparation
from hf_fda.preparing.regmean import STATISTICS, configs_of, merged_layers
from hf_fda.preparing.targets import writing_pieces
from hf_fda.running import Run
from hf_fda.stages import Piece
from hf_fda.statistics.following import following_grams
from hf_fda.statistics.grams import GramFiles, gram_of
from hf_fda.statistics.layers import path_in
from hf_fda.statistics.states import KeptStates
from hf_fda.store import key_of
from hf_fda.streaming.merging_tensors import TensorMerger
from hf_fda.streaming.tensorwise import apply_method
from hf_fda.streaming.workers import Workers
from hf_fda.version import versions


@dataclass(frozen=True)
class Step:
    """A block, or None for what follows the blocks, and the base's names of its layers' weights."""

    block: str | None
    weights: tuple[str, ...]


class RegMeanPlusPreparation(Preparation):
    """Merges the blocks one after the other.

    Args:
        run: of a plan by "regmean_pp".
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        assert isinstance(self.plan.config, RegMeanPlusConfig)
        self.configs = configs_of(self.plan)
        self.base, self.sources = self.plan.inputs.base, self.plan.inputs.weighted
        weights = merged_layers(self.plan)
        self.blocks = [block for block in find_blocks(self.base.layout.model) if self._everywhere(block)]
        where = regions(self.base.layout)
        self.steps = [Step(own, tuple(n for n in weights if n.startswith(f"{own}."))) for own in self.blocks]
        after = tuple(name for name in weights if where[name] == "after")
        if after:
            self.steps.append(Step(None, after))
        self.before = [name for name in self.base.names if where[name] == "before"]
        self._shared: dict[str, Tensor] = {}  # of `before`, for as long as steps are made
        self.step_of = {name: number for number, step in enumerate(self.steps) for name in step.weights}

    def _everywhere(self, block: str) -> bool:
        """Whether all sources have a block."""
        names = [name for name in self.base.names if name.startswith(f"{block}.")]
        return all(any(name in source.tensor_of for name in names) for source in self.sources)

    @property
    def count(self) -> int:
        """As `Preparation.count`."""
        return len(writing_pieces(self.run)) + len(self.steps) * (len(self.sources) + 1)

    def stages(self, wanted: Container[str]) -> Iterator[Sequence[Piece]]:
        """As `Preparation.stages`: for each step the sources' inputs, then the merge, from where an earlier run came
        to. What blocks gave out is kept until all sources have gone on from it."""
        if not any(name in wanted for name in self.step_of):
            return
        yield writing_pieces(self.run)
        first = self._first()
        for _ in range(first * (len(self.sources) + 1)):
            self.run.progress.finish("what an earlier run finished")
        for number in range(first, len(self.steps)):
            yield self._inputs(number)
            if number and self.run.team.main:
                for piece in self._inputs(number - 1):
                    self.run.store.remove(piece.file)
            yield [self._merging(number)]
        self._shared.clear()

    def _first(self) -> int:
        """The step to go on with: the first one that is not merged, or an earlier one where what it needs is lost."""
        merged = self.run.finished([self._merging(number) for number in range(len(self.steps))])
        number = merged.index(False) if not all(merged) else len(self.steps)
        if number == len(self.steps):
            return number
        while number:
            here, before = (self.run.finished(self._inputs(own)) for own in (number, number - 1))
            if all(has or could for has, could in zip(here, before, strict=True)):
                break
            number -= 1
        return number

    def key(self, name: str) -> str | None:
        """As `Preparation.key`: of its step."""
        return self._key(self.step_of[name]) if name in self.step_of else None

    def settled(self, name: str, config: MethodConfig) -> MethodConfig:
        """As `Preparation.settled`: what was merged, or the mean."""
        if not isinstance(config, RegMeanConfig):
            return config
        if name not in self.step_of:
            return config.mean()
        return FoundRegMean(**vars(config), read=partial(self._task, name))

    def _key(self, number: int) -> str:
        steps = [(step.block, step.weights) for step in self.steps[: number + 1]]
        options = {name: config.options() for name, config in self.configs.items()}
        return key_of("regmean_pp", steps, options, self.run.fingerprints, self.run.data_prints, versions())

    # -- the sources' inputs ---------------------------------------------------------------------------------------

    def _inputs(self, number: int) -> list[Piece]:
        return [self._input(source, number) for source in self.sources]

    def _inputs_file(self, source: AlignedSource, number: int) -> str:
        return f"{STATISTICS}/{source.name}/step-{number}.safetensors"

    def _input(self, source: AlignedSource, number: int) -> Piece:
        """The work of bringing one source's rows into a step."""
        step = self.steps[number]
        what = f"inputs of {source.name}, {step.block or 'after the blocks'}"

        def make() -> Callable[[Path], str]:
            before = self.plan.output / self._inputs_file(source, number - 1)
            paths = [path_in(source, block, self.base.names) for block in self.blocks[: number + 1]]
            tensors = following_grams(
                source,
                self.run.rows(source.name),
                self.plan.device,
                paths[:number],
                None if step.block is None else paths[number],
                step.weights,
                self._merged_for(source, number),
                KeptStates(before if number > 1 else None),
                lambda batch: self.run.progress.now(f"{what}, batch {batch + 1}"),
            )
            return lambda path: save_tensors(path, tensors)

        return Piece(what, self._inputs_file(source, number), key_of(self._key(number), source.name), 1.0, make)

    def _merged_for(self, source: AlignedSource, number: int) -> dict[str, Callable[[], Tensor]]:
        """What a source's model takes from the merged one in a step, by the source's names."""
        makers = {name: partial(self._merged_before, name) for name in self.before}
        if number:
            last = f"{self.blocks[number - 1]}."
            makers |= {name: partial(self._merged, name) for name in self.base.names if name.startswith(last)}
        shared = [name for name in makers if name in source.tensor_of and name in self.configs]
        return {source.tensor_of[name]: makers[name] for name in shared}

    def _merged(self, name: str) -> Tensor:
        """One of the base's tensors as it is merged, in float32."""
        if name in self.step_of:
            base = self.base.read(name).float()
            return base + self._task(name, slice(0, base.numel())).view_as(base)
        with Workers() as workers:
            return TensorMerger(self.run.vectors, workers).merged(name, self.configs[name].mean(), torch.float32)

    def _merged_before(self, name: str) -> Tensor:
        """As `_merged`, of what lies before the blocks, which every source needs in every step."""
        if name not in self._shared:
            self._shared[name] = self._merged(name)
        return self._shared[name]

    # -- the merge -------------------------------------------------------------------------------------------------

    def _merged_file(self, number: int) -> str:
        return f"{STATISTICS}/merged-{number}.safetensors"

    def _task(self, name: str, entries: slice) -> Tensor:
        """Some entries of the merged task tensor of a layer's weight; its step is done."""
        path = self.plan.output / self._merged_file(self.step_of[name])
        return read_tensor(path, read_header(path)[name], entries)

    def _merging(self, number: int) -> Piece:
        """The work of merging a step's layers."""
        step = self.steps[number]

        def make() -> Callable[[Path], str]:
            found = [GramFiles([self.plan.output / self._inputs_file(own, number)]) for own in self.sources]
            tasks = {name: self._solve(name, found) for name in step.weights}
            return lambda path: save_tensors(path, tasks)

        what = f"merge {step.block or 'what follows the blocks'}"
        return Piece(what, self._merged_file(number), key_of(self._key(number), "merged"), 1.0, make)

    def _solve(self, name: str, found: Sequence[GramFiles]) -> Tensor:
        base, tasks = self.run.vectors.read(name, torch.float32)
        own = self.configs[name]
        grams = gram_of(found, name, own.normalize)
        config = own.mean() if grams is None else SettledRegMean(**vars(own), grams=grams)
        return apply_method(config, base, tasks, self.base.layout.roles[name]).cpu().contiguous()
