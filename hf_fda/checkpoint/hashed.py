"""A file whose hash is taken while it is written."""

from __future__ import annotations

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

READ = 2**20
"""Bytes read at a time of what was not written in order."""


class HashedFile:
    """A file that is written piece by piece, and hashed in a thread of its own as far as the pieces come in order; the
    rest is read again when the file is closed.

    Args:
        path: the file to make.
        size: its bytes.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._file = open(path, "wb+", buffering=0)  # noqa: SIM115 (closed by `close`)
        self._file.truncate(size)
        self._size, self._hashed = size, 0
        self._hash = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1, "hash")
        self._last: Future[None] | None = None

    def write(self, start: int, data: bytes | memoryview) -> None:
        """Write bytes at a place of the file. They must not change until the next piece is written."""
        view = memoryview(data).cast("B")
        if self._last is not None:
            self._last.result()
            self._last = None
        if start == self._hashed:
            self._last = self._thread.submit(self._hash.update, view)
            self._hashed += len(view)
        self._file.seek(start)
        while len(view):
            view = view[self._file.write(view) :]

    def close(self) -> None:
        """Close the file, without a hash if it is not complete."""
        self._thread.shutdown()
        self._file.close()

    def digest(self) -> str:
        """SHA-256 of all bytes, in hexadecimal; nothing is written any more."""
        if self._last is not None:
            self._last.result()
        self._file.seek(self._hashed)
        while piece := self._file.read(READ):
            self._hash.update(piece)
            self._hashed += len(piece)
        return self._hash.hexdigest()
