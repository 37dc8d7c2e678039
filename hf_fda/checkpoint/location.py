"""Where a checkpoint's files are: a folder, or a repository on the Hub whose files are fetched when needed."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)

from hf_fda.checkpoint.header import TensorEntry, known_dtype, read_header
from hf_fda.checkpoint.untrusted import check_file_names, check_link, read_json
from hf_fda.errors import InputError
from hf_fda.hub import UNREACHABLE, hub_errors

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"


@dataclass
class Location:
    """Files of one checkpoint, or of one dataset. `folder` is set for a folder, `repo_id` and `commit` for a Hub
    repository of some `kind`, of which the files may lie in a `subfolder`; `token` is the one to ask for them with.
    `inner` are the files one folder further in."""

    id: str
    folder: Path | None = None
    repo_id: str | None = None
    commit: str | None = None
    names: tuple[str, ...] = field(default=())
    subfolder: str = ""
    inner: tuple[str, ...] = field(default=())
    kind: str = "model"
    token: str | None = field(default=None, repr=False)

    def holding(self, name: str) -> tuple[str, ...]:
        """The folders in it that hold a file of some name."""
        return tuple(own.removesuffix(f"/{name}") for own in self.inner if own.endswith(f"/{name}"))

    def inside(self, subfolder: str) -> Location:
        """A folder in it."""
        names = tuple(own.removeprefix(f"{subfolder}/") for own in self.inner if own.startswith(f"{subfolder}/"))
        repo_id, at, revision = self.id.partition("@")
        id = f"{self.id.rstrip('/')}/{subfolder}" if self.repo_id is None else f"{repo_id}/{subfolder}{at}{revision}"
        folder = None if self.folder is None else self.folder / subfolder
        return Location(id, folder, self.repo_id, self.commit, names, subfolder, kind=self.kind, token=self.token)

    def path(self, name: str) -> Path:
        """The local path of one file; a Hub file is downloaded into the cache first."""
        if self.folder is not None:
            if self.kind == "dataset":
                check_link(self.folder / name, self.folder)
            return self.folder / name
        with hub_errors(self.id, file=name):
            return self._fetch(name)

    def _fetch(self, name: str, cached: bool = False) -> Path:
        """A Hub file in the cache; with `cached` it has to be there already."""
        assert self.repo_id is not None
        where: dict[str, Any] = {"revision": self.commit, "repo_type": self.kind, "token": self.token}
        return Path(hf_hub_download(self.repo_id, self._remote(name), **where, local_files_only=cached))

    def _remote(self, name: str) -> str:
        """A file's name in the repository."""
        return f"{self.subfolder}/{name}" if self.subfolder else name

    def json(self, name: str) -> Any:
        """A JSON file's content.

        Raises:
            InputError: when it is not valid JSON.
        """
        return read_json(self.path(name), f"{self.id}: {name}")

    @property
    def here(self) -> bool:
        """Whether the weights lie on this disk; those of a repository on the Hub do once they were fetched."""
        if self.folder is not None:
            return True
        try:
            for name in self.weight_files():
                self._fetch(name, cached=True)
        except LocalEntryNotFoundError:
            return False
        return True

    def header(self, name: str) -> dict[str, TensorEntry]:
        """A safetensors file's tensors. Of a Hub file that is not in the cache only the header is fetched, and where
        its tensors start is not known (counted from the header's end)."""
        if self.folder is not None:
            return read_header(self.path(name))
        assert self.repo_id is not None
        try:
            return read_header(self._fetch(name, cached=True))
        except LocalEntryNotFoundError:
            pass
        try:
            with hub_errors(self.id, file=name):
                metadata = HfApi(token=self.token).parse_safetensors_file_metadata(
                    self.repo_id, self._remote(name), repo_type=self.kind, revision=self.commit
                )
        except (SafetensorsParsingError, NotASafetensorsRepoError):
            raise InputError(f"{self.id}: {name} on the Hub is no safetensors file, or damaged") from None
        return {
            tensor: TensorEntry(known_dtype(self.id, tensor, info.dtype), tuple(info.shape), info.data_offsets[0])
            for tensor, info in metadata.tensors.items()
        }

    def fingerprint(self) -> str:
        """A hash that changes when the weights do: the commit, or the weight files' names, sizes and times."""
        facts: list[Any] = [self.commit]
        if self.commit is None and self.folder is not None:
            for name in self.weight_files():
                stat = os.stat(self.folder / name)
                facts.append((name, stat.st_size, stat.st_mtime_ns))
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def weight_files(self) -> tuple[str, ...]:
        """The safetensors files of the checkpoint, from its index where it has one.

        Raises:
            InputError: when there are none, or the index names a file outside the folder or one that is missing.
        """
        if INDEX in self.names:
            index = self.json(INDEX)
            files = index.get("weight_map") if isinstance(index, dict) else None
            if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
                raise InputError(f"{self.id}: {INDEX} has no weight_map that names files; fetch or save it again")
            listed = sorted(set(files.values()))
            for name in listed:
                if os.path.basename(name) != name or name in ("", ".", ".."):
                    raise InputError(f"{self.id}: {INDEX} names '{name}', which lies outside the checkpoint; refused")
                if name not in self.names:
                    raise InputError(f"{self.id}: {INDEX} names '{name}', which is missing; fetch it again")
            return tuple(listed)
        if SINGLE in self.names:
            return (SINGLE,)
        raise InputError(f"{self.id}: {self._no_weights()}")

    def _no_weights(self) -> str:
        if ADAPTER in self.names:
            return "this is a PEFT adapter; an adapter is a source: give what it was trained on as the base"
        if any(re.fullmatch(r".*\.(bin|pt|pth|ckpt)", name) for name in self.names):
            return (
                "it holds pickled weights only, which are never opened; convert it once: "
                f"AutoModel.from_pretrained('{self.id}').save_pretrained('converted/')"
            )
        return f"no {SINGLE} and no {INDEX} in it"


def locate(id: str | os.PathLike[str], revision: str | None = None) -> Location:
    """Find a checkpoint.

    Args:
        id: a folder, or a Hub id: "org/name", "org/name@revision", or a folder in one: "org/name/folder@revision".
        revision: a branch, tag or commit; wins over one inside `id`.

    Raises:
        InputError: when there is no such folder or repository, or the Hub cannot be reached and it is not cached.
    """
    text = os.fspath(id)
    folder = Path(text).expanduser()
    if folder.is_dir():
        names, inner = _files_in(folder)
        return Location(text, folder=folder, names=names, inner=inner)
    if folder.exists():
        raise InputError(f"{text}: is a file; pass the folder it lies in")
    repo_id, _, inside = text.partition("@")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", repo_id) or text.startswith((".", "/", "~")):
        raise InputError(f"{text}: no such folder, and not a Hub id ('org/name' or 'org/name@revision') either")
    org, *rest = repo_id.split("/")
    found = _on_hub(text, "/".join([org, *rest[:1]]), revision or inside or None, "/".join(rest[1:]))
    if found.subfolder and not found.names:
        raise InputError(f"{text}: no such folder, and the repository '{found.repo_id}' has none of that name either")
    return found


def _files_in(folder: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of a folder's files, and of those in its folders."""
    entries = list(os.scandir(folder))
    names = sorted(entry.name for entry in entries if entry.is_file())
    folders = [entry for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    readable = [own for own in folders if os.access(own.path, os.R_OK | os.X_OK)]
    inner = [f"{own.name}/{entry.name}" for own in readable for entry in os.scandir(own.path) if entry.is_file()]
    return tuple(names), tuple(sorted(inner))


def _on_hub(text: str, repo_id: str, revision: str | None, subfolder: str) -> Location:
    api = HfApi()
    with hub_errors(text, "no such folder, not in the cache, and "):
        try:
            commit = api.resolve_revision(repo_id, revision=revision).resolved  # remembered for offline use
            info = api.model_info(repo_id, revision=commit)
        except (RepositoryNotFoundError, RevisionNotFoundError, GatedRepoError):
            raise
        except UNREACHABLE as error:
            cached = _in_cache(text, repo_id, revision, subfolder)
            if cached is None:
                raise error from error.__cause__
            return cached
    check_file_names((own.rfilename for own in info.siblings or ()), text)
    prefix = f"{subfolder}/" if subfolder else ""
    within = sorted(own.rfilename for own in info.siblings or () if own.rfilename.startswith(prefix))
    names = tuple(own.removeprefix(prefix) for own in within)
    inner = tuple(own for own in names if own.count("/") == 1)
    return Location(text, None, repo_id, info.sha, names, subfolder, inner)


def _in_cache(text: str, repo_id: str, revision: str | None, subfolder: str) -> Location | None:
    """A repository as an earlier run left it in the cache; None when its weights are not there."""
    try:
        folder = Path(snapshot_download(repo_id, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, OSError):
        return None
    own = folder / subfolder
    if not own.is_dir():
        return None
    names, inner = _files_in(own)
    found = Location(text, own, repo_id, folder.name, names, subfolder, inner)
    if ADAPTER in names or found.holding(ADAPTER):
        return found
    try:
        found.weight_files()
    except InputError:
        return None
    return found
