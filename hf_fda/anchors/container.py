"""Anchors as a thing of their own: a folder or a Hub dataset that stands for what a fine-tune learned."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch
from huggingface_hub import HfApi, hf_hub_download

from hf_fda.anchors.beside import HEAD_CONFIG, HEAD_WEIGHTS, REST, Beside
from hf_fda.anchors.construction import UnitAnchors
from hf_fda.anchors.files import INDEX, read_index, read_unit, row_of, unit_file, write_frame, write_unit
from hf_fda.anchors.making import Making, Wanted
from hf_fda.anchors.manifest import MANIFEST, AnchorsInfo, read_manifest
from hf_fda.anchors.narrowing import Narrowing
from hf_fda.anchors.showing import as_html, as_text
from hf_fda.anchors.snapshots import read_snapshots, snapshot_file, write_snapshots
from hf_fda.checkpoint.hashed import digest
from hf_fda.checkpoint.location import Location
from hf_fda.checkpoint.named import FileTensors
from hf_fda.checkpoint.untrusted import check_link
from hf_fda.errors import InputError, nearest
from hf_fda.hub import hub_errors
from hf_fda.processes import together
from hf_fda.pushing import PushOptions, push

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ON_HUB = "datasets/"
"""Before a Hub id it says that a dataset is meant, not a model (the Hub writes it so in its addresses)."""


class FunctionalDualAnchors:
    """Anchors of every block of one source, in the model's order.

    Made by `construct`, opened by `from_pretrained`; `anchors["model.layers.3"]` is a `UnitAnchors` with the tensors
    `.anchors` (n, T, d) and `.targets` (n, T, d') and the float `.loss`. An opened folder or dataset reads a block
    when it is asked for.

    Args:
        info: what they are.
        units: their tensors by unit, or None when they lie in files.
        location: where the files lie.
        beside: what lies beside anchors in memory.
    """

    def __init__(
        self,
        info: AnchorsInfo,
        units: dict[str, UnitAnchors] | None = None,
        *,
        location: Location | None = None,
        beside: Beside | None = None,
    ) -> None:
        self.info = info
        self._units, self._location, self._beside = units, location, beside or Beside()

    def __repr__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        return as_html(self)

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

    @property
    def in_memory(self) -> bool:
        """Whether they lie in no files."""
        return self._units is not None

    @property
    def on_hub(self) -> bool:
        """Whether their files are on the Hub."""
        return self._location is not None and self._location.folder is None

    @property
    def origin(self) -> str | None:
        """The folder or dataset ("datasets/org/name@commit") they were opened from; None when in memory only."""
        where = self._location
        if where is None or where.folder is not None:
            return None if where is None else str(where.folder)
        return f"{ON_HUB}{where.repo_id}@{where.commit}"

    @property
    def folder(self) -> Path | None:
        """The folder they were opened from; None when they are on the Hub or in memory only."""
        return None if self._location is None else self._location.folder

    @property
    def index(self) -> list[dict[str, Any]]:
        """A row a block, as `index/anchors.parquet` holds them: its file, shapes, type, loss and steps.

        Raises:
            InputError: when the file is missing or damaged.
        """
        if self._location is not None:
            return read_index(self._path(INDEX))
        units = {block: self[block] for block in self}
        return [
            row_of(block, (own.anchors.shape, own.targets.shape), self.info.dtype, vars(own))
            for block, own in units.items()
        ]

    @cached_property
    def beside(self) -> Beside:
        """What their publisher put beside them: the source's other tensors, its task head.

        Raises:
            InputError: when its files are missing, damaged, or not what `anchors.json` says.
        """
        where, info = self._location, self.info
        if where is None:
            return self._beside
        rest = None if info.rest is None else self._stored(where, REST, info.rest)
        if info.head is None:
            return Beside(rest)
        if where.folder is not None:
            self._path(HEAD_CONFIG)
        config = where.json(HEAD_CONFIG)
        if not isinstance(config, dict):
            raise InputError(f"{where.id}: {HEAD_CONFIG} is no configuration; fetch the anchors again")
        return Beside(rest, (self._stored(where, HEAD_WEIGHTS, info.head), config))

    def _stored(self, where: Location, file: str, names: tuple[str, ...]) -> FileTensors:
        """The tensors in a file beside anchors; one on the Hub is not fetched for it."""
        if where.folder is not None:
            self._path(file)
        tensors = FileTensors(where, file)
        if set(tensors.specs) != set(names):
            raise InputError(f"{where.id}: {file} holds other tensors than {MANIFEST} says; fetch the anchors again")
        return tensors

    def digest(self, block: str) -> str:
        """A hash of one block's tensors (of its file's bytes, where it lies in one)."""
        if self._units is None:
            return digest(self.file(block))
        unit, hashed = self._units[block], hashlib.sha256()
        for tensor in (unit.anchors, unit.targets):
            hashed.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        return hashed.hexdigest()

    def snapshots(self, block: str) -> dict[int, torch.Tensor]:
        """One block's anchors (n, T, d) on their way, by the steps done; empty where none were kept, as on the Hub."""
        if self._units is not None:
            return dict(self[block].snapshots)
        path = None if self.folder is None else self.folder / snapshot_file(block)
        return read_snapshots(path) if path is not None and path.is_file() else {}

    def file(self, block: str) -> Path:
        """The local file of one block; one on the Hub is downloaded into the cache first."""
        return self._path(unit_file(block))

    def _path(self, file: str) -> Path:
        """The local path of a file that has to be there."""
        assert self._location is not None
        path = self._location.path(file)
        if not path.is_file():
            raise InputError(f"{path} is missing; construct or fetch the anchors again")
        return path

    @classmethod
    def construct(
        cls,
        base: str | os.PathLike[str] | PreTrainedModel,
        source: str | os.PathLike[str] | PreTrainedModel,
        device: str | torch.device = "auto",
        seed: int = 0,
        trust_remote_code: bool = False,
        *,
        output: str | os.PathLike[str] | None = None,
        dtype: str = "float32",
        include_rest: bool = False,
        include_head: bool = False,
        snapshots: Sequence[int] = (),
        quiet: bool = False,
        **options: Any,
    ) -> FunctionalDualAnchors:
        """Construct the anchors of a fine-tuned model; no data is looked at.

        Launched in several processes (`torchrun`, `accelerate launch`), these share the blocks: each calls this with
        the same arguments and gets all anchors.

        Args:
            base: the checkpoint it was fine-tuned from: Hub id, folder or model.
            source: the fine-tuned checkpoint.
            device: "auto" or a torch device.
            seed: of the anchors' start.
            trust_remote_code: run model code that comes with the checkpoints.
            output: a folder to write them to block by block; interrupted, the same call goes on there. None keeps
                them in memory.
            dtype: type to store anchors and targets in: "float32", or half of it: "bfloat16", "float16". What that does
                to a merge is then measured, block by block, by adapting the base to both: longer than construction.
            include_rest: put the source's tensors outside the blocks that differ from the base's (embeddings, norms)
                beside the anchors, as they are. A merge of the anchors alone then has them, too.
            include_head: put the source's task head beside them, so that a merge of the anchors alone serves the task.
            snapshots: numbers of steps after which anchors are kept as they are then, to look at how they came about
                (`snapshots`, `hf_fda.analyze`); a merge has no use for them.
            quiet: show no progress.
            options: fields of `FDAConfig`; those of adaptation only matter where a half type's effect is measured.

        Raises:
            InputError: when base or source cannot be used or do not belong together, or a source without a task head is
                to give one.
            RunError: when a loss becomes infinite or not a number.
        """
        wanted = Wanted(dtype, include_rest, include_head, tuple(snapshots))
        with together(device) as team:
            making = team.agree(
                lambda: Making.prepare(base, source, device, seed, trust_remote_code, output, wanted, options)
            )
            if making.folder is None:
                info, units, beside = making.in_memory(team)
                return cls(info, units, beside=beside)
            info = making.on_disk(team, quiet)
            return cls(info, location=Location(str(making.folder), making.folder, kind="dataset"))

    @classmethod
    def from_pretrained(
        cls, id: str | os.PathLike[str], revision: str | None = None, token: str | None = None
    ) -> FunctionalDualAnchors:
        """Open anchors: a folder, or a Hub dataset ("org/name", "org/name@revision", "datasets/org/name").

        Of a dataset only `anchors.json` is fetched; a block's file when it is asked for.

        Args:
            id: the folder or the dataset.
            revision: a branch, tag or commit of the dataset; wins over one inside `id`.
            token: an access token; the saved one if None.

        Raises:
            InputError: when there is no such folder or dataset, or it holds no anchors.
        """
        text = os.fspath(id)
        folder = Path(text).expanduser()
        if folder.is_dir():
            if not (folder / MANIFEST).is_file():
                raise InputError(f"{text}: no {MANIFEST} in it, so it is no anchors folder")
            check_link(folder / MANIFEST, folder)
            return cls(read_manifest(folder / MANIFEST), location=Location(text, folder, kind="dataset"))
        repo_id, _, inside = text.removeprefix(ON_HUB).partition("@")
        with hub_errors(text, "no such folder, and "):
            api = HfApi(token=token)
            commit = api.resolve_revision(repo_id, repo_type="dataset", revision=revision or inside or None).resolved
        with hub_errors(text, "no such folder, and ", file=MANIFEST):
            path = hf_hub_download(repo_id, MANIFEST, revision=commit, repo_type="dataset", token=token)
        location = Location(repo_id, repo_id=repo_id, commit=commit, kind="dataset", token=token)
        return cls(read_manifest(Path(path)), location=location)

    def save_pretrained(
        self, folder: str | os.PathLike[str], dtype: str | None = None, base: Any = None, device: str = "auto"
    ) -> None:
        """Write the anchors as a folder: a card, `anchors.json`, a parquet index and one safetensors file a block, with
        what lies beside them.

        Args:
            folder: where.
            dtype: type to store anchors and targets in, as `construct`; None: the one they have.
            base: what they were constructed from, to measure what a narrower type does to a merge; needed where it is
                not on the Hub.
            device: where to measure that.

        Raises:
            InputError: when the type cannot be used, or there is no base to measure with.
        """
        self._write(Path(folder), Narrowing.of(self.info, dtype, base, device))
        for block in self:
            if kept := self.snapshots(block):
                write_snapshots(Path(folder) / snapshot_file(block), kept)

    def _write(self, target: Path, narrowing: Narrowing, where: str = "PATH_OR_DATASET_ID") -> None:
        """Write the folder; its card says that `where` opens the anchors."""
        (target / MANIFEST).unlink(missing_ok=True)
        for block in self:
            path = target / unit_file(block)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_unit(path, narrowing.stored(block, self[block]), narrowing.info.dtype)
        self.beside.write(target)
        write_frame(target, narrowing.info, where)

    def push_to_hub(
        self, repo_id: str, *, dtype: str | None = None, base: Any = None, **options: Unpack[PushOptions]
    ) -> str:
        """Upload the anchors as a Hub dataset.

        Args:
            repo_id: "org/name"; made if it is not there.
            dtype: type to store anchors and targets in, as `save_pretrained`.
            base: as `save_pretrained`.
            options: private, token, revision, commit_message and create_pr, as `hf_fda.pushing.push`.

        Returns:
            the address of the commit, or of the pull request.
        """
        with tempfile.TemporaryDirectory() as folder:
            self._write(Path(folder), Narrowing.of(self.info, dtype, base, "auto"), repo_id)
            return push(folder, repo_id, **options)


def hidden_size(config: Any) -> int:
    """d of a model's blocks."""
    return int(getattr(config, "hidden_size", None) or config.get_text_config().hidden_size)
