"""What a source answers on its own rows, computed once, kept in few bytes in memory or in a file.

Classifiers' and language models' answers are kept as log-probabilities: a likely one is near zero, where half precision
is finest, while logits carry an offset that costs digits and says nothing. Yes-or-no answers are kept as logits, and
values as they are, in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_fda.checkpoint.header import read_header, read_tensor
from hf_fda.checkpoint.writer import SafetensorsWriter, TensorSpec
from hf_fda.data.rows import Kind, TaskRows
from hf_fda.divergence.measures import Target, answer
from hf_fda.divergence.task_models import logits_of
from hf_fda.errors import InputError, RunError
from hf_fda.merge_methods.divmerge import Precision


@dataclass(frozen=True)
class _Place:
    """Where a row's answers lie: in which part, from which position on, how many."""

    part: int
    start: int
    count: int


class RecordedOutputs:
    """A source's answers, part by part as they were computed.

    Args:
        kind: what they mean.
        rows: (R,), the row numbers in the order in which they were answered.
        counts: (R,), how many positions each of them has.
        parts: (P,), how many of the rows each part holds.
        read: gives entries first to last (not with it) of tensor "values.N" (n, C) or "ids.N" (n, k) of part N.
        bucketed: whether there are "ids".
    """

    def __init__(
        self,
        kind: Kind,
        rows: Tensor,
        counts: Tensor,
        parts: Tensor,
        read: Callable[[str, int, int], Tensor],
        bucketed: bool,
    ) -> None:
        self.kind: Kind = kind
        self._read, self._bucketed = read, bucketed
        self._places: dict[int, _Place] = {}
        order, sizes = iter(rows.tolist()), iter(counts.tolist())
        for part, held in enumerate(parts.tolist()):
            start = 0
            for _ in range(held):
                size = next(sizes)
                self._places[next(order)] = _Place(part, start, size)
                start += size

    def __len__(self) -> int:
        return len(self._places)

    def target(self, rows: Sequence[int], device: torch.device) -> Target:
        """The answers of some rows, one after the other, on a device.

        Args:
            rows: their numbers.
            device: where to.
        """
        ids = self._gathered("ids", rows).long().to(device) if self._bucketed else None
        return Target(self._gathered("values", rows).to(device).float(), ids)

    def _gathered(self, what: str, rows: Sequence[int]) -> Tensor:
        places = [self._places[row] for row in rows]
        return torch.cat([self._read(f"{what}.{own.part}", own.start, own.start + own.count) for own in places])


def record(
    model: PreTrainedModel,
    rows: TaskRows,
    device: torch.device,
    *,
    batch_size: int = 32,
    precision: Precision = "float16",
    top_k: int | None = None,
    path: Path | None = None,
    report: Callable[[int], None] = lambda done: None,
) -> RecordedOutputs:
    """Compute a source's answers on its rows.

    Args:
        model: the source, as `source_model` makes it.
        rows: its rows.
        device: where the model is.
        batch_size: rows at a time.
        precision: type in which log-probabilities and logits are kept.
        top_k: keep so many of the most likely labels or tokens of a position and all others as one bucket, where there
            are more.
        path: a file to make, in which they are kept instead of in memory; written batch by batch.
        report: called with the number of rows done, now and then.

    Raises:
        RunError: when an answer is not finite.
    """
    batches = _answers(model, rows, device, batch_size, precision, top_k, report)
    if path is not None:
        _write(path, rows, batch_size, batches)
        return open_outputs(path, rows.kind)
    tensors = _index(rows, batch_size)
    for number, answers in enumerate(batches):
        tensors |= {f"{what}.{number}": tensor for what, tensor in answers.items()}
    return from_tensors(tensors, rows.kind)


def _index(rows: TaskRows, batch_size: int) -> dict[str, Tensor]:
    """The tensors that say where each row's answers lie; known before they are."""
    parts = [numbers for numbers, _ in rows.batches(batch_size)]
    order = [row for part in parts for row in part]
    counts = [1 if rows.scored is None else int(rows.scored[row].sum()) for row in order]
    return {
        "rows": torch.tensor(order),
        "counts": torch.tensor(counts),
        "parts": torch.tensor([len(part) for part in parts]),
    }


@torch.no_grad()
def _answers(
    model: PreTrainedModel,
    rows: TaskRows,
    device: torch.device,
    batch_size: int,
    precision: Precision,
    top_k: int | None,
    report: Callable[[int], None],
) -> Iterator[dict[str, Tensor]]:
    """The answers of one batch after another, on the CPU."""
    done = 0
    kept = torch.float32 if precision == "float32" or rows.kind == "values" else torch.float16
    for numbers, batch in rows.batches(batch_size):
        logits = logits_of(model, batch.to(device))
        if not bool(logits.isfinite().any(-1).all()) or bool(logits.isnan().any()):
            raise RunError(f"task '{rows.task}': its source's answers are not finite; check its weights and these rows")
        ids = None
        if rows.kind in ("labels", "tokens") and top_k is not None and top_k < logits.shape[-1]:
            ids = logits.topk(top_k, -1).indices
        answers = {"values": answer(rows.kind, logits, ids).to("cpu", kept)}
        if ids is not None:
            answers["ids"] = ids.to("cpu", torch.int32)
        yield answers
        done += len(numbers)
        report(done)


def _write(path: Path, rows: TaskRows, batch_size: int, batches: Iterator[dict[str, Tensor]]) -> None:
    """A file of the answers, never held in memory: their number is known once the first batch is there."""
    index = _index(rows, batch_size)
    of_part = index["counts"].split(index["parts"].tolist())
    first = next(batches)
    specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in index.items()}
    for number, counts in enumerate(of_part):
        for what, tensor in first.items():
            specs[f"{what}.{number}"] = TensorSpec(tensor.dtype, (int(counts.sum()), tensor.shape[1]))
    with SafetensorsWriter(path, specs, {"kind": rows.kind, "fingerprint": rows.fingerprint}) as file:
        for name, tensor in index.items():
            file.write(name, tensor)
        for number, answers in enumerate(chain([first], batches)):
            for what, tensor in answers.items():
                file.write(f"{what}.{number}", tensor)


def from_tensors(tensors: Mapping[str, Tensor], kind: Kind) -> RecordedOutputs:
    """Answers in memory.

    Args:
        tensors: "rows", "counts" and "parts" as in `RecordedOutputs`, and "values.N" and perhaps "ids.N".
        kind: what they mean.
    """

    def read(name: str, first: int, last: int) -> Tensor:
        return tensors[name][first:last]

    return RecordedOutputs(kind, tensors["rows"], tensors["counts"], tensors["parts"], read, "ids.0" in tensors)


def open_outputs(path: Path, kind: Kind) -> RecordedOutputs:
    """Answers in a file that `record` made; only those that are asked for are read.

    Args:
        path: the file.
        kind: what they mean.

    Raises:
        InputError: when it is no such file, or damaged.
    """
    entries = read_header(path)
    if not {"rows", "counts", "parts"} <= set(entries):
        raise InputError(f"{path}: holds no recorded outputs; delete it, and they are computed again")
    rows, counts, parts = (read_tensor(path, entries[name]) for name in ("rows", "counts", "parts"))

    def read(name: str, first: int, last: int) -> Tensor:
        width = entries[name].shape[1]
        return read_tensor(path, entries[name], slice(first * width, last * width)).view(-1, width)

    return RecordedOutputs(kind, rows, counts, parts, read, "ids.0" in entries)
