"""Rows in one file on this machine."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_fda.data.tables import DEFAULT_SPLIT, SOLE, Row, Table, listed, types_of_features
from hf_fda.errors import InputError, nearest

WRAPPER = "data"
"""The key under which a JSON file may hold its rows."""


def open_file(path: Path, label: str, split: str | None = None) -> Table:
    """A file's rows. Text is read at once, so that a broken line is found before any work; parquet when asked for.

    Args:
        path: the file.
        label: what to call it in errors.
        split: what a user says of splits.

    Raises:
        InputError: when it cannot be read, naming the line.
    """
    if split not in (None, DEFAULT_SPLIT):
        raise InputError(f"{label}: a file has no splits; leave split='{split}' out or give its folder")
    ending = path.suffix.lower()
    facts = {"path": str(path)}
    if ending == ".parquet":
        return _parquet(path, label, facts)
    if ending not in TEXT_FILES:
        known = [*TEXT_FILES, ".parquet"]
        raise InputError(f"{label}: rows are read from {', '.join(known)} files; {nearest(ending, known)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{label}: is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"{label}: cannot be read ({error.strerror})") from None
    return listed(label, TEXT_FILES[ending](text, label), facts)


def _json_lines(text: str, label: str) -> list[Row]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{label}, line {number}: not valid JSON ({error})") from None
        rows.append(_as_row(row, f"{label}, line {number}"))
    return rows


def _json(text: str, label: str) -> Sequence[Row]:
    """A list of rows, or one under the key "data"; a file of one object a line is read as such."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return _json_lines(text, label)
        raise InputError(f"{label}, line {error.lineno}: not valid JSON ({error.msg})") from None
    if isinstance(content, dict):
        content = content.get(WRAPPER)
    if not isinstance(content, list):
        raise InputError(f"{label}: must be a list of rows, or a mapping with one under '{WRAPPER}'")
    return [_as_row(row, f"{label}, row {number}") for number, row in enumerate(content, 1)]


def _as_row(row: Any, label: str) -> Row:
    if isinstance(row, str):
        return {SOLE: row}
    if not isinstance(row, Mapping):
        raise InputError(f"{label}: a row must be a mapping from column to value, or a text, not {row!r:.40}")
    return row


def _separated(delimiter: str) -> Callable[[str, str], list[Row]]:
    def read(text: str, label: str) -> list[Row]:
        reader = csv.DictReader(io.StringIO(text), delimiter=delimiter, strict=True)
        rows: list[Row] = []
        try:
            for row in reader:
                if None in row or None in row.values():
                    width = len(reader.fieldnames or ())
                    raise InputError(f"{label}, line {reader.line_num}: does not have the header's {width} columns")
                rows.append(row)
        except csv.Error as error:
            raise InputError(f"{label}, line {reader.line_num}: {error}") from None
        return rows

    return read


def _lines(text: str, label: str) -> list[Row]:
    return [{SOLE: line} for line in text.removesuffix("\n").split("\n")]


TEXT_FILES: dict[str, Callable[[str, str], Sequence[Row]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".txt": _lines,
}
"""How the content of a text file becomes rows, by its ending; a .txt file has one text a line."""


def _parquet(path: Path, label: str, facts: Mapping[str, Any]) -> Table:
    import pyarrow.parquet
    from datasets import Dataset

    try:
        dataset = Dataset(pyarrow.parquet.read_table(path))
    except (OSError, ValueError) as error:  # pyarrow's own errors are kinds of ValueError
        raise InputError(f"{label}: cannot be read as parquet ({str(error).splitlines()[0]})") from None
    return listed(label, dataset, facts, types_of_features(dataset.features))
