"""Files that are either finished or not there, and the record of what each was made from.

A finished file is written under a temporary name, flushed, renamed into place and only then recorded: with the key
of everything that determines it and the hash of its bytes. Work that was interrupted leaves files that are not
recorded, and goes on with the first one that is missing, damaged, or was made from something else.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_fda.checkpoint.hashed import digest
from hf_fda.errors import InputError, RunError

WORK = ".cache/huggingface/hf_fda"
"""Where records and work in progress lie inside an output folder; uploads to the Hub leave this folder out."""


def new_folder(output: str | os.PathLike[str]) -> Path:
    """An output folder that may be written: new, empty, or of earlier work of ours.

    Raises:
        InputError: when it is a file or holds something else.
    """
    folder = Path(output).expanduser()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output '{folder}' is a file; choose a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / WORK).is_dir():
        raise InputError(f"output '{folder}' holds something else; choose a new or empty folder")
    return folder


def key_of(*facts: Any) -> str:
    """A hash of plain values (numbers, strings, lists, mappings) that determine a file."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


@dataclass(frozen=True)
class Filled:
    """A file that is written under a temporary name, and what will be recorded of it."""

    name: str
    temporary: Path
    facts: dict[str, Any]


class Store:
    """The files of one output folder.

    Args:
        folder: the output folder; made when something is first written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.work = folder / WORK

    def finished(self, name: str, key: str) -> bool:
        """Whether file `name` is there, undamaged, and was made from what `key` stands for."""
        path, record = self.folder / name, self._record(name)
        try:
            known = json.loads(record.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        if known.get("key") != key or not path.is_file() or path.stat().st_size != known.get("size"):
            return False
        return digest(path) == known.get("xxh3_128")

    def write(self, name: str, key: str, writer: Callable[[Path], str]) -> Path:
        """Make one file: `writer` fills a temporary file, which then takes its name and is recorded.

        Args:
            name: the file.
            key: of everything that determines it.
            writer: fills the file at a path and says the hash of what it wrote (`digest`).

        Raises:
            RunError: when the disk is full or cannot be written.
        """
        return self.settle(self.fill(name, key, writer))

    def fill(self, name: str, key: str, writer: Callable[[Path], str]) -> Filled:
        """The first half of `write`: the file is written, and not yet sure to be on the disk."""
        path, record = self.folder / name, self._record(name)
        temporary = self._partial(name)
        with self._disk_errors(path):
            for parent in (path.parent, record.parent, temporary.parent):
                parent.mkdir(parents=True, exist_ok=True)
            record.unlink(missing_ok=True)
            written = writer(temporary)
            return Filled(name, temporary, {"key": key, "size": temporary.stat().st_size, "xxh3_128": written})

    def settle(self, filled: Filled) -> Path:
        """The second half of `write`: the file goes to the disk, takes its name and is recorded."""
        path = self.folder / filled.name
        with self._disk_errors(path):
            _flush(filled.temporary)
            os.replace(filled.temporary, path)
            partial = self._partial(f"{filled.name}.json")
            partial.write_text(json.dumps(filled.facts), encoding="utf-8")
            os.replace(partial, self._record(filled.name))
        return path

    def await_file(self, name: str, seconds: float = 120.0) -> None:
        """Wait until a file that another process has written is seen here: network file systems remember for a
        while what was not there.

        Raises:
            RunError: when it does not show itself.
        """
        path = self.folder / name
        if not appears(path, seconds):
            raise RunError(
                f"{path}: another process wrote it, but it is not to be seen on {socket.gethostname()} after "
                f"{seconds:.0f} seconds; check the shared file system and run the same command again"
            )

    def move(self, name: str, target: str) -> None:
        """Move a finished file with its record; interrupted anywhere, one of the two names stays finished."""
        source, destination = self.folder / name, self.folder / target
        with self._disk_errors(destination):
            record = self._record(target)
            for parent in (destination.parent, record.parent):
                parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self._record(name), record)
            os.replace(source, destination)
            self._record(name).unlink()

    def write_text(self, name: str, text: str) -> Path:
        """Make one text file, whole or not at all; it is not recorded."""
        return self.write_plainly(name, lambda path: path.write_text(text, encoding="utf-8"))

    def write_plainly(self, name: str, writer: Callable[[Path], object]) -> Path:
        """Make one file, whole or not at all, that is not recorded: `writer` fills a temporary one."""
        path = self.folder / name
        temporary = self._partial(name)
        with self._disk_errors(path):
            for parent in (path.parent, temporary.parent):
                parent.mkdir(parents=True, exist_ok=True)
            writer(temporary)
            os.replace(temporary, path)
        return path

    def remove(self, name: str) -> None:
        """Remove a file or folder of the store, and its record."""
        path = self.folder / name
        if path.is_dir():
            shutil.rmtree(path)
            shutil.rmtree(self.work / "records" / name, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
            self._record(name).unlink(missing_ok=True)

    def _record(self, name: str) -> Path:
        return self.work / "records" / f"{name}.json"

    def _partial(self, name: str) -> Path:
        """Where a file is written at first; a process that was taken for dead does not write over it."""
        return self.work / "partial" / f"{name.replace('/', '__')}.{socket.gethostname()}-{os.getpid()}.partial"

    @contextmanager
    def _disk_errors(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                free = shutil.disk_usage(self.folder).free if self.folder.exists() else 0
                raise RunError(
                    f"{path}: no space left on the disk ({free / 1e9:.1f} GB free); make room and run the same "
                    "command again: it goes on from here"
                ) from None
            raise RunError(f"{path}: cannot be written ({error.strerror or error})") from None


def appears(path: Path, seconds: float) -> bool:
    """Whether a path exists within some seconds; looking into the folders above makes a network file system look."""
    end = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > end:
            return False
        for parent in path.parents:
            if parent.is_dir():
                os.listdir(parent)
                break
        time.sleep(0.2)
    return True


def _flush(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
