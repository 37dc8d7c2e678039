"""What a user says about data: which rows, and which columns of them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from hf_fda.errors import InputError, nearest

ANCHORS = "anchors"
"""What a user says for data where anchors are to take its place."""

SYNTHETIC = "synthetic"
"""What a user says for data where rows are to be drawn from the sources' weights."""

WORDS = (ANCHORS, SYNTHETIC)
"""What may stand for the data of all tasks."""

HUB_ID = re.compile(r"(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?::(?P<name>[^@\s]+))?(?:@(?P<revision>\S+))?")
"""A dataset on the Hub: "org/name", "org/name:config", "org/name@revision", "org/name:config@revision"."""


@dataclass(frozen=True)
class Reading:
    """How rows are read, the same for all tasks.

    `rows` is the most rows of a task (None: all): a sample by `seed` of those that can be counted, in their own order,
    and the first ones of a stream. `max_length` is the most tokens of a text, or the model's own maximum where that is
    less; what is longer is cut by the tokenizer, as a rule at its end. Without `fetch` no weights are downloaded for
    rows that are drawn from them: until they are here, it is assumed that they show some text. Unless outputs are
    `compared` on the rows, a source needs no head.
    """

    rows: int | None = None
    max_length: int = 512
    seed: int = 0
    trust_remote_code: bool = False
    fetch: bool = True
    compared: bool = True

    def __post_init__(self) -> None:
        if self.rows is not None:
            check_number("rows", self.rows)
        check_number("max_length", self.max_length)


def check_number(name: str, value: Any) -> None:
    """Refuse what is no whole number, at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name} must be a whole number, at least 1, not {value!r}")


@dataclass(frozen=True)
class Given:
    """The data of one task as a user gives it.

    `path` is a file, a folder, a Hub id or an object in memory; `name`, `split` and `revision` are of a dataset with
    several. With `stream` the first rows are read and no more of a dataset is fetched than that takes. `columns` are
    those of the text (or of a pair of texts) or image, or `prompt` and `target`; `rows` and `max_length` overrule those
    of `Reading`. Rows whose `fingerprint` is another are refused.
    """

    path: Any
    name: str | None = None
    split: str | None = None
    revision: str | None = None
    stream: bool = False
    columns: tuple[str, ...] = ()
    prompt: str | None = None
    target: str | None = None
    rows: int | None = None
    max_length: int | None = None
    fingerprint: str | None = None

    @property
    def synthetic(self) -> bool:
        """Whether there are no rows, and such are to be drawn from the source's weights."""
        return isinstance(self.path, str) and self.path == SYNTHETIC

    @property
    def named(self) -> tuple[str, ...]:
        """All columns that are named."""
        return tuple(name for name in (*self.columns, self.prompt, self.target) if name is not None)


KEYS = tuple(field.name for field in fields(Given))


def as_given(task: str, value: Any) -> Given:
    """One task's data, from what a user gives: an object, a path or Hub id, or a mapping with the keys of `Given`.

    Raises:
        InputError: when the mapping says something else.
    """
    if not isinstance(value, Mapping) or hasattr(value, "num_rows"):  # a DatasetDict is a mapping of splits
        return Given(value)
    for key in value:
        if key not in KEYS:
            raise InputError(f"data of '{task}': unknown key '{key}': {nearest(str(key), KEYS)}")
    if value.get("path") is None:
        raise InputError(f"data of '{task}': no 'path'; name the file, folder or Hub dataset, or give a dataset")
    columns = value.get("columns") or ()
    listed = (columns,) if isinstance(columns, str) else tuple(columns) if isinstance(columns, Sequence) else None
    if listed is None or len(listed) > 2 or not all(isinstance(name, str) for name in listed):
        raise InputError(f"data of '{task}': columns must name one column, or two for pairs, not {columns!r}")
    for key in ("name", "split", "revision", "prompt", "target", "fingerprint"):
        if not isinstance(value.get(key), (str, type(None))):
            raise InputError(f"data of '{task}': {key} must be text, not {value[key]!r}")
    if not isinstance(value.get("stream", False), bool):
        raise InputError(f"data of '{task}': stream must be true or false, not {value['stream']!r}")
    given = Given(**{**value, "columns": listed})
    for key in ("rows", "max_length"):
        if value.get(key) is not None:
            check_number(f"data of '{task}': {key}", value[key])
    if given.columns and given.prompt:
        raise InputError(f"data of '{task}': give columns, or prompt and target, not both")
    return given


def is_path(value: Any) -> bool:
    """Whether data is given by a name, not as an object."""
    return isinstance(value, (str, os.PathLike))


def said_on_command_line(
    data: Sequence[str], columns: Sequence[str] = (), splits: Sequence[str] = (), flag: str = "--data"
) -> dict[str, dict[str, Any]]:
    """Data from a command line's words.

    >>> said_on_command_line(["trec=org/trec"], ["trec=question"])
    {'trec': {'path': 'org/trec', 'columns': ['question']}}

    Args:
        data: "TASK=PATH" for each task.
        columns: "TASK=COLUMN" or "TASK=COLUMN,COLUMN".
        splits: "TASK=SPLIT".
        flag: by which `data` was said.

    Raises:
        InputError: when a word is written otherwise, or says something of a task without data.
    """
    found: dict[str, dict[str, Any]] = {}
    for word in data:
        task, path = _parted(word, flag)
        if task in found:
            raise InputError(f"{flag} {word}: '{task}' has data already; put the rows into one file")
        found[task] = {"path": path}
    for other, key, words in (("--columns", "columns", columns), ("--split", "split", splits)):
        for word in words:
            task, value = _parted(word, other)
            if task not in found:
                raise InputError(f"{other} {word}: '{task}' has no data: {nearest(task, found)}")
            found[task][key] = value.split(",") if key == "columns" else value
    return found


def _parted(word: str, flag: str) -> tuple[str, str]:
    task, equals, value = word.partition("=")
    if not (task and equals and value):
        raise InputError(f"{flag} {word}: write it as {flag} TASK=...")
    return task, value
