"""Runs a plan: block by block and tensor by tensor, each result a finished file before the next begins."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from hf_fda.anchors import AnchorBuilder, UnitAnchors, adapt_unit, unit_generator
from hf_fda.anchors.files import Construction, read_unit, unit_file
from hf_fda.blocks import Unit
from hf_fda.checkpoint.alignment import AlignedSource
from hf_fda.checkpoint.header import read_header, read_tensor
from hf_fda.checkpoint.writer import SafetensorsWriter, Shard, save_tensors
from hf_fda.devices import release_memory
from hf_fda.errors import InputError, RunError
from hf_fda.inputs import Source
from hf_fda.merge_methods import FDAConfig, MethodConfig
from hf_fda.planning import check_disk, out_dtype
from hf_fda.plans import Plan
from hf_fda.progress import Progress, logger
from hf_fda.publish import publish
from hf_fda.store import WORK, Store, key_of
from hf_fda.tensorwise import PART, apply_method, by_entry
from hf_fda.version import versions

STAGED = f"{WORK}/staged"
BLOCKS = f"{WORK}/blocks"

RELEASE_EVERY = 50_000_000
"""Bytes written to a weight file between two times that freed memory is given back."""


def run(plan: Plan, quiet: bool = False) -> Path:
    """Do what a plan says. Work that an earlier run of the same plan finished is not done again.

    Args:
        plan: from `hf_fda.plan`.
        quiet: show no progress.

    Returns:
        the output folder.

    Raises:
        InputError: when the disk has no room for the result; nothing was written then.
        RunError: when the work fails on the way; the same call goes on from there.
    """
    check_disk(plan)
    with Progress(len(plan.constructions) + len(plan.units) + len(plan.shards), quiet) as progress:
        try:
            Engine(plan, progress).merge()
        except InputError as error:  # an input that was whole when the plan was made: a download that broke off
            raise RunError(f"{error}; the same call goes on from here") from None
    return plan.output


class Engine:
    """One run of a plan.

    Args:
        plan: what to do.
        progress: whom to tell.
    """

    def __init__(self, plan: Plan, progress: Progress) -> None:
        self.plan, self.progress = plan, progress
        self.base = plan.inputs.base
        self.store = Store(plan.output)
        self._finished: dict[str, bool] = {}
        self._moved: dict[str, bool] = {}

    def merge(self) -> None:
        """Construct, adapt, assemble, publish."""
        for unit in self.plan.units:
            for source in self.plan.sources_of(unit):
                if source.anchors is None:
                    self._construction(source).construct(unit, self.progress)
            self._adapt(unit)
        for source in self.plan.inputs.sources:
            if source.anchors is None and self.plan.units:
                self._construction(source).frame(self.plan.units_of(source))
        for shard in self.plan.shards:
            self._assemble(shard)
        publish(self.plan, self.store)
        self._warn_of_equals()

    def _note_move(self, source: str, moved: Callable[[], bool]) -> None:
        """Remember whether a source was seen to differ from the base; asks no more once it was."""
        self._moved[source] = self._moved.get(source, False) or moved()

    def _warn_of_equals(self) -> None:
        for name in (name for name, moved in self._moved.items() if not moved):
            logger.warning("source '%s' equals the base in all that was merged: its task vector is zero", name)

    # -- anchors ---------------------------------------------------------------------------------------------------

    @cached_property
    def builder(self) -> AnchorBuilder:
        """Makes anchors; exists only for method "fda"."""
        assert isinstance(self.plan.config, FDAConfig)
        return AnchorBuilder(self.base, self.plan.units, self.plan.config, self.plan.device, self.plan.seed)

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """A hash of base and sources, by name; it changes when their weights do."""
        named = {source.name: source.checkpoint.fingerprint() for source in self.plan.inputs.weighted}
        return {"": self.base.fingerprint(), **named}

    def _construction(self, source: Source) -> Construction:
        """What makes one source's anchors in the output folder."""
        assert source.weights is not None
        prints = (self.fingerprints[""], self.fingerprints[source.name])
        return Construction(self.store, f"anchors/{source.name}/", self.builder, source.weights, prints)

    def _anchors_key(self, source: Source, unit: Unit) -> str:
        if source.anchors is not None:
            return key_of("given", source.anchors.digest(unit.name))
        return self._construction(source).key(unit)

    def _anchors_of(self, source: Source, unit: Unit) -> UnitAnchors:
        """The anchors of one unit for one source."""
        if source.anchors is not None:
            found = source.anchors[unit.name]
        else:
            found = read_unit(self.plan.output / "anchors" / source.name / unit_file(unit.name))
        self._note_move(source.name, lambda: bool(found.cosines))
        return found

    # -- adaptation ------------------------------------------------------------------------------------------------

    def _adapt(self, unit: Unit) -> None:
        """Adapt one unit to the anchors of all sources, unless that is done."""
        name, key = f"{BLOCKS}/{unit.name}.safetensors", self._unit_key(unit)
        if not self.store.finished(name, key) and not self._assembled(unit):
            self.progress.now(f"adapt {unit.name}")
            adapted = self._adapted(unit)
            self.store.write(name, key, lambda path: save_tensors(path, adapted))
            release_memory()
        self.progress.finish(unit.name)

    def _adapted(self, unit: Unit) -> dict[str, Tensor]:
        """The merged tensors of one unit, by the base's names, in float32."""
        config = self.plan.config
        assert isinstance(config, FDAConfig) and config.epochs is not None
        assert config.adaptation_distance is not None and config.adaptation_learning_rate is not None
        module = self.builder.load(self.base.read, unit)
        tasks = None if config.initial == "base" else self._start(module, unit)
        pairs = [self._anchors_of(source, unit) for source in self.plan.sources_of(unit)]
        if not any(found.cosines for found in pairs):  # no source moves it: steps would only follow rounding noise
            return {f"{unit.name}.{path}": value.detach().cpu() for path, value in module.named_parameters()}
        try:
            adapted = adapt_unit(
                module,
                self.builder.capture.calls[unit.name],
                [found.anchors.to(self.plan.device) for found in pairs],
                [found.targets.to(self.plan.device) for found in pairs],
                tasks,
                kind=config.adaptation_distance,
                epochs=config.epochs,
                learning_rate=config.adaptation_learning_rate,
                batch_size=config.batch_size,
                generator=unit_generator(self.plan.seed, "batches", unit.name),
                report=lambda epoch, loss: self.progress.now(f"adapt {unit.name}", loss),
            )
        except RunError as error:
            raise RunError(f"block '{unit.name}': {error}") from None
        logger.debug("%s: distance %.4g before, %.4g after", unit.name, adapted.loss_before, adapted.loss_after)
        return {f"{unit.name}.{name}": tensor for name, tensor in adapted.parameters.items()}

    def _start(self, module: torch.nn.Module, unit: Unit) -> list[dict[str, Tensor]]:
        """Move a unit from the base to the start of adaptation; its task vectors, whose coefficients will be adapted.

        They are the sources' own where the start is their sum (task arithmetic, linear), else the merged one.
        """
        config = self.plan.config
        assert isinstance(config, FDAConfig) and isinstance(config.initial, MethodConfig)
        own = config.initial.elementwise
        tasks: list[dict[str, Tensor]] = [{} for _ in range(len(self.plan.inputs.weighted) if own else 1)]
        for path, parameter in module.named_parameters():
            name = f"{unit.name}.{path}"
            base, theirs = self._tensors(name, torch.float32)
            merged = apply_method(config.initial, base, theirs, self.base.layout.roles[name])
            parameter.data = (base + merged).contiguous()
            for held, task in zip(tasks, theirs if own else [merged], strict=True):
                held[path] = task
        return tasks

    def _unit_key(self, unit: Unit) -> str:
        config = self.plan.config
        anchors = [self._anchors_key(source, unit) for source in self.plan.sources_of(unit)]
        start = (
            self.fingerprints if isinstance(config, FDAConfig) and config.initial != "base" else self.fingerprints[""]
        )
        return key_of("unit", unit.name, config.options(), anchors, start, self.plan.seed, versions())

    # -- assembly --------------------------------------------------------------------------------------------------

    def _assembled(self, unit: Unit) -> bool:
        """Whether all shards that hold tensors of a unit are finished."""
        holding = [shard for shard in self.plan.shards if self._units_in(shard) & {unit.name}]
        return all(self._shard_finished(shard) for shard in holding)

    def _units_in(self, shard: Shard) -> set[str]:
        recipes = self.plan.result.recipes
        return {recipes[name].unit or "" for group in shard.groups for name in group} - {""}

    def _shard_finished(self, shard: Shard) -> bool:
        if shard.file not in self._finished:
            key = self._shard_key(shard)
            places = (shard.file, f"{STAGED}/{shard.file}")
            self._finished[shard.file] = any(self.store.finished(place, key) for place in places)
        return self._finished[shard.file]

    def _shard_key(self, shard: Shard) -> str:
        units = {unit.name: self._unit_key(unit) for unit in self.plan.units if unit.name in self._units_in(shard)}
        recipes = self.plan.result.recipes
        rules = [
            (
                name,
                recipe.rule,
                recipe.config.options() if recipe.config else None,
                recipe.config and recipe.config.name,
            )
            for group in shard.groups
            for name in group
            for recipe in [recipes[name]]
        ]
        specs = {name: (str(spec.dtype), spec.shape) for name, spec in shard.specs.items()}
        return key_of("shard", rules, specs, units, self.fingerprints, versions())

    def _assemble(self, shard: Shard) -> None:
        """Write one weight file, unless it is there."""
        if not self._shard_finished(shard):
            self.progress.now(f"write {shard.file}")
            self.store.write(f"{STAGED}/{shard.file}", self._shard_key(shard), lambda path: self._fill(path, shard))
            release_memory()
        self.progress.finish(shard.file)

    def _fill(self, path: Path, shard: Shard) -> None:
        result, written = self.plan.result, 0
        with SafetensorsWriter(path, shard.specs) as file:
            for group in shard.groups:
                if written > RELEASE_EVERY:
                    release_memory()
                    written = 0
                tensors = {
                    name: self._tensor(name).to(out_dtype(self.plan.inputs, result, name, self.plan.dtype))
                    for name in group
                }
                for name, tensor in result.layout.to_disk(tensors).items():
                    file.write(name, tensor)
                    written += tensor.nbytes

    def _tensor(self, name: str) -> Tensor:
        """One merged tensor in memory layout, on the CPU, by its recipe.

        Raises:
            RunError: when it is not finite although its inputs are.
        """
        recipe = self.plan.result.recipes[name]
        if recipe.rule == "unit":
            path = self.plan.output / BLOCKS / f"{recipe.unit}.safetensors"
            return read_tensor(path, read_header(path)[self.plan.result.base_names[name]])
        if recipe.rule == "base":
            return self.base.read(self.plan.result.base_names[name])
        assert recipe.config is not None
        own = self.plan.result.base_names.get(name)
        merged = self._soup(name, recipe.config) if own is None else self._by_method(own, recipe.config)
        if merged.is_floating_point() and not bool(merged.isfinite().all()):
            raise RunError(f"tensor '{name}': the merged values are not finite; check the inputs for infinities or NaN")
        return merged

    def _soup(self, name: str, config: MethodConfig) -> Tensor:
        """The mean of a tensor that the base does not have, by the sources' own name."""
        tensors = [source.checkpoint.read(name).double() for source in self.plan.inputs.weighted]
        return config.merge(torch.zeros_like(tensors[0]), tensors)

    def _by_method(self, name: str, config: MethodConfig) -> Tensor:
        """One of the base's tensors merged by a parameter-space method, on the CPU.

        Where entries do not depend on each other, a large tensor is read and merged in parts of bounded size.
        """
        if not self.base.dtype(name).is_floating_point:
            return self.base.read(name)
        role, shape = self.base.layout.roles[name], self.base.shape(name)
        if not by_entry(config, role):
            base, tasks = self._tensors(name, torch.float32)
            for source, task in zip(self.plan.inputs.weighted, tasks, strict=True):
                if not bool(task.isfinite().all()):
                    raise RunError(f"source '{source.name}': tensor '{name}' is not finite; check its weights")
            return (base + apply_method(config, base, tasks, role)).cpu()
        exact = torch.float32 if self.plan.device.type == "mps" else torch.float64
        merged = torch.empty(prod(shape), dtype=self.plan.dtype or self.base.dtype(name))
        for start in range(0, len(merged), PART):
            part = slice(start, min(start + PART, len(merged)))
            base, tasks = self._tensors(name, exact, part)
            merged[part] = base.add_(config.merge(base, tasks))
        return merged.view(shape)

    def _tensors(self, name: str, work: torch.dtype, part: slice | None = None) -> tuple[Tensor, list[Tensor]]:
        """The base's tensor and the sources' task tensors in type `work` on the device."""
        base = self.base.read(name, part).to(self.plan.device, work)
        return base, [self._task(source, name, base, part) for source in self.plan.inputs.weighted]

    def _task(self, source: AlignedSource, name: str, base: Tensor, part: slice | None) -> Tensor:
        if name not in source.tensor_of:
            return torch.zeros_like(base)
        task = source.read(name, part).to(base.device, base.dtype).sub_(base)
        self._note_move(source.name, lambda: bool(task.any()))
        return task
