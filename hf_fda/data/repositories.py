"""Rows in a folder or in a dataset on the Hub, which `datasets` reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from hf_fda.data.objects import open_object
from hf_fda.data.request import HUB_ID, Given
from hf_fda.data.tables import (
    LOOKED_AT,
    Picked,
    Row,
    Table,
    choose_split,
    class_names,
    drawn,
    streamed,
    types_of,
    types_of_features,
)
from hf_fda.errors import InputError
from hf_fda.hub import UNREACHABLE, first_line, hub_errors

SAVED = ("dataset_info.json", "dataset_dict.json")
"""Files by which a folder is known that `save_to_disk` wrote."""


def open_folder(folder: Path, given: Given, label: str) -> Table:
    """The rows of a folder: one that `save_to_disk` wrote, or files that `datasets` reads (images too).

    Raises:
        InputError: when `datasets` cannot read it, or it has several splits.
    """
    if any((folder / name).is_file() for name in SAVED):
        import datasets

        with _readable(label):
            saved = datasets.load_from_disk(folder)
        splits = isinstance(saved, Mapping)
        split = choose_split([str(name) for name in saved], given.split, label) if splits else None
        table = open_object(saved[split] if splits else saved, None if splits else given.split, label)
        return replace(table, facts={"path": str(folder)} | ({"split": split} if split else {}))
    return _built(str(folder), given, label)


def open_dataset(given: Given, label: str) -> Table:
    """The rows of a dataset on the Hub: "org/name", "org/name:config", "org/name@revision".

    Raises:
        InputError: when the Hub has none of that name, cannot be asked, or the dataset has several splits.
    """
    found = HUB_ID.fullmatch(str(given.path))
    assert found is not None
    repo, revision = found["repo"], given.revision or found["revision"]
    commit = _commit(repo, revision, label)
    return _built(repo, replace(given, name=given.name or found["name"], revision=commit), label)


def _commit(repo: str, revision: str | None, label: str) -> str | None:
    """The commit of a dataset; None where the Hub cannot be asked and the cache is to say what is its latest."""
    with hub_errors(f"{label} ({repo})", "no such file or folder, and "):
        try:
            return HfApi().resolve_revision(repo, repo_type="dataset", revision=revision).resolved
        except (RepositoryNotFoundError, RevisionNotFoundError, GatedRepoError):
            raise
        except UNREACHABLE as error:
            if revision is None and _is_cached(repo):
                return None
            raise error from error.__cause__


def _is_cached(repo: str) -> bool:
    """Whether an earlier run left a dataset in the cache of `datasets`."""
    import datasets

    return (Path(datasets.config.HF_DATASETS_CACHE) / repo.replace("/", "___")).is_dir()


def _built(path: str, given: Given, label: str) -> Table:
    """A table of what a builder of `datasets` reads; only its first rows are looked at before it is asked for."""
    import datasets

    with _readable(label):
        builder: Any = datasets.load_dataset_builder(path, given.name, revision=given.revision)
        facts = _facts(path, builder, given, label)
        known = builder.info.splits or builder.config.data_files or builder.as_streaming_dataset()
        split = choose_split([str(name) for name in known], given.split, label)
        whole = split.partition("[")[0]  # a stream knows no parts such as "train[:10%]"
        stream = builder.as_streaming_dataset(whole)
        columns = types_of_features(stream.features) if stream.features else types_of(list(stream.take(LOOKED_AT)))

    def first() -> Iterator[Row]:
        with _readable(label):
            yield from stream

    def read(most: int | None, random: torch.Generator) -> Sequence[Row]:
        with _readable(label):
            builder.download_and_prepare()
            rows = builder.as_dataset(split)

        def row(number: int) -> Row:
            with _readable(label):
                return rows[number]

        return Picked(row, range(len(rows)) if most is None else drawn(len(rows), most, random))

    facts["split"] = split
    classes = class_names(stream.features)
    if given.stream:
        return streamed(label, first, facts | {"stream": True}, columns, classes)
    sizes = builder.info.splits or {}
    count = sizes[whole].num_examples if whole == split and whole in sizes else None
    return Table(label, columns, count or None, first, read, facts, classes)


def _facts(path: str, builder: Any, given: Given, label: str) -> dict[str, Any]:
    """What finds again the rows that a builder reads: a Hub dataset's commit, and its configuration.

    Raises:
        InputError: when it reads another commit than that which is wanted, as it does offline.
    """
    facts = {"path": path}
    if builder.repo_id is not None:
        if given.revision not in (None, builder.hash):
            raise InputError(
                f"{label} ({path}): commit {given.revision} is not in the cache, which has {builder.hash}, and the Hub "
                "cannot be asked"
            )
        facts["revision"] = builder.hash
    if builder.config.name != "default":
        facts["name"] = builder.config.name
    return facts


@contextmanager
def _readable(label: str) -> Iterator[None]:
    """What `datasets` raises, in this package's words; it has no kinds of its own for most of it."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{label}: datasets cannot read it ({first_line(error)})") from None
