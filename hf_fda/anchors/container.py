"""Anchors as a thing of their own: a folder or a Hub dataset that stands for what a fine-tune learned."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError

from hf_fda.anchors.builder import AnchorBuilder
from hf_fda.anchors.construction import UnitAnchors
from hf_fda.blocks import family_of, find_units
from hf_fda.checkpoint.alignment import align, check_shapes
from hf_fda.checkpoint.header import read_header, read_tensor
from hf_fda.checkpoint.reader import open_checkpoint
from hf_fda.checkpoint.writer import save_tensors
from hf_fda.devices import resolve_device
from hf_fda.errors import InputError, nearest
from hf_fda.merge_methods.fda import FDAConfig
from hf_fda.merge_methods.registry import resolve_method
from hf_fda.store import digest
from hf_fda.version import versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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


class FunctionalDualAnchors:
    """Anchors of every block of one source, in the model's order.

    Made by `construct`, opened by `from_pretrained`; `anchors["model.layers.3"]` is a `UnitAnchors` with the tensors
    `.anchors` (n, T, d) and `.targets` (n, T, d') and the float `.loss`. An opened folder or dataset reads a block
    when it is asked for.

    Args:
        info: what they are.
        units: their tensors by unit, or None when they lie in files.
        folder: where the files lie.
        repo_id: the Hub dataset that they come from.
        revision: its revision.
    """

    def __init__(
        self,
        info: AnchorsInfo,
        units: dict[str, UnitAnchors] | None = None,
        *,
        folder: Path | None = None,
        repo_id: str | None = None,
        revision: str | None = None,
    ) -> None:
        self.info = info
        self._units = units
        self._folder, self._repo_id, self._revision = folder, repo_id, revision

    @property
    def blocks(self) -> list[str]:
        """Names of the blocks, in the model's order."""
        return list(self.info.units)

    def __len__(self) -> int:
        return len(self.info.units)

    def __iter__(self) -> Iterator[str]:
        return iter(self.info.units)

    def __getitem__(self, block: str) -> UnitAnchors:
        if block not in self.info.units:
            raise KeyError(f"no anchors of block '{block}': {nearest(block, self.info.units)}")
        if self._units is not None:
            return self._units[block]
        return read_unit(self.file(block))

    def digest(self, block: str) -> str:
        """A hash of one block's tensors (of its file's bytes, where it lies in one)."""
        if self._units is None:
            return digest(self.file(block))
        unit, hashed = self._units[block], hashlib.sha256()
        for tensor in (unit.anchors, unit.targets):
            hashed.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        return hashed.hexdigest()

    def file(self, block: str) -> Path:
        """The local file of one block; one on the Hub is downloaded into the cache first."""
        if self._folder is not None:
            return self._folder / unit_file(block)
        assert self._repo_id is not None
        return Path(
            hf_hub_download(self._repo_id, unit_file(block), revision=self._revision, repo_type="dataset")
        )

    @classmethod
    def construct(
        cls,
        base: str | os.PathLike[str] | PreTrainedModel,
        source: str | os.PathLike[str] | PreTrainedModel,
        device: str | torch.device = "auto",
        seed: int = 0,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> FunctionalDualAnchors:
        """Construct the anchors of a fine-tuned model; no data is looked at.

        Args:
            base: the checkpoint it was fine-tuned from: Hub id, folder or model.
            source: the fine-tuned checkpoint.
            device: "auto" or a torch device.
            seed: of the anchors' start.
            trust_remote_code: run model code that comes with the checkpoints.
            options: fields of `FDAConfig`.

        Raises:
            InputError: when base or source cannot be used or do not belong together.
            RunError: when a loss becomes infinite or not a number.
        """
        config = resolve_method("fda", options)
        assert isinstance(config, FDAConfig)
        theta = open_checkpoint(base, trust_remote_code=trust_remote_code, label="base")
        tuned = align(theta, open_checkpoint(source, trust_remote_code=trust_remote_code, label="source"), "source")
        config = config.for_family(family_of(theta.layout), hidden_size(theta.config))
        units = find_units(theta.layout, config.unit or ("block",))
        check_shapes(theta, tuned, [name for unit in units for name in unit.tensors])
        builder = AnchorBuilder(theta, units, config, resolve_device(device), seed)
        built = {unit.name: builder.build(tuned, unit) for unit in units}
        info = AnchorsInfo(
            tuple(built), config.construction(), provenance(theta), provenance(tuned.checkpoint), seed
        )
        return cls(info, built)

    @classmethod
    def from_pretrained(cls, id: str | os.PathLike[str], revision: str | None = None) -> FunctionalDualAnchors:
        """Open anchors: a folder, or a Hub dataset ("org/name" or "org/name@revision").

        Raises:
            InputError: when there is no such folder or dataset, or it holds no anchors.
        """
        text = os.fspath(id)
        folder = Path(text).expanduser()
        if folder.is_dir():
            if not (folder / MANIFEST).is_file():
                raise InputError(f"{text}: no {MANIFEST} in it, so it is no anchors folder")
            return cls(_read_manifest(folder / MANIFEST), folder=folder)
        repo_id, _, inside = text.partition("@")
        try:
            commit = HfApi().dataset_info(repo_id, revision=revision or inside or None).sha
            path = hf_hub_download(repo_id, MANIFEST, revision=commit, repo_type="dataset")
        except (RepositoryNotFoundError, EntryNotFoundError):
            raise InputError(f"{text}: no such folder, and no such anchors dataset on the Hub") from None
        except (HfHubHTTPError, OSError, ValueError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(f"{text}: no such folder, and the Hub cannot be asked ({reason})") from None
        return cls(_read_manifest(Path(path)), repo_id=repo_id, revision=commit)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the anchors as a folder: a card, `anchors.json`, a parquet index and one safetensors file a block."""
        target = Path(folder)
        for block in self:
            path = target / unit_file(block)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_unit(path, self[block])
        write_frame(target, self.info)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Upload the anchors as a Hub dataset.

        Args:
            repo_id: "org/name"; made if it is not there.
            private: make it private.
            token: an access token; the saved one if None.

        Returns:
            the address of the commit.
        """
        import tempfile

        api = HfApi(token=token)
        api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            commit = api.upload_folder(
                repo_id=repo_id, repo_type="dataset", folder_path=folder, commit_message="Add anchors"
            )
        return str(commit)


def unit_file(unit: str) -> str:
    """The path of a unit's file inside an anchors folder."""
    return f"blocks/{unit}.safetensors"


def write_unit(path: Path, unit: UnitAnchors) -> None:
    """Write one unit's anchors and targets; loss, steps and cosines go into the file's header."""
    metadata = {
        "loss": repr(unit.loss),
        "steps": str(unit.steps),
        "cosines": json.dumps(unit.cosines),
        "left_out": json.dumps(unit.left_out),
    }
    save_tensors(path, {"anchors": unit.anchors, "targets": unit.targets}, metadata)


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
    import pyarrow
    from pyarrow import parquet

    from hf_fda.cards import anchors_card

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
            }
        )
    (folder / INDEX).parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / INDEX)
    (folder / "README.md").write_text(anchors_card(info, rows), encoding="utf-8")
    (folder / MANIFEST).write_text(info.to_json(), encoding="utf-8")


def provenance(checkpoint: Any) -> dict[str, Any]:
    """Where a checkpoint came from, as plain values."""
    return {"id": checkpoint.id, "commit": checkpoint.commit, "class": checkpoint.layout.model_class.__name__}


def hidden_size(config: Any) -> int:
    """d of a model's blocks."""
    return int(getattr(config, "hidden_size", None) or config.get_text_config().hidden_size)


def _read_manifest(path: Path) -> AnchorsInfo:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts["format"] > FORMAT:
            raise InputError(f"{path}: written by a newer hf_fda (format {facts['format']}); update hf_fda")
        return AnchorsInfo(**{**facts, "units": tuple(facts["units"])})
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: damaged ({error}); construct or fetch the anchors again") from None
