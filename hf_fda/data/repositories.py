"""Rows in a folder or in a dataset on the Hub, which `datasets` reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from hf_fda.data.objects import open_object
from hf_fda.data.request import HUB_ID, Given
from hf_fda.data.tables import LOOKED_AT, Row, Table, choose_split, drawn, types_of, types_of_features
from hf_fda.errors import InputError
from hf_fda.hub import UNREACHABLE, first_line, hub_errors

SAVED = ("dataset_info.json", "dataset_dict.json")
"""Files by which a folder is known that `save_to_disk` wrote."""


def open_folder(folder: Path, given: Given, label: str) -> Table:
    """The rows of a folder: one that `save_to_disk` wrote, or files that `datasets` reads (images too).

    Raises:
        InputError: when `datasets` cannot read it, or it has several splits.
    """
    facts = {"path": str(folder)}
    if any((folder / name).is_file() for name in SAVED):
        import datasets

        with _readable(label):
            saved = datasets.load_from_disk(folder)
        splits = isinstance(saved, Mapping)
        split = choose_split([str(name) for name in saved], given.split, label) if splits else None
        table = open_object(saved[split] if splits else saved, None if splits else given.split, label)
        return _found_at(table, label, facts | ({"split": split} if split else {}))
    return _built(str(folder), given, label, facts, None)


def open_dataset(given: Given, label: str) -> Table:
    """The rows of a dataset on the Hub: "org/name", "org/name:config", "org/name@revision".

    Raises:
        InputError: when the Hub has none of that name, cannot be asked, or the dataset has several splits.
    """
    found = HUB_ID.fullmatch(str(given.path))
    assert found is not None
    repo, name, revision = found["repo"], given.name or found["name"], given.revision or found["revision"]
    commit = _commit(repo, revision, label)
    facts = {"path": repo} | ({"revision": commit} if commit else {"revision": revision} if revision else {})
    return _built(repo, Given(repo, name, given.split, commit or revision), label, facts, commit or revision)


def _commit(repo: str, revision: str | None, label: str) -> str | None:
    """The commit of a dataset; None where the Hub cannot be asked, and only the cache can tell."""
    with hub_errors(f"{label} ({repo})", "no such file or folder, and "):
        try:
            return HfApi().dataset_info(repo, revision=revision).sha
        except (RepositoryNotFoundError, RevisionNotFoundError, GatedRepoError):
            raise
        except UNREACHABLE as error:
            if not _is_cached(repo):
                raise error from error.__cause__
            return None


def _is_cached(repo: str) -> bool:
    """Whether an earlier run left a dataset in the cache of `datasets`."""
    import datasets

    return (Path(datasets.config.HF_DATASETS_CACHE) / repo.replace("/", "___")).is_dir()


def _built(path: str, given: Given, label: str, facts: Mapping[str, Any], revision: str | None) -> Table:
    """A table of what a builder of `datasets` reads; only its first rows are looked at before it is asked for."""
    import datasets

    with _readable(label):
        builder = datasets.load_dataset_builder(path, given.name, revision=revision)
    known = builder.info.splits or builder.config.data_files or {}
    with _readable(label):
        streams: Any = builder.as_streaming_dataset() if not known else None
    split = choose_split([str(name) for name in known or streams], given.split, label)
    whole = split.partition("[")[0]  # a stream knows no parts such as "train[:10%]"
    stream = builder.as_streaming_dataset(whole)

    def first() -> Iterator[Row]:
        with _readable(label):
            yield from stream

    def read(most: int | None, random: torch.Generator) -> Sequence[Row]:
        with _readable(label):
            rows: Any = datasets.load_dataset(path, given.name, split=split, revision=revision)
        return [rows[row] for row in (range(len(rows)) if most is None else drawn(len(rows), most, random))]

    features = stream.features
    columns = types_of_features(features) if features else types_of(list(stream.take(LOOKED_AT)))
    infos = builder.info.splits or {}
    count = infos[whole].num_examples if whole in infos and whole == split else None
    named = {"name": given.name} if given.name else {}
    return Table(label, columns, count or None, first, read, {**facts, **named, "split": split})


def _found_at(table: Table, label: str, facts: Mapping[str, Any]) -> Table:
    return Table(label, table.columns, table.count, table.first, table.read, facts)


@contextmanager
def _readable(label: str) -> Iterator[None]:
    """What `datasets` raises, in this package's words; it has no kinds of its own for most of it."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{label}: datasets cannot read it ({first_line(error)})") from None
