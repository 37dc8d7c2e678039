"""Rows in memory: datasets, data loaders, lists."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from hf_fda.data.tables import SOLE, Row, Table, choose_split, class_names, listed, streamed, types_of_features
from hf_fda.errors import InputError

IN_MEMORY = "in memory only"
"""How the record of rows ends that cannot be found again."""

KINDS = (
    "a file (.jsonl, .json, .csv, .tsv, .txt, .parquet), a folder, a dataset's id on the Hub, a datasets.Dataset, a "
    "DataLoader of encoded batches, or a list of texts, mappings or images"
)


def open_object(value: Any, split: str | None, label: str) -> Table:
    """The rows of an object in memory.

    Args:
        value: a dataset of `datasets` (with or without splits, streamed or not), a data loader that gives mappings from
            the model's arguments to tensors, a frame of pandas, or anything with a length whose items are texts, images
            or mappings.
        split: what a user says of splits.
        label: what to call it in errors.

    Raises:
        InputError: when it is something else, or has several splits.
    """
    if isinstance(value, Mapping) and hasattr(value, "num_rows"):
        chosen = choose_split([str(name) for name in value], split, label)
        return open_object(value[chosen], None, f"{label} (split '{chosen}')")
    if split is not None:
        raise InputError(f"{label}: {type(value).__name__} has no splits; leave split='{split}' out")
    facts = {"path": f"{_title(value)}, {IN_MEMORY}"}
    features = getattr(value, "features", None)
    columns = types_of_features(features) if isinstance(features, Mapping) else None
    if isinstance(value, DataLoader):
        return streamed(label, lambda: _unbatched(value, label), facts)
    if hasattr(value, "iterrows"):  # of pandas, which has columns for items
        return listed(label, value.to_dict("records"), facts)
    if isinstance(value, (str, bytes, Mapping)):
        raise InputError(f"{label}: must be {KINDS}, not {type(value).__name__}")
    if hasattr(value, "__len__") and hasattr(value, "__getitem__"):
        return listed(label, value if columns is not None else _Rows(value, label), facts, columns)
    if isinstance(value, IterableDataset) or type(value).__module__.startswith("datasets."):
        return streamed(label, lambda: iter(value), facts, columns, class_names(features))
    raise InputError(f"{label}: must be {KINDS}, not {type(value).__name__}")


def _title(value: Any) -> str:
    count = f" of {len(value)}" if hasattr(value, "__len__") else ""
    return f"{type(value).__name__}{count}"


class _Rows(Sequence[Row]):
    """Items as rows: mappings as they are, others as rows of one column."""

    def __init__(self, items: Any, label: str) -> None:
        self._items, self._label = items, label

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, number: Any) -> Any:
        item = self._items[number]
        if isinstance(item, Mapping):
            return item
        if isinstance(item, (int, float, tuple, list)):
            raise InputError(
                f"{self._label}: row {number} is a {type(item).__name__}; rows must be texts, images, or mappings from "
                "column to value"
            )
        return {SOLE: item}


def _unbatched(loader: DataLoader[Any], label: str) -> Iterator[Row]:
    """The rows of a loader's batches."""
    for batch in loader:
        if not isinstance(batch, Mapping):
            raise InputError(
                f"{label}: the DataLoader gives a {type(batch).__name__} a batch; it must give mappings from the "
                "model's arguments ('input_ids', 'attention_mask', 'pixel_values', ...) to tensors"
            )
        tensors = {name: cast(Tensor, value) for name, value in batch.items() if isinstance(value, Tensor)}
        if not tensors:
            raise InputError(
                f"{label}: the DataLoader's batches hold no tensors ({', '.join(map(str, batch))}); give it a "
                "collate_fn that encodes rows, or give the dataset itself"
            )
        count = max(len(tensor) if tensor.ndim else 0 for tensor in tensors.values())
        rowwise = {name: tensor for name, tensor in tensors.items() if tensor.ndim and len(tensor) == count}
        yield from ({name: tensor[row] for name, tensor in rowwise.items()} for row in range(count))
