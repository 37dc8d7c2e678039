"""How much sources get in each other's way, as charts: over everything, and block by block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_fda.analysis.charts import Axes, Chart, lines, table
from hf_fda.analysis.similarities import from_gram


@dataclass(frozen=True)
class Words:
    """What two charts of the same cosines are called.

    `name` is of their files, `title` and `caption` of the cosines over everything, `by_block` is the title of the means
    by block, `vectors` what the cosines are of, `place` what the blocks are counted as.
    """

    name: str
    title: str
    caption: str
    by_block: str
    vectors: str
    place: str


def interference_charts(words: Words, names: Sequence[str], products: Sequence[Tensor]) -> list[Chart]:
    """The cosines between sources, from the products of their vectors.

    Args:
        words: what the charts say.
        names: of K sources.
        products: of each block (K, K), as `gram` gives them.
    """
    whole = from_gram(names, torch.stack(list(products)).sum(0))
    places = [float(number) for number in range(len(products))]
    return [
        table(
            words.name,
            words.title,
            words.caption,
            ("source", "source", "cosine"),
            names,
            dict(zip(names, whole.cosines, strict=True)),
            limit=1.0,
        ),
        lines(
            f"{words.name}-by-block",
            words.by_block,
            "The mean cosine of two different sources.",
            Axes(f"{words.place}, from the first", "mean cosine"),
            {words.vectors: (places, [from_gram(names, own).mean for own in products])},
        ),
    ]
