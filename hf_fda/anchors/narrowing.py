"""Saving anchors in a narrower type than they have."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from hf_fda.anchors.builder import AnchorBuilder
from hf_fda.anchors.construction import UnitAnchors
from hf_fda.anchors.making import builder_of
from hf_fda.anchors.manifest import AnchorsInfo, check_dtype
from hf_fda.anchors.rounding import stored
from hf_fda.checkpoint.likeness import likeness
from hf_fda.checkpoint.reader import open_checkpoint
from hf_fda.errors import InputError
from hf_fda.merge_methods.fda import FDAConfig
from hf_fda.merge_methods.registry import resolve_method


@dataclass(frozen=True)
class Narrowing:
    """How anchors are saved: what `anchors.json` then says, and what measures the effect; None where there is none."""

    info: AnchorsInfo
    builder: AnchorBuilder | None = None

    @classmethod
    def of(cls, info: AnchorsInfo, dtype: str | None, base: Any, device: str) -> Narrowing:
        """As `FunctionalDualAnchors.save_pretrained`.

        Raises:
            InputError: when the type cannot be used, or there is no base to measure with.
        """
        if dtype is None or dtype == info.dtype:
            return cls(info)
        check_dtype(dtype)
        if info.dtype != "float32":
            raise InputError(f"dtype '{dtype}': the anchors are stored as {info.dtype} already; construct them again")
        if base is None and info.base.get("commit") is None:
            raise InputError(
                f"dtype '{dtype}': what it does to a merge is measured on the base ('{info.base['id']}', which is not "
                "on the Hub); say where it is: base=..."
            )
        theta = open_checkpoint(base or f"{info.base['id']}@{info.base['commit']}", label="base")
        config = resolve_method("fda", info.config)
        assert isinstance(config, FDAConfig)
        builder = builder_of(theta, config, device, info.seed)
        names = [name for unit in builder.units for name in unit.tensors]
        if tuple(unit.name for unit in builder.units) != info.units or (
            "likeness" in info.base and likeness(theta, names) != info.base["likeness"]
        ):
            raise InputError(f"base: {theta.id} is not what the anchors were constructed from ('{info.base['id']}')")
        return cls(replace(info, dtype=dtype), builder)

    def stored(self, block: str, found: UnitAnchors) -> UnitAnchors:
        """One block's anchors as they are saved."""
        if self.builder is None:
            return found
        unit = next(unit for unit in self.builder.units if unit.name == block)
        return stored(self.builder, unit, found, self.info.dtype)
