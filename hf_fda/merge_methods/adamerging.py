"""Options of the merge by entropy. The work itself is in `hf_fda.divergence`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hf_fda.merge_methods.config import option
from hf_fda.merge_methods.learned import LearnedConfig, Schedule
from hf_fda.merge_methods.registry import register_config


@dataclass(frozen=True, kw_only=True)
class AdaMergingConfig(LearnedConfig):
    """Options of `adamerging`."""

    name: ClassVar[str] = "adamerging"
    summary: ClassVar[str] = "weights of the sources by which the outputs are least uncertain"
    paper: ClassVar[str] = "AdaMerging, arXiv 2310.02575"

    plain_start: ClassVar[float] = 0.3

    # Large steps end where every answer is certain and wrong; these go as far as 500 of 1e-3, as published
    learning_rate: float = option(2.5e-3, "Adam's step size", minimum=0)
    schedule: Schedule = option("constant", "the step size stays, or falls to zero over all steps")


register_config(AdaMergingConfig)
