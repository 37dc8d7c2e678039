"""Making the anchors of one model, in memory or in a folder, in any number of processes."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_fda.adapters import open_source
from hf_fda.anchors.beside import Beside, check_beside
from hf_fda.anchors.builder import AnchorBuilder
from hf_fda.anchors.construction import UnitAnchors
from hf_fda.anchors.files import Construction
from hf_fda.anchors.manifest import MANIFEST, AnchorsInfo, check_dtype, manifest, read_manifest
from hf_fda.anchors.rounding import rounding_of, stored
from hf_fda.anchors.snapshots import check_snapshots
from hf_fda.blocks import Unit, family_of, find_units
from hf_fda.checkpoint.alignment import AlignedSource, align, check_shapes
from hf_fda.checkpoint.interface import Checkpoint
from hf_fda.checkpoint.reader import open_checkpoint
from hf_fda.costs import construction
from hf_fda.devices import resolve_device
from hf_fda.merge_methods.fda import FDAConfig
from hf_fda.merge_methods.registry import resolve_method
from hf_fda.processes import Team
from hf_fda.progress import Progress
from hf_fda.sharing import check_same, check_shared
from hf_fda.stages import assign, find_finished, work_off
from hf_fda.store import Store, key_of, new_folder
from hf_fda.version import versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    Given = str | os.PathLike[str] | PreTrainedModel


@dataclass(frozen=True)
class Wanted:
    """What is made beside a source's blocks, and how it is stored, as `FunctionalDualAnchors.construct` takes it."""

    dtype: str = "float32"
    rest: bool = False
    head: bool = False
    snapshots: tuple[int, ...] = ()


@dataclass(frozen=True)
class Making:
    """The anchors of one model, ready to be made: of which model, how, and into which folder (None: memory)."""

    base: Checkpoint
    source: AlignedSource
    builder: AnchorBuilder
    folder: Path | None
    wanted: Wanted

    @classmethod
    def prepare(
        cls,
        base: Given,
        source: Given,
        device: str | torch.device,
        seed: int,
        trust_remote_code: bool,
        output: str | os.PathLike[str] | None,
        wanted: Wanted,
        options: Mapping[str, Any],
    ) -> Making:
        """Open base and source and check that they belong together; arguments as `FunctionalDualAnchors.construct`.

        Raises:
            InputError: when they do not, or something else cannot be used.
        """
        config = resolve_method("fda", options)
        assert isinstance(config, FDAConfig)
        check_dtype(wanted.dtype)
        check_snapshots(wanted.snapshots)
        theta = open_checkpoint(base, trust_remote_code=trust_remote_code, label="base")
        tuned = align(theta, open_source(theta, source, trust_remote_code), "source")
        builder = builder_of(theta, config, device, seed, wanted.snapshots)
        check_shapes(theta, tuned, [name for unit in builder.units for name in unit.tensors])
        check_beside(theta, tuned, wanted.rest, wanted.head)
        return cls(theta, tuned, builder, None if output is None else new_folder(output), wanted)

    def in_memory(self, team: Team) -> tuple[AnchorsInfo, dict[str, UnitAnchors], Beside]:
        """Make the anchors; every process gets all of them."""
        check_same(self._facts(team), team)
        units, groups = self.builder.grouped, self.builder.groups
        owners = assign([self._cost(unit) for unit in units], team.count, [groups[unit.name] for unit in units])
        own = {
            unit.name: stored(self.builder, unit, self.builder.build(self.source, unit), self.wanted.dtype)
            for unit, owner in zip(units, owners, strict=True)
            if owner == team.rank
        }
        team.wait()
        owner_of = {unit.name: owner for unit, owner in zip(units, owners, strict=True)}
        built = {unit.name: team.from_owner(own.get(unit.name), owner_of[unit.name]) for unit in self.builder.units}
        beside = self._beside()
        what = {"dtype": self.wanted.dtype, "rounding": rounding_of(built), **beside.described()}
        options = self.builder.config.construction()
        info = manifest(self.base, self.source, self.builder.units, options, self.builder.seed, **what)
        return info, built, beside

    def on_disk(self, team: Team, quiet: bool) -> AnchorsInfo:
        """Make the anchors in the folder, those that are not there yet."""
        assert self.folder is not None
        check_same(self._facts(team), team)
        check_shared(self.folder, team)
        store, units = Store(self.folder), self.builder.units
        prints = self.base.fingerprint(), self.source.checkpoint.fingerprint()
        construction = Construction(store, "", self.builder, self.source, prints, self.wanted.dtype)
        with Progress(len(units), quiet or not team.main) as progress:
            pieces = [construction.piece(unit, self._cost(unit), progress) for unit in self.builder.grouped]
            work_off(pieces, find_finished(pieces, store, team), store, team, progress)
        if team.main:
            construction.frame(units, self._beside())
        team.wait()
        store.await_file(MANIFEST)
        return read_manifest(self.folder / MANIFEST)

    def _beside(self) -> Beside:
        return Beside.of(self.base, self.source, self.wanted.rest, self.wanted.head)

    def _cost(self, unit: Unit) -> float:
        return construction(self.base, self.builder.config, unit).weight

    def _facts(self, team: Team) -> dict[str, str]:
        """What all processes must see alike, as hashes by what it is."""
        if team.count == 1:
            return {}
        return {
            "the base's weights": self.base.fingerprint(),
            "the source's weights": self.source.checkpoint.fingerprint(),
            "the options": key_of(self.builder.config.construction(), self.builder.seed, asdict(self.wanted)),
            "versions": key_of(versions()),
        }


def builder_of(
    base: Checkpoint, config: FDAConfig, device: str | torch.device, seed: int, snapshots: Collection[int] = ()
) -> AnchorBuilder:
    """What makes anchors for a base, and adapts its units to such anchors alone.

    Args:
        base: the base.
        config: the options, of which those that are open follow the kind of model.
        device: "auto" or a torch device.
        seed: of the anchors' start.
        snapshots: numbers of steps after which anchors are kept as they are then.
    """
    alone = replace(config, initial="base", rest="base", parametrization="parameters")
    size = getattr(base.config, "hidden_size", None) or base.config.get_text_config().hidden_size
    complete = alone.for_family(family_of(base.layout), int(size))
    units = find_units(base.layout, complete.unit or ("block",))
    return AnchorBuilder(base, units, complete, resolve_device(device), seed, snapshots)
