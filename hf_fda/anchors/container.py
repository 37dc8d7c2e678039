"""Anchors as a thing of their own: a folder or a Hub dataset that stands for what a fine-tune learned."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import HfApi, hf_hub_download

from hf_fda.anchors.construction import UnitAnchors
from hf_fda.anchors.files import (
    MANIFEST,
    AnchorsInfo,
    read_manifest,
    read_unit,
    unit_file,
    write_frame,
    write_unit,
)
from hf_fda.anchors.making import Making
from hf_fda.checkpoint.hashed import digest
from hf_fda.errors import InputError, nearest
from hf_fda.hub import hub_errors
from hf_fda.processes import together
from hf_fda.pushing import push

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

    @property
    def in_memory(self) -> bool:
        """Whether they lie in no files."""
        return self._units is not None

    @property
    def on_hub(self) -> bool:
        """Whether their files are on the Hub."""
        return self._repo_id is not None

    @property
    def origin(self) -> str | None:
        """The folder or dataset ("datasets/org/name@commit") they were opened from; None when in memory only."""
        if self._folder is not None:
            return str(self._folder)
        return f"{ON_HUB}{self._repo_id}@{self._revision}" if self._repo_id is not None else None

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
        with hub_errors(self._repo_id, file=unit_file(block)):
            return Path(hf_hub_download(self._repo_id, unit_file(block), revision=self._revision, repo_type="dataset"))

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
            quiet: show no progress.
            options: fields of `FDAConfig`.

        Raises:
            InputError: when base or source cannot be used or do not belong together.
            RunError: when a loss becomes infinite or not a number.
        """
        with together(device) as team:
            making = team.agree(lambda: Making.prepare(base, source, device, seed, trust_remote_code, output, options))
            if making.folder is None:
                return cls(*making.in_memory(team))
            return cls(making.on_disk(team, quiet), folder=making.folder)

    @classmethod
    def from_pretrained(cls, id: str | os.PathLike[str], revision: str | None = None) -> FunctionalDualAnchors:
        """Open anchors: a folder, or a Hub dataset ("org/name", "org/name@revision", "datasets/org/name").

        Raises:
            InputError: when there is no such folder or dataset, or it holds no anchors.
        """
        text = os.fspath(id)
        folder = Path(text).expanduser()
        if folder.is_dir():
            if not (folder / MANIFEST).is_file():
                raise InputError(f"{text}: no {MANIFEST} in it, so it is no anchors folder")
            return cls(read_manifest(folder / MANIFEST), folder=folder)
        repo_id, _, inside = text.removeprefix(ON_HUB).partition("@")
        with hub_errors(text, "no such folder, and "):
            api = HfApi()
            commit = api.resolve_revision(repo_id, repo_type="dataset", revision=revision or inside or None).resolved
        with hub_errors(text, "no such folder, and ", file=MANIFEST):
            path = hf_hub_download(repo_id, MANIFEST, revision=commit, repo_type="dataset")
        return cls(read_manifest(Path(path)), repo_id=repo_id, revision=commit)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the anchors as a folder: a card, `anchors.json`, a parquet index and one safetensors file a block."""
        target = Path(folder)
        for block in self:
            path = target / unit_file(block)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_unit(path, self[block])
        write_frame(target, self.info)

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None, revision: str | None = None
    ) -> str:
        """Upload the anchors as a Hub dataset.

        Args:
            repo_id: "org/name"; made if it is not there.
            private: make it private.
            token: an access token; the saved one if None.
            revision: a branch; the main one if None.

        Returns:
            the address of the commit.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push(folder, repo_id, private=private, token=token, revision=revision)


def hidden_size(config: Any) -> int:
    """d of a model's blocks."""
    return int(getattr(config, "hidden_size", None) or config.get_text_config().hidden_size)
