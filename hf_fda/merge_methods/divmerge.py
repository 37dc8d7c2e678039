"""Options of the merge by divergence. The work itself is in `hf_fda.divergence`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from hf_fda.merge_methods.config import option
from hf_fda.merge_methods.learned import INITIAL, Initial, LearnedConfig
from hf_fda.merge_methods.registry import register_config

Measure = Literal["jensen-shannon", "forward-kl", "reverse-kl"]
Precision = Literal["float16", "float32"]


@dataclass(frozen=True, kw_only=True)
class DivMergeConfig(LearnedConfig):
    """Options of `divmerge`."""

    name: ClassVar[str] = "divmerge"
    summary: ClassVar[str] = "weights of the sources by which the outputs diverge least from each source's"
    paper: ClassVar[str] = "DivMerge, arXiv 2509.02108"
    takes_anchors: ClassVar[bool] = True

    initial: Initial = option("tsv", INITIAL)
    divergence: Measure = option("jensen-shannon", "of the merged model's outputs from the source's on its own rows")
    balance: bool = option(
        True, "divide each task's divergence by what it is at the start, so that no task's large ones drown another's"
    )
    top_k: int | None = option(None, "outputs that are kept of a position, all others being one; none: all", minimum=1)
    precision: Precision = option("float16", "type in which the sources' outputs are kept")


register_config(DivMergeConfig)
