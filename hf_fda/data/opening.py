"""Data of a merge: matched to the sources, checked before any work, and encoded when it is needed."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_fda.checkpoint.alignment import AlignedSource
from hf_fda.data.encoders import Chosen, choose_encoder, taker_of
from hf_fda.data.encoding import EncodedRow, Encoder
from hf_fda.data.files import TEXT_FILES, open_file
from hf_fda.data.objects import IN_MEMORY, KINDS, open_object
from hf_fda.data.processors import check_tokens
from hf_fda.data.repositories import open_dataset, open_folder
from hf_fda.data.request import HUB_ID, SYNTHETIC, Given, Reading, as_given, is_path
from hf_fda.data.rows import Kind, TaskRows
from hf_fda.data.synthetic import DRAWN, draw_from
from hf_fda.data.tables import Table, described
from hf_fda.errors import InputError, few, nearest
from hf_fda.inputs import Inputs
from hf_fda.progress import logger

DRAWN_FROM = "synthetic, drawn from the source's weights"
"""Where rows come from that nobody gave, in words."""

TRIED = 20
"""How many rows are looked at, at most, for one that has something in it."""


@dataclass(frozen=True)
class OpenedData:
    """The rows of one task, found and checked, not yet encoded.

    `kind` is what the source's logits mean on them; `count` how many rows there are at most, None where only reading
    them tells. `lacks_targets` says that an encoder-decoder's rows do not say what is written on them, so that
    `with_written_targets` has to be called. `record` is how to find the rows again, as plain values that `open_data`
    takes for the task; of rows in memory it says only what they were.
    """

    task: str
    kind: Kind
    count: int | None
    lacks_targets: bool
    record: Mapping[str, Any]
    table: Table
    encoder: Encoder
    given: Given
    seed: int

    @property
    def summary(self) -> str:
        """Where the rows come from, and how many they are, in words."""
        return self._said(DRAWN_FROM if self.drawn else str(self.record["path"]))

    @property
    def shown(self) -> str:
        """The same for readers elsewhere: of a file on a disk its own name alone."""
        if self.drawn:
            return self.summary
        path = str(self.record["path"])
        revision = f"@{self.record['revision']}" if self.on_hub and "revision" in self.record else ""
        return self._said(path + revision if self.on_hub else Path(path).name)

    @property
    def on_hub(self) -> bool:
        """Whether the rows are a dataset on the Hub."""
        path = str(self.record["path"])
        return not self.drawn and not path.endswith(IN_MEMORY) and not Path(path).expanduser().exists()

    @property
    def drawn(self) -> bool:
        """Whether the rows are no data, but drawn from the source's weights."""
        return self.record["path"] == SYNTHETIC

    @property
    def assumed(self) -> bool:
        """Whether the rows are drawn from weights that were not downloaded yet, which may turn out to show nothing."""
        return self.table.assumed

    def _said(self, what: str) -> str:
        return what if self.count is None else f"{what}, {self.count:,} row{'s' if self.count > 1 else ''}"

    def encode(self) -> TaskRows:
        """Read and encode the rows. Those with nothing in them are left out, which is logged; so is what is cut.

        Raises:
            InputError: when none is left, or they are not those that the given fingerprint is of.
        """
        found = self.table.sample(self.given.rows, self.seed, self.task)
        encoded = [row for row in map(self.encoder, found) if row is not None]
        if not encoded:
            raise nothing_in(self.table, len(found))
        cut = [row.length for row in encoded if row.cut and not self.drawn]
        report_rows(self.table.label, len(found), len(encoded), cut)
        inputs = [row.inputs for row in encoded]
        scored = [row.scored for row in encoded if row.scored is not None] or None
        fingerprint = fingerprint_of(self.kind, inputs, scored)
        if self.given.fingerprint not in (None, fingerprint):
            raise InputError(
                f"{self.table.label}: not the rows that its fingerprint was written down for, or they are encoded "
                "otherwise now; leave the fingerprint out to take them as they are"
            )
        return TaskRows(self.task, self.kind, inputs, scored, self.encoder.padding, fingerprint)

    def recorded(self, rows: TaskRows) -> dict[str, Any]:
        """`record` with the fingerprint of what was read, which is checked when the rows are read again."""
        return {**self.record, "fingerprint": rows.fingerprint}


def most_rows(data: Mapping[str, OpenedData], limit: int | None) -> int:
    """How many rows the task has that has most.

    Args:
        data: of all tasks.
        limit: of the rows that are taken; None: all are. Of a stream it is all that is known.
    """
    known = [own.count if own.count is not None else limit or 0 for own in data.values()]
    return min(max(known, default=0), limit or max(known, default=0))


def open_data(
    data: Mapping[str, Any] | str, inputs: Inputs, reading: Reading | None = None, of_all: bool = True
) -> dict[str, OpenedData]:
    """Open the rows of every source, and check that they can be encoded; no more rows are read than that takes.

    Args:
        data: by task name a file (.jsonl, .json, .csv, .tsv, .txt, .parquet), a folder of files or of `save_to_disk`, a
            dataset's id on the Hub ("org/name", "org/name:config", "org/name@revision"), a `datasets.Dataset`, a
            DataLoader of encoded batches, a list of texts, mappings or images, a mapping with one of these under
            "path" and any of the other keys of `Given`, or `SYNTHETIC`; that alone: of every source.
        inputs: base and sources.
        reading: how rows are read.
        of_all: whether every source has to have rows.

    Returns:
        one for each source that has rows, in the sources' order.

    Raises:
        InputError: when there are no rows for a source, they cannot be read, or the source does not take them.
    """
    reading = reading or Reading()
    given = _matched(data, inputs, of_all)
    opened, tokenizers = {}, {}
    for source in inputs.weighted:
        if source.name not in given:
            continue
        opened[source.name], chosen = _open(inputs, source, given[source.name], reading)
        if chosen.tokenizer is not None:
            tokenizers[source.name] = chosen.tokenizer
    check_tokens(inputs, tokenizers)
    return opened


def fingerprint_of(kind: Kind, inputs: Sequence[Mapping[str, Tensor]], scored: Sequence[Tensor] | None) -> str:
    """A hash of encoded rows: of what logits mean, and of all tensors with their names, types and shapes."""
    digest = hashlib.sha256(kind.encode())
    for number, row in enumerate(inputs):
        tensors = dict(sorted(row.items())) | ({} if scored is None else {"scored": scored[number]})
        for name, tensor in tensors.items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _matched(data: Any, inputs: Inputs, of_all: bool) -> dict[str, Given]:
    """What is given for each source that has rows."""
    if isinstance(data, str) and data == SYNTHETIC:
        data = dict.fromkeys((source.name for source in inputs.weighted), SYNTHETIC)
    if not isinstance(data, Mapping) or hasattr(data, "num_rows"):
        raise InputError(f"data must be a mapping from task name to its rows, not {type(data).__name__}")
    names = [source.name for source in inputs.sources]
    for task in data:
        if task not in names:
            raise InputError(f"data: there is no source '{task}': {nearest(str(task), names)}")
    for source in inputs.sources:
        if source.weights is None and (of_all or source.name in data):
            raise InputError(f"source '{source.name}' is anchors only; rows can only be shown to weights")
    lacking = [name for name in names if name not in data and of_all]
    if lacking:
        raise InputError(
            f"no data for {few(map(repr, lacking), 5)}; every source needs rows of its task: "
            f"data={{'{lacking[0]}': ...}} (--data {lacking[0]}=...)"
        )
    return {task: as_given(task, value) for task, value in data.items()}


def _open(inputs: Inputs, source: AlignedSource, given: Given, reading: Reading) -> tuple[OpenedData, Chosen]:
    taker = taker_of(source, reading.compared)
    if given.synthetic:
        given = replace(given, rows=given.rows or min(reading.rows or DRAWN, DRAWN))
        table = draw_from(inputs, source, taker, given, reading)
    else:
        given = replace(given, rows=given.rows or reading.rows)
        table = open_table(given, f"data of '{source.name}'")
    chosen = choose_encoder(inputs, source, taker, table, given, reading)
    tried = _first_encoded(table, chosen.encoder)
    facts = {**table.facts, **chosen.facts} | ({"rows": given.rows} if given.rows else {})
    counts = [count for count in (given.rows, table.count) if count is not None]
    return (
        OpenedData(
            task=source.name,
            kind=taker.form.kind,
            count=min(counts, default=None),
            lacks_targets=taker.form.kind == "tokens" and tried.scored is None,
            record=facts,
            table=table,
            encoder=chosen.encoder,
            given=given,
            seed=reading.seed,
        ),
        chosen,
    )


def open_table(given: Given, label: str) -> Table:
    """The rows that a user gives, not yet read.

    Args:
        given: where they are.
        label: what to call them in errors.

    Raises:
        InputError: when there are none, or they cannot be read.
    """
    table = _at_path(given, label) if is_path(given.path) else open_object(given.path, given.split, label)
    if not table.columns or table.count == 0:
        raise InputError(f"{table.label}: there are no rows in it")
    return table


def _at_path(given: Given, label: str) -> Table:
    text = str(given.path)
    path = Path(text).expanduser()
    if text.endswith(IN_MEMORY):
        raise InputError(f"{label}: was a {text} when the merge was written down; give these rows again: data=...")
    if path.is_file():
        return open_file(path, f"{label} ({text})", given.split)
    if path.is_dir():
        return open_folder(path, given, f"{label} ({text})")
    if path.suffix.lower() in (*TEXT_FILES, ".parquet") or text.startswith((".", "/", "~")):
        beside = sorted(own.name for own in path.parent.iterdir()) if path.parent.is_dir() else []
        hint = f"; {nearest(path.name, beside)}" if 0 < len(beside) < TRIED else ""
        raise InputError(f"{label}: there is no file or folder '{text}'{hint}")
    if not HUB_ID.fullmatch(text):
        raise InputError(
            f"{label}: there is no file or folder '{text}', and it is no dataset's id either: give {KINDS}"
        )
    return open_dataset(given, label)


def _first_encoded(table: Table, encoder: Encoder) -> EncodedRow:
    """The first row that has something in it, encoded."""
    tried = 0
    for row in itertools.islice(table.first(), TRIED):
        tried += 1
        encoded = encoder(row)
        if encoded is not None:
            return encoded
    raise nothing_in(table, tried)


def nothing_in(table: Table, count: int) -> InputError:
    """The error that of so many rows none has anything in it."""
    return InputError(
        f"{table.label}: none of {count} rows has anything in it that the model predicts on; it has the columns "
        f"{described(table.columns)}"
    )


def report_rows(label: str, read: int, encoded: int, cut: Sequence[int]) -> None:
    """Say what of the rows was left out or cut.

    Args:
        label: what to call them.
        read: how many were read.
        encoded: how many of them had something in them.
        cut: the lengths, in tokens, of those that were cut.
    """
    said = []
    if read > encoded:
        said.append(f"{read - encoded} of {read} rows have nothing in them and are left out")
    if cut:
        said.append(f"{len(cut)} of {encoded} texts are cut to {max(cut)} tokens (max_length, or all the model takes)")
    if said:
        logger.warning("%s: %s", label, ", ".join(said))
