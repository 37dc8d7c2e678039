"""Making the anchors of one model, in memory or in a folder, in any number of processes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_fda.adapters import open_source
from hf_fda.anchors.builder import AnchorBuilder
from hf_fda.anchors.construction import UnitAnchors
from hf_fda.anchors.files import AnchorsInfo, Construction, provenance
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
class Making:
    """The anchors of one model, ready to be made: of which model, how, and into which folder (None: memory)."""

    base: Checkpoint
    source: AlignedSource
    builder: AnchorBuilder
    folder: Path | None

    @classmethod
    def prepare(
        cls,
        base: Given,
        source: Given,
        device: str | torch.device,
        seed: int,
        trust_remote_code: bool,
        output: str | os.PathLike[str] | None,
        options: Mapping[str, Any],
    ) -> Making:
        """Open base and source and check that they belong together; arguments as `FunctionalDualAnchors.construct`.

        Raises:
            InputError: when they do not, or something else cannot be used.
        """
        config = resolve_method("fda", options)
        assert isinstance(config, FDAConfig)
        theta = open_checkpoint(base, trust_remote_code=trust_remote_code, label="base")
        tuned = align(theta, open_source(theta, source, trust_remote_code), "source")
        size = getattr(theta.config, "hidden_size", None) or theta.config.get_text_config().hidden_size
        config = config.for_family(family_of(theta.layout), int(size))
        units = find_units(theta.layout, config.unit or ("block",))
        check_shapes(theta, tuned, [name for unit in units for name in unit.tensors])
        builder = AnchorBuilder(theta, units, config, resolve_device(device), seed)
        return cls(theta, tuned, builder, None if output is None else new_folder(output))

    def in_memory(self, team: Team) -> tuple[AnchorsInfo, dict[str, UnitAnchors]]:
        """Make the anchors; every process gets all of them."""
        check_same(self._facts(team), team)
        units = self.builder.units
        owners = assign([self._cost(unit) for unit in units], team.count)
        own = {
            unit.name: self.builder.build(self.source, unit)
            for unit, owner in zip(units, owners, strict=True)
            if owner == team.rank
        }
        team.wait()
        built = {
            unit.name: team.from_owner(own.get(unit.name), owner) for unit, owner in zip(units, owners, strict=True)
        }
        origins = provenance(self.base), provenance(self.source.checkpoint)
        return AnchorsInfo(tuple(built), self.builder.config.construction(), *origins, self.builder.seed), built

    def on_disk(self, team: Team, quiet: bool) -> AnchorsInfo:
        """Make the anchors in the folder, those that are not there yet."""
        assert self.folder is not None
        check_same(self._facts(team), team)
        check_shared(self.folder, team)
        store, units = Store(self.folder), self.builder.units
        prints = self.base.fingerprint(), self.source.checkpoint.fingerprint()
        construction = Construction(store, "", self.builder, self.source, prints)
        with Progress(len(units), quiet or not team.main) as progress:
            pieces = [construction.piece(unit, self._cost(unit), progress) for unit in units]
            work_off(pieces, find_finished(pieces, store, team), store, team, progress)
        info = construction.info(units)
        if team.main:
            construction.frame(units)
        team.wait()
        return info

    def _cost(self, unit: Unit) -> float:
        return construction(self.base, self.builder.config, unit).weight

    def _facts(self, team: Team) -> dict[str, str]:
        """What all processes must see alike, as hashes by what it is."""
        if team.count == 1:
            return {}
        return {
            "the base's weights": self.base.fingerprint(),
            "the source's weights": self.source.checkpoint.fingerprint(),
            "the options": key_of(self.builder.config.construction(), self.builder.seed),
            "versions": key_of(versions()),
        }
