"""Options of the merge by entropy. The work itself is in `hf_fda.divergence`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hf_fda.merge_methods.learned import LearnedConfig
from hf_fda.merge_methods.registry import register_config


@dataclass(frozen=True, kw_only=True)
class AdaMergingConfig(LearnedConfig):
    """Options of `adamerging`."""

    name: ClassVar[str] = "adamerging"
    summary: ClassVar[str] = "coefficients of the task vectors by which the outputs are least uncertain"
    paper: ClassVar[str] = "AdaMerging, arXiv 2310.02575"


register_config(AdaMergingConfig)
