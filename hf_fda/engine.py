"""Runs a plan: block by block and tensor by tensor, each result a finished file before the next begins."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from hf_fda.anchors import AnchorBuilder, UnitAnchors, adapt_unit, unit_generator
from hf_fda.anchors.files import Construction, read_unit, unit_file
from hf_fda.assembly import BLOCKS, Assembly
from hf_fda.blocks import Unit
from hf_fda.checkpoint.writer import save_tensors
from hf_fda.devices import release_memory
from hf_fda.errors import InputError, RunError
from hf_fda.inputs import Source
from hf_fda.merge_methods import FDAConfig, MethodConfig
from hf_fda.planning import check_disk
from hf_fda.plans import Plan
from hf_fda.progress import Progress, logger
from hf_fda.publish import publish
from hf_fda.store import Store, key_of
from hf_fda.taskvectors import TaskVectors
from hf_fda.tensorwise import apply_method
from hf_fda.version import versions


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
        self.vectors = TaskVectors(plan.inputs, plan.device)
        self.assembly = Assembly(plan, self.store, self.vectors, self.fingerprints, self._unit_key)

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
            self.assembly.write(shard, self.progress)
        publish(self.plan, self.store)
        self.vectors.warn_of_equals()

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
        self.vectors.note_move(source.name, lambda: bool(found.cosines))
        return found

    # -- adaptation ------------------------------------------------------------------------------------------------

    def _adapt(self, unit: Unit) -> None:
        """Adapt one unit to the anchors of all sources, unless that is done."""
        name, key = f"{BLOCKS}/{unit.name}.safetensors", self._unit_key(unit)
        if not self.store.finished(name, key) and not self.assembly.holds(unit):
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
            base, theirs = self.vectors.read(name, torch.float32)
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
