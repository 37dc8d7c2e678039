"""How well the blocks of a merge were fitted: the losses of its anchors, and the distances that adaptation left."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from hf_fda.errors import RunError

LOSSES = "block_losses.json"
"""The file in a merged folder that holds them."""

LOSSES_PICTURE = "block_losses.png"
"""Its picture, where matplotlib is installed."""


@dataclass(frozen=True)
class BlockLoss:
    """Of one block: by source the loss of its anchors, and the mean distance to what the sources do, `before` and
    `after` adaptation; None where there was none."""

    block: str
    construction: Mapping[str, float]
    before: float | None = None
    after: float | None = None

    @property
    def left(self) -> float | None:
        """The share of the distance that adaptation left."""
        return None if self.before is None or self.after is None or self.before <= 0 else self.after / self.before


@dataclass(frozen=True)
class BlockLosses:
    """Of all blocks that a merge fitted, in the model's order."""

    rows: tuple[BlockLoss, ...]

    @classmethod
    def read(cls, path: Path) -> BlockLosses:
        """What a file holds.

        Raises:
            RunError: when it is damaged.
        """
        try:
            return cls(tuple(BlockLoss(**row) for row in json.loads(path.read_text(encoding="utf-8"))["rows"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path}: damaged ({error}); remove it and run the same merge again") from None

    def text(self) -> str:
        """The content of the file."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @property
    def sources(self) -> tuple[str, ...]:
        """Those with anchors."""
        return tuple(dict.fromkeys(source for row in self.rows for source in row.construction))

    @property
    def titles(self) -> tuple[str, ...]:
        """The heads of the table's columns."""
        adapted = ("distance before", "distance after") if any(row.before is not None for row in self.rows) else ()
        return ("block", *self.sources, *adapted)

    def table(self) -> list[tuple[str, ...]]:
        """A row for each block, in words."""
        distances = len(self.titles) - 1 - len(self.sources)
        return [
            (
                row.block,
                *(_words(row.construction.get(source)) for source in self.sources),
                *(_words(value) for value in (row.before, row.after)[:distances]),
            )
            for row in self.rows
        ]


def _words(value: float | None) -> str:
    """A loss for reading.

    >>> _words(0.12345)
    '0.1234'
    """
    return "" if value is None else f"{value:.4g}"
