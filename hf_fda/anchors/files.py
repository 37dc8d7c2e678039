"""An anchors folder: one safetensors file a unit, made and recorded one at a time, and the frame around them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import pyarrow
import torch
from pyarrow import parquet

from hf_fda.anchors.beside import Beside
from hf_fda.anchors.builder import AnchorBuilder
from hf_fda.anchors.construction import UnitAnchors
from hf_fda.anchors.manifest import MANIFEST, AnchorsInfo, manifest
from hf_fda.anchors.rounding import Rounding, stored
from hf_fda.anchors.snapshots import snapshot_file, write_snapshots
from hf_fda.blocks import Unit
from hf_fda.cards import anchors_card
from hf_fda.checkpoint.alignment import AlignedSource
from hf_fda.checkpoint.header import TensorEntry, read_header, read_metadata, read_tensor
from hf_fda.checkpoint.untrusted import parse_json
from hf_fda.checkpoint.writer import save_tensors
from hf_fda.drawing import can_draw
from hf_fda.errors import InputError
from hf_fda.pictures import draw_construction
from hf_fda.progress import Progress, logger
from hf_fda.stages import Piece
from hf_fda.store import Store, key_of
from hf_fda.version import versions

INDEX = "index/anchors.parquet"

PICTURE = "anchors.png"
"""The picture of losses and spectra, where matplotlib is installed."""

SHOWN = 1024
"""Vectors of a block, at most, whose spectrum is drawn."""


def unit_file(unit: str) -> str:
    """The path of a unit's file inside an anchors folder."""
    return f"blocks/{unit}.safetensors"


def write_unit(path: Path, unit: UnitAnchors, dtype: str) -> str:
    """Write one unit's anchors and targets; all else that is known of them goes into the file's header.

    Args:
        path: of the file.
        unit: the anchors; what they hold has to fit the type.
        dtype: to store them in.

    Returns:
        the file's hash.
    """
    metadata = {
        "loss": repr(unit.loss),
        "steps": str(unit.steps),
        "cosines": json.dumps(unit.cosines),
        "left_out": json.dumps(unit.left_out),
    }
    if unit.rounding is not None:
        metadata["rounding"] = json.dumps(unit.rounding.to_dict())
    kind = getattr(torch, dtype)
    return save_tensors(path, {"anchors": unit.anchors.to(kind), "targets": unit.targets.to(kind)}, metadata)


def read_unit(path: Path) -> UnitAnchors:
    """Read one unit's anchors.

    Raises:
        InputError: when the file is damaged.
    """
    entries, facts = describe(path)
    anchors, targets = (read_tensor(path, entries[name]).float() for name in ("anchors", "targets"))
    return UnitAnchors(anchors, targets, **facts)


def describe(path: Path) -> tuple[dict[str, TensorEntry], dict[str, Any]]:
    """What a unit's file says in its header: its tensors, and all else that is known of them.

    Raises:
        InputError: when the file is damaged, or its tensors do not belong together.
    """
    entries = read_header(path)
    if not {"anchors", "targets"} <= set(entries):
        raise InputError(f"{path}: holds no anchors and targets; construct or fetch them again")
    anchors, targets = entries["anchors"].shape, entries["targets"].shape
    if len(anchors) != 3 or len(targets) != 3 or anchors[:2] != targets[:2]:
        raise InputError(
            f"{path}: anchors {anchors} and targets {targets} do not belong together; construct or fetch them again"
        )
    return entries, _facts(path)


def _facts(path: Path) -> dict[str, Any]:
    """What a unit's file says of its anchors beside the tensors."""
    words = read_metadata(path)
    try:
        rounding = parse_json(words["rounding"]) if "rounding" in words else None
        cosines = parse_json(words.get("cosines", "{}"))
        return {
            "loss": float(words.get("loss", "nan")),
            "steps": int(words.get("steps", "0")),
            "cosines": {str(name): float(cosine) for name, cosine in cosines.items()},
            "left_out": tuple(map(str, parse_json(words.get("left_out", "[]")))),
            "rounding": None if rounding is None else Rounding(**{name: float(own) for name, own in rounding.items()}),
        }
    except (ValueError, TypeError, AttributeError):
        raise InputError(f"{path}: what its header says of the anchors is damaged; fetch them again") from None


def row_of(block: str, shapes: Sequence[Sequence[int]], dtype: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What the index says of a block.

    Args:
        block: its name.
        shapes: of anchors and targets.
        dtype: that they are stored in.
        facts: `loss`, `steps` and `left_out`.
    """
    return {
        "block": block,
        "file": unit_file(block),
        "shape": list(shapes[0]),
        "target_shape": list(shapes[1]),
        "dtype": dtype,
        "loss": facts["loss"],
        "steps": facts["steps"],
        "left_out": list(facts["left_out"]),
    }


def read_index(path: Path) -> list[dict[str, Any]]:
    """The rows of an index, one a block.

    Raises:
        InputError: when the file is missing or damaged.
    """
    try:
        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path}: cannot be read ({error}); construct or fetch the anchors again") from None
    needed = {"block", "shape", "target_shape", "dtype", "loss", "steps"}
    if not all(needed <= set(row) for row in rows):
        raise InputError(f"{path}: is no index of anchors; construct or fetch them again")
    return rows


def write_frame(folder: Path, info: AnchorsInfo, where: str = "PATH_OR_DATASET_ID") -> AnchorsInfo:
    """Write what surrounds the blocks of an anchors folder: index, card and, last, `anchors.json`.

    Args:
        folder: the anchors folder.
        info: what `anchors.json` will say, but for what the blocks' files say.
        where: what the card says opens the anchors.

    Returns:
        what `anchors.json` says.
    """
    rows, rounding = [], {}
    for block in info.units:
        path = folder / unit_file(block)
        entries, facts = describe(path)
        shapes = entries["anchors"].shape, entries["targets"].shape
        rows.append(row_of(block, shapes, info.dtype, facts) | {"bytes": path.stat().st_size})
        if facts["rounding"] is not None:
            rounding[block] = facts["rounding"].to_dict()
    picture = _picture(folder, rows)
    info = replace(info, rounding=rounding)
    (folder / INDEX).parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / INDEX)
    (folder / "README.md").write_text(anchors_card(info, rows, where, picture), encoding="utf-8")
    (folder / MANIFEST).write_text(info.to_json(), encoding="utf-8")
    return info


def _picture(folder: Path, rows: list[dict[str, Any]]) -> str | None:
    """Draw the losses and the spectra of all blocks, unless that was done; the file, None where it cannot be drawn."""
    path = folder / PICTURE
    if path.is_file() and _indexed(folder, rows):
        return PICTURE
    path.unlink(missing_ok=True)
    spectra = {row["block"]: _spectrum(folder / unit_file(row["block"])) for row in rows} if can_draw() else {}
    if not all(spectra.values()) or not spectra:
        return None
    draw_construction({row["block"]: row["loss"] for row in rows}, spectra, path)
    return PICTURE


def _indexed(folder: Path, rows: list[dict[str, Any]]) -> bool:
    """Whether an index of the same was written, which comes after the picture."""
    try:
        return read_index(folder / INDEX) == rows
    except InputError:
        return False


def _spectrum(path: Path) -> list[float]:
    """The singular values of a unit's first anchors, each as a share of the largest, which are drawn; none of anchors
    that are not finite."""
    entry = read_header(path)["anchors"]
    width = entry.shape[-1]
    part = read_tensor(path, entry, slice(0, min(prod(entry.shape), SHOWN * width)))
    if not bool(part.isfinite().all()):
        return []
    values = torch.linalg.svdvals(part.view(-1, width).float())
    return (values / values[0].clamp_min(torch.finfo(values.dtype).tiny)).tolist()


@dataclass(frozen=True)
class Construction:
    """What makes the anchors of one source, unit by unit, in a folder of a store.

    Args:
        store: where the files go and are recorded.
        prefix: the anchors folder inside the store; "" for the store's own folder.
        builder: makes anchors.
        source: for which model.
        fingerprints: hashes of the base's and the source's weights.
        dtype: that they are stored in.
    """

    store: Store
    prefix: str
    builder: AnchorBuilder
    source: AlignedSource
    fingerprints: tuple[str, str]
    dtype: str = "float32"

    @property
    def folder(self) -> Path:
        """The anchors folder."""
        return self.store.folder / self.prefix

    def key(self, unit: Unit) -> str:
        """A hash of everything that determines a unit's file."""
        config = self.builder.config
        options = config.construction()
        narrow = () if self.dtype == "float32" else (self.dtype, config.options())
        kept = (self.builder.snapshots,) if self.builder.snapshots else ()
        return key_of("anchors", unit.name, options, self.fingerprints, self.builder.seed, versions(), *narrow, *kept)

    def piece(self, unit: Unit, cost: float, progress: Progress) -> Piece:
        """The work of making one unit's anchors.

        Args:
            unit: which.
            cost: of it, compared with other pieces.
            progress: whom to tell the loss on the way.
        """
        what = f"construct {self.source.name} {unit.name}"

        def make() -> Callable[[Path], str]:
            built = self.builder.build(self.source, unit, lambda step, loss: progress.now(what, loss))
            anchors = stored(self.builder, unit, built, self.dtype)
            if anchors.left_out:
                logger.debug("%s: no gradient or no task vector for %s", what, ", ".join(anchors.left_out))
            if built.snapshots:  # first, so that a finished block has them
                write_snapshots(self.folder / snapshot_file(unit.name), built.snapshots)
            return lambda path: write_unit(path, anchors, self.dtype)

        group = f"{self.prefix}{self.builder.groups[unit.name][0].name}"
        return Piece(what, f"{self.prefix}{unit_file(unit.name)}", self.key(unit), cost, make, group=group)

    def frame(self, units: Sequence[Unit], beside: Beside) -> AnchorsInfo:
        """Write index, card, manifest and what else belongs there around complete blocks; what the manifest says."""
        builder = self.builder
        beside.write(self.folder)
        what = {"dtype": self.dtype, **beside.described()}
        options = builder.config.construction()
        return write_frame(self.folder, manifest(builder.base, self.source, units, options, builder.seed, **what))
