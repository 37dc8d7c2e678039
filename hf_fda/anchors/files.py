"""An anchors folder: one safetensors file a unit, made and recorded one at a time, and the frame around them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from hf_fda.anchors.builder import AnchorBuilder
from hf_fda.anchors.construction import UnitAnchors
from hf_fda.blocks import Unit
from hf_fda.cards import anchors_card
from hf_fda.checkpoint.alignment import AlignedSource
from hf_fda.checkpoint.header import read_header, read_tensor
from hf_fda.checkpoint.writer import save_tensors
from hf_fda.errors import InputError
from hf_fda.progress import Progress, logger
from hf_fda.stages import Piece
from hf_fda.store import Store, key_of
from hf_fda.version import versions

MANIFEST = "anchors.json"
INDEX = "index/anchors.parquet"
FORMAT = 1


@dataclass(frozen=True)
class AnchorsInfo:
    """What `anchors.json` says: the units in the model's order, the construction's options, where it came from."""

    units: tuple[str, ...]
    config: dict[str, Any]
    base: dict[str, Any]
    source: dict[str, Any]
    seed: int
    versions: dict[str, str] = field(default_factory=versions)
    format: int = FORMAT

    def to_json(self) -> str:
        """The text of `anchors.json`."""
        facts = {**self.__dict__, "units": list(self.units)}
        return json.dumps(facts, indent=2) + "\n"


def unit_file(unit: str) -> str:
    """The path of a unit's file inside an anchors folder."""
    return f"blocks/{unit}.safetensors"


def write_unit(path: Path, unit: UnitAnchors) -> str:
    """Write one unit's anchors and targets; loss, steps and cosines go into the file's header. The file's hash."""
    metadata = {
        "loss": repr(unit.loss),
        "steps": str(unit.steps),
        "cosines": json.dumps(unit.cosines),
        "left_out": json.dumps(unit.left_out),
    }
    return save_tensors(path, {"anchors": unit.anchors, "targets": unit.targets}, metadata)


def read_unit(path: Path) -> UnitAnchors:
    """Read one unit's anchors.

    Raises:
        InputError: when the file is damaged.
    """
    entries, metadata = read_header(path), read_metadata(path)
    return UnitAnchors(
        read_tensor(path, entries["anchors"]).float(),
        read_tensor(path, entries["targets"]).float(),
        loss=float(metadata.get("loss", "nan")),
        steps=int(metadata.get("steps", 0)),
        cosines=json.loads(metadata.get("cosines", "{}")),
        left_out=tuple(json.loads(metadata.get("left_out", "[]"))),
    )


def read_metadata(path: Path) -> dict[str, str]:
    """The free words in a safetensors file's header."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return dict(json.loads(file.read(length)).get("__metadata__", {}))


def write_frame(folder: Path, info: AnchorsInfo) -> None:
    """Write what surrounds the blocks of an anchors folder: index, card and, last, `anchors.json`."""
    rows = []
    for unit in info.units:
        path = folder / unit_file(unit)
        entries, metadata = read_header(path), read_metadata(path)
        rows.append(
            {
                "block": unit,
                "file": unit_file(unit),
                "shape": list(entries["anchors"].shape),
                "target_shape": list(entries["targets"].shape),
                "dtype": str(entries["anchors"].dtype).removeprefix("torch."),
                "loss": float(metadata["loss"]),
                "steps": int(metadata["steps"]),
                "left_out": list(json.loads(metadata.get("left_out", "[]"))),
            }
        )
    (folder / INDEX).parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / INDEX)
    (folder / "README.md").write_text(anchors_card(info, rows), encoding="utf-8")
    (folder / MANIFEST).write_text(info.to_json(), encoding="utf-8")


def provenance(checkpoint: Any) -> dict[str, Any]:
    """Where a checkpoint came from, as plain values."""
    return {"id": checkpoint.id, "commit": checkpoint.commit, "class": checkpoint.layout.model_class.__name__}


def read_manifest(path: Path) -> AnchorsInfo:
    """Read `anchors.json`.

    Raises:
        InputError: when it is damaged or written by a newer version.
    """
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts["format"] > FORMAT:
            raise InputError(f"{path}: written by a newer hf_fda (format {facts['format']}); update hf_fda")
        return AnchorsInfo(**{**facts, "units": tuple(facts["units"])})
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: damaged ({error}); construct or fetch the anchors again") from None


@dataclass(frozen=True)
class Construction:
    """What makes the anchors of one source, unit by unit, in a folder of a store.

    Args:
        store: where the files go and are recorded.
        prefix: the anchors folder inside the store; "" for the store's own folder.
        builder: makes anchors.
        source: for which model.
        fingerprints: hashes of the base's and the source's weights.
    """

    store: Store
    prefix: str
    builder: AnchorBuilder
    source: AlignedSource
    fingerprints: tuple[str, str]

    @property
    def folder(self) -> Path:
        """The anchors folder."""
        return self.store.folder / self.prefix

    def key(self, unit: Unit) -> str:
        """A hash of everything that determines a unit's anchors."""
        options = self.builder.config.construction()
        return key_of("anchors", unit.name, options, self.fingerprints, self.builder.seed, versions())

    def piece(self, unit: Unit, cost: float, progress: Progress) -> Piece:
        """The work of making one unit's anchors.

        Args:
            unit: which.
            cost: of it, compared with other pieces.
            progress: whom to tell the loss on the way.
        """
        what = f"construct {self.source.name} {unit.name}"

        def make() -> Callable[[Path], str]:
            anchors = self.builder.build(self.source, unit, lambda step, loss: progress.now(what, loss))
            if anchors.left_out:
                logger.debug("%s: no gradient or no task vector for %s", what, ", ".join(anchors.left_out))
            return lambda path: write_unit(path, anchors)

        return Piece(what, f"{self.prefix}{unit_file(unit.name)}", self.key(unit), cost, make)

    def info(self, units: Iterable[Unit]) -> AnchorsInfo:
        """What the manifest of these units says."""
        names = tuple(unit.name for unit in units)
        base, source = provenance(self.builder.base), provenance(self.source.checkpoint)
        return AnchorsInfo(names, self.builder.config.construction(), base, source, self.builder.seed)

    def frame(self, units: Iterable[Unit]) -> None:
        """Write index, card and manifest around complete blocks."""
        write_frame(self.folder, self.info(units))
