"""What encoder-decoders write on rows that do not say what is written on them, kept until the merge is done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hf_fda.checkpoint.alignment import AlignedSource
from hf_fda.checkpoint.header import read_header, read_tensor
from hf_fda.checkpoint.writer import save_tensors
from hf_fda.data.rows import TaskRows
from hf_fda.data.writing import DECODER, with_written_targets
from hf_fda.divergence.task_models import source_model
from hf_fda.stages import Piece
from hf_fda.store import WORK, key_of
from hf_fda.version import versions

if TYPE_CHECKING:
    from hf_fda.running import Run

TARGETS = f"{WORK}/targets"
"""Where they lie."""

MAX_NEW_TOKENS = 64
"""The most tokens that are written on a row."""


def writing_pieces(run: Run) -> list[Piece]:
    """The work of every source that has to write, on its rows, what is then compared.

    Args:
        run: of a plan with rows of data.
    """
    return [_piece(run, source) for source in run.plan.inputs.weighted if run.plan.data[source.name].lacks_targets]


def _piece(run: Run, source: AlignedSource) -> Piece:
    what = f"targets of {source.name}"

    def make() -> Callable[[Path], str]:
        rows = run.plan.data[source.name].encode()
        written = with_written_targets(source_model(source, run.plan.device), rows, MAX_NEW_TOKENS)
        tensors = {f"{number}": own[DECODER] for number, own in enumerate(written.inputs)}
        return lambda path: save_tensors(path, tensors)

    own = run.fingerprints[source.name], run.data_prints[source.name]
    return Piece(what, _file(source.name), key_of("targets", own, MAX_NEW_TOKENS, versions()), 1.0, make)


def _file(task: str) -> str:
    return f"{TARGETS}/{task}.safetensors"


def with_targets(rows: TaskRows, output: Path) -> TaskRows:
    """Rows with what their source has written on them.

    Args:
        rows: of a task.
        output: the output folder of the run.
    """
    path = output / _file(rows.task)
    entries = read_header(path)
    texts = [read_tensor(path, entries[f"{number}"]) for number in range(len(rows))]
    inputs = [{**own, DECODER: text} for own, text in zip(rows.inputs, texts, strict=True)]
    return replace(rows, inputs=inputs, scored=[text.new_ones(len(text)).bool() for text in texts])
