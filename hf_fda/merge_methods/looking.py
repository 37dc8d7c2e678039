"""What the methods that look at rows of data have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hf_fda.merge_methods.config import LooksAt, MethodConfig, option


@dataclass(frozen=True, kw_only=True)
class RowsConfig(MethodConfig):
    """Options of every method that looks at rows of data. Nothing of them is a label."""

    data: ClassVar[LooksAt] = "must"

    rows: int | None = option(
        1000, "rows of a task at most: a sample by the seed, the first ones of a stream; none: all", minimum=1
    )
    max_length: int = option(512, "tokens of a text at most; what is longer is cut", minimum=1)
